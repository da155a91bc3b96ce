"""LoRA around a linear layer: `nn.Linear`, a quantised linear, or GPT-2's `Conv1D`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from lit_peft.adapter import innermost
from lit_peft.combining import low_rank
from lit_peft.low_rank.additive import AdditiveLinear
from lit_peft.low_rank.rows import change_rows
from lit_peft.ops.lora_linear import joins, lora_linear
from lit_peft.ops.low_rank import low_rank_update
from lit_peft.ops.nf4_lora import joins_nf4, nf4_lora_linear
from lit_peft.selection import Rows, acting
from lit_peft.structure import widths
from lit_peft.targets import find

if TYPE_CHECKING:
    from lit_peft.methods.lora import LoRAConfig


class LoRALinear(AdditiveLinear):
    """Adds s B A dropout(x) to a linear layer's output.

    `base` is an `nn.Linear`, a quantised linear, or GPT-2's `Conv1D` (which stores W transposed). Inputs are
    (..., in), outputs (..., out). Parameters are float32 whatever the base is, and are cast to the input's dtype for
    the product, so that no float32 copy of the activations is kept.

    Example:
        >>> import torch
        >>> from lit_peft import LoRAConfig
        >>> layer = LoRALinear(torch.nn.Linear(8, 4), LoRAConfig(r=2))
        >>> sum(p.numel() for _, p in layer.own_parameters())
        24
    """

    peft_type: ClassVar[str] = "LORA"
    use_dora: ClassVar[bool] = False  # which sets this class can hold
    starts: ClassVar[tuple[str, ...]] = ("default", "loaded", "gaussian", "orthogonal", "eva")

    def add(self, name: str, config: LoRAConfig) -> None:
        """Make A (r, in) and B (out, r) of another named set.

        Raises:
            ValueError: if the name is taken, or this or another set trains weights of the base itself.
            TypeError: if the set needs another kind of adapter.
        """
        if self.configs and any(c.bias != "none" or c.modules_to_save for c in (config, *self.configs.values())):
            raise ValueError(
                f"lora.bias and lora.modules_to_save train the base itself, which all named adapters share: {name!r} "
                "cannot stand beside another set here. Leave both out to hold several adapters."
            )
        kind = config.init_lora_weights
        if config.use_dora != self.use_dora or not kind.startswith(self.starts):
            raise TypeError(
                f"A {type(self).__name__} cannot hold a set with use_dora={config.use_dora} and {kind} start. Add sets "
                "of one kind, or `join` them."
            )
        super().add(name, config)
        if "lora_a" not in self._modules:
            self.lora_a = nn.ParameterDict()
            self.lora_b = nn.ParameterDict()
        device = next(self.base.parameters()).device
        first, second = self.pair_shapes(config)
        a = torch.empty(first, device=device, dtype=torch.float32)
        b = torch.zeros(second, device=device, dtype=torch.float32)
        if device.type != "meta":
            self.start(a, b, config)
        self.lora_a[name] = nn.Parameter(a)
        self.lora_b[name] = nn.Parameter(b)

    def pair_shapes(self, config: LoRAConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of the parameters A and B."""
        wide, tall = widths(innermost(self.base))
        return (config.r, wide), (tall, config.r)

    def start(self, a: Tensor, b: Tensor, config: LoRAConfig) -> None:
        """Fill A (r, in), empty so far, and B (out, r), zero so far, with their starting values."""
        if config.init_lora_weights == "gaussian":
            nn.init.normal_(a, std=1 / config.r)
        elif config.init_lora_weights == "orthogonal":
            orthogonal(a, b)
        else:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))

    def change(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """Return y + s B A dropout(x): (..., in), (..., out) -> (..., out)."""
        config: LoRAConfig = self.configs[name]
        a, b = self.pair(name)
        return low_rank_update(y, x, a, b, config.scale, dropout=config.dropout if self.training else 0.0)

    def joined(self, name: str, x: Tensor) -> Tensor | None:
        """Return x W^T + c + s dropout(x) A^T B^T, where the base is a plain or quantised linear layer."""
        base = self._modules["base"]
        if type(self).change is not LoRALinear.change or base is None:
            return None
        config: LoRAConfig = self.configs[name]
        dropout = config.dropout if self.training else 0.0
        if joins(base, x, casts=True):
            return lora_linear(x, base, *self.pair(name), config.scale, dropout=dropout)
        if joins_nf4(base, x):
            return nf4_lora_linear(x, base, *self.pair(name), config.scale, dropout=dropout)
        return None

    def change_rows(self, choice: Rows, x: Tensor, y: Tensor | None = None) -> Tensor | None:
        """Return the output, each row with s B A x of its own sets added, where that is all that the sets do."""
        return change_rows(self, choice, x, y) if type(self).change is LoRALinear.change else None

    def low_rank(self) -> tuple[Tensor, Tensor, float] | None:
        """Return A, B and s where this very call adds s B A x to the base's output and nothing else; else None."""
        choice, steps = acting(self.scope), ("forward", "joined", "applied", "change")
        if isinstance(choice, Rows) or len(choice) != 1 or not isinstance(choice[0], str):
            return None
        config: LoRAConfig | None = self.configs.get(choice[0])
        own = all(getattr(type(self), step) is getattr(LoRALinear, step) for step in steps)
        if config is None or not own or (config.dropout and self.training):
            return None
        return *self.pair(choice[0]), config.scale

    def pair(self, name: str) -> tuple[Tensor, Tensor]:
        """Return A (rank, in) and B (out, rank) as they are multiplied."""
        own: Any = self._modules  # not `self.lora_a[name]`: on small models looking that up takes longer than a product
        return own["lora_a"]._parameters[name], own["lora_b"]._parameters[name]

    def delta(self, name: str) -> Tensor:
        """Return the change of the weight s B A, (out, in), in float32."""
        a, b = self.pair(name)
        delta: Tensor = self.configs[name].scale * (b.float() @ a.float())
        return delta

    def combined(
        self, names: Sequence[str], weights: Sequence[float], how: str, **options: Any
    ) -> tuple[LoRAConfig, dict[str, Tensor]]:
        """Return a weighted combination of some sets, as one set of scale 1.

        Raises:
            TypeError: if the update of a set is not s B A alone.
        """
        configs: list[LoRAConfig] = [self.configs[name] for name in names]
        other = any(getattr(type(self), part) is not getattr(LoRALinear, part) for part in ("pair", "delta", "change"))
        if other or any(config.use_dora for config in configs):
            return super().combined(names, weights, how, **options)
        with torch.no_grad():
            pairs = [(self.lora_a[n], self.lora_b[n], c.scale) for n, c in zip(names, configs, strict=True)]
            options.pop("absent")  # a set without this layer changes nothing there
            a, b = low_rank(pairs, weights, how, **options)
        r = a.shape[0]
        alpha = math.sqrt(r) if configs[0].use_rslora else float(r)
        plain: dict[str, Any] = {"rank_pattern": {}, "alpha_pattern": {}, "init_lora_weights": "loaded"}
        return replace(configs[0], r=r, alpha=alpha, **plain), {"lora_A.weight": a, "lora_B.weight": b}

    def tensors(self, name: str = "default") -> dict[str, Tensor]:
        """Return A and B under HF PEFT's names."""
        return {"lora_A.weight": self.lora_a[name].detach(), "lora_B.weight": self.lora_b[name].detach()}

    def check_config(self, path: str, config: Mapping[str, Any], name: str = "default") -> None:
        """See that the folder's scale s is the one in use here.

        Raises:
            ValueError: if it is not.
        """
        r = find(config.get("rank_pattern") or {}, path, config.get("r", 8))
        alpha = find(config.get("alpha_pattern") or {}, path, config.get("lora_alpha", config.get("alpha", 8)))
        theirs = alpha / (math.sqrt(r) if config.get("use_rslora") else r)
        mine = self.layer_settings(name)
        here = mine["lora_alpha"] / (math.sqrt(mine["r"]) if mine["use_rslora"] else mine["r"])
        if not math.isclose(theirs, here, rel_tol=1e-6):
            raise ValueError(
                f"The adapter was trained with the scale {theirs:g} on {path}, and here it is {here:g}. Set lora.alpha "
                "as in its adapter_config.json, or start from the folder: adapter=FOLDER."
            )

    def stored_rank(self, name: str) -> int:
        """Return the rank of A and B as `tensors` gives them, more than r where a layer holds several pairs."""
        return int(self.configs[name].r)

    def layer_settings(self, name: str = "default") -> dict[str, Any]:
        """Return this layer's settings under HF PEFT's names, so that s stays what it is for the stored rank."""
        config: LoRAConfig = self.configs[name]
        rank, alpha = self.stored_rank(name), config.alpha
        if rank != config.r:
            alpha *= math.sqrt(rank / config.r) if config.use_rslora else rank / config.r
        return {"r": rank, "lora_alpha": alpha, "use_rslora": config.use_rslora}


@torch.no_grad()
def orthogonal(a: Tensor, b: Tensor) -> None:
    """Fill A (r, in) and B (out, r) from the odd and the even rows of one random orthogonal matrix, so that B A = 0.

    Raises:
        ValueError: if the rank is odd.
    """
    r = a.shape[0]
    if r % 2:
        raise ValueError(f"lora.r is {r}, and an orthogonal start halves it. Choose an even rank.")
    q, _ = torch.linalg.qr(torch.randn(r, r, device=a.device))
    a.copy_(q[0::2].t() @ torch.randn(r // 2, a.shape[1], device=a.device) / 10)
    b.copy_(torch.randn(b.shape[0], r // 2, device=b.device) @ q[1::2] / 10)
