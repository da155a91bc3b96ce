"""Adapters and the one verb: `place`.

An `Adapter` is a trainable module around one frozen `base` module. It can hold several sets of weights by name; which
of them act is chosen by the *call* (see `named`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch.distributed as dist
from torch import Tensor, nn

from lit_peft.selection import Rows, Scope, acting

Where = Iterable[str] | Mapping[str, Any] | Callable[[str, nn.Module], bool]


class Adapter(nn.Module):
    """A trainable module around one frozen `base` module: the base class of every method's own module.

    Subclasses implement `add` (make the parameters of one named set), `change` (what one set makes of the base's
    output) or, where that is not enough, `forward`; and `merge` where it exists. What they do not define is looked up
    on the base, so that code which reads `layer.weight` or `layer.in_features` still works.

    Attributes:
        base: the adapted module.
        configs: the configuration of each named set.
        frozen: beginnings of the names of own parameters that are saved but never trained.

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
    peft_type: Any = ""  # the kind of folder that holds its weights; empty: it has none
    frozen: ClassVar[tuple[str, ...]] = ()

    def __init__(self, base: nn.Module, config: Any, name: str = "default") -> None:
        super().__init__()
        self.base = base
        self.scope = Scope()
        self.configs: dict[str, Any] = {}
        self.add(name, config)

    def add(self, name: str, config: Any) -> None:
        """Make the parameters of another named set; subclasses extend this.

        Raises:
            ValueError: if the name is taken.
        """
        if name in self.configs:
            raise _taken(name)
        self.configs[name] = config

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Call the base on x (batch, ..., in) and let every set that acts change its output (batch, ..., out)."""
        y = self.base(x, *args, **kwargs)
        for name, rows in self.shares(x):
            if rows is None:
                y = self.change(name, x, y)
            else:
                y = y.index_copy(0, rows, self.change(name, x[rows], y[rows]).to(y.dtype))
        return y

    def change(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """Return what one named set makes of the base's output y for the input x, without changing either.

        Raises:
            TypeError: if the method works in another way; then it overrides `forward`.
        """
        raise TypeError(f"{type(self).__name__} defines neither change nor forward.")

    def active(self) -> tuple[str, ...]:
        """Return the names that act in this very call on the whole batch, in order.

        Raises:
            TypeError: if names are routed row by row, which an adapter with a `forward` of its own reads from `shares`.
        """
        choice = acting(self.scope)
        if isinstance(choice, Rows):
            raise TypeError(f"{type(self).__name__} cannot be routed row by row. Use `adapters` for whole batches.")
        return tuple(name for name in choice if name in self.configs)

    def shares(self, x: Tensor) -> list[tuple[str, Tensor | None]]:
        """Return the names that act in this very call, each with the rows of x it acts on; None for all rows."""
        choice = acting(self.scope)
        if not isinstance(choice, Rows):
            return [(name, None) for name in choice if name in self.configs]
        # With several processes every set takes part, if need be with no row: DDP waits for a gradient from each.
        together = self.training and dist.is_available() and dist.is_initialized()
        names = self.configs if together else [name for name in choice.names if name in self.configs]
        return [(name, choice.of(name, x)) for name in names]

    def own_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the adapter's own parameters, not the base's, with names relative to this module."""
        for key, parameter in self.named_parameters():
            if not key.startswith("base."):
                yield key, parameter

    def trained_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the own parameters that training changes: all but the `frozen` ones."""
        for key, parameter in self.own_parameters():
            if not key.startswith(self.frozen):
                yield key, parameter

    def remove(self, name: str) -> None:
        """Delete one named set.

        Raises:
            ValueError: if there is none of that name.
        """
        if name not in self.configs:
            raise ValueError(f"No adapter is named {name!r}. This layer has {sorted(self.configs)}.")
        del self.configs[name]
        for module in self._modules.values():
            if isinstance(module, nn.ParameterDict) and name in module:
                del module[name]

    def tensors(self, name: str = "default") -> dict[str, Tensor]:
        """Return one named set as `{file key: tensor}`, in the layout of HF PEFT where PEFT has the method."""
        return {
            key.removesuffix(f".{name}"): value.detach()
            for key, value in self.own_parameters()
            if key.endswith(f".{name}")
        }

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

    def merge(self, names: tuple[str, ...] | None = None) -> nn.Module:
        """Fold the named sets (default: the active ones) into the base and return it.

        Raises:
            TypeError: if the method cannot be folded.
        """
        raise TypeError(f"{type(self).__name__} cannot be merged into its base. Save the adapter instead of merging.")

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


def place(model: nn.Module, where: Where, make: Callable[..., Adapter]) -> list[str]:
    """Swap every matching module of a model for an adapter around it.

    Works on any `nn.Module`, with or without a Trainer. A module that sits at several paths (a tied embedding) gets one
    adapter, which then sits at all of them.

    Args:
        model: the model to change, in place.
        where: module paths, or a predicate over (path, module), or `{path: config}`.
        make: builds the adapter around one module, such as `lambda base: LoRALinear(base, LoRAConfig())`; with
            `{path: config}` it is called with the base and the config.

    Returns:
        The paths that were adapted.

    Raises:
        ValueError: if a path does not exist or nothing matches.

    Example:
        >>> import torch
        >>> from lit_peft import LoRAConfig, place
        >>> from lit_peft.methods.lora import LoRALinear
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> place(model, ["0", "2"], lambda base: LoRALinear(base, LoRAConfig(r=2)))
        ['0', '2']
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    if callable(where):
        paths = [path for path, module in modules.items() if path and where(path, module)]
    else:
        paths = list(where)
    if not paths:
        raise ValueError("Nothing to adapt: no module matched. Check the method's targets.")
    unknown = [path for path in paths if path not in modules]
    if unknown:
        raise ValueError(f"No module at {unknown[0]!r} in {type(model).__name__}.")
    scope = scope_of(model)
    made: dict[int, Adapter] = {}
    for path in paths:
        base = modules[path]
        adapter = made.get(id(base))
        if adapter is None:
            adapter = make(base, where[path]) if isinstance(where, Mapping) else make(base)
            made[id(base)] = adapter
            adapter.scope = scope
            adapter.train(base.training)
            # The parent is looked up afresh: an adapter placed a moment ago may have become the parent.
            for alias in [alias for alias, module in modules.items() if module is base]:
                model.set_submodule(alias, adapter)
    return paths


def join(
    model: nn.Module, where: Mapping[str, Any], kind: Callable[[nn.Module], type[Adapter]], name: str = "default"
) -> list[str]:
    """Give the modules at some paths one more named set each, in an adapter that stands there or in a new one.

    Args:
        model: the model to change, in place.
        where: `{path: config}`.
        kind: tells the adapter's class from the innermost module at a path.
        name: the set's name.

    Returns:
        The paths.

    Raises:
        ValueError: if the name is taken at one of them, or a path does not exist. Nothing is changed then.
    """
    standing: dict[str, Adapter] = {}
    for path in where:
        module = model.get_submodule(path)
        wanted = kind(innermost(module))
        while isinstance(module, Adapter):
            if type(module) is wanted:
                standing[path] = module
                if name in module.configs:
                    raise _taken(name)
            module = module.base
    fresh = {path: config for path, config in where.items() if path not in standing}
    if fresh:
        place(model, fresh, lambda base, config: kind(innermost(base))(base, config, name))
    for path, adapter in standing.items():
        adapter.add(name, where[path])
    return list(where)


def _taken(name: str) -> ValueError:
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
        TypeError: if a method cannot be folded.
    """
    found = [(path, m) for path, m in model.named_modules(remove_duplicate=False) if isinstance(m, Adapter)]
    folded: dict[int, nn.Module] = {}
    for path, adapter in reversed(found):  # inner ones first; one at several paths (tied) is folded once
        if id(adapter) not in folded:
            folded[id(adapter)] = adapter.merge(names)
        model.set_submodule(path, folded[id(adapter)])
    model.__dict__.pop("_adapter_scope", None)
    return model
