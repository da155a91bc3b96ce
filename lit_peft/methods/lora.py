"""LoRA: low-rank adaptation of linear layers (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

    y = W x + b + s B A dropout(x),    A (r, in), B (out, r),    s = alpha / r

A starts Kaiming-uniform, B at zero: the adapted model starts as the base model, bit for bit. rsLoRA
(https://arxiv.org/abs/2312.03732) sets s = alpha / sqrt(r), which keeps the update's size steady over ranks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from torch import nn
from transformers.pytorch_utils import Conv1D

from lit_peft.adapter import Adapter, innermost, named_adapters, remember
from lit_peft.low_rank import dora, residual
from lit_peft.low_rank.convolution import CONVOLUTIONS, LoRAConv, check_groups
from lit_peft.low_rank.embedding import LoRAEmbedding
from lit_peft.low_rank.fused import LoRAFused, is_fused, note_slices
from lit_peft.low_rank.in_place import bias_names, inside, parameters_of, refuse_unused, untie, whole_modules
from lit_peft.low_rank.linear import LoRALinear
from lit_peft.methods.lora_config import LoRAConfig as LoRAConfig
from lit_peft.mixin import PEFT
from lit_peft.placing import join
from lit_peft.sites import is_linear, match
from lit_peft.targets import KEYS, OWN, bare, patterns, saved_modules, stored_layers, stored_targets

LEAVES = ("lora_A.weight", "lora_embedding_A")


def adaptable(module: nn.Module) -> bool:
    """Whether LoRA can stand around a module that is named."""
    return is_linear(module) or isinstance(module, (nn.Embedding, *CONVOLUTIONS))


def layer_class(config: LoRAConfig, module: nn.Module) -> type[Adapter]:
    """Return the class of adapter for one module."""
    if config.use_dora:
        return dora.DoRALinear
    if config.residual:
        return residual.ResidualLinear
    if isinstance(module, nn.Embedding):
        return LoRAEmbedding
    if isinstance(module, CONVOLUTIONS):
        return LoRAConv
    if config.enable_lora is not None and is_fused(module):
        return LoRAFused
    return LoRALinear


def check_layer(path: str, config: LoRAConfig, module: nn.Module) -> None:
    """Raise a ValueError where a variant of LoRA cannot adapt a layer."""
    if config.use_dora:
        dora.check_layer(path, module)
    if config.residual:
        residual.check_layer(path, module, config)


class LoRA(PEFT):
    """LoRA on the task's model: low-rank updates beside its linear layers.

    Args:
        lora: rank, scale, dropout and targets.

    Example:
        >>> from lit_peft import LoRA, SFT
        >>> class Mine(LoRA, SFT): ...
    """

    method = "lora"
    default_lr: ClassVar[float] = LoRAConfig.default_lr
    preset: ClassVar[dict[str, Any]] = {}  # what a variant fixes in the configuration, whatever else the user sets

    def __init__(self, *args: Any, lora: LoRAConfig = LoRAConfig(), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lora = self.configured(LoRAConfig, "lora", lora, **self.fixed(lora))

    @classmethod
    def fixes(cls, given: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
        """Return what this variant fixes in its settings."""
        return {**super().fixes(given), "lora": cls.fixed(given.get("lora", {}))}

    @classmethod
    def fixed(cls, given: LoRAConfig | Mapping[str, Any]) -> Mapping[str, Any]:
        """Return what this variant fixes in a given configuration: nothing in one that came with its weights."""
        start = given.get("init_lora_weights") if isinstance(given, Mapping) else given.init_lora_weights
        if start == "loaded":
            return {}
        return {key: value for c in reversed(cls.__mro__) for key, value in c.__dict__.get("preset", {}).items()}

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
            check_layer(path, layers[path], base)
            if isinstance(base, CONVOLUTIONS):
                check_groups(layers[path], base)
        if config.enable_lora is not None:
            note_slices(model, paths)
        in_place = bias_names(model, config.bias, paths) | parameters_of(model, saved)
        join(model, layers, self.adapter_class, self.placing)
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

    def learning_rate(self, name: str, parameter: nn.Parameter) -> float | None:
        """Return this variant's rate for its own weights."""
        preferred = super().learning_rate(name, parameter)
        return self.default_lr if preferred == LoRAConfig.default_lr and "lora_" in name else preferred

    def adopt(self, config: Mapping[str, Any]) -> None:
        """Take rank, scale and targets from an adapter folder.

        Raises:
            ValueError: if the folder holds another kind of LoRA, or its layers do not fit this model.
        """
        super().adopt(config)
        if config.get("peft_type") == "LORA":
            assert self.model is not None
            plain = LoRAConfig.from_peft(config)  # refuses what is no plain LoRA before its layers are looked at
            fixed = self.fixed({})
            other = next((key for key in ("use_dora", "use_rslora") if fixed.get(key, False) > getattr(plain, key)), "")
            if other:
                raise ValueError(
                    f"The adapter was made with {other}=false, and {self.method} is LoRA with it. Use --method lora, "
                    "which takes on all that the folder says, or start without the adapter."
                )
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
            and not all(self.trained_anyway(f"{path}.{n}", p) for n, p in model.get_submodule(path).named_parameters())
        ]

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
        transposed = any(isinstance(m, Conv1D) or getattr(m, "transposed", False) for m in placed)
        part = {**self.lora.to_peft(), "fan_in_fan_out": transposed}
        if self.lora.enable_lora is not None:  # PEFT reads one pair of a higher rank; these say what it is made of
            words = ("enable_lora", "r", "alpha", "rank_pattern", "alpha_pattern")
            part[OWN] = {word: getattr(self.lora, word) for word in words}
        return [*super().parts(), part]


class RsLoRA(LoRA):
    """LoRA with the rank-stabilised scale s = alpha / sqrt(r) (Kalajdzievski 2023, arXiv 2312.03732)."""

    method = "rslora"
    preset: ClassVar[dict[str, Any]] = {"use_rslora": True}
