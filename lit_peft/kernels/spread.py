"""Back from an update's output: P = s g B and g^T H in one read of g, and the update of x's gradient under dropout.

    dyb_db:   P = s g B   (rows, r),   dB = s D(g)^T H L   (width, r),   and [g | P L] beside them
    spread:   dx += D(P A)                                          in place, with the mask drawn again

With L = diag(gain), or none. With another g, the second product is also dA: D(x)^T P (width, r).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from lit_peft.kernels.build import Build
from lit_peft.kernels.shrink import padded, parts, precision, stays

if TYPE_CHECKING:
    from torch import Tensor


@triton.jit
def dyb_db_kernel(
    g_ptr,
    b_ptr,
    h_ptr,
    gain_ptr,
    p_ptr,
    db_ptr,
    packed_ptr,
    rows,
    width,
    r,
    g_stride,
    scale,
    p,
    seed,
    steps,
    BM: tl.constexpr,
    BK: tl.constexpr,
    RANK: tl.constexpr,
    PAD: tl.constexpr,
    GAIN: tl.constexpr,
    DROP: tl.constexpr,
    WHOLE: tl.constexpr,
    P: tl.constexpr,
    DB: tl.constexpr,
    ATOMIC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """P (rows, r), or one part of its sum a program of axis 1; dB (width, r), by atomics or in parts by axis 0."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    rank, at = tl.arange(0, RANK), tl.arange(0, BK)
    here, inner = (row < rows)[:, None], (rank < r)[None, :]
    wide = width + PAD
    total = tl.zeros((BM, RANK), dtype=tl.float32)
    if GAIN:
        gain = tl.load(gain_ptr + rank, mask=rank < r, other=0.0).to(tl.float32)[None, :]
    if DB:
        h = tl.load(h_ptr + row[:, None] * r + rank[None, :], mask=here & inner, other=0.0)
    first = tl.program_id(1) * steps * BK
    for start in range(first, min(first + steps * BK, width), BK):
        column = (start + at).to(tl.int64)
        inside = column < width
        g = tl.load(g_ptr + row[:, None] * g_stride + column[None, :], mask=here & inside[None, :], other=0.0)
        if PAD:
            tl.store(packed_ptr + row[:, None] * wide + column[None, :], g, mask=here & inside[None, :])
        if P:
            b = tl.load(b_ptr + column[:, None] * r + rank[None, :], mask=inside[:, None] & inner, other=0.0)
            total = tl.dot(g, b.to(g.dtype), total, input_precision=PRECISION)
        if DB:
            if DROP:
                g = tl.where(stays(seed, row, start, width, p, BM, BK), g, 0.0)
            db = tl.dot(tl.trans(g), h.to(g.dtype), input_precision=PRECISION) * scale
            if GAIN:
                db = db * gain
            if DROP:
                db = db / (1 - p)
            place = column[:, None] * r + rank[None, :]
            if ATOMIC:
                tl.atomic_add(db_ptr + place, db, mask=inside[:, None] & inner, sem="relaxed")
            else:
                part = tl.program_id(0).to(tl.int64) * width * r
                tl.store(db_ptr + part + place, db, mask=inside[:, None] & inner)
    if P:
        total = total * scale
        if WHOLE:
            tl.store(p_ptr + row[:, None] * r + rank[None, :], total.to(p_ptr.dtype.element_ty), mask=here & inner)
        else:
            part = tl.program_id(1).to(tl.int64) * rows
            tl.store(p_ptr + (part + row)[:, None] * r + rank[None, :], total, mask=here & inner)
        if PAD and WHOLE:
            if GAIN:
                total = total * gain
            border = packed_ptr + row[:, None] * wide + width
            tl.store(border + rank[None, :], total.to(packed_ptr.dtype.element_ty), mask=here)
            if PAD > RANK:
                rest = tl.arange(0, PAD)[None, :]
                nothing = tl.zeros((BM, PAD), dtype=packed_ptr.dtype.element_ty)
                tl.store(border + rest, nothing, mask=here & (rest >= RANK))


@triton.jit
def spread_kernel(
    dx_ptr,
    p_ptr,
    a_ptr,
    rows,
    width,
    r,
    p,
    seed,
    BM: tl.constexpr,
    BK: tl.constexpr,
    RANK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dx (rows, width) += D(P A), P (rows, r), A (r, width)."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    start = tl.program_id(1) * BK
    column, rank = start + tl.arange(0, BK), tl.arange(0, RANK)
    here, inside = (row < rows)[:, None], (column < width)[None, :]
    place = dx_ptr + row[:, None] * width + column[None, :]
    dx = tl.load(place, mask=here & inside, other=0.0)
    inner = tl.load(p_ptr + row[:, None] * r + rank[None, :], mask=here & (rank < r)[None, :], other=0.0)
    a = tl.load(
        a_ptr + rank[:, None].to(tl.int64) * width + column[None, :], mask=(rank < r)[:, None] & inside, other=0.0
    )
    change = tl.dot(inner, a.to(inner.dtype), input_precision=PRECISION) / (1 - p)
    change = tl.where(stays(seed, row, start, width, p, BM, BK), change, 0.0)
    tl.store(place, (dx.to(tl.float32) + change).to(dx_ptr.dtype.element_ty), mask=here & inside)


def blocks(r: int, itemsize: int) -> dict[str, Any]:
    """Return the block sizes and warps for a rank, by the bytes of an entry."""
    if itemsize > 2:
        return {"BM": 32, "BK": 32, "num_warps": 4, "num_stages": 2}
    if r > 64:
        return {"BM": 32, "BK": 32, "num_warps": 8, "num_stages": 2}
    return {"BM": 64, "BK": 128 if r <= 32 else 64, "num_warps": 4 if r <= 32 else 8, "num_stages": 3}


def dyb_db(
    g: Tensor,
    b: Tensor | None,
    h: Tensor | None,
    gain: Tensor | None,
    scale: float,
    p: float,
    seed: int,
    pad: int,
    split: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return P = s g B, dB = s D(g)^T H diag(gain) in float32, and [g | P diag(gain) | 0] where pad is above 0.

    Sums over rows are made by atomics, in an order that changes, or in two stages where torch is to be deterministic.

    Args:
        g: (rows, width), each row contiguous.
        b: (width, r) contiguous, in any floating dtype; none: no P, and no packing.
        h: (rows, r) contiguous; none: no dB.
        gain: (r,) or none.
        scale: s.
        p: the share of entries of g that are dropped from dB.
        seed: of the numbers that decide which.
        pad: columns of the border, a power of two, at least 64 and the rank.
        split: among how many programs a row is shared out; 0: as it fits the GPU.
    """
    import torch

    rows, width = g.shape
    r = b.shape[1] if b is not None else h.shape[1] if h is not None else 0
    rank = padded(r)
    block = blocks(rank, g.element_size())
    split = split or parts(rows, width, g.device, block)
    whole, groups = split == 1, triton.cdiv(rows, block["BM"])
    atomic = not torch.are_deterministic_algorithms_enabled() and groups > 1
    inner = g.new_empty((0,))
    if b is not None:
        inner = g.new_empty((rows, r)) if whole else g.new_empty((split, rows, r), dtype=torch.float32)
    db = g.new_empty((0,), dtype=torch.float32)
    if h is not None:
        shape = (width, r) if atomic else (groups, width, r)
        db = (torch.zeros if atomic else torch.empty)(shape, dtype=torch.float32, device=g.device)
    packed = g.new_empty((rows, width + pad) if pad else (0,))
    dyb_db_kernel[(groups, split)](
        g,
        g if b is None else b,
        g if h is None else h,
        g if gain is None else gain,
        inner,
        db,
        packed,
        rows,
        width,
        r,
        g.stride(0),
        scale,
        p,
        seed,
        triton.cdiv(triton.cdiv(width, block["BK"]), split),
        RANK=rank,
        PAD=pad,
        GAIN=gain is not None,
        DROP=p > 0,
        WHOLE=whole,
        P=b is not None,
        DB=h is not None,
        ATOMIC=atomic,
        PRECISION=precision(),
        **block,
    )
    if h is not None and not atomic:
        db = db[0] if groups == 1 else db.sum(0)
    if b is not None and not whole:
        total = inner.sum(0)
        inner = total.to(g.dtype)
        if pad:
            packed[:, width : width + r] = total if gain is None else total * gain.float()
            packed[:, width + r :] = 0
    return inner, db, packed


def spread(dx: Tensor, inner: Tensor, a: Tensor, p: float, seed: int) -> None:
    """Add D(P A) to dx, in place: dx (rows, width), P (rows, r) in dx's dtype, A (r, width), all contiguous."""
    (rows, width), r = dx.shape, len(a)
    rank = padded(r)
    block = blocks(rank, dx.element_size())
    grid = triton.cdiv(rows, block["BM"]), triton.cdiv(width, block["BK"])
    spread_kernel[grid](dx, inner, a, rows, width, r, p, seed, RANK=rank, PRECISION=precision(), **block)


def _builds() -> list[Build]:
    made = []
    for label, dtype, r, pad, p, how in (
        ("dyb_db, bf16, r 16", tl.bfloat16, 16, 0, 0.0, {}),
        ("dyb_db, bf16, r 16, packed", tl.bfloat16, 16, 64, 0.0, {}),
        ("dyb_db, bf16, r 16, packed, two stages", tl.bfloat16, 16, 64, 0.0, {"ATOMIC": False}),
        ("dyb_db, bf16, r 64, packed", tl.bfloat16, 64, 64, 0.0, {}),
        ("dyb_db, bf16, r 128", tl.bfloat16, 128, 0, 0.0, {}),
        ("dB alone, bf16, r 16, dropped", tl.bfloat16, 16, 0, 0.1, {"P": False}),
        ("dyb_db, fp32, r 16, packed", tl.float32, 16, 64, 0.0, {}),
        ("spread, bf16, r 16", tl.bfloat16, 16, 0, 0.1, None),
        ("spread, bf16, r 64", tl.bfloat16, 64, 0, 0.1, None),
        ("spread, fp32, r 16", tl.float32, 16, 0, 0.1, None),
    ):
        block = blocks(r, 4 if dtype == tl.float32 else 2)
        options = {key: block[key] for key in ("num_warps", "num_stages")}
        arguments: dict[str, Any] = {"rows": 8192, "width": 4096, "r": r, "p": p, "seed": 2**61, "PRECISION": "ieee"}
        arguments |= {"BM": block["BM"], "BK": block["BK"], "RANK": r}
        if how is None:
            arguments |= {"dx_ptr": dtype, "p_ptr": dtype, "a_ptr": tl.float32}
        else:
            arguments |= {"g_ptr": dtype, "b_ptr": tl.float32, "h_ptr": dtype, "gain_ptr": tl.float32, "p_ptr": dtype}
            arguments |= {"db_ptr": tl.float32, "packed_ptr": dtype, "g_stride": 4096, "scale": 2.0, "steps": 32}
            arguments |= {
                "PAD": pad,
                "GAIN": False,
                "DROP": p > 0,
                "WHOLE": True,
                "P": True,
                "DB": True,
                "ATOMIC": True,
            }
        kernel = spread_kernel if how is None else dyb_db_kernel
        made.append(Build(label, kernel, arguments | (how or {}), options, products=dtype != tl.float32))
    return made


BUILDS = _builds()
