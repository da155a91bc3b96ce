"""Low-rank products of tokens that belong to different sets of weights, each token with its own set's matrix.

    shrink:   h[p] = M_i x[t(p)]                        M_i (r_i, width), the rows of set i in the stack of all M
    expand:   out[t(p)] += M_i^T h[p]
    collect:  d_i = sum over the places p of set i of h[p] x[t(p)]^T       (r_i, width)

A place p is a token in the order in which each set's tokens stand together; t(p) is where it is in the batch. The
tables are those of `lit_peft.ops.routing`. Backward, the same three are called with A and B exchanged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from lit_peft.kernels.build import Build

if TYPE_CHECKING:
    from torch import Tensor


@triton.jit
def _token(order_ptr, place, inside, tokens):
    """Returns which token of the batch stands at a place."""
    row = tl.load(order_ptr + place // tokens, mask=inside, other=0).to(tl.int64)
    return row * tokens + place % tokens


@triton.jit
def shrink_kernel(
    x_ptr, m_ptr, h_ptr, order_ptr, blocks_ptr, sets_ptr, tokens, width,
    R: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """h (places, R), zero beyond a set's rank; one block of places of one set a program."""
    block = tl.program_id(0)
    one, start = tl.load(blocks_ptr + 2 * block), tl.load(blocks_ptr + 2 * block + 1)
    end, first, rank = tl.load(sets_ptr + 4 * one + 1), tl.load(sets_ptr + 4 * one + 2), tl.load(sets_ptr + 4 * one + 3)
    place, r = start + tl.arange(0, ROWS), tl.arange(0, R)
    inside, held = place < end, r < rank
    token = _token(order_ptr, place, inside, tokens)
    line = (first + r).to(tl.int64)
    h = tl.zeros((ROWS, R), tl.float32)
    for begin in range(0, width, COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        within = column < width
        x = tl.load(
            (x_ptr + token * width)[:, None] + column[None, :], mask=inside[:, None] & within[None, :], other=0.0
        )
        m = tl.load((m_ptr + line * width)[None, :] + column[:, None], mask=held[None, :] & within[:, None], other=0.0)
        h = tl.dot(x, m, h, input_precision=EXACT)
    at = place.to(tl.int64)[:, None] * R + r[None, :]
    tl.store(h_ptr + at, h.to(h_ptr.dtype.element_ty), mask=inside[:, None])


@triton.jit
def expand_kernel(
    out_ptr, h_ptr, m_ptr, order_ptr, blocks_ptr, sets_ptr, tokens, width,
    R: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """out (tokens, width), changed in place; one block of places and of columns a program."""
    block = tl.program_id(0)
    one, start = tl.load(blocks_ptr + 2 * block), tl.load(blocks_ptr + 2 * block + 1)
    end, first, rank = tl.load(sets_ptr + 4 * one + 1), tl.load(sets_ptr + 4 * one + 2), tl.load(sets_ptr + 4 * one + 3)
    place = start + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside, within = place < end, column < width
    token = _token(order_ptr, place, inside, tokens)
    at, here = (out_ptr + token * width)[:, None] + column[None, :], inside[:, None] & within[None, :]
    out = tl.load(at, mask=here, other=0.0).to(tl.float32)
    for begin in range(0, R, STEP):
        r = begin + tl.arange(0, STEP)
        h = tl.load(h_ptr + place.to(tl.int64)[:, None] * R + r[None, :], mask=inside[:, None], other=0.0)
        line, held = (first + r).to(tl.int64), r < rank
        m = tl.load((m_ptr + line * width)[:, None] + column[None, :], mask=held[:, None] & within[None, :], other=0.0)
        out = tl.dot(h, m, out, input_precision=EXACT)
    tl.store(at, out.to(out_ptr.dtype.element_ty), mask=here)


@triton.jit
def collect_kernel(
    h_ptr, x_ptr, d_ptr, order_ptr, sets_ptr, tokens, width,
    R: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """d (sum of ranks, width) in float32; one set and block of columns a program, so that sums have one order."""
    one = tl.program_id(0)
    start, end = tl.load(sets_ptr + 4 * one), tl.load(sets_ptr + 4 * one + 1)
    first, rank = tl.load(sets_ptr + 4 * one + 2), tl.load(sets_ptr + 4 * one + 3)
    r = tl.arange(0, R)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    within = column < width
    d = tl.zeros((COLUMNS, R), tl.float32)
    for begin in range(start, end, ROWS):
        place = begin + tl.arange(0, ROWS)
        inside = place < end
        token = _token(order_ptr, place, inside, tokens)
        h = tl.load(h_ptr + place.to(tl.int64)[:, None] * R + r[None, :], mask=inside[:, None], other=0.0)
        x = tl.load(
            (x_ptr + token * width)[:, None] + column[None, :], mask=inside[:, None] & within[None, :], other=0.0
        )
        d = tl.dot(tl.trans(x), h, d, input_precision=EXACT)
    at = (d_ptr + (first + r).to(tl.int64) * width)[None, :] + column[:, None]
    tl.store(at, d, mask=(r < rank)[None, :] & within[:, None])


def _sizes(kernel: Any, block: int, rank: int, width: int, small: bool) -> tuple[dict[str, Any], dict[str, int]]:
    """Returns a kernel's blocks and options: places in a block, rank, width, and whether numbers have two bytes."""
    columns = {shrink_kernel: 128, expand_kernel: 128, collect_kernel: 64}[kernel]
    columns //= (1 if small else 4) * (1 if rank <= 64 else 2) * (2 if width % 16 else 1)  # what fits into registers
    blocks = {"R": rank, "ROWS": block, "COLUMNS": columns, "EXACT": "tf32" if small else "ieee"}
    if kernel is expand_kernel:
        blocks["STEP"] = rank if small else 16  # float32 is multiplied without tensor cores, out of registers
    return blocks, {"num_warps": 4, "num_stages": 3 if small and kernel is not expand_kernel else 1}


def shrink(
    x: Tensor, m: Tensor, order: Tensor, blocks: Tensor, sets: Tensor, tokens: int, block: int, rank: int
) -> Tensor:
    """Return h (places, rank) of contiguous x (tokens of the batch, width) and m (sum of ranks, width)."""
    h = x.new_empty(len(order) * tokens, rank)
    sizes, options = _sizes(shrink_kernel, block, rank, x.shape[1], x.dtype.itemsize == 2)
    if len(blocks):
        shrink_kernel[(len(blocks),)](x, m, h, order, blocks, sets, tokens, x.shape[1], **sizes, **options)
    return h


def expand(
    out: Tensor, h: Tensor, m: Tensor, order: Tensor, blocks: Tensor, sets: Tensor, tokens: int, block: int
) -> None:
    """Add M_i^T h[p] to the rows of contiguous out (tokens of the batch, width), in place."""
    width = out.shape[1]
    sizes, options = _sizes(expand_kernel, block, h.shape[1], width, out.dtype.itemsize == 2)
    grid = (len(blocks), triton.cdiv(width, sizes["COLUMNS"]))
    if len(blocks):
        expand_kernel[grid](out, h, m, order, blocks, sets, tokens, width, **sizes, **options)


def collect(h: Tensor, x: Tensor, total: int, order: Tensor, sets: Tensor, tokens: int, block: int) -> Tensor:
    """Return d (total, width) in float32, of h (places, rank) and contiguous x (tokens of the batch, width)."""
    import torch

    width = x.shape[1]
    d = torch.empty(total, width, device=x.device, dtype=torch.float32)
    sizes, options = _sizes(collect_kernel, block, h.shape[1], width, x.dtype.itemsize == 2)
    grid = (len(sets), triton.cdiv(width, sizes["COLUMNS"]))
    collect_kernel[grid](h, x, d, order, sets, tokens, width, **sizes, **options)
    return d


def _builds() -> list[Build]:
    made = []
    tables = {"order_ptr": tl.int32, "sets_ptr": tl.int32, "tokens": 512, "width": 4096}
    several = tables | {"blocks_ptr": tl.int32}
    for label, dtype, block, rank in (
        ("bf16, 64 places, r 16", tl.bfloat16, 64, 16),
        ("bf16, 16 places, r 64", tl.bfloat16, 16, 64),
        ("fp32, 64 places, r 16", tl.float32, 64, 16),
    ):
        for name, kernel, arguments in (
            ("shrink", shrink_kernel, several | {"x_ptr": dtype, "m_ptr": dtype, "h_ptr": dtype}),
            ("expand", expand_kernel, several | {"out_ptr": dtype, "h_ptr": dtype, "m_ptr": dtype}),
            ("collect", collect_kernel, tables | {"h_ptr": dtype, "x_ptr": dtype, "d_ptr": tl.float32}),
        ):
            small = dtype != tl.float32
            sizes, options = _sizes(kernel, block, rank, 4096, small)
            made.append(Build(f"{name}, {label}", kernel, arguments | sizes, options, products=small))
    return made


BUILDS = _builds()
