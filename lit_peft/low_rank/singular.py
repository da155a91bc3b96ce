"""AdaLoRA around a linear layer: an update in the form of a singular value decomposition, and its penalty."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from lit_peft.adapter import innermost
from lit_peft.low_rank.additive import AdditiveLinear
from lit_peft.ops.gram import orthogonality
from lit_peft.ops.lora_linear import joins, lora_linear
from lit_peft.ops.low_rank import low_rank_update
from lit_peft.ops.nf4_lora import joins_nf4, nf4_lora_linear
from lit_peft.structure import widths

if TYPE_CHECKING:
    from lit_peft.methods.adalora import AdaLoRAConfig


class AdaLoRALinear(AdditiveLinear):
    """Adds s P (lambda * (Q dropout(x))) to a linear layer's output.

    `base` is an `nn.Linear`, a quantised linear, or GPT-2's `Conv1D`. Parameters are float32 whatever the base is, and
    are cast to the input's dtype for the product.

    Attributes:
        kept: for each named set whose ranks are settled but not cut yet, which rows (r,) are left.

    Example:
        >>> import torch
        >>> from lit_peft import AdaLoRAConfig
        >>> layer = AdaLoRALinear(torch.nn.Linear(8, 4), AdaLoRAConfig(init_r=2, target_r=1))
        >>> sum(p.numel() for _, p in layer.own_parameters())
        26
    """

    peft_type: ClassVar[str] = "ADALORA"

    def add(self, name: str, config: AdaLoRAConfig) -> None:
        """Make P (out, r), lambda (r,) and Q (r, in) of another named set."""
        super().add(name, config)
        if "adalora_p" not in self._modules:
            self.kept: dict[str, Tensor] = {}
            self.adalora_p = nn.ParameterDict()
            self.adalora_lambda = nn.ParameterDict()
            self.adalora_q = nn.ParameterDict()
        wide, tall = widths(innermost(self.base))
        device = next(self.base.parameters()).device
        p = torch.empty(tall, config.init_r, device=device, dtype=torch.float32)
        q = torch.empty(config.init_r, wide, device=device, dtype=torch.float32)
        if device.type != "meta":
            nn.init.normal_(p, std=0.02)
            nn.init.normal_(q, std=0.02)
        self.adalora_p[name] = nn.Parameter(p)
        self.adalora_lambda[name] = nn.Parameter(torch.zeros(config.init_r, device=device, dtype=torch.float32))
        self.adalora_q[name] = nn.Parameter(q)

    def remove(self, name: str) -> None:
        """Delete one named set."""
        super().remove(name)
        self.kept.pop(name, None)

    def change(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """Return y + s P (lambda * (Q dropout(x))): (..., in), (..., out) -> (..., out)."""
        config: AdaLoRAConfig = self.configs[name]
        p, scale, q = self.adalora_p[name], self.adalora_lambda[name], self.adalora_q[name]
        dropout = config.dropout if self.training else 0.0
        return low_rank_update(y, x, q, p, config.scale, dropout=dropout, diagonal=scale)

    def joined(self, name: str, x: Tensor) -> Tensor | None:
        """Return x W^T + c + s P (lambda * (Q dropout(x))), where the base is a plain or quantised linear layer."""
        if type(self).change is not AdaLoRALinear.change:
            return None
        config: AdaLoRAConfig = self.configs[name]
        p, scale, q = self.adalora_p[name], self.adalora_lambda[name], self.adalora_q[name]
        dropout = config.dropout if self.training else 0.0
        if joins(self.base, x, casts=True):
            return lora_linear(x, self.base, q, p, config.scale, dropout=dropout, diagonal=scale)
        if joins_nf4(self.base, x):
            return nf4_lora_linear(x, self.base, q, p, config.scale, dropout=dropout, diagonal=scale)
        return None

    def delta(self, name: str) -> Tensor:
        """Return s P diag(lambda) Q, (out, in), in float32."""
        p, scale, q = self.adalora_p[name], self.adalora_lambda[name], self.adalora_q[name]
        delta: Tensor = self.configs[name].scale * ((p.float() * scale.float()) @ q.float())
        return delta

    # Ranks -----------------------------------------------------------------------------------------------------------

    def triplets(self, name: str) -> tuple[tuple[nn.Parameter, int], ...]:
        """Return lambda, P and Q, each with the dimension along which the triplets lie."""
        return (self.adalora_lambda[name], 0), (self.adalora_p[name], 1), (self.adalora_q[name], 0)

    def target(self, name: str) -> int:
        """Return the mean rank that a named set is to have in the end."""
        target_r: int = self.configs[name].target_r
        return target_r

    def resize(self, name: str, rank: int) -> None:
        """Make room for another rank; the values are lost. Parameters stay the same objects."""
        for parameter, dim in self.triplets(name):
            if parameter.shape[dim] != rank:
                shape = [rank if i == dim else size for i, size in enumerate(parameter.shape)]
                parameter.grad = None
                parameter.data = parameter.data.new_zeros(shape)
        self.kept.pop(name, None)

    def shrink(self, name: str) -> None:
        """Cut off the rows that are not kept; the output stays the same, and parameters the same objects."""
        kept = self.kept.pop(name, None)
        if kept is not None:
            for parameter, dim in self.triplets(name):
                parameter.grad = None
                rows = kept.nonzero()[:, 0].to(parameter.device)
                parameter.data = parameter.data.index_select(dim, rows)

    # Files -----------------------------------------------------------------------------------------------------------

    def check_config(self, path: str, config: Mapping[str, Any], name: str = "default") -> None:
        """See that the folder's scale s is the one in use here.

        Raises:
            ValueError: if it is not.
        """
        theirs, here = float(config.get("lora_alpha", 8)) / float(config.get("init_r", 12)), self.configs[name].scale
        if not math.isclose(theirs, here, rel_tol=1e-4):  # PEFT divides by a hair more than init_r
            raise ValueError(
                f"The adapter was trained with the scale {theirs:g} on {path}, and here it is {here:g}. Set "
                "adalora.alpha and init_r as in its adapter_config.json, or start from the folder: adapter=FOLDER."
            )

    def tensors(self, name: str = "default") -> dict[str, Tensor]:
        """Return the kept rows under HF PEFT's names."""
        scale, p, q = (parameter.detach() for parameter, _ in self.triplets(name))
        kept = self.kept.get(name)
        if kept is not None:
            # gathered first where they are sharded: rows cannot be picked out of shards
            scale, p, q = (t.full_tensor() if hasattr(t, "full_tensor") else t for t in (scale, p, q))
            rows = kept.nonzero()[:, 0].to(scale.device)
            scale, p, q = scale[rows], p[:, rows], q[rows]
        return {"lora_A": q, "lora_B": p, "lora_E": scale[:, None]}

    def shapes(self, tensors: Mapping[str, Tensor], name: str = "default") -> dict[str, tuple[int, ...]]:
        """Return the shapes for any rank that a file may hold, up to init_r."""
        (wide, tall), rank = widths(innermost(self.base)), self.configs[name].init_r
        if "lora_E" in tensors:
            rank = min(rank, len(tensors["lora_E"]))
        return {"lora_A": (rank, wide), "lora_B": (tall, rank), "lora_E": (rank, 1)}

    def settings(self, path: str, name: str = "default") -> dict[str, dict[str, Any]]:
        """Return which of the init_r rows are in the file, as PEFT's rank_pattern."""
        kept, full = self.kept.get(name), self.configs[name].init_r
        rank = len(self.adalora_lambda[name]) if kept is None else int(kept.sum())
        return {} if rank == full else {"rank_pattern": {f"{path}.lora_E": [row < rank for row in range(full)]}}

    def load_tensors(self, tensors: Mapping[str, Tensor], name: str = "default") -> None:
        """Take over a file's rows, as many as there are."""
        self.resize(name, len(tensors["lora_E"]))
        super().load_tensors(tensors, name)


def penalty(adapters: Iterable[AdaLoRALinear]) -> Tensor:
    """Return the sum of ||P^T P - I||^2 + ||Q Q^T - I||^2 over the layers, for the sets that act (equation 4).

    Squared Frobenius norms, summed over layers, as the paper writes it. (The authors' code and HF PEFT average norms
    that are not squared. Those have a gradient of constant length right up to the optimum, around which it swings; and
    a sum asks the same of each layer however many there are.) In float32 under every precision, as one function for
    all layers: see `lit_peft.ops.gram`.
    """
    rows: list[Tensor] = []
    columns: list[Tensor] = []
    for adapter in adapters:
        for name in adapter.chosen():
            p, q = adapter.adalora_p[name], adapter.adalora_q[name]
            if p.requires_grad:
                rows.append(_whole(q).float())
                columns.append(_whole(p).float())
    return orthogonality(rows, columns)


def _whole(parameter: Tensor) -> Tensor:
    # Under FSDP2 each process computes the whole penalty; backwards, it keeps its own shard's part of the gradient.
    whole: Tensor = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return whole
