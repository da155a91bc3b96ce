"""LoRA: low-rank adaptation of linear layers (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

    y = W x + b + s B A dropout(x),    A (r, in), B (out, r),    s = alpha / r

A starts Kaiming-uniform, B at zero: the adapted model starts as the base model, bit for bit. rsLoRA
(https://arxiv.org/abs/2312.03732) sets s = alpha / sqrt(r), which keeps the update's size steady over ranks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from torch import nn
from transformers.pytorch_utils import Conv1D

from lit_peft.adapter import Adapter, innermost, join, named_adapters
from lit_peft.low_rank.linear import LoRALinear
from lit_peft.mixin import PEFT
from lit_peft.sites import match
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
        layers_to_transform: only these transformer layers, by number; None: all.
        rank_pattern: ranks of single layers, by a regular expression for the end of the path: `{"q_proj": 16}`.
        alpha_pattern: alphas of single layers, written like rank_pattern.
        modules_to_save: modules that are trained whole and saved with the adapter, by the end of their path.
        bias: which biases of the base are trained too: `none`, `all`, or `lora_only` for those of adapted layers.
        use_rslora: scale by alpha / sqrt(r) instead.
        use_dora: train a magnitude for each output, and the low rank for the direction only (DoRA).
        init_lora_weights: how A and B start: `default` (Kaiming-uniform A, zero B), `gaussian`, `orthogonal`, or from
            the base's weight (`pissa`, `olora`), or from its inputs (`eva`).
        enable_lora: for fused query-key-value layers: which of the three get an update of their own; None: one update
            for the whole layer.
        loraplus_lr_ratio: learning rate of B over that of A (LoRA+).
        loraplus_lr_embedding: learning rate of adapted embeddings under LoRA+.

    Raises:
        ValueError: if a value is out of range.
    """

    r: int = 8
    alpha: float = 16
    dropout: float = 0.0
    target_modules: list[str] | str = "all-linear"
    exclude_modules: list[str] | str | None = None
    layers_to_transform: int | list[int] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    modules_to_save: list[str] | None = None
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: Literal["default", "gaussian", "orthogonal", "pissa", "olora", "eva"] = "default"
    enable_lora: list[bool] | None = None
    loraplus_lr_ratio: float = 1.0
    loraplus_lr_embedding: float = 1e-6

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

    def at(self, path: str) -> LoRAConfig:
        """Return the settings of one layer: rank and alpha as the patterns say."""
        r, alpha = _find(self.rank_pattern, path, self.r), _find(self.alpha_pattern, path, self.alpha)
        return self if (r, alpha) == (self.r, self.alpha) else replace(self, r=r, alpha=alpha)

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


def _find(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    return next((value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", path)), default)


def layer_class(config: LoRAConfig, module: nn.Module) -> type[Adapter]:
    """Return the class of adapter for one module."""
    return LoRALinear


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
        where = {path: self.lora.at(path) for path in paths}
        join(self.model, where, lambda base: layer_class(self.lora, base), self.placing)

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

    def gathered(self, layers: Mapping[str, Any]) -> LoRAConfig:
        """Return the configuration of a combined adapter: each layer by its path, with its own rank."""
        first: LoRAConfig = next(iter(layers.values()))
        others = {re.escape(path): config for path, config in layers.items() if config != first}
        return replace(
            first,
            target_modules=sorted(layers),
            exclude_modules=None,
            layers_to_transform=None,
            rank_pattern={path: config.r for path, config in others.items()},
            alpha_pattern={path: config.alpha for path, config in others.items()},
        )

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
