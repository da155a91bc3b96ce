"""DoRA around the layer's own product: the update added and the rows stretched in one pass; dB and dm in one pass.

    forward:   out <- b + c (out - b + s H^T B^T)         in place, out = W x + b (rows, out)
    backward:  D = g^T H^T (out, r),   d = sum_t g (y - b) (out,)        g and y are read once

The sums over rows are taken in two stages, always in the same order, as in `scaled`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from lit_peft.kernels.build import Build

if TYPE_CHECKING:
    from torch import Tensor

ROWS, COLUMNS = 64, 64
SHARES = 64  # of the rows, at most
OPTIONS = {"num_warps": 4, "num_stages": 2}


@triton.jit
def turn_kernel(
    out_ptr,
    h_ptr,
    b_ptr,
    c_ptr,
    bias_ptr,
    rows,
    width,
    r,
    scale,
    BIASED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
):
    """One tile of out a program; h (r, rows), b (width, r), c and bias (width,)."""
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    at = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    rank = tl.arange(0, RANK)
    here, inside, ranked = row < rows, at < width, rank < r
    # the offset of H's last row can pass 2^31: rows are many
    h = tl.load(
        h_ptr + rank.to(tl.int64)[None, :] * rows + row[:, None], mask=here[:, None] & ranked[None, :], other=0.0
    )
    b = tl.load(b_ptr + at.to(tl.int64)[None, :] * r + rank[:, None], mask=ranked[:, None] & inside[None, :], other=0.0)
    update = tl.dot(h, b, input_precision="ieee")
    spot = out_ptr + row.to(tl.int64)[:, None] * width + at[None, :]
    mask = here[:, None] & inside[None, :]
    out = tl.load(spot, mask=mask, other=0.0)
    # rounded as the plain path rounds it, before it is stretched
    out = (out.to(tl.float32) + scale * update).to(out_ptr.dtype.element_ty).to(tl.float32)
    c = tl.load(c_ptr + at, mask=inside, other=0.0).to(tl.float32)
    out = out * c[None, :]
    if BIASED:
        bias = tl.load(bias_ptr + at, mask=inside, other=0.0).to(tl.float32)
        out += ((1 - c) * bias)[None, :]
    tl.store(spot, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def turn_backward_kernel(
    g_ptr,
    y_ptr,
    h_ptr,
    bias_ptr,
    db_ptr,
    dm_ptr,
    rows,
    width,
    r,
    share,
    BIASED: tl.constexpr,
    LENGTHS: tl.constexpr,
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
):
    """A share's part of D (shares, width, r) and of d (shares, width), in float32; a block of columns a program."""
    at = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.program_id(1)
    rank = tl.arange(0, RANK)
    inside, ranked = at < width, rank < r
    db = tl.zeros((COLUMNS, RANK), dtype=tl.float32)
    dm = tl.zeros((COLUMNS,), dtype=tl.float32)
    bias = tl.zeros((COLUMNS,), dtype=tl.float32)
    if BIASED:
        bias = tl.load(bias_ptr + at, mask=inside, other=0.0).to(tl.float32)
    for first in range(part * share, tl.minimum((part + 1) * share, rows), ROWS):
        row = first + tl.arange(0, ROWS)
        here = row < rows
        # (columns, rows): D is a product of g^T
        spot = row.to(tl.int64)[None, :] * width + at[:, None]
        mask = inside[:, None] & here[None, :]
        g = tl.load(g_ptr + spot, mask=mask, other=0.0)
        if LENGTHS:
            y = tl.load(y_ptr + spot, mask=mask, other=0.0).to(tl.float32)
            dm += tl.sum(g.to(tl.float32) * (y - bias[:, None]), 1)
        if PAIRS:
            h = tl.load(
                h_ptr + rank.to(tl.int64)[None, :] * rows + row[:, None],
                mask=here[:, None] & ranked[None, :],
                other=0.0,
            )
            db = tl.dot(g, h, db, input_precision="ieee")
    if LENGTHS:
        tl.store(dm_ptr + part.to(tl.int64) * width + at, dm, mask=inside)
    if PAIRS:
        spot = (part.to(tl.int64) * width + at)[:, None] * r + rank[None, :]
        tl.store(db_ptr + spot, db, mask=inside[:, None] & ranked[None, :])


def rows_of(width: int) -> int:
    """Return the rows of a tile, for numbers of some bytes: products in float32 run in registers, and need more."""
    return 16 if width == 4 else ROWS


def padded(r: int) -> int:
    """Return the number of rows that a product of rank r is computed with: tensor cores take 16 at least."""
    return max(16, int(triton.next_power_of_2(r)))


def turn(out: Tensor, h: Tensor, b: Tensor, c: Tensor, bias: Tensor | None, scale: float) -> None:
    """Write b + c (out - b + s H^T B^T) into out (rows, width), of H (r, rows), B (width, r), b and c (width,)."""
    rows, width = out.shape
    tile = rows_of(out.element_size())
    grid = (triton.cdiv(width, COLUMNS), triton.cdiv(rows, tile))
    sizes: dict[str, Any] = {"ROWS": tile, "COLUMNS": COLUMNS, "RANK": padded(len(h))}
    biased = bias is not None
    turn_kernel[grid](
        out, h, b, c.float(), bias if biased else c, rows, width, len(h), scale, BIASED=biased, **sizes, **OPTIONS
    )


def turn_backward(g: Tensor, y: Tensor | None, h: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return D (width, r) and d (width,) in float32, of contiguous g and y (rows, width) and H (r, rows).

    Without y, d is all zero; without H, r is 0.
    """
    import torch

    rows, width = g.shape
    r = 0 if h is None else len(h)
    share = ROWS * max(1, triton.cdiv(rows, ROWS * SHARES))
    shares = triton.cdiv(rows, share)
    db = torch.empty(shares, width, r, device=g.device, dtype=torch.float32)
    dm = torch.zeros(shares, width, device=g.device, dtype=torch.float32)
    sizes: dict[str, Any] = {"ROWS": rows_of(g.element_size()), "COLUMNS": COLUMNS, "RANK": padded(r)}
    turn_backward_kernel[(triton.cdiv(width, COLUMNS), shares)](
        g,
        g if y is None else y,
        g if h is None else h,
        g if bias is None else bias,
        db,
        dm,
        rows,
        width,
        r,
        share,
        BIASED=bias is not None,
        LENGTHS=y is not None,
        PAIRS=r > 0,
        **sizes,
        **OPTIONS,
    )
    return db.sum(0), dm.sum(0)


def _builds() -> list[Build]:
    made = []
    bf16, fp16, fp32 = tl.bfloat16, tl.float16, tl.float32
    for name, dtype, r in (
        ("bf16", bf16, 16),
        ("bf16", bf16, 64),
        ("fp16", fp16, 16),
        ("fp32", fp32, 16),
        ("fp32", fp32, 64),
    ):
        label = f"{name}, r {r}"
        common: dict[str, Any] = {"rows": 8192, "width": 4096, "r": r, "BIASED": False}
        common["ROWS"] = rows_of(dtype.primitive_bitwidth // 8)
        common |= {"COLUMNS": COLUMNS, "RANK": padded(r), "h_ptr": dtype, "bias_ptr": dtype}
        forward = {"out_ptr": dtype, "b_ptr": dtype, "c_ptr": tl.float32, "scale": 0.5}
        backward = {"g_ptr": dtype, "y_ptr": dtype, "db_ptr": tl.float32, "dm_ptr": tl.float32}
        backward |= {"share": 128, "LENGTHS": True, "PAIRS": True}
        cores = dtype != tl.float32
        made.append(Build(f"turn, {label}", turn_kernel, common | forward, OPTIONS, products=cores))
        made.append(Build(f"turn backward, {label}", turn_backward_kernel, common | backward, OPTIONS, products=cores))
    return made


BUILDS = _builds()
