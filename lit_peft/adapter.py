"""Adapters, their names, and the one verb: `place`.

An `Adapter` is a trainable module around one frozen `base` module. It can hold several sets of weights by name. Which
of them act is chosen by the *call* (`with adapters(model, "reward"):`, `with disabled(model):`) and travels with the
call: gradient checkpointing replays a layer long after the choice was made, on CUDA in another thread, so the choice
is captured when the layer first runs and restored for its replay (see `keep_selection`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

Where = Iterable[str] | Callable[[str, nn.Module], bool]


class Scope:
    """The names that act by default in one adapted model, and what turns its in-place training off.

    Attributes:
        active: names that act when nothing else is chosen.
        current: what acts right now; equals `active` outside of `adapters` and `disabled`. Compiled code reads this
            (torch.compile guards on plain attributes but cannot trace a ContextVar), eager code the ContextVar.
        originals: base values of parameters that are trained in place, for `disabled`.
        irreversible: why `disabled` cannot give the base back, or an empty string.
    """

    def __init__(self) -> None:
        self.active: tuple[str, ...] = ("default",)
        self.current: tuple[str, ...] = ("default",)
        self.originals: dict[str, tuple[nn.Parameter, Tensor]] = {}
        self.irreversible = ""


_SELECTED: ContextVar[Mapping[Scope, tuple[str, ...]] | None] = ContextVar("lit_peft_selected", default=None)


class Adapter(nn.Module):
    """A trainable module around one frozen `base` module: the base class of every method's own module.

    Subclasses implement `add` (make the parameters of one named set), `forward`, and `merge` where it exists. What they
    do not define is looked up on the base, so that code which reads `layer.weight` or `layer.in_features` still works.

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
            raise ValueError(
                f"This model already has an adapter named {name!r}. Choose another name, or delete it first."
            )
        self.configs[name] = config

    def active(self) -> tuple[str, ...]:
        """Return the names that act in this very call, in order."""
        if torch.compiler.is_compiling():
            chosen = self.scope.current
        else:
            selected = _SELECTED.get()
            chosen = self.scope.active if selected is None else selected.get(self.scope, self.scope.active)
        return tuple(name for name in chosen if name in self.configs)

    def own_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the adapter's own parameters, not the base's, with names relative to this module."""
        for key, parameter in self.named_parameters():
            if not key.startswith("base."):
                yield key, parameter

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


def place(model: nn.Module, where: Where, make: Callable[[nn.Module], Adapter]) -> list[str]:
    """Swap every matching module of a model for an adapter around it.

    Works on any `nn.Module`, with or without a Trainer. A module that sits at several paths (a tied embedding) gets one
    adapter, which then sits at all of them.

    Args:
        model: the model to change, in place.
        where: module paths, or a predicate over (path, module).
        make: builds the adapter around one module, such as `lambda base: LoRALinear(base, LoRAConfig())`.

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
            adapter = made[id(base)] = make(base)
            adapter.scope = scope
            adapter.train(base.training)
        # The parent is looked up afresh: an adapter placed a moment ago may have become the parent.
        model.set_submodule(path, adapter)
    return paths


def scope_of(model: nn.Module) -> Scope:
    """Return the model's scope, making one if it has none."""
    found = _scopes(model)
    if found:
        return found[0]
    # In __dict__, not by setattr: it is no module and no parameter, and deepcopy keeps it shared with the adapters.
    scope = model.__dict__["_adapter_scope"] = Scope()
    return scope


def _scopes(model: nn.Module) -> list[Scope]:
    found: dict[Scope, None] = {}
    for module in model.modules():
        if isinstance(module, Adapter):
            found[module.scope] = None
        elif "_adapter_scope" in module.__dict__:
            found[module.__dict__["_adapter_scope"]] = None
    return list(found)


@contextmanager
def _select(selection: Mapping[Scope, tuple[str, ...]]) -> Iterator[None]:
    previous = _SELECTED.get() or {}
    token = _SELECTED.set(selection)
    mirrored = {scope: scope.current for scope in {**previous, **selection}}
    for scope in mirrored:
        scope.current = selection.get(scope, scope.active)
    try:
        yield
    finally:
        for scope, current in mirrored.items():
            scope.current = current
        _SELECTED.reset(token)


def adapters(model: nn.Module, *names: str) -> AbstractContextManager[None]:
    """Choose which named adapters act in the calls made inside the `with` block.

    Args:
        model: the adapted model, or a LightningModule that holds it.
        *names: one or several names; they act together, in this order.

    Raises:
        ValueError: if a name is unknown.

    Example:
        >>> from lit_peft import adapters
        >>> # with adapters(model, "reward"):
        >>> #     scores = model(**batch)
    """
    known = adapter_names(model)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"No adapter is named {unknown[0]!r}. This model has {known}.")
    return _select({**(_SELECTED.get() or {}), **dict.fromkeys(_scopes(model), names)})


def activate(model: nn.Module, *names: str) -> None:
    """Choose which named adapters act by default, until chosen otherwise.

    Raises:
        ValueError: if a name is unknown.
    """
    with adapters(model, *names):  # validates
        for scope in _scopes(model):
            scope.active = names
    for scope in _scopes(model):
        scope.current = names


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Run the untouched base model inside the `with` block.

    Exact for adapters: they step aside. Methods that train existing weights in place (`Freeze`, `Full` with
    `keep_base`) have the original values put back for the duration, with gradients off: a value swapped in for a moment
    cannot be what a later backward pass sees.

    Args:
        model: the adapted model, or a LightningModule that holds it.

    Raises:
        TypeError: if weights were trained in place and no copy of the base was kept.

    Example:
        >>> from lit_peft import disabled
        >>> # with disabled(model):
        >>> #     reference = model(**batch).logits
    """
    scopes = _scopes(model)
    reasons = [scope.irreversible for scope in scopes if scope.irreversible]
    if reasons:
        raise TypeError(reasons[0])
    with ExitStack() as stack:
        stack.enter_context(_select({**(_SELECTED.get() or {}), **dict.fromkeys(scopes, ())}))
        for scope in scopes:
            if scope.originals:
                stack.enter_context(torch.no_grad())
                stack.enter_context(_swapped(scope))
        yield


@contextmanager
def _swapped(scope: Scope) -> Iterator[None]:
    originals, scope.originals = scope.originals, {}  # a nested `disabled` finds nothing left to swap
    tuned: list[tuple[nn.Parameter, Tensor]] = []
    try:
        for key, (parameter, original) in originals.items():
            if type(parameter.data) is not Tensor:
                kind = type(parameter.data).__name__
                raise TypeError(
                    f"Cannot give the base back: {key} is sharded ({kind}). Use `disabled` before sharding."
                )
            tuned.append((parameter, parameter.data))
            parameter.data = original.to(parameter.device, parameter.dtype)
        yield
    finally:
        for parameter, data in tuned:
            parameter.data = data.to(parameter.device)
        scope.originals = originals


def remember(model: nn.Module, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Keep a CPU copy of parameters that are about to be trained in place, so that `disabled` can restore the base."""
    scope = scope_of(model)
    for key, parameter in parameters:
        scope.originals[key] = (parameter, parameter.detach().to("cpu", copy=True))


def keep_selection(model: nn.Module) -> None:
    """Make gradient checkpointing replay each layer with the adapters that acted when it first ran.

    Call it after gradient checkpointing was switched on (the `PEFT` mixin does). Reading the choice at replay time
    would use whatever was chosen *last*: with two adapters in one backward pass the gradients are then wrong with no
    error.
    """
    wrapped: dict[int, Callable[..., Any]] = {}
    for module in model.modules():
        function = module.__dict__.get("_gradient_checkpointing_func")
        if function is None or getattr(function, "keeps_selection", False):
            continue
        module.__dict__["_gradient_checkpointing_func"] = wrapped.setdefault(id(function), capturing(function))


def capturing(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a checkpointing function so that its replay sees the adapters that were chosen at the call.

    Args:
        checkpoint: such as `torch.utils.checkpoint.checkpoint`.

    Returns:
        A function with the same arguments.
    """

    def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # a compiled region traces its replay at the call
            return checkpoint(function, *args, **kwargs)
        captured = _SELECTED.get() or {}

        def replay(*inner: Any, **named: Any) -> Any:
            with _select(captured):
                return function(*inner, **named)

        return checkpoint(replay, *args, **kwargs)

    run.keeps_selection = True  # type: ignore[attr-defined]
    return run


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
