"""The grouped form of `routed`: each token's products with its own set's matrices, in Triton kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from lit_peft.ops.routed_forms import Gradients
from lit_peft.ops.routing import Sets


class Grouped:
    """One launch for all sets; H is (places, rank), see `Tables`, and one set at most acts on a row."""

    MOST_RANK: ClassVar[int] = 128  # what fits into a program's registers

    @staticmethod
    def add(out: Tensor, x: Tensor, sets: Sets) -> Tensor:
        """See `Form`."""
        t = sets.rows.tables(sets.ranks, len(x) // sets.rows.count, x.device)
        h: Tensor = shrink(
            x.contiguous(), sets.stacked_a(x.dtype), t.order, t.blocks, t.sets, t.tokens, t.block, t.rank
        )
        expand(out, h, sets.stacked_b(x.dtype).t().contiguous(), t.order, t.blocks, t.sets, t.tokens, t.block)
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
        g, total = g.contiguous(), sum(sets.ranks)
        t = sets.rows.tables(sets.ranks, len(g) // sets.rows.count, g.device)
        da: Gradients = [None] * len(for_a)
        db = [*da]
        if h is not None:
            db = sets.split_b(collect(h, g, total, t.order, t.sets, t.tokens, t.block), for_b)
        if dx is not None or x is not None:
            inner = shrink(
                g, sets.stacked_b(g.dtype).t().contiguous(), t.order, t.blocks, t.sets, t.tokens, t.block, t.rank
            )
            if dx is not None:
                expand(
                    dx.zero_() if fresh else dx,
                    inner,
                    sets.stacked_a(g.dtype),
                    t.order,
                    t.blocks,
                    t.sets,
                    t.tokens,
                    t.block,
                )
            if x is not None:
                da = sets.split_a(collect(inner, x.contiguous(), total, t.order, t.sets, t.tokens, t.block), for_a)
        return da, db


# As registered operations the launches have shapes without data: fake tensors, the memory count and compilers see them.
@torch.library.custom_op("lit_peft::grouped_shrink", mutates_args=())
def shrink(
    x: Tensor, m: Tensor, order: Tensor, blocks: Tensor, sets: Tensor, tokens: int, block: int, rank: int
) -> Tensor:
    """Return h (places, rank) of x (tokens of the batch, width) and m (sum of ranks, width)."""
    from lit_peft.kernels.grouped import shrink

    return shrink(x, m, order, blocks, sets, tokens, block, rank)


@shrink.register_fake
def _(x: Tensor, m: Tensor, order: Tensor, blocks: Tensor, sets: Tensor, tokens: int, block: int, rank: int) -> Tensor:
    return x.new_empty(len(order) * tokens, rank)


@torch.library.custom_op("lit_peft::grouped_expand", mutates_args=("out",))
def expand(
    out: Tensor, h: Tensor, m: Tensor, order: Tensor, blocks: Tensor, sets: Tensor, tokens: int, block: int
) -> None:
    """Add each place's product with its set's rows of m (sum of ranks, width) to out (tokens of the batch, width)."""
    from lit_peft.kernels.grouped import expand

    expand(out, h, m, order, blocks, sets, tokens, block)


@expand.register_fake
def _(out: Tensor, h: Tensor, m: Tensor, order: Tensor, blocks: Tensor, sets: Tensor, tokens: int, block: int) -> None:
    return None


@torch.library.custom_op("lit_peft::grouped_collect", mutates_args=())
def collect(h: Tensor, x: Tensor, total: int, order: Tensor, sets: Tensor, tokens: int, block: int) -> Tensor:
    """Return (total, width) in float32: of each set, the sum over its places of h and x."""
    from lit_peft.kernels.grouped import collect

    return collect(h, x, total, order, sets, tokens, block)


@collect.register_fake
def _(h: Tensor, x: Tensor, total: int, order: Tensor, sets: Tensor, tokens: int, block: int) -> Tensor:
    return x.new_empty(total, x.shape[1], dtype=torch.float32)
