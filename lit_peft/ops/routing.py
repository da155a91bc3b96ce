"""Which sets of weights act on which rows of a batch, in the forms that `routed` and its kernels read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Run(NamedTuple):
    """Rows beside each other, `start` to `stop`, on which the same sets act."""

    start: int
    stop: int
    sets: tuple[int, ...]


class Tables(NamedTuple):
    """What the grouped kernels read. A place is a token in the order in which each set's tokens stand together.

    Attributes:
        order: (rows with a set,) the batch's rows, by set.
        blocks: (blocks, 2) the set of each block of places, and the place it begins at.
        sets: (sets, 4) of each set its first place, the place after its last one, its first row in the stack of all A,
            and its rank.
        tokens: in one row of the batch.
        block: places in a block.
        rank: the width of H, a power of two from 16 on: no rank is greater.
    """

    order: Tensor
    blocks: Tensor
    sets: Tensor
    tokens: int
    block: int
    rank: int


class Routing:
    """Which sets of weights act on each row of a batch.

    What is derived from it is kept: all layers of a model ask for the same.

    Args:
        rows: for each row the sets that act on it, as numbers from 0; most often one, or none.

    Attributes:
        count: how many rows there are.
        runs: the rows in order, as few runs as possible.
        alone: whether no row has more than one set.

    Example:
        >>> Routing([(0,), (0,), (), (1,)]).runs
        [Run(start=0, stop=2, sets=(0,)), Run(start=2, stop=3, sets=()), Run(start=3, stop=4, sets=(1,))]
    """

    def __init__(self, rows: Sequence[Sequence[int]]) -> None:
        self.rows = [tuple(sets) for sets in rows]
        self.count = len(self.rows)
        self.alone = all(len(sets) < 2 for sets in self.rows)
        ends = list(accumulate(len(list(same)) for _, same in groupby(self.rows)))
        starts = [0, *ends[:-1]]
        self.runs = [Run(start, end, self.rows[start]) for start, end in zip(starts, ends, strict=True)]
        self._kept: dict[Any, Any] = {}

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def mask(self, ranks: tuple[int, ...], like: Tensor) -> Tensor:
        """Return 1 where a set acts on a row, else 0: (sum of ranks, rows), in another tensor's dtype and device."""

        def make() -> Tensor:
            acts = torch.zeros(len(ranks), self.count, dtype=like.dtype)
            for row, sets in enumerate(self.rows):
                acts[list(sets), row] = 1
            return acts.repeat_interleave(torch.tensor(ranks), 0).to(like.device)

        found: Tensor = self._once(("mask", ranks, like.dtype, like.device), make)
        return found

    def tables(self, ranks: tuple[int, ...], tokens: int, device: torch.device) -> Tables:
        """Return what the grouped kernels read, for sets of these ranks and so many tokens in a row.

        Only where no row has more than one set.
        """

        def make() -> Tables:
            members: list[list[int]] = [[] for _ in ranks]
            for row, sets in enumerate(self.rows):
                for one in sets:
                    members[one].append(row)
            ends = list(accumulate(len(rows) * tokens for rows in members))
            begins = [0, *ends[:-1]]
            offsets = [0, *accumulate(ranks)][:-1]
            # a full block of 64 is what Hopper's products want; sets with few tokens would leave most of it empty
            block = 64 if sum(self.acted) * tokens >= 48 * max(1, sum(map(bool, members))) else 16
            starts = [(one, at) for one, end in enumerate(ends) for at in range(begins[one], end, block)]

            def table(values: Any, width: int) -> Tensor:
                return torch.tensor(values, dtype=torch.int32).view(-1, width).to(device)

            return Tables(
                table([row for rows in members for row in rows], 1)[:, 0],
                table(starts, 2),
                table(list(zip(begins, ends, offsets, ranks, strict=True)), 4),
                tokens,
                block,
                max(16, 1 << (max(ranks) - 1).bit_length()),
            )

        found: Tables = self._once(("tables", ranks, tokens, device), make)
        return found

    @property
    def acted(self) -> list[int]:
        """How many sets act on each row."""
        return [len(sets) for sets in self.rows]


@dataclass(frozen=True)
class Sets:
    """The sets of weights of one layer, and where they act.

    Attributes:
        a: A_i (r_i, in).
        b: B_i (out, r_i).
        scales: s_i.
        rows: which of them act on which rows.
    """

    a: Sequence[Tensor]
    b: Sequence[Tensor]
    scales: Sequence[float]
    rows: Routing

    @property
    def ranks(self) -> tuple[int, ...]:
        """All r_i."""
        return tuple(map(len, self.a))

    def stacked_a(self, dtype: torch.dtype) -> Tensor:
        """Return all A_i below each other, (sum of ranks, in)."""
        return torch.cat([*self.a]).to(dtype)

    def stacked_b(self, dtype: torch.dtype) -> Tensor:
        """Return all s_i B_i beside each other, (out, sum of ranks), scaled before they are rounded."""
        if len(set(self.scales)) > 1:
            return torch.cat(torch._foreach_mul([*self.b], [*self.scales]), 1).to(dtype)
        stacked = torch.cat([*self.b], 1)
        return (stacked if self.scales[0] == 1 else stacked.mul_(self.scales[0])).to(dtype)

    def split_a(self, gradient: Tensor, asked: Sequence[bool]) -> list[Tensor | None]:
        """Return the dA_i that are asked for, of all below each other; copies, or one would keep all others alive."""
        pieces = zip(torch.split(gradient, [*self.ranks]), self.a, asked, strict=True)
        return [piece.to(part.dtype, copy=True) if wanted else None for piece, part, wanted in pieces]

    def split_b(self, gradient: Tensor, asked: Sequence[bool]) -> list[Tensor | None]:
        """Return the dB_i that are asked for, of the gradients of all B_i^T below each other, before their scales."""
        pieces = zip(torch.split(gradient, [*self.ranks]), self.b, self.scales, asked, strict=True)
        return [(scale * piece.to(part.dtype)).t() if wanted else None for piece, part, scale, wanted in pieces]
