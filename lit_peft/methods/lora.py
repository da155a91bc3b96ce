"""LoRA: low-rank adaptation of linear layers (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

    y = W x + b + s B A dropout(x),    A (r, in), B (out, r),    s = alpha / r

A starts Kaiming-uniform, B at zero: the adapted model starts as the base model, bit for bit. rsLoRA
(https://arxiv.org/abs/2312.03732) sets s = alpha / sqrt(r), which keeps the update's size steady over ranks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from torch import nn
from transformers.pytorch_utils import Conv1D

from lit_peft.adapter import Adapter, innermost, join, named_adapters, remember
from lit_peft.low_rank.convolution import CONVOLUTIONS, LoRAConv, check_groups
from lit_peft.low_rank.embedding import LoRAEmbedding
from lit_peft.low_rank.fused import LoRAFused, is_fused, note_slices
from lit_peft.low_rank.in_place import bias_names, inside, parameters_of, refuse_unused, untie, whole_modules
from lit_peft.low_rank.linear import LoRALinear
from lit_peft.mixin import PEFT
from lit_peft.sites import is_linear, match
from lit_peft.targets import (
    KEYS,
    OWN,
    bare,
    find,
    fits,
    patterns,
    saved_modules,
    stored_layers,
    stored_targets,
)

# PEFT's settings that leave plain LoRA's formula as it is, or are read below; any other must be off.
PLAIN = frozenset(
    "peft_type task_type auto_mapping base_model_name_or_path revision inference_mode peft_version runtime_config "
    "r lora_alpha lora_dropout use_rslora target_modules exclude_modules layers_to_transform layers_pattern "
    "modules_to_save fan_in_fan_out init_lora_weights loftq_config eva_config corda_config lora_ga_config "
    "velora_config megatron_core qalora_group_size ensure_weight_tying "
    f"rank_pattern alpha_pattern bias {KEYS} {OWN}".split()
)
# Values of init_lora_weights that do not change the base; PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA do.
KEEPS_BASE = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
# What each adapted layer has in a file: linear layers and convolutions, embeddings.
LEAVES = ("lora_A.weight", "lora_embedding_A")


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
            the base's weight (`pissa`, `olora`), or from its inputs (`eva`).
        enable_lora: for fused query-key-value layers: which of the three get an update of their own, such as
            `[true, false, true]`; None: one update for the whole layer.
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
        if isinstance(self.modules_to_save, str):
            raise ValueError(f"lora.modules_to_save is {self.modules_to_save!r}; it must be a list of names.")
        if self.enable_lora is not None:
            if len(self.enable_lora) != 3 or not any(self.enable_lora):
                raise ValueError(
                    f"lora.enable_lora is {self.enable_lora}; it must say true or false for each of q, k, v."
                )
            if self.use_dora or self.init_lora_weights in ("orthogonal", "pissa", "olora", "eva"):
                what = "use_dora" if self.use_dora else f"init_lora_weights={self.init_lora_weights!r}"
                raise ValueError(f"lora.enable_lora does not go with {what}: it has a pair A, B for each slice.")

    @property
    def scale(self) -> float:
        """The factor s in front of B A."""
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

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
        return {
            "peft_type": "LORA",
            "r": self.r,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "use_rslora": self.use_rslora,
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
        )


def _check_rank(what: str, value: int) -> None:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{what} is {value}; the rank must be 1 or more.")


def _check_pattern(what: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"lora.{what} has {pattern!r}, no regular expression: {error}.") from None


def _check_alpha(what: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{what} is {value}; it must be above 0.")


def adaptable(module: nn.Module) -> bool:
    """Whether LoRA can stand around a module that is named."""
    return is_linear(module) or isinstance(module, (nn.Embedding, *CONVOLUTIONS))


def layer_class(config: LoRAConfig, module: nn.Module) -> type[Adapter]:
    """Return the class of adapter for one module."""
    if isinstance(module, nn.Embedding):
        return LoRAEmbedding
    if isinstance(module, CONVOLUTIONS):
        return LoRAConv
    if config.enable_lora is not None and is_fused(module):
        return LoRAFused
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

    _in_place: frozenset[str] = frozenset()  # what is trained of the base itself, by name in the plain model

    def place_adapters(self) -> None:
        """Put an adapter of the right kind around every target; note which weights of the base are trained too.

        Raises:
            ValueError: if targets, patterns or modules do not fit this model; nothing is changed then.
        """
        super().place_adapters()
        assert self.model is not None
        model, config = self.model, self.lora
        saved = whole_modules(model, config.modules_to_save)
        paths = match(
            model,
            config.target_modules,
            exclude_modules=config.exclude_modules,
            layers_to_transform=config.layers_to_transform,
            kinds=adaptable,
        )
        refuse_unused(model, [*map(bare, paths), *saved])
        paths = [path for path in paths if not inside(bare(path), saved)]
        if not paths:
            raise ValueError(f"lora.modules_to_save {config.modules_to_save} leaves no layer to adapt. Name fewer.")
        layers = config.of_layers(paths)
        for path in paths:
            base = innermost(model.get_submodule(path))
            if isinstance(base, CONVOLUTIONS):
                check_groups(layers[path], base)
        if config.enable_lora is not None:
            note_slices(model, paths)
        in_place = bias_names(model, config.bias, paths) | parameters_of(model, saved)
        join(model, layers, self.adapter_class)
        untie(model, saved)
        remember(
            model,
            [(n, p) for n, p in model.named_parameters() if bare(n) in in_place and not self.is_trainable(n, p)],
        )
        self._in_place = frozenset(in_place)

    def is_trainable(self, name: str, parameter: nn.Parameter) -> bool:
        """Modules to save and the chosen biases are."""
        return super().is_trainable(name, parameter) or (bool(self._in_place) and bare(name) in self._in_place)

    def adapter_class(self, base: nn.Module) -> type[Adapter]:
        """Return the class of adapter for one module."""
        return layer_class(self.lora, base)

    def adopt(self, config: Mapping[str, Any]) -> None:
        """Take rank, scale and targets from an adapter folder.

        Raises:
            ValueError: if the folder holds another kind of LoRA, or its layers do not fit this model.
        """
        super().adopt(config)
        if config.get("peft_type") == "LORA":
            assert self.model is not None
            plain = LoRAConfig.from_peft(config)  # refuses what is no plain LoRA before its layers are looked at
            modules = [bare(path) for path, _ in self.model.named_modules()]
            targets = stored_targets(config, LEAVES, modules)
            layers = {path: plain.at(path) for path in stored_layers(config, LEAVES)}
            found = {
                "rank_pattern": patterns({path: layer.r for path, layer in layers.items()}, plain.r),
                "alpha_pattern": patterns({path: layer.alpha for path, layer in layers.items()}, plain.alpha),
                **(config.get(OWN) or {}),
            }
            self.lora = self.configured(
                LoRAConfig,
                "lora",
                plain,
                target_modules=targets,
                exclude_modules=None,
                modules_to_save=self._saved(self.model, config, modules) or None,
                bias=plain.bias if any(key.endswith(".bias") for key in config[KEYS]) else "none",
                **found,
            )

    def _saved(self, model: nn.Module, config: Mapping[str, Any], modules: list[str]) -> list[str]:
        """Return the modules that a folder holds whole, but for those that the task trains anyway (its head)."""
        found = saved_modules(config, modules)
        return [
            path
            for path in found
            if not inside(path, [other for other in found if other != path])
            and not all(self.is_trainable(f"{path}.{n}", p) for n, p in model.get_submodule(path).named_parameters())
        ]

    def parts(self) -> list[dict[str, Any]]:
        """Return the settings for `adapter_config.json`."""
        assert self.model is not None
        placed = (innermost(a) for _, a in named_adapters(self.model) if isinstance(a, LoRALinear))
        # PEFT sets this by itself on GPT-2, with a warning
        part = {**self.lora.to_peft(), "fan_in_fan_out": any(isinstance(m, Conv1D) for m in placed)}
        if self.lora.enable_lora is not None:  # PEFT reads one pair of a higher rank; these say what it is made of
            words = ("enable_lora", "r", "alpha", "rank_pattern", "alpha_pattern")
            part[OWN] = {word: getattr(self.lora, word) for word in words}
        return [*super().parts(), part]


class RsLoRA(LoRA):
    """LoRA with the rank-stabilised scale s = alpha / sqrt(r) (Kalajdzievski 2023, arXiv 2312.03732)."""

    method = "rslora"
    preset: ClassVar[dict[str, Any]] = {"use_rslora": True}
