"""The low-rank updates of up to three layers that read one input, in one launch: forward, and for the gradients.

forward:   Y_i += s_i H_i^T B_i^T                   the layers' outputs beside each other, changed in place
backward:  P_i = s_i B_i^T G_i^T                    and the G_i put beside each other on the way
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from lit_peft.kernels.build import Build

if TYPE_CHECKING:
    from torch import Tensor


@triton.jit
def _added(
    y_ptr, out_ptr, h_ptr, b_ptr, row, column, rows, width, y_stride, out_stride, scale,
    R: tl.constexpr, PAD: tl.constexpr, COPIED: tl.constexpr,
):  # fmt: skip
    """One tile of y + s H^T B^T: y (rows, width), H (R, rows), B (width, R)."""
    if R > 0 or COPIED:
        inside = (row < rows)[:, None] & (column < width)[None, :]
        y = tl.load(y_ptr + row[:, None] * y_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        if R > 0:
            at = tl.arange(0, PAD)
            h_inside, b_inside = (
                (row < rows)[:, None] & (at < R)[None, :],
                (at < R)[:, None] & (column < width)[None, :],
            )
            h = tl.load(h_ptr + at[None, :].to(tl.int64) * rows + row[:, None], mask=h_inside, other=0.0)
            b = tl.load(b_ptr + column[None, :] * R + at[:, None], mask=b_inside, other=0.0).to(h.dtype)
            y += scale * tl.dot(h, b, input_precision="ieee")
        tl.store(out_ptr + row[:, None] * out_stride + column[None, :], y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def expand_kernel(
    y_ptr, last_ptr, h_ptr, b0_ptr, b1_ptr, b2_ptr, rows, n0, n1, n2, s0, s1, s2,
    R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, PAD: tl.constexpr, APART: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of one layer's output; that of the last layer goes to `last` where APART."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    block, total = tl.program_id(1), n0 + n1 + n2
    first, second = tl.cdiv(n0, BLOCK_N), tl.cdiv(n1, BLOCK_N)
    at = tl.arange(0, BLOCK_N)
    if block < first:
        _added(y_ptr, y_ptr, h_ptr, b0_ptr, row, block * BLOCK_N + at, rows, n0, total, total, s0, R0, PAD, False)
    elif block < first + second:
        here, column = y_ptr + n0, (block - first) * BLOCK_N + at
        _added(here, here, h_ptr + R0 * rows, b1_ptr, row, column, rows, n1, total, total, s1, R1, PAD, False)
    else:
        here, column = y_ptr + n0 + n1, (block - first - second) * BLOCK_N + at
        h = h_ptr + (R0 + R1) * rows
        if APART:
            _added(here, last_ptr, h, b2_ptr, row, column, rows, n2, total, n2, s2, R2, PAD, True)
        else:
            _added(here, here, h, b2_ptr, row, column, rows, n2, total, total, s2, R2, PAD, False)


@triton.jit
def _shrunk(
    g_ptr, b_ptr, p_ptr, all_ptr, row, rows, width, stride, total, scale,
    R: tl.constexpr, PAD: tl.constexpr, PACK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """P (R, rows) of some rows of G (rows, width), which are copied to `all` (rows, total) where PACK."""
    if R > 0 or PACK:
        r = tl.arange(0, PAD)
        p = tl.zeros((BLOCK_M, PAD), tl.float32)
        for start in range(0, width, BLOCK_K):
            at = start + tl.arange(0, BLOCK_K)
            inside = (row < rows)[:, None] & (at < width)[None, :]
            g = tl.load(g_ptr + row[:, None] * stride + at[None, :], mask=inside, other=0.0)
            if PACK:
                tl.store(all_ptr + row[:, None] * total + at[None, :], g, mask=inside)
            if R > 0:
                b = tl.load(
                    b_ptr + at[:, None] * R + r[None, :], mask=(at < width)[:, None] & (r < R)[None, :], other=0.0
                )
                p += tl.dot(g, b.to(g.dtype), input_precision="ieee")
        if R > 0:
            inside = (row < rows)[:, None] & (r < R)[None, :]
            p = (scale * p).to(p_ptr.dtype.element_ty)
            tl.store(p_ptr + r[None, :].to(tl.int64) * rows + row[:, None], p, mask=inside)


@triton.jit
def spread_kernel(
    g0_ptr, g1_ptr, g2_ptr, b0_ptr, b1_ptr, b2_ptr, p_ptr, all_ptr, rows, n0, n1, n2, stride0, stride1, stride2,
    s0, s1, s2, R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, PAD: tl.constexpr, PACK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """All P_i of some rows, and those rows of all G_i beside each other where PACK."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    total = n0 + n1 + n2
    _shrunk(g0_ptr, b0_ptr, p_ptr, all_ptr, row, rows, n0, stride0, total, s0, R0, PAD, PACK, BLOCK_M, BLOCK_K)
    p1, all1 = p_ptr + R0 * rows, all_ptr + n0
    _shrunk(g1_ptr, b1_ptr, p1, all1, row, rows, n1, stride1, total, s1, R1, PAD, PACK, BLOCK_M, BLOCK_K)
    p2, all2 = p_ptr + (R0 + R1) * rows, all_ptr + n0 + n1
    _shrunk(g2_ptr, b2_ptr, p2, all2, row, rows, n2, stride2, total, s2, R2, PAD, PACK, BLOCK_M, BLOCK_K)


def _three(values: Sequence[Any], absent: Any) -> list[Any]:
    return [*values, *[absent] * (3 - len(values))]


def _options(ranks: Sequence[int], itemsize: int) -> dict[str, int]:
    pad = max(16, triton.next_power_of_2(max(ranks)))
    return {"PAD": pad, "BLOCK_M": 32 if itemsize > 2 else 64, "num_warps": 4}


def expand(y: Tensor, h: Tensor, bs: Sequence[Tensor], scales: Sequence[float], apart: bool) -> Tensor:
    """Add all updates to y (rows, sum of n_i) in place; return the last layer's output where it is to be apart.

    Args:
        y: contiguous.
        h: H (sum of r_i, rows), contiguous.
        bs: B_i (n_i, r_i), two or three, with r_i = 0 where there is no update.
        scales: s_i.
        apart: whether the last layer's output, of three, gets memory of its own.
    """
    import torch

    rows, ranks, sizes = len(y), [b.shape[1] for b in bs], [len(b) for b in bs]
    last = torch.empty((rows, sizes[-1]) if apart else (0,), dtype=y.dtype, device=y.device)
    options = {**_options(ranks, y.element_size()), "BLOCK_N": 64}
    grid = (triton.cdiv(rows, options["BLOCK_M"]), sum(triton.cdiv(size, options["BLOCK_N"]) for size in sizes))
    r0, r1, r2 = _three(ranks, 0)
    expand_kernel[grid](
        y, last, h, *_three([b.contiguous() for b in bs], y), rows, *_three(sizes, 0), *_three(scales, 1.0),
        R0=r0, R1=r1, R2=r2, APART=apart, **options,
    )  # fmt: skip
    return last


def spread(gs: Sequence[Tensor], bs: Sequence[Tensor], scales: Sequence[float], pack: bool) -> tuple[Tensor, Tensor]:
    """Return P (sum of r_i, rows), and all G_i beside each other (rows, sum of n_i) or nothing.

    Args:
        gs: G_i (rows, n_i), two or three, with unit stride in a row.
        bs: B_i (n_i, r_i), with r_i = 0 where there is no update.
        scales: s_i.
        pack: whether to return the G_i beside each other.
    """
    import torch

    rows, ranks, sizes = len(gs[0]), [b.shape[1] for b in bs], [len(b) for b in bs]
    p = torch.empty((sum(ranks), rows), dtype=gs[0].dtype, device=gs[0].device)
    whole = torch.empty((rows, sum(sizes)) if pack else (0,), dtype=gs[0].dtype, device=gs[0].device)
    options = {**_options(ranks, gs[0].element_size()), "BLOCK_K": 64}
    r0, r1, r2 = _three(ranks, 0)
    spread_kernel[(triton.cdiv(rows, options["BLOCK_M"]),)](
        *_three(gs, p), *_three([b.contiguous() for b in bs], p), p, whole, rows, *_three(sizes, 0),
        *_three([g.stride(0) for g in gs], 0), *_three(scales, 1.0), R0=r0, R1=r1, R2=r2, PACK=pack, **options,
    )  # fmt: skip
    return p, whole


def _builds() -> list[Build]:
    made = []
    for label, dtype, size, r in (
        ("bf16", tl.bfloat16, 2, 16),
        ("bf16", tl.bfloat16, 2, 64),
        ("fp32", tl.float32, 4, 16),
    ):
        common: dict[str, Any] = {"rows": 8192, "n0": 4096, "n1": 1024, "n2": 1024, "s0": 2.0, "s1": 2.0, "s2": 2.0}
        common |= {"R0": r, "R1": r, "R2": r, **_options((r,), size)}
        options = {"num_warps": common.pop("num_warps")}
        bs = dict.fromkeys(("b0_ptr", "b1_ptr", "b2_ptr"), tl.float32)
        tensors = bs | dict.fromkeys(("y_ptr", "last_ptr", "h_ptr"), dtype)
        more = {"APART": True, "BLOCK_N": 64}
        made.append(Build(f"expand, {label}, r {r}", expand_kernel, tensors | common | more, options, size == 2))
        tensors = bs | dict.fromkeys(("g0_ptr", "g1_ptr", "g2_ptr", "p_ptr", "all_ptr"), dtype)
        more = {"stride0": 4096, "stride1": 1024, "stride2": 1024, "PACK": True, "BLOCK_K": 64}
        made.append(Build(f"spread, {label}, r {r}", spread_kernel, tensors | common | more, options, size == 2))
    return made


BUILDS = _builds()
