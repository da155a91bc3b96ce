"""Which named adapters act in a call.

The choice is made by the call and travels with it. Gradient checkpointing replays a layer long after the choice was
made, on CUDA in another thread: read at replay time, the choice would be whatever was chosen *last*, and with two
adapters in one backward pass the gradients would be wrong with no error. So it is captured when the layer first runs
and restored for its replay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn


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


def acting(scope: Scope) -> tuple[str, ...]:
    """Return the names that act in this very call."""
    if torch.compiler.is_compiling():
        return scope.current
    selected = _SELECTED.get()
    return scope.active if selected is None else selected.get(scope, scope.active)


def choose(choice: Mapping[Scope, tuple[str, ...]]) -> AbstractContextManager[None]:
    """Choose names for some scopes inside the `with` block; others keep theirs."""
    return _select({**(_SELECTED.get() or {}), **choice})


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


@contextmanager
def originals_restored(scope: Scope) -> Iterator[None]:
    """Put the base values of weights that are trained in place back, inside the `with` block.

    Raises:
        TypeError: if they are sharded.
    """
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
