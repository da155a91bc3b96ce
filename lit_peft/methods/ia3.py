"""(IA)3: learned factors on keys, values and the feed-forward's inside (Liu et al. 2022, https://arxiv.org/abs/2205.05638).

    k <- l_k * k,    v <- l_v * v,    FFN(x) = W2 (l_ff * act(W1 x))

The factors l start at one: the adapted model starts as the base model. A key or value factor scales the *output* of its
linear layer, bias included; l_ff scales the *input* of the feed-forward's last linear layer, which is the same as
scaling what is inside. Both fold into the weights. On a decoder layer with grouped queries that is 2 d_kv + f numbers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lit_peft.adapter import Adapter, innermost, named_adapters
from lit_peft.combining import weighted
from lit_peft.methods.ia3_sites import PEFT_TARGETS, Scaled, t_few
from lit_peft.mixin import PEFT
from lit_peft.ops.lora_linear import joins
from lit_peft.ops.recipes import recording
from lit_peft.ops.scaled import reference, scaled, scaled_linear, scaled_output
from lit_peft.placing import join
from lit_peft.sites import layer_index, match, widths
from lit_peft.targets import KEYS, bare, stored_targets
from lit_peft.weights import dense, fold

# HF PEFT's settings that are read here or do not change the formula; any other must be off.
PLAIN = frozenset(
    "peft_type task_type auto_mapping base_model_name_or_path revision inference_mode peft_version target_modules "
    f"exclude_modules feedforward_modules fan_in_fan_out modules_to_save init_ia3_weights {KEYS}".split()
)


@dataclass(frozen=True, kw_only=True)
class IA3Config:
    """Settings of (IA)3.

    Args:
        placement: where the factors go if target_modules names nothing: `t-few`, keys, values and the feed-forward's
            inside, as in the paper; or `peft`, the layers that HF PEFT chooses for this architecture.
        target_modules: which linear layers instead, written as for LoRA.
        feedforward_modules: those among target_modules whose input is scaled, not their output; a list of endings of
            paths, or one regular expression.
        exclude_modules: layers to leave out, written like target_modules.
        layers_to_transform: only these transformer layers, by number; None: all.

    Raises:
        ValueError: if a value is out of range, or feedforward_modules comes without target_modules.
    """

    placement: Literal["t-few", "peft"] = "t-few"
    target_modules: list[str] | str | None = None
    feedforward_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: int | list[int] | None = None

    default_lr: ClassVar[float] = 3e-3

    def __post_init__(self) -> None:
        if self.placement not in ("t-few", "peft"):
            raise ValueError(f"ia3.placement is {self.placement!r}; it must be t-few or peft.")
        if self.target_modules is not None and not self.target_modules:
            raise ValueError("ia3.target_modules is empty. Name some, or leave it out for ia3.placement.")
        if self.feedforward_modules and self.target_modules is None:
            raise ValueError(
                "ia3.feedforward_modules says which of ia3.target_modules are meant. Give both, or neither."
            )

    def sites(self, model: nn.Module) -> dict[str, Scaled]:
        """Return which layers of a model are scaled, and which side and part of each.

        Raises:
            ValueError: if the placement is not known for this model, or a target matches nothing.
        """
        if self.target_modules is None and self.placement == "t-few":
            return self._kept(model, t_few(model))
        targets, inner = self.target_modules, self.feedforward_modules
        if targets is None:
            kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
            if kind not in PEFT_TARGETS:
                raise ValueError(
                    f"HF PEFT has no (IA)3 layers for {kind!r}. Set ia3.target_modules, or ia3.placement=t-few."
                )
            targets, inner = map(list, PEFT_TARGETS[kind])
        options: dict[str, Any] = {"layers_to_transform": self.layers_to_transform}
        paths = match(model, targets, exclude_modules=self.exclude_modules, **options)
        inside = [path for path in paths if _feeds(bare(path), inner)]
        if inner and not inside:
            raise ValueError(f"ia3.feedforward_modules {inner!r} names none of ia3.target_modules {targets!r}.")
        return {path: Scaled(feedforward=path in inside) for path in paths}

    def _kept(self, model: nn.Module, found: dict[str, Scaled]) -> dict[str, Scaled]:
        """Leave out what exclude_modules and layers_to_transform leave out."""
        chosen = self.layers_to_transform
        if chosen is not None:
            numbers = {chosen} if isinstance(chosen, int) else set(chosen)
            missing = sorted(numbers - {layer_index(path) for path in found})
            if missing:
                raise ValueError(f"ia3.layers_to_transform names layer {missing[0]}, which this model lacks.")
            found = {path: scaled for path, scaled in found.items() if layer_index(path) in numbers}
        if self.exclude_modules:
            out = set(match(model, self.exclude_modules, partial=True))
            found = {path: scaled for path, scaled in found.items() if path not in out}
        if not found:
            raise ValueError("ia3.exclude_modules and ia3.layers_to_transform leave no layer of this model to scale.")
        return found

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> IA3Config:
        """Read HF PEFT's settings, but for the targets, which a folder's tensors tell.

        Raises:
            ValueError: for a setting that is not known here.
        """
        for key, value in config.items():
            if key not in PLAIN and value not in (None, False, [], {}):
                raise ValueError(f"This adapter uses {key}={value!r}, which (IA)3 here does not have. Save it without.")
        if not config.get("target_modules"):
            raise ValueError("adapter_config.json names no target_modules. Add the list of adapted layers to the file.")
        inner = config.get("feedforward_modules")
        stored = [key.removesuffix(".ia3_l") for key in config.get(KEYS, ())]
        used = any(_feeds(path, inner) for path in stored)  # PEFT does not mind one that names nothing
        return cls(target_modules=config["target_modules"], feedforward_modules=inner if used else None)


def _feeds(path: str, inner: Sequence[str] | str | None) -> bool:
    """HF PEFT's rule: a list holds endings of paths, not bound to whole words; a string is a regular expression."""
    if isinstance(inner, str):
        return re.fullmatch(inner, path) is not None
    return any(path.endswith(ending) for ending in inner or ())


class IA3Linear(Adapter):
    """Scales a linear layer's output, y = l * (W x + b), or its input, y = W (l * x) + b.

    Example:
        >>> import torch
        >>> from lit_peft.methods.ia3_sites import Scaled
        >>> layer = IA3Linear(torch.nn.Linear(8, 4), Scaled())
        >>> [tuple(p.shape) for _, p in layer.own_parameters()]
        [(4,)]
    """

    peft_type: ClassVar[str] = "IA3"

    def add(self, name: str, config: Scaled) -> None:
        """Make the factors of another named set, all one: (out,) or (in,), or those of a fused layer's keys and values.

        Raises:
            ValueError: if another set scales the other side of this layer.
        """
        sides = {other.feedforward for other in self.configs.values()}
        if sides - {config.feedforward}:
            raise ValueError(f"Another (IA)3 adapter scales the other side of this layer; {name!r} must do as it does.")
        super().add(name, config)
        if "ia3_l" not in self._modules:
            self.ia3_l = nn.ParameterDict()
        wide, tall = widths(innermost(self.base))
        device = next(self.base.parameters()).device
        size = config.scaled or (wide if config.feedforward else tall)
        self.ia3_l[name] = nn.Parameter(torch.ones(size, device=device, dtype=torch.float32))

    def factors(self, name: str) -> Tensor:
        """Return l over the whole side of the layer: (out,) or (in,), one where nothing is trained."""
        config: Scaled = self.configs[name]
        trained: Tensor = self.ia3_l[name]
        if not config.scaled:
            return trained
        rows = trained.view(config.groups, -1)
        whole = widths(innermost(self.base))[1] // config.groups
        ones = rows.new_ones(config.groups, whole - rows.shape[1])
        return torch.cat([ones, rows], dim=1).flatten()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map (..., in) to (..., out); several sets multiply."""
        factor = self._factor(x)
        if factor is None:
            return self.base(x, *args, **kwargs)  # type: ignore[no-any-return]
        inside = next(iter(self.configs.values())).feedforward
        whole = factor.ndim == 1 and recording()  # one factor for all rows
        if whole and not (args or kwargs) and joins(self.base, x):
            return scaled_linear(x, self.base, factor, inside=inside)
        if inside:
            scaled_x = scaled(x, factor) if whole else reference(x, factor)
            return self.base(scaled_x, *args, **kwargs)  # type: ignore[no-any-return]
        y: Tensor = self.base(x, *args, **kwargs)
        return scaled_output(y, factor) if whole else reference(y, factor)

    def _factor(self, x: Tensor) -> Tensor | None:
        """Return the product of the acting sets' factors, (width,), or (rows, 1, ..., width) where rows are routed."""
        whole, routed = None, None
        for name, rows in self.shares(x):
            factors = self.factors(name)
            if rows is None:
                whole = factors if whole is None else whole * factors
            else:
                routed = factors.new_ones(x.shape[0], factors.shape[0]) if routed is None else routed
                routed = routed.index_copy(0, rows, routed[rows] * factors)
        return whole if routed is None else routed.view(x.shape[0], *[1] * (x.ndim - 2), -1)

    def merge(self, names: tuple[str, ...] | None = None) -> nn.Module:
        """Fold l into W: its rows and the bias, or its columns; in float32, rounded once to the base's dtype."""
        with torch.no_grad():
            for name in self.active() if names is None else names:
                if name not in self.configs:
                    continue
                factors = self.factors(name)
                inner = self.configs[name].feedforward
                weight = dense(self.base).float()
                fold(self.base, weight * ((factors if inner else factors[:, None]) - 1))
                bias = self.base._parameters.get("bias")
                if bias is not None and not inner:
                    self.base.bias = nn.Parameter((bias.float() * factors).to(bias.dtype), requires_grad=False)
        return self.base

    def tensors(self, name: str = "default") -> dict[str, Tensor]:
        """Return l as HF PEFT stores it: (1, in) for the input's factors, (out, 1) for the output's."""
        factors = self.factors(name).detach()
        return {"ia3_l": factors[None, :] if self.configs[name].feedforward else factors[:, None]}

    def shapes(self, tensors: Mapping[str, Tensor], name: str = "default") -> dict[str, tuple[int, ...]]:
        """Return the shape of l; see that the file scales the side of this layer that is scaled here.

        Raises:
            ValueError: if it does not.
        """
        mine, theirs = super().shapes(tensors, name), tensors.get("ia3_l")
        inner = self.configs[name].feedforward
        if theirs is not None and max(theirs.shape) > 1 and (theirs.shape[0] == 1) != inner:
            sides = ("input", "output") if inner else ("output", "input")
            raise ValueError(
                f"The adapter scales this layer's {sides[1]}, and here its {sides[0]} is scaled. Set "
                "ia3.feedforward_modules as in its adapter_config.json, or start from the folder: adapter=FOLDER."
            )
        return mine

    def load_tensors(self, tensors: Mapping[str, Tensor], name: str = "default") -> None:
        """Copy l into one named set.

        Raises:
            ValueError: if it is missing, or scales what is not scaled here.
        """
        if "ia3_l" not in tensors:
            raise ValueError(f"The adapter file lacks 'ia3_l'; it holds {sorted(tensors)}.")
        config: Scaled = self.configs[name]
        factors = tensors["ia3_l"].flatten()
        if config.scaled:
            grid = factors.view(config.groups, -1)
            still = grid.shape[1] - config.scaled // config.groups
            if bool((grid[:, :still] != 1).any()):
                raise ValueError(
                    "The file scales the queries of a fused layer too. Set ia3.placement=peft, or ia3.target_modules."
                )
            factors = grid[:, still:].flatten()
        with torch.no_grad():
            self.ia3_l[name].copy_(factors)

    def combined(
        self, names: Sequence[str], weights: Sequence[float], how: str, **options: Any
    ) -> tuple[Any, dict[str, Tensor]]:
        """Return sum_i w_i l_i (`linear`), or what TIES or DARE make of the changes l_i - 1.

        A set that does not scale this layer counts as ones.

        Raises:
            ValueError: for a rule that is for low ranks only.
        """
        ones = torch.ones_like(self.factors(names[0]))
        if how == "linear":
            parts = [w * self.factors(name).detach() for name, w in zip(names, weights, strict=True)]
            factors = sum(parts, options["absent"] * ones)
        else:
            changes = [self.factors(name).detach() - ones for name in names]
            factors = ones + weighted(changes, weights, how, density=options["density"], generator=options["generator"])
        config: Scaled = self.configs[names[0]]
        if any(self.configs[name] != config for name in names):
            config = replace(config, scaled=0)
        return config, {"ia3_l": factors[None, :] if config.feedforward else factors[:, None]}


class IA3(PEFT):
    """(IA)3 on the task's model: learned factors on keys, values and the feed-forward's inside.

    Args:
        ia3: where the factors go.

    Example:
        >>> from lit_peft import IA3, SFT
        >>> class Mine(IA3, SFT): ...
    """

    method = "ia3"

    def __init__(self, *args: Any, ia3: IA3Config = IA3Config(), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ia3 = self.configured(IA3Config, "ia3", ia3)

    def place_adapters(self) -> None:
        """Put an `IA3Linear` around every layer that is scaled."""
        super().place_adapters()
        assert self.model is not None
        join(self.model, self.ia3.sites(self.model), lambda base: IA3Linear, self.placing)

    def adopt(self, config: Mapping[str, Any]) -> None:
        """Take the targets from an adapter folder.

        Raises:
            ValueError: if the folder's settings are not known here, or its layers do not fit this model.
        """
        super().adopt(config)
        if config.get("peft_type") == "IA3":
            assert self.model is not None
            plain = IA3Config.from_peft(config)
            targets = stored_targets(config, "ia3_l", (path for path, _ in self.model.named_modules()))
            self.ia3 = self.configured(IA3Config, "ia3", plain, target_modules=targets)

    def gathered(self, layers: Mapping[str, Any]) -> IA3Config:
        """Return the configuration of a combined adapter.

        Raises:
            ValueError: if it scales parts of fused layers, and not those that this configuration scales.
        """
        assert self.model is not None
        if layers == {bare(path): scaled for path, scaled in self.ia3.sites(self.model).items()}:
            return self.ia3
        if any(scaled.scaled for scaled in layers.values()):
            raise ValueError("Combine (IA)3 adapters of one placement where layers are fused, as in this model.")
        inner = sorted(path for path, scaled in layers.items() if scaled.feedforward)
        return IA3Config(target_modules=sorted(layers), feedforward_modules=inner or None)

    def parts(self) -> list[dict[str, Any]]:
        """Return the settings for `adapter_config.json`."""
        assert self.model is not None
        placed = {
            bare(path): adapter
            for path, adapter in named_adapters(self.model)
            if isinstance(adapter, IA3Linear) and self.placing in adapter.configs
        }
        inner = {path for path, adapter in placed.items() if adapter.configs[self.placing].feedforward}
        part: dict[str, Any] = {
            "peft_type": "IA3",
            "feedforward_modules": sorted(inner),
            "fan_in_fan_out": any(isinstance(innermost(adapter), Conv1D) for adapter in placed.values()),
        }
        # PEFT wants the second list within the first, and reads it as endings: whole paths are never mistaken
        return [*super().parts(), {**part, "target_modules": sorted(placed)} if placed else part]
