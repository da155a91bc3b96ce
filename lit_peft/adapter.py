"""Adapters and the one verb: `place`.

An `Adapter` is a trainable module around one frozen `base` module. It can hold several sets of weights by name; which
of them act is chosen by the *call* (see `named`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from lit_peft.choosing import Choosing
from lit_peft.ops.lean import make_plain
from lit_peft.selection import Scope


class Adapter(Choosing):
    """A trainable module around one frozen `base` module: the base class of every method's own module.

    Subclasses implement `add` (make the parameters of one named set), `change` (what one set makes of the base's
    output) or, where that is not enough, `forward`; and `merge` where it exists. What they do not define is looked up
    on the base, so that code which reads `layer.weight` or `layer.in_features` still works.

    Attributes:
        base: the adapted module.
        configs: the configuration of each named set.
        frozen: beginnings of the names of own parameters that are saved but never trained.
        restarts: how often the base's weight has been rewritten by `restart`.

    Args:
        base: the module to adapt; it stays frozen and is only ever called.
        config: the method's configuration.
        name: the name of this first set of weights.

    Example:
        >>> import torch
        >>> from lit_peft.methods.lora import LoRAConfig, LoRALinear
        >>> layer = LoRALinear(torch.nn.Linear(4, 3), LoRAConfig(r=2))
        >>> x = torch.ones(1, 4)
        >>> bool((layer(x) == layer.base(x)).all())
        True
    """

    is_adapter: ClassVar[bool] = True
    peft_type: ClassVar[Any] = ""  # the kind of folder that holds its weights; empty: it has none
    frozen: ClassVar[tuple[str, ...]] = ()
    packs: ClassVar[bool] = True  # whether rows of several texts give the same as the texts alone
    site: ClassVar[tuple[str, ...]] = ()  # settings that its place in the model fills in, not the user
    restarts: int = 0

    def __init__(self, base: nn.Module, config: Any, name: str = "default") -> None:
        super().__init__()
        self.base = base
        self.scope = Scope()
        self.configs: dict[str, Any] = {}
        self.add(name, config)

    def add(self, name: str, config: Any) -> None:
        """Make the parameters of another named set; subclasses extend this.

        Raises:
            ValueError: if the name is taken, or cannot be one.
        """
        check_name(name)
        if name in self.configs:
            raise taken(name)
        self.configs[name] = config

    def own_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the adapter's own parameters, not the base's, with names relative to this module."""
        for key, parameter in self.named_parameters():
            if not key.startswith("base."):
                yield key, parameter

    def trained_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the own parameters that training changes: all but the `frozen` ones and those of sets at rest."""
        trained = self.scope.trained
        for key, parameter in self.own_parameters():
            names = [piece for piece in key.split(".")[1:] if piece in self.configs]  # weights shared by all sets: none
            if not key.startswith(self.frozen) and (trained is None or not names or names[-1] in trained):
                yield key, parameter

    def remove(self, name: str) -> None:
        """Delete one named set.

        Raises:
            ValueError: if there is none of that name.
        """
        if name not in self.configs:
            raise ValueError(f"No adapter is named {name!r}. This layer has {sorted(self.configs)}.")
        del self.configs[name]
        for key, module in self.named_modules():
            if isinstance(module, nn.ParameterDict) and name in module and not key.startswith("base."):
                del module[name]

    def tensors(self, name: str = "default") -> dict[str, Tensor]:
        """Return one named set as `{file key: tensor}`, in the layout of HF PEFT where PEFT has the method."""
        return {
            key.removesuffix(f".{name}"): value.detach()
            for key, value in self.own_parameters()
            if key.endswith(f".{name}")
        }

    def check_tensors(self, tensors: Mapping[str, Tensor], name: str = "default") -> None:
        """See that tensors of the right shapes are ones that this adapter can hold; most hold any.

        Raises:
            ValueError: if not.
        """

    def check_config(self, path: str, config: Mapping[str, Any], name: str = "default") -> None:
        """See that a folder's settings mean for this layer what its tensors are multiplied by here.

        Args:
            path: the layer's path in the plain model.
            config: the contents of `adapter_config.json`.
            name: which named set is to be filled.

        Raises:
            ValueError: if they do not, as with another scale.
        """

    def shapes(self, tensors: Mapping[str, Tensor], name: str = "default") -> dict[str, tuple[int, ...]]:
        """Return `{file key: shape}` that one named set can take, of those in `tensors`; as a rule what it has now."""
        return {key: tuple(tensor.shape) for key, tensor in self.tensors(name).items()}

    def settings(self, path: str, name: str = "default") -> dict[str, dict[str, Any]]:
        """Return what `adapter_config.json` notes of this one layer, as entries of its dictionaries (rank_pattern)."""
        return {}

    def load_tensors(self, tensors: Mapping[str, Tensor], name: str = "default") -> None:
        """Copy `{file key: tensor}` into one named set; the inverse of `tensors`.

        Raises:
            ValueError: if a key is missing or a shape differs.
        """
        mine = self.tensors(name)
        for key, target in mine.items():
            if key not in tensors:
                raise ValueError(f"The adapter file lacks {key!r}; it holds {sorted(tensors)}.")
            if tensors[key].shape != target.shape:
                shapes = f"{tuple(tensors[key].shape)} in the file, {tuple(target.shape)} in this model"
                raise ValueError(f"Shapes differ for {key!r}: {shapes}. Is it an adapter of another base model?")
            target.copy_(tensors[key])

    def combined(
        self, names: Sequence[str], weights: Sequence[float], how: str, **options: Any
    ) -> tuple[Any, dict[str, Tensor]]:
        """Return configuration and tensors (named as in `tensors`) of a weighted combination of some sets.

        Args:
            names: the sets, all of them in this adapter.
            weights: one for each.
            how: the rule, as for `combine_adapters`.
            **options: `rank`, `density`, `generator`, and `absent`, the weight of sets that are not in this adapter.

        Raises:
            TypeError: if the method has no such rule.
        """
        kind = type(self).__name__
        together = ", ".join(map(repr, names))
        raise TypeError(f"{how} is not defined for {kind}. Let its sets act together: adapters(model, {together}).")

    def merge(self, names: tuple[str, ...] | None = None) -> nn.Module:
        """Fold the named sets (default: the active ones) into the base and return it.

        Raises:
            TypeError: if the method cannot be folded.
        """
        raise TypeError(f"{type(self).__name__} cannot be merged into its base. Save the adapter instead of merging.")

    def restart(self, name: str, seed: int) -> None:
        """Fold one named set into the base's weight, in place, and bring the set back to a start that changes nothing.

        Args:
            name: which set.
            seed: for starting values that are random.

        Raises:
            TypeError: if the method cannot be restarted.
        """
        raise TypeError(f"{type(self).__name__} cannot be restarted. Use --method relora or remora.")

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base":
                raise
            return getattr(super().__getattr__("base"), name)


def innermost(module: nn.Module) -> nn.Module:
    """Return the module below all adapters that were placed around it."""
    while isinstance(module, Adapter):
        module = module.base
    return module


def named_adapters(model: nn.Module) -> Iterator[tuple[str, Adapter]]:
    """Yield every adapter in the model with its path, outer ones before inner ones."""
    for path, module in model.named_modules():
        if isinstance(module, Adapter):
            yield path, module


def adapter_names(model: nn.Module) -> list[str]:
    """Return the sorted names of all sets of adapter weights in the model."""
    return sorted({name for _, adapter in named_adapters(model) for name in adapter.configs})


def check_name(name: str) -> None:
    """Raise a ValueError unless a set of weights can have this name."""
    if not re.fullmatch(r"[\w-]+", name) or hasattr(nn.ParameterDict(), name):
        raise ValueError(
            f"{name!r} cannot be the name of an adapter. Use letters, digits, _ and -, and no method of a dict."
        )


def check_once(names: Sequence[Any]) -> None:
    """Raise a ValueError if a name comes twice: the adapter would act twice."""
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{twice!r} is named twice, and would act twice. Name each adapter once.")


def taken(name: str) -> ValueError:
    """Return the error for a name that is in use."""
    return ValueError(f"This model already has an adapter named {name!r}. Choose another name, or delete it first.")


def scope_of(model: nn.Module) -> Scope:
    """Return the model's scope, making one if it has none."""
    found = scopes_of(model)
    if found:
        return found[0]
    # In __dict__, not by setattr: it is no module and no parameter, and deepcopy keeps it shared with the adapters.
    scope = model.__dict__["_adapter_scope"] = Scope()
    return scope


def scopes_of(model: nn.Module) -> list[Scope]:
    """Return the scopes of all adapted models in a module: one, as a rule."""
    found: dict[Scope, None] = {}
    for module in model.modules():
        if isinstance(module, Adapter):
            found[module.scope] = None
        elif "_adapter_scope" in module.__dict__:
            found[module.__dict__["_adapter_scope"]] = None
    return list(found)


def remember(model: nn.Module, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Keep a CPU copy of parameters that are about to be trained in place, so that `disabled` can restore the base."""
    scope = scope_of(model)
    for key, parameter in parameters:
        if parameter.is_meta:  # a model that is only counted
            continue
        scope.originals[key] = (parameter, parameter.detach().to("cpu", copy=True))


def merge(model: nn.Module, names: tuple[str, ...] | None = None) -> nn.Module:
    """Fold every adapter of a model into its base, in place, and return the model without adapters.

    Args:
        model: the adapted model.
        names: which sets to fold; default: those that act.

    Raises:
        ValueError: if a name is unknown, or comes twice.
        TypeError: if a method cannot be folded, or the base is quantised.
    """
    found = [(path, m) for path, m in model.named_modules(remove_duplicate=False) if isinstance(m, Adapter)]
    unknown = [name for name in names or () if name not in adapter_names(model)]
    check_once(names or ())
    if unknown:
        raise ValueError(f"No adapter is named {unknown[0]!r}. This model has {adapter_names(model)}.")
    reasons = [why for _, adapter in found if (why := getattr(type(innermost(adapter)), "unmergeable", ""))]
    for path, adapter in found:
        weight = innermost(adapter)._parameters.get("weight")
        if weight is not None and not weight.is_floating_point():
            reasons.append(
                f"{path} holds its weight as {weight.dtype}: nothing folds into it. Load the base unquantised."
            )
        acts = [name for name in (adapter.active() if names is None else names) if name in adapter.configs]
        if acts and type(adapter).merge is Adapter.merge:
            kind = type(adapter).__name__
            reasons.append(f"{kind} cannot be merged into its base. Save the adapter instead of merging.")
    if reasons:  # here, not in the first layer that cannot: nothing may be half merged
        raise TypeError(reasons[0])
    make_plain(model)
    folded: dict[int, nn.Module] = {}
    for path, adapter in reversed(found):  # inner ones first; one at several paths (tied) is folded once
        if id(adapter) not in folded:
            folded[id(adapter)] = adapter.merge(names)
        model.set_submodule(path, folded[id(adapter)])
    model.__dict__.pop("_adapter_scope", None)
    return model
