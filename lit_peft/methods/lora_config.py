"""The settings of LoRA, and what they are called in HF PEFT's files."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from lit_peft.low_rank import residual
from lit_peft.targets import KEYS, OWN, bare, find, fits

# PEFT's settings that leave plain LoRA's formula as it is, or are read below; any other must be off.
PLAIN = frozenset(
    "peft_type task_type auto_mapping base_model_name_or_path revision inference_mode peft_version runtime_config "
    "r lora_alpha lora_dropout use_rslora use_dora "
    "target_modules exclude_modules layers_to_transform layers_pattern "
    "modules_to_save fan_in_fan_out init_lora_weights loftq_config eva_config corda_config lora_ga_config "
    "velora_config megatron_core qalora_group_size ensure_weight_tying "
    f"rank_pattern alpha_pattern bias {KEYS} {OWN}".split()
)
# Values of init_lora_weights that do not change the base; PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA do.
STARTS = ("default", "gaussian", "orthogonal", "pissa", "olora", "eva", "loaded")
KEEPS_BASE = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
# What each adapted layer has in a file: linear layers and convolutions, embeddings.


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Settings of LoRA.

    Args:
        r: rank of the update.
        alpha: numerator of the scale s = alpha / r.
        dropout: dropout on the adapter's input.
        target_modules: which layers: `all-linear`, a role (`attention`, `feed-forward`), a list of endings of module
            paths, or one regular expression over whole paths. Named ones may be embeddings and convolutions too.
        exclude_modules: layers to leave out, written like target_modules; wins over it.
        layers_to_transform: only these transformer layers, by number; None: all.
        rank_pattern: ranks of single layers, by a regular expression for the end of the path: `{"q_proj": 16}`. Two
            that fit one layer must agree.
        alpha_pattern: alphas of single layers, written like rank_pattern.
        modules_to_save: modules that are trained whole and saved with the adapter, by the end of their path.
        bias: which biases of the base are trained too: `none`, `all`, or `lora_only` for those of adapted layers.
        use_rslora: scale by alpha / sqrt(r) instead.
        use_dora: train a magnitude for each output, and the low rank for the direction only (DoRA).
        init_lora_weights: how A and B start: `default` (Kaiming-uniform A, zero B), `gaussian`, `orthogonal`, or from
            the base's weight (`pissa`, `pissa_niter_4` and `_16` for a faster, randomised SVD, `olora`), or from its
            inputs (`eva`). `loaded` is what is noted when they came from a file; variants then add nothing.
        enable_lora: for fused query-key-value layers: which of the three get an update of their own, such as
            `[true, false, true]`; None: one update for the whole layer.
        loraplus_lr_ratio: under LoRA+, learning rate of B over that of A.
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
    init_lora_weights: Literal[
        "default", "gaussian", "orthogonal", "pissa", "pissa_niter_4", "pissa_niter_16", "olora", "eva", "loaded"
    ] = "default"
    enable_lora: list[bool] | None = None
    loraplus_lr_ratio: float = 16.0
    loraplus_lr_embedding: float = 1e-6

    default_lr: ClassVar[float] = 2e-4

    def __post_init__(self) -> None:
        _check_rank("lora.r", self.r)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout is {self.dropout}; it must be at least 0 and below 1.")
        _check_alpha("lora.alpha", self.alpha)
        if not self.target_modules:
            raise ValueError("lora.target_modules is empty. Name some, or leave it out for all linear layers.")
        for pattern, rank in self.rank_pattern.items():
            _check_pattern("rank_pattern", pattern)
            _check_rank(f"lora.rank_pattern[{pattern!r}]", rank)
        for pattern, alpha in self.alpha_pattern.items():
            _check_pattern("alpha_pattern", pattern)
            _check_alpha(f"lora.alpha_pattern[{pattern!r}]", alpha)
        if self.bias not in ("none", "all", "lora_only"):
            raise ValueError(f"lora.bias is {self.bias!r}; it must be 'none', 'all' or 'lora_only'.")
        if self.init_lora_weights not in STARTS and not residual.FAST.fullmatch(str(self.init_lora_weights)):
            raise ValueError(
                f"lora.init_lora_weights is {self.init_lora_weights!r}; it must be one of {', '.join(STARTS)}, "
                "pissa_niter_4, pissa_niter_16."
            )
        if isinstance(self.modules_to_save, str):
            raise ValueError(f"lora.modules_to_save is {self.modules_to_save!r}; it must be a list of names.")
        if self.enable_lora is not None:
            if len(self.enable_lora) != 3 or not any(self.enable_lora):
                raise ValueError(
                    f"lora.enable_lora is {self.enable_lora}; it must say true or false for each of q, k, v."
                )
            if self.use_dora or self.init_lora_weights not in ("default", "gaussian", "loaded"):
                what = "use_dora" if self.use_dora else f"init_lora_weights={self.init_lora_weights!r}"
                raise ValueError(f"lora.enable_lora does not go with {what}: it has a pair A, B for each slice.")
        for key in ("loraplus_lr_ratio", "loraplus_lr_embedding"):
            if not 0 < getattr(self, key) < math.inf:
                raise ValueError(f"lora.{key} is {getattr(self, key)}; it must be above 0.")
        if self.use_dora and self.residual:
            raise ValueError(f"use_dora does not go with init_lora_weights={self.init_lora_weights!r}. Choose one.")

    @property
    def scale(self) -> float:
        """The factor s in front of B A."""
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    @property
    def residual(self) -> bool:
        """Whether A and B start inside the base's weight, which stays as it is (PiSSA, OLoRA)."""
        return self.init_lora_weights.startswith(residual.ResidualLinear.starts)

    def plain(self) -> LoRAConfig:
        """Return the plain LoRA of twice the rank and the same scale that a PiSSA or OLoRA set is saved as."""
        factor = math.sqrt(2) if self.use_rslora else 2
        return replace(
            self,
            r=2 * self.r,
            alpha=factor * self.alpha,
            rank_pattern={key: 2 * r for key, r in self.rank_pattern.items()},
            alpha_pattern={key: factor * alpha for key, alpha in self.alpha_pattern.items()},
            init_lora_weights="loaded",
        )

    def at(self, path: str) -> LoRAConfig:
        """Return the settings of one layer: rank and alpha as the first pattern says that fits."""
        path = bare(path)
        r, alpha = find(self.rank_pattern, path, self.r), find(self.alpha_pattern, path, self.alpha)
        return self if (r, alpha) == (self.r, self.alpha) else replace(self, r=r, alpha=alpha)

    def of_layers(self, paths: Iterable[str]) -> dict[str, LoRAConfig]:
        """Return `{path: settings}` for the layers to adapt.

        Raises:
            ValueError: if a pattern fits none of them, or two that fit one layer disagree.
        """
        paths = list(paths)
        for kind, entries in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            fitting = {key: [path for path in paths if fits(key, bare(path))] for key in entries}
            for key, found in fitting.items():
                if not found:
                    leaves = sorted({path.rpartition(".")[2] for path in paths})
                    raise ValueError(
                        f"lora.{kind} has {key!r}, which fits none of the {len(paths)} adapted layers; they end in "
                        f"{leaves}."
                    )
            for path in paths:
                keys = [key for key, found in fitting.items() if path in found]
                other = next((key for key in keys if entries[key] != entries[keys[0]]), None)
                if other is not None:
                    raise ValueError(
                        f"lora.{kind} has both {keys[0]!r} ({entries[keys[0]]}) and {other!r} ({entries[other]}) for "
                        f"{bare(path)!r}. Make one of them fit fewer layers."
                    )
        return {path: self.at(path) for path in paths}

    def to_peft(self) -> dict[str, Any]:
        """Return the settings under HF PEFT's names."""
        if self.residual:
            return self.plain().to_peft()
        return {
            "peft_type": "LORA",
            "r": self.r,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "use_rslora": self.use_rslora,
            "use_dora": self.use_dora,
            "bias": self.bias,
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> LoRAConfig:
        """Read HF PEFT's settings.

        Raises:
            ValueError: for a LoRA variant that changes the formula and is not known here.
        """
        if config.get("use_mora"):
            raise ValueError("This adapter is MoRA (use_mora: true), not LoRA. Load it with --method mora.")
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
            rank_pattern=config.get("rank_pattern") or {},
            alpha_pattern=config.get("alpha_pattern") or {},
            bias=config.get("bias", "none"),
            use_rslora=config.get("use_rslora", False),
            use_dora=config.get("use_dora", False),
            init_lora_weights="loaded",
        )


def _check_rank(what: str, value: int) -> None:
    if type(value) is not int or value < 1:  # True is an int too
        kind = "" if type(value) is int else ", a whole number"
        raise ValueError(f"{what} is {value}; the rank must be 1 or more{kind}.")


def _check_pattern(what: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"lora.{what} has {pattern!r}, no regular expression: {error}.") from None


def _check_alpha(what: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{what} is {value}; it must be above 0.")
