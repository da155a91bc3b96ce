"""Named adapters: several sets of weights on one base, added, chosen, routed row by row, switched off, deleted.

Which set acts is chosen by the *call*: `with adapters(model, "reward"):`, `with routed(model, names):`,
`with disabled(model):`. The choice travels with the call, through gradient checkpointing too (see `selection`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from lit_peft.adapter import Adapter, adapter_names, named_adapters, scopes_of
from lit_peft.selection import Rows, choose, originals_restored


def add_adapter(model: nn.Module, name: str, config: Any = None) -> None:
    """Give every adapter of a model another named set of weights, at its starting values.

    Args:
        model: the adapted model.
        name: the new name; it acts when chosen with `adapters` or `activate`.
        config: the new set's configuration, for the adapters of its method; None: that of each adapter's first set.

    Raises:
        ValueError: if the name is taken or no adapter takes this kind of configuration.
    """
    found = [adapter for _, adapter in named_adapters(model)]
    if config is not None:
        found = [adapter for adapter in found if type(next(iter(adapter.configs.values()))) is type(config)]
    if not found:
        raise ValueError(f"No adapter of this model takes a {type(config).__name__}. Place one first.")
    for adapter in found:
        adapter.add(name, config if config is not None else next(iter(adapter.configs.values())))


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
    _check_known(model, names)
    return choose(dict.fromkeys(scopes_of(model), names))


def routed(model: nn.Module, names: Sequence[str | Sequence[str] | None]) -> AbstractContextManager[None]:
    """Choose for each row of the batch which named adapter acts on it, in the calls made inside the `with` block.

    The base runs once on the whole batch. Works in training too: each set gets gradients from its own rows only.

    Args:
        model: the adapted model, or a LightningModule that holds it.
        names: one entry a row: a name, several that act together, or None for the base alone.

    Raises:
        ValueError: if a name is unknown, or there are none; in the call, if the batch has another number of rows.
        TypeError: if a row asks for the base and weights of the base are trained in place.

    Example:
        >>> from lit_peft import routed
        >>> # with routed(model, ["policy", "policy", "reward", None]):
        >>> #     logits = model(**batch).logits
    """
    if not names:
        raise ValueError("routed needs one name for each row of the batch; it got none.")
    rows = Rows(names)
    _check_known(model, rows.names)
    if any(not entry for entry in names) and any(scope.originals for scope in scopes_of(model)):
        raise TypeError(
            "A row cannot be answered by the base alone: weights of the base itself are trained here (biases, modules "
            "to save, layers), for all rows. Use `disabled` for a batch of such rows."
        )
    return choose(dict.fromkeys(scopes_of(model), rows))


def delete_adapter(model: nn.Module, name: str) -> None:
    """Remove one named set of weights from a model; adapters that held no other go, and the base takes their place.

    Raises:
        ValueError: if no adapter has the name.
    """
    _check_known(model, (name,))
    found = [(path, m) for path, m in model.named_modules(remove_duplicate=False) if isinstance(m, Adapter)]
    for adapter in {id(adapter): adapter for _, adapter in found}.values():
        if name in adapter.configs:
            adapter.remove(name)
    for path, adapter in reversed(found):  # inner ones first
        if not adapter.configs:
            model.set_submodule(path, adapter.base)
    for scope in scopes_of(model):
        scope.active = tuple(other for other in scope.active if other != name)
        scope.current = scope.active


def _check_known(model: nn.Module, names: Iterable[str]) -> None:
    known = adapter_names(model)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"No adapter is named {unknown[0]!r}. This model has {known}.")


def activate(model: nn.Module, *names: str) -> None:
    """Choose which named adapters act by default, until chosen otherwise.

    Raises:
        ValueError: if a name is unknown.
    """
    with adapters(model, *names):  # validates
        for scope in scopes_of(model):
            scope.active = names
    for scope in scopes_of(model):
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
    scopes = scopes_of(model)
    reasons = [scope.irreversible for scope in scopes if scope.irreversible]
    if reasons:
        raise TypeError(reasons[0])
    with ExitStack() as stack:
        stack.enter_context(choose(dict.fromkeys(scopes, ())))
        for scope in scopes:
            if scope.originals:
                stack.enter_context(torch.no_grad())
                stack.enter_context(originals_restored(scope))
        yield
