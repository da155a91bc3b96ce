"""LoRA: low-rank adaptation of linear layers (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

    y = W x + b + s B A dropout(x),    A (r, in), B (out, r),    s = alpha / r

A starts Kaiming-uniform, B at zero: the adapted model starts as the base model, bit for bit. rsLoRA
(https://arxiv.org/abs/2312.03732) sets s = alpha / sqrt(r), which keeps the update's size steady over ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lit_peft.adapter import Adapter, innermost, named_adapters, place
from lit_peft.mixin import PEFT
from lit_peft.sites import match, widths
from lit_peft.targets import KEYS, stored_targets

# PEFT's settings that leave plain LoRA's formula as it is, or are read below; any other must be off.
PLAIN = frozenset(
    "peft_type task_type auto_mapping base_model_name_or_path revision inference_mode peft_version runtime_config "
    "r lora_alpha lora_dropout use_rslora target_modules exclude_modules layers_to_transform layers_pattern "
    "modules_to_save fan_in_fan_out init_lora_weights loftq_config eva_config corda_config lora_ga_config "
    f"velora_config megatron_core qalora_group_size ensure_weight_tying {KEYS}".split()
)
# Values of init_lora_weights that do not change the base; PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA do.
KEEPS_BASE = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Settings of LoRA.

    Args:
        r: rank of the update.
        alpha: numerator of the scale s = alpha / r.
        dropout: dropout on the adapter's input.
        target_modules: which linear layers: `all-linear`, a role (`attention`, `feed-forward`), a list of endings of
            module paths, or one regular expression over whole paths.
        exclude_modules: layers to leave out, written like target_modules; wins over it.
        use_rslora: scale by alpha / sqrt(r) instead.

    Raises:
        ValueError: if a value is out of range.
    """

    r: int = 8
    alpha: float = 16
    dropout: float = 0.0
    target_modules: list[str] | str = "all-linear"
    exclude_modules: list[str] | str | None = None
    use_rslora: bool = False

    default_lr: ClassVar[float] = 2e-4

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"lora.r is {self.r}; the rank must be 1 or more.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout is {self.dropout}; it must be at least 0 and below 1.")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"lora.alpha is {self.alpha}; it must be above 0.")
        if not self.target_modules:
            raise ValueError("lora.target_modules is empty. Name some, or leave it out for all linear layers.")

    @property
    def scale(self) -> float:
        """The factor s in front of B A."""
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def to_peft(self) -> dict[str, Any]:
        """Return the settings under HF PEFT's names."""
        return {
            "peft_type": "LORA",
            "r": self.r,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "use_rslora": self.use_rslora,
            "bias": "none",
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> LoRAConfig:
        """Read HF PEFT's settings.

        Raises:
            ValueError: for a LoRA variant that changes the formula and is not known here.
        """
        init = config.get("init_lora_weights", True)
        if init not in KEEPS_BASE:
            raise ValueError(
                f"This adapter has init_lora_weights={init!r}, which changed its base model. Save it again as plain "
                "LoRA: save_pretrained(..., path_initial_model_for_weight_conversion=...)."
            )
        for key, value in config.items():
            if key not in PLAIN and value not in (None, False, [], {}, "none"):
                raise ValueError(f"This adapter uses {key}={value!r}, which plain LoRA does not have.")
        if not config.get("target_modules"):
            raise ValueError("adapter_config.json names no target_modules. Add the list of adapted layers to the file.")
        return cls(
            r=config.get("r", 8),
            alpha=config.get("lora_alpha", 8),
            dropout=config.get("lora_dropout", 0.0),
            target_modules=config["target_modules"],
            exclude_modules=config.get("exclude_modules"),
            use_rslora=config.get("use_rslora", False),
        )


class LoRALinear(Adapter):
    """Adds s B A dropout(x) to a linear layer's output.

    `base` is an `nn.Linear`, a quantised linear, or GPT-2's `Conv1D` (which stores W transposed). Inputs are
    (..., in), outputs (..., out). Parameters are float32 whatever the base is, and are cast to the input's dtype for
    the product, so that no float32 copy of the activations is kept.

    Example:
        >>> import torch
        >>> layer = LoRALinear(torch.nn.Linear(8, 4), LoRAConfig(r=2))
        >>> sum(p.numel() for _, p in layer.own_parameters())
        24
    """

    peft_type: ClassVar[str] = "LORA"

    def add(self, name: str, config: LoRAConfig) -> None:
        """Make A (r, in) and B (out, r) of another named set."""
        super().add(name, config)
        if "lora_a" not in self._modules:
            self.lora_a = nn.ParameterDict()
            self.lora_b = nn.ParameterDict()
        wide, tall = widths(innermost(self.base))
        device = next(self.base.parameters()).device
        a = torch.empty(config.r, wide, device=device, dtype=torch.float32)
        if device.type != "meta":
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        self.lora_a[name] = nn.Parameter(a)
        self.lora_b[name] = nn.Parameter(torch.zeros(tall, config.r, device=device, dtype=torch.float32))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map (..., in) to (..., out)."""
        y: Tensor = self.base(x, *args, **kwargs)
        for name in self.active():
            config: LoRAConfig = self.configs[name]
            a, b = self.lora_a[name], self.lora_b[name]
            h: Tensor = F.dropout(x, config.dropout, self.training) if config.dropout else x
            h = F.linear(h, a.to(h.dtype))
            # addmm adds B h to y in one pass, with no temporary of the output's size
            rows, h = y.reshape(-1, y.shape[-1]), h.reshape(-1, h.shape[-1]).to(y.dtype)
            y = torch.addmm(rows, h, b.t().to(y.dtype), alpha=config.scale).view(y.shape)
        return y

    def delta(self, name: str) -> Tensor:
        """Return s B A, (out, in), in float32."""
        delta: Tensor = self.configs[name].scale * (self.lora_b[name].float() @ self.lora_a[name].float())
        return delta

    def merge(self, names: tuple[str, ...] | None = None) -> nn.Module:
        """Fold s B A into W: added in float32, rounded once to the base's dtype."""
        weight = self.base.get_parameter("weight")
        transposed = isinstance(self.base, Conv1D)
        if not isinstance(self.base, (nn.Linear, Conv1D)) or not weight.is_floating_point():
            kind = type(self.base).__name__
            raise TypeError(f"Cannot merge into a {kind} layer. Load the base unquantised to merge.")
        with torch.no_grad():
            for name in self.active() if names is None else names:
                delta = self.delta(name).to(weight.device)
                weight.data = (weight.float() + (delta.t() if transposed else delta)).to(weight.dtype)
        return self.base

    def tensors(self, name: str = "default") -> dict[str, Tensor]:
        """Return A and B under HF PEFT's names."""
        return {"lora_A.weight": self.lora_a[name].detach(), "lora_B.weight": self.lora_b[name].detach()}


class LoRA(PEFT):
    """LoRA on the task's model: low-rank updates beside its linear layers.

    Args:
        lora: rank, scale, dropout and targets.

    Example:
        >>> from lit_peft import LoRA, SFT
        >>> class Mine(LoRA, SFT): ...
    """

    method = "lora"
    preset: ClassVar[dict[str, Any]] = {}  # what a variant fixes in the configuration, whatever else the user sets

    def __init__(self, *args: Any, lora: LoRAConfig = LoRAConfig(), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lora = self.configured(LoRAConfig, "lora", lora, **self.preset)

    def place_adapters(self) -> None:
        """Put a `LoRALinear` around every target."""
        super().place_adapters()
        assert self.model is not None
        paths = match(self.model, self.lora.target_modules, exclude_modules=self.lora.exclude_modules)
        place(self.model, paths, lambda base: LoRALinear(base, self.lora))

    def adopt(self, config: Mapping[str, Any]) -> None:
        """Take rank, scale and targets from an adapter folder.

        Raises:
            ValueError: if the folder holds another kind of LoRA, or its layers do not fit this model.
        """
        super().adopt(config)
        if config.get("peft_type") == "LORA":
            assert self.model is not None
            plain = LoRAConfig.from_peft(config)  # refuses what is no plain LoRA before its layers are looked at
            targets = stored_targets(config, "lora_A.weight", (path for path, _ in self.model.named_modules()))
            self.lora = self.configured(LoRAConfig, "lora", plain, target_modules=targets, exclude_modules=None)

    def parts(self) -> list[dict[str, Any]]:
        """Return the settings for `adapter_config.json`."""
        assert self.model is not None
        placed = (innermost(a) for _, a in named_adapters(self.model) if isinstance(a, LoRALinear))
        # PEFT sets this by itself on GPT-2, with a warning
        return [*super().parts(), {**self.lora.to_peft(), "fan_in_fan_out": any(isinstance(m, Conv1D) for m in placed)}]


class RsLoRA(LoRA):
    """LoRA with the rank-stabilised scale s = alpha / sqrt(r) (Kalajdzievski 2023, arXiv 2312.03732)."""

    method = "rslora"
    preset: ClassVar[dict[str, Any]] = {"use_rslora": True}
