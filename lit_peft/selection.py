"""Which named adapters act in a call.

The choice is made by the call and travels with it. Gradient checkpointing replays a layer long after the choice was
made, on CUDA in another thread: read at replay time, the choice would be whatever was chosen *last*, and with two
adapters in one backward pass the gradients would be wrong with no error. So it is captured when the layer first runs
and restored for its replay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from lit_peft.blocks import Block, Entry, names_in


class Rows:
    """A choice for each row of a batch: which set of weights acts on it.

    Args:
        names: one entry a row: a name or a block, several that act together, or None for the base alone.

    Attributes:
        count: number of rows.
        entries: the names and blocks that some row asks for.
        names: the names in them.
        each: what each row asks for.
        derived: what adapters make of this choice and keep beside it, under keys of their own.
    """

    def __init__(self, names: Sequence[Entry | Sequence[Entry] | None]) -> None:
        self.each: list[tuple[Entry, ...]] = []
        self.derived: dict[Any, Any] = {}
        found: dict[tuple[Entry, ...], list[int]] = {}
        for row, wanted in enumerate(names):
            group = () if wanted is None else (wanted,) if isinstance(wanted, str | Block) else tuple(wanted)
            found.setdefault(group, []).append(row)
            self.each.append(group)
        self.count = len(names)
        self.entries = tuple(dict.fromkeys(entry for group in found for entry in group))
        self.names = names_in(self.entries)
        self._groups = [(group, len(rows)) for group, rows in found.items()]
        order = [row for rows in found.values() for row in rows]
        self._order = None if order == sorted(order) else torch.tensor(order)
        self._rows = {
            entry: torch.tensor([row for group, rows in found.items() if entry in group for row in rows])
            for entry in self.entries
        }

    def rows(self, entry: Entry) -> list[int]:
        """Return the rows that ask for a name or a block."""
        found = self._rows.get(entry)
        return [] if found is None else found.tolist()

    def of(self, entry: Entry, x: Tensor) -> Tensor:
        """Return the indices into the first dimension of x (rows, ..., width) that an entry acts on; may be empty.

        Raises:
            ValueError: if x does not have as many rows as names were given.
        """
        # token ids have no width: two dimensions of them are a batch, while two of numbers are single tokens
        beams = self.beams(x, x.ndim + (not x.is_floating_point()))
        return _repeated(self._rows.get(entry, torch.empty(0, dtype=torch.long)).to(x.device), beams)

    def grouped(self, x: Tensor, y: Tensor) -> tuple[list[tuple[tuple[Entry, ...], int]], Tensor | None]:
        """Return the groups of rows that ask for the same, as (names, number of rows), and the order that sorts them.

        Args:
            x: the input (rows, ...) of a layer.
            y: its output (rows, ..., width).

        Returns:
            The groups, and the indices that put the rows of one group beside each other; None where they are already.

        Raises:
            ValueError: if x does not have as many rows as names were given.
        """
        beams = self.beams(x, y.ndim)
        order = None if self._order is None else _repeated(self._order.to(x.device), beams)
        return [(entry, number * beams) for entry, number in self._groups], order

    def beams(self, x: Tensor, dimensions: int) -> int:
        """Return how often each row comes in a layer's input x: a generator's beams repeat it.

        Args:
            x: (rows, ...).
            dimensions: how many the layer's output has.

        Raises:
            ValueError: if x does not have as many rows as names were given.
        """
        beams, rest = divmod(x.shape[0], self.count)
        # they only come in generation, which needs no gradients: in training it is a name too few
        if rest or not beams or (beams > 1 and (dimensions < 3 or torch.is_grad_enabled())):
            raise ValueError(
                f"Names are routed to {self.count} rows, but a layer was called with {x.shape[0]}. Give one name for "
                "each row of the batch; layers that see single tokens (experts) cannot be routed."
            )
        return beams


def _repeated(rows: Tensor, beams: int) -> Tensor:
    """Return the indices of all beams of the given rows."""
    return rows if beams == 1 else (rows[:, None] * beams + torch.arange(beams, device=rows.device)).flatten()


Choice = tuple[Entry, ...] | Rows


class Scope:
    """The names that act by default in one adapted model, and what turns its in-place training off.

    Attributes:
        active: names and blocks that act when nothing else is chosen.
        current: what acts right now; equals `active` outside of `adapters` and `disabled`. Compiled code reads this
            (torch.compile guards on plain attributes but cannot trace a ContextVar), eager code the ContextVar.
        originals: base values of parameters that are trained in place, for `disabled`.
        irreversible: why `disabled` cannot give the base back, or an empty string.
        trained: names of the sets that are trained; None: all of them.
    """

    def __init__(self) -> None:
        self.active: tuple[Entry, ...] = ("default",)
        self.current: Choice = ("default",)
        self.originals: dict[str, tuple[nn.Parameter, Tensor]] = {}
        self.irreversible = ""
        self.trained: tuple[str, ...] | None = None


# What an outer adapter tells those inside it in one call: a padding mask, tensors that layers share. Captured for
# replays like the selection; mirrored in a plain dict for compiled code.
_TOLD: ContextVar[Mapping[str, Any] | None] = ContextVar("lit_peft_told", default=None)
_CURRENT: dict[str, Any] = {}
_SELECTED: ContextVar[Mapping[Scope, Choice] | None] = ContextVar("lit_peft_selected", default=None)


def acting(scope: Scope) -> Choice:
    """Return the names that act in this very call, on the whole batch or row by row."""
    if torch.compiler.is_compiling():
        return scope.current
    selected = _SELECTED.get()
    return scope.active if selected is None else selected.get(scope, scope.active)


def choose(choice: Mapping[Scope, Choice]) -> AbstractContextManager[None]:
    """Choose names for some scopes inside the `with` block; others keep theirs."""
    return _select({**(_SELECTED.get() or {}), **choice})


@contextmanager
def _select(selection: Mapping[Scope, Choice]) -> Iterator[None]:
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


def told(key: str) -> Any:
    """Return what was told under this key to the call that is running; None if nothing was."""
    return _CURRENT.get(key) if torch.compiler.is_compiling() else (_TOLD.get() or {}).get(key)


@contextmanager
def telling(**facts: Any) -> Iterator[None]:
    """Tell the adapters that are called inside the `with` block something about this call, such as its padding mask."""
    before = _TOLD.get() or {}
    now = {**before, **facts}
    token = _TOLD.set(now)
    _CURRENT.clear()
    _CURRENT.update(now)
    try:
        yield
    finally:
        _TOLD.reset(token)
        _CURRENT.clear()
        _CURRENT.update(before)


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
        captured, facts = _SELECTED.get() or {}, _TOLD.get() or {}

        def replay(*inner: Any, **named: Any) -> Any:
            with _select(captured), telling(**facts):
                return function(*inner, **named)

        return checkpoint(replay, *args, **kwargs)

    run.keeps_selection = True  # type: ignore[attr-defined]
    return run
