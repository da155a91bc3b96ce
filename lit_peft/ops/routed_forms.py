"""The plain forms of `routed`: all sets in one product, or run after run of neighbouring rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from lit_peft.ops.routing import Routing, Sets

Gradients = list[Tensor | None]


class Form(Protocol):
    """How the updates of a batch are computed, forward and backward."""

    @staticmethod
    def add(out: Tensor, x: Tensor, sets: Sets) -> Tensor:
        """Add the updates for x (tokens, in) to out (tokens, out) in place, and return H in a layout of its own."""

    @staticmethod
    def back(
        g: Tensor,
        x: Tensor | None,
        h: Tensor | None,
        sets: Sets,
        dx: Tensor | None,
        fresh: bool,
        for_a: Sequence[bool],
        for_b: Sequence[bool],
    ) -> tuple[Gradients, Gradients]:
        """Add to the gradient of x in place, and return dA and dB of the sets that are asked for.

        Args:
            g: the gradient of out (tokens, out).
            x: (tokens, in); None where no dA is asked for.
            h: what `add` returned; None where no dB is asked for.
            sets: as in `add`.
            dx: (tokens, in), or None.
            fresh: dx holds nothing yet, and is filled.
            for_a: of which sets dA is asked for.
            for_b: of which sets dB is asked for.
        """


class Stacked:
    """All sets in one product; H is (sum of ranks, tokens), zero outside of each row's own sets."""

    @staticmethod
    def add(out: Tensor, x: Tensor, sets: Sets) -> Tensor:
        """See `Form`."""
        h = _own(sets.stacked_a(x.dtype) @ x.t(), sets)
        out.addmm_(h.t(), sets.stacked_b(x.dtype).t())
        return h

    @staticmethod
    def back(
        g: Tensor,
        x: Tensor | None,
        h: Tensor | None,
        sets: Sets,
        dx: Tensor | None,
        fresh: bool,
        for_a: Sequence[bool],
        for_b: Sequence[bool],
    ) -> tuple[Gradients, Gradients]:
        """See `Form`."""
        da: Gradients = [None] * len(for_a)
        db = [*da] if h is None else sets.split_b(h @ g, for_b)
        if dx is not None or x is not None:
            inner = _own(sets.stacked_b(g.dtype).t() @ g.t(), sets)
            if dx is not None:
                dx.addmm_(inner.t(), sets.stacked_a(g.dtype), beta=0 if fresh else 1)
            if x is not None:
                da = sets.split_a(inner @ x, for_a)
        return da, db


def _own(h: Tensor, sets: Sets) -> Tensor:
    """Set to zero, in place, what of h (sum of ranks, tokens) is not of a row's own sets."""
    h.view(len(h), sets.rows.count, -1).mul_(sets.rows.mask(sets.ranks, h)[:, :, None])
    return h


class ByRun:
    """Each run of rows by itself; H is one flat tensor, (rank, tokens) of each run and set one after the other."""

    @staticmethod
    def add(out: Tensor, x: Tensor, sets: Sets) -> Tensor:
        """See `Form`."""
        rows, ranks = sets.rows, sets.ranks
        tokens, casts = len(x) // rows.count, _casts(sets, x.dtype)
        h = x.new_empty(sum((run.stop - run.start) * tokens * ranks[i] for run in rows.runs for i in run.sets))
        for i, part, inner in _parts(h, ranks, rows, tokens):
            a, b = casts[i]
            # (rank, tokens), not (tokens, rank): products with narrow results are up to four times slower on CPUs
            torch.mm(a, x[part].t(), out=inner)
            out[part].addmm_(inner.t(), b.t(), alpha=sets.scales[i])
        return h

    @staticmethod
    def back(
        g: Tensor,
        x: Tensor | None,
        h: Tensor | None,
        sets: Sets,
        dx: Tensor | None,
        fresh: bool,
        for_a: Sequence[bool],
        for_b: Sequence[bool],
    ) -> tuple[Gradients, Gradients]:
        """See `Form`."""
        rows, ranks = sets.rows, sets.ranks
        tokens, casts = len(g) // rows.count, _casts(sets, g.dtype)
        da: Gradients = [None] * len(ranks)
        db: Gradients = [None] * len(ranks)
        filled: set[int] = set()
        if dx is not None and fresh:
            for start, stop, acting in rows.runs:
                if not acting:
                    dx[start * tokens : stop * tokens] = 0
        for i, part, inner in _parts(h, ranks, rows, tokens):
            a, b = casts[i]
            if h is not None and for_b[i]:
                db[i] = _sum(db[i], inner @ g[part], sets.b[i].dtype)
            if dx is None and not for_a[i]:
                continue
            slope = (b.t() @ g[part].t()).mul_(sets.scales[i])
            if dx is not None:
                dx[part].addmm_(slope.t(), a, beta=0 if fresh and part.start not in filled else 1)
                filled.add(part.start)
            if x is not None and for_a[i]:
                da[i] = _sum(da[i], slope @ x[part], sets.a[i].dtype)
        for i in range(len(ranks)):
            if for_a[i] and da[i] is None:
                da[i] = torch.zeros_like(sets.a[i])
            if for_b[i]:
                found = db[i]
                db[i] = torch.zeros_like(sets.b[i]) if found is None else found.mul_(sets.scales[i]).t()
        return da, db


def _sum(before: Tensor | None, product: Tensor, dtype: torch.dtype) -> Tensor:
    # in the parameter's dtype: several runs of a set are several roundings
    return product.to(dtype) if before is None else before.add_(product)


def _casts(sets: Sets, dtype: torch.dtype) -> dict[int, tuple[Tensor, Tensor]]:
    acting = {i for run in sets.rows.runs for i in run.sets}
    return {i: (sets.a[i].to(dtype), sets.b[i].to(dtype)) for i in acting}


def _parts(h: Tensor | None, ranks: Sequence[int], rows: Routing, tokens: int) -> Iterator[tuple[int, slice, Any]]:
    """Yield set, tokens and H (rank, tokens), if there is one, of each run and set."""
    at = 0
    for start, stop, acting in rows.runs:
        for i in acting:
            size = (stop - start) * tokens
            end = at + ranks[i] * size
            yield i, slice(start * tokens, stop * tokens), None if h is None else h[at:end].view(ranks[i], size)
            at = end
