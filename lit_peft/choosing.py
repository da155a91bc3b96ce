"""What acts in a call of one adapter: one set of weights or several, row by row, or put together in blocks."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lit_peft.blocks import Average, Block, Entry, Fuse, Stack, names_in
from lit_peft.selection import Choice, Rows, Scope, acting


class Choosing(nn.Module):
    """A module with sets of weights by name, which lets those that the call has chosen change its base's output.

    Attributes:
        base: the adapted module.
        scope: tells which sets act.
        configs: the configuration of each named set.
    """

    reads_output: ClassVar[bool] = False  # whether `change` goes by y alone, so that sets can be stacked
    base: nn.Module
    scope: Scope
    configs: dict[str, Any]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Call the base on x (batch, ..., in) and let every set that acts change its output (batch, ..., out)."""
        choice = acting(self.scope)
        joined: Tensor | None = None
        if isinstance(choice, Rows):
            joined = None if args or kwargs else self.change_rows(choice, x)
        elif len(choice) == 1 and not (args or kwargs) and choice[0] in self.configs:
            joined = self.joined(choice[0], x)
        if joined is not None:
            return joined
        y = self.base(x, *args, **kwargs)
        if isinstance(choice, Rows):
            return self._routed(choice, x, y)
        for entry in choice:
            y = self.applied(entry, x, y)
        return y

    def joined(self, name: str, x: Tensor) -> Tensor | None:
        """Return the base's output for x, changed by one set, where both are one function; else None."""
        return None

    def change_rows(self, choice: Rows, x: Tensor, y: Tensor | None = None) -> Tensor | None:
        """Return the base's output y for x, all rows changed by their own sets in one function, where there is one.

        Args:
            choice: what acts on each row.
            x: the base's input (rows, ...).
            y: the base's output; None: it is to be part of the function.

        Returns:
            (rows, ...); or None, and then each set changes its own rows by `change`.
        """
        return None

    def applied(self, entry: Entry, x: Tensor, y: Tensor) -> Tensor:
        """Return what a named set, or a block of several, makes of the base's output y for the input x."""
        if isinstance(entry, str):
            return self.change(entry, x, y) if entry in self.configs else y
        if not any(name in self.configs for name in entry.names):
            return y
        if isinstance(entry, Average):  # of the outputs: the weights sum to one, so that is y and the mean change
            pairs = zip(entry.weights, entry.parts, strict=True)
            return sum(weight * self.applied(part, x, y) for weight, part in pairs).to(y.dtype)  # type: ignore[union-attr]
        for part in entry.parts:
            y = self.applied(part, x, y)
        return y

    def refusal(self, block: Block) -> str:
        """Return why this adapter cannot apply a block of its sets; an empty string if it can, or has none of them."""
        held = [name for name in block.names if name in self.configs]
        kind, together = type(self).__name__, ", ".join(map(repr, block.names))
        way = f"Let them act together: adapters(model, {together})."
        if held and type(self).forward is not Choosing.forward:
            return f"{kind} cannot apply {block}: it works inside its layer, not on the output. {way}"
        for inner in block.inside() if held else ():
            if isinstance(inner, Fuse):
                return f"{kind} cannot apply {inner}: only bottleneck adapters are fused. {way}"
            if isinstance(inner, Stack) and not self.reads_output and self.meets(inner):
                return f"{kind} cannot apply {inner}: it reads its layer's input, whatever acted before. {way}"
        return ""

    def meets(self, block: Block) -> bool:
        """Whether several parts of a block have weights in this adapter."""
        return sum(any(name in self.configs for name in names_in((part,))) for part in block.parts) > 1

    def needing(self, name: str) -> list[str]:
        """Return the names of the sets here that need another one."""
        return []

    def _routed(self, choice: Rows, x: Tensor, y: Tensor) -> Tensor:
        """Let every set change its own rows of y: sorted by set first, so that each works on one slice.

        That is two copies of y however many sets there are, and none where the rows come sorted.
        """
        if not any(name in self.configs for name in choice.names) and not self.together:
            return y
        changed = self.change_rows(choice, x, y)
        if changed is not None:
            return changed
        groups, order = choice.grouped(x, y)
        if order is not None:
            x, y = x.index_select(0, order), y.index_select(0, order)
        pieces, start = [], 0
        for names, number in groups:
            taken, piece = x.narrow(0, start, number), y.narrow(0, start, number)
            for entry in names:
                piece = self.applied(entry, taken, piece).to(y.dtype)
            pieces.append(piece)
            start += number
        if self.together:
            absent = [name for name in self.configs if name not in choice.names]
            pieces += [self.change(name, x[:0], y[:0]).to(y.dtype) for name in absent]
        y = torch.cat(pieces)
        return y if order is None else y.index_select(0, order.argsort())

    @property
    def together(self) -> bool:
        """Whether every set takes part in a routed call, if need be with no row, as with several processes."""
        # DDP waits for a gradient from each
        return self.training and dist.is_available() and dist.is_initialized()

    def change(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """Return what one named set makes of the base's output y for the input x, without changing either.

        Raises:
            TypeError: if the method works in another way; then it overrides `forward`.
        """
        raise TypeError(f"{type(self).__name__} defines neither change nor forward.")

    def active(self) -> tuple[str, ...]:
        """Return the names that act in this very call on the whole batch, in order.

        Raises:
            TypeError: if a block acts; or names are routed row by row, which an adapter with a `forward` of its own
                reads from `shares`.
        """
        choice = self._by_name()
        if isinstance(choice, Rows):
            raise TypeError(f"{type(self).__name__} cannot be routed row by row. Use `adapters` for whole batches.")
        return tuple(name for name in names_in(choice) if name in self.configs)

    def _by_name(self) -> Choice:
        """Return what acts in this call, in which none of this adapter's sets is part of a block."""
        choice = acting(self.scope)
        for entry in choice.entries if isinstance(choice, Rows) else choice:
            if not isinstance(entry, str) and any(name in self.configs for name in entry.names):
                kind = type(self).__name__
                raise TypeError(f"{kind} needs adapters by name, and {entry} acts. Choose names: adapters(model, 'a').")
        return choice

    def chosen(self) -> tuple[str, ...]:
        """Return the names that act in this very call on at least one row, alone or in a block, in order."""
        choice = acting(self.scope)
        names = choice.names if isinstance(choice, Rows) else names_in(choice)
        return tuple(name for name in names if name in self.configs)

    def shares(self, x: Tensor) -> list[tuple[str, Tensor | None]]:
        """Return the names that act in this very call, each with the rows of x it acts on; None for all rows.

        Raises:
            TypeError: if one of them acts as part of a block.
        """
        choice = self._by_name()
        if not isinstance(choice, Rows):
            return [(entry, None) for entry in choice if isinstance(entry, str) and entry in self.configs]
        names = self.configs if self.together else [name for name in choice.names if name in self.configs]
        return [(name, choice.of(name, x)) for name in names]
