"""Additions and RMS norms of a decoder layer, with the low-rank updates around them, a block of rows a program.

add_expand:         x + y + s H^T B^T
add_norm_shrink:    x2 = x + y + s H^T B^T,   out = w u,   u = x2 rho,   rho = 1 / sqrt(mean(x2^2) + eps),   A out^T
norm_back:          dx = rho (t w - u mean(t w u)) + residual,   t = g + P^T A

The last two go over a row twice, the second time from its end, which the caches still hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from lit_peft.kernels.build import Build
from lit_peft.kernels.norm import stacked
from lit_peft.kernels.shrink import turned

if TYPE_CHECKING:
    from torch import Tensor


@triton.jit
def across(h_ptr, row, rows, R: tl.constexpr, PAD: tl.constexpr, TURNED: tl.constexpr):
    """Some rows (BLOCK_M, PAD) of H^T, of which H (R, rows) lies in memory, or, where TURNED, H^T."""
    at = tl.arange(0, PAD)
    inside = (row < rows)[:, None] & (at < R)[None, :]
    if TURNED:
        return tl.load(h_ptr + row[:, None] * R + at[None, :], mask=inside, other=0.0)
    else:
        return tl.load(h_ptr + at[None, :].to(tl.int64) * rows + row[:, None], mask=inside, other=0.0)


@triton.jit
def product(h, b_ptr, column, width, r_step, column_step, R: tl.constexpr, PAD: tl.constexpr):
    """H^T B in float32, of some rows H^T (BLOCK_M, PAD) and some columns of B (R, width), its entries so far apart."""
    at = tl.arange(0, PAD)
    inside = (at < R)[:, None] & (column < width)[None, :]
    b = tl.load(b_ptr + at[:, None] * r_step + column[None, :] * column_step, mask=inside, other=0.0)
    return tl.dot(h, b.to(h.dtype), input_precision="ieee")


@triton.jit
def add_expand_kernel(
    x_ptr, y_ptr, h_ptr, b_ptr, out_ptr, rows, width, scale,
    R: tl.constexpr, PAD: tl.constexpr, TURNED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of x + y + s H^T B^T (rows, width)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    place = row[:, None] * width + column[None, :]
    total = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(y_ptr + place, mask=inside, other=0.0).to(tl.float32)
    if R > 0:
        total += scale * product(across(h_ptr, row, rows, R, PAD, TURNED), b_ptr, column, width, 1, R, R, PAD)
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def add_norm_shrink_kernel(
    x_ptr, y_ptr, h_ptr, b_ptr, w_ptr, a0_ptr, a1_ptr, a2_ptr, total_ptr, out_ptr, rho_ptr, low_ptr, stack_ptr,
    rows, width, scale, eps, R: tl.constexpr, PAD: tl.constexpr, TURNED: tl.constexpr,
    R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, PAD_A: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x2 and its norm (rows, width), rho (rows,), A out^T (R0 + R1 + R2, rows), and A."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    there, blocks = (row < rows)[:, None], tl.cdiv(width, BLOCK_K)
    if R > 0:
        h = across(h_ptr, row, rows, R, PAD, TURNED)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    for block in range(blocks):
        at = block * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = there & (at < width)[None, :]
        place = row[:, None] * width + at[None, :]
        total = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
        total += tl.load(y_ptr + place, mask=inside, other=0.0).to(tl.float32)
        if R > 0:
            total += scale * product(h, b_ptr, at, width, 1, R, R, PAD)
        rounded = total.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + place, rounded, mask=inside)
        total = rounded.to(tl.float32)
        squares += tl.sum(total * total, 1)
    rho = 1 / tl.sqrt(squares / width + eps)
    tl.store(rho_ptr + row, rho, mask=row < rows)
    tl.debug_barrier()  # what is read from here on was written by other threads
    r, first = tl.arange(0, PAD_A)[None, :], tl.program_id(0) == 0
    low = tl.zeros((BLOCK_M, PAD_A), tl.float32)
    for block in range(blocks):
        at = (blocks - 1 - block) * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = there & (at < width)[None, :]
        place = row[:, None] * width + at[None, :]
        total = tl.load(total_ptr + place, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + at, mask=at < width, other=0.0).to(tl.float32)
        unit = (total * rho[:, None]).to(out_ptr.dtype.element_ty).to(tl.float32)
        out = (unit * w[None, :]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + place, out, mask=inside)
        # of the output, not of w x2 and scaled afterwards: in float16 that could be too large
        a = stacked(a0_ptr, a1_ptr, a2_ptr, stack_ptr, at, r, width, first, R0, R1, R2)
        low += tl.dot(out, a, input_precision="ieee")
    place = r.to(tl.int64) * rows + row[:, None]
    tl.store(low_ptr + place, low.to(low_ptr.dtype.element_ty), mask=there & (r < R0 + R1 + R2))


@triton.jit
def _terms(
    g_ptr, p, a_ptr, x_ptr, w_ptr, rho, place, inside, column, width, R: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    """One tile of t w and of u, and w, in float32."""
    t = tl.load(g_ptr + place, mask=inside, other=0.0).to(tl.float32)
    if R > 0:
        t += product(p, a_ptr, column, width, width, 1, R, PAD)
    w = tl.load(w_ptr + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    unit = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32) * rho[:, None]
    return t * w, unit, w


@triton.jit
def norm_back_kernel(
    g_ptr, p_ptr, a_ptr, residual_ptr, x_ptr, w_ptr, rho_ptr, dx_ptr, out_ptr, rows, width,
    R: tl.constexpr, PAD: tl.constexpr, RESIDUAL: tl.constexpr, AGAIN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dx (rows, width), and the norm's output (rows, width) where AGAIN."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    there, blocks = (row < rows)[:, None], tl.cdiv(width, BLOCK_K)
    rho = tl.load(rho_ptr + row, mask=row < rows, other=0.0)
    p = p_ptr
    if R > 0:
        p = across(p_ptr, row, rows, R, PAD, False)
    shared = tl.zeros((BLOCK_M,), tl.float32)
    for block in range(blocks):
        at = block * BLOCK_K + tl.arange(0, BLOCK_K)
        place, inside = row[:, None] * width + at[None, :], there & (at < width)[None, :]
        inner, unit, _ = _terms(g_ptr, p, a_ptr, x_ptr, w_ptr, rho, place, inside, at, width, R, PAD)
        shared += tl.sum(inner * unit, 1)
    shared /= width
    for block in range(blocks):
        at = (blocks - 1 - block) * BLOCK_K + tl.arange(0, BLOCK_K)
        place, inside = row[:, None] * width + at[None, :], there & (at < width)[None, :]
        inner, unit, w = _terms(g_ptr, p, a_ptr, x_ptr, w_ptr, rho, place, inside, at, width, R, PAD)
        dx = rho[:, None] * (inner - unit * shared[:, None])
        if RESIDUAL:
            dx += tl.load(residual_ptr + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + place, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if AGAIN:
            out = unit.to(out_ptr.dtype.element_ty).to(tl.float32) * w
            tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=inside)


def _padded(r: int) -> int:
    padded: int = max(16, triton.next_power_of_2(r))
    return padded


def _height(rows: int, itemsize: int) -> int:
    """Return how many rows a program takes: with few rows fewer, or most of a GPU would do nothing."""
    return 32 if rows > 4096 and itemsize == 2 else 16


def _forward(rows: int, pad: int, itemsize: int) -> dict[str, int]:
    small = pad <= 32 and itemsize == 2  # larger blocks spill
    columns, warps = (64, 4) if small else (32, 8)
    height = _height(rows, itemsize) if small else 16
    return {"BLOCK_M": height, "BLOCK_K": columns, "num_warps": warps, "num_stages": 2}


def _backward(rows: int, itemsize: int) -> dict[str, int]:
    return {"BLOCK_M": _height(rows, itemsize), "BLOCK_K": 256 // itemsize, "num_warps": 8, "num_stages": 3}


def _tiles(itemsize: int) -> dict[str, int]:
    return {"BLOCK_M": 32 if itemsize > 2 else 64, "BLOCK_N": 64, "num_warps": 4}


def add_expand(x: Tensor, y: Tensor, h: Tensor | None, b: Tensor | None, scale: float) -> Tensor:
    """Return x + y + s H^T B^T (rows, width), of contiguous x, y (rows, width), B (width, r), H (r, rows) or H^T."""
    import torch

    (rows, width), r, out = x.shape, 0 if h is None else len(h), torch.empty_like(x)
    tiles = _tiles(x.element_size())
    add_expand_kernel[(triton.cdiv(rows, tiles["BLOCK_M"]), triton.cdiv(width, tiles["BLOCK_N"]))](
        x, y, x if h is None else h, x if b is None else b, out, rows, width, scale,
        R=r, PAD=_padded(r), TURNED=turned(h), **tiles,
    )  # fmt: skip
    return out


def add_norm_shrink(
    x: Tensor,
    y: Tensor,
    h: Tensor | None,
    b: Tensor | None,
    scale: float,
    weight: Tensor,
    eps: float,
    factors: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return x2 and its norm (rows, width), rho (rows,), A out^T (sum of r_i, rows) and A (sum of r_i, width).

    Args:
        x: (rows, width), contiguous, as all are.
        y: (rows, width).
        h: H (r, rows), itself contiguous or turned over, or None.
        b: B (width, r) in any floating dtype, or None.
        scale: s.
        weight: w (width,).
        eps: added to the mean square.
        factors: A_i (r_i, width), one to three, in any floating dtype.
    """
    import torch

    (rows, width), r, ranks = x.shape, 0 if h is None else len(h), [len(a) for a in factors]
    total, out, rho = torch.empty_like(x), torch.empty_like(x), x.new_empty((rows,), dtype=torch.float32)
    low, stack, absent = x.new_empty((sum(ranks), rows)), x.new_empty((sum(ranks), width)), 3 - len(ranks)
    r0, r1, r2 = [*ranks, *[0] * absent]
    pad, pad_a = _padded(r), _padded(sum(ranks))
    blocks = _forward(rows, max(pad, pad_a), x.element_size())
    add_norm_shrink_kernel[(triton.cdiv(rows, blocks["BLOCK_M"]),)](
        x, y, x if h is None else h, x if b is None else b, weight, *factors, *[x] * absent,
        total, out, rho, low, stack, rows, width, scale, eps,
        R=r, PAD=pad, TURNED=turned(h), R0=r0, R1=r1, R2=r2, PAD_A=pad_a, **blocks,
    )  # fmt: skip
    return total, out, rho, low, stack


def norm_back(
    g: Tensor,
    p: Tensor | None,
    a: Tensor | None,
    residual: Tensor | None,
    x: Tensor,
    weight: Tensor,
    rho: Tensor,
    again: bool,
) -> tuple[Tensor, Tensor]:
    """Return dx (rows, width), and the norm's output (rows, width) or nothing.

    Args:
        g: (rows, width), contiguous, as all are.
        p: P (r, rows), or None.
        a: A (r, width) in any floating dtype, or None.
        residual: (rows, width), or None.
        x: (rows, width).
        weight: w (width,).
        rho: (rows,) in float32.
        again: whether the output is wanted.
    """
    import torch

    (rows, width), r = x.shape, 0 if p is None else len(p)
    dx, out = torch.empty_like(x), x.new_empty(x.shape if again else (0,))
    blocks = _backward(rows, x.element_size())
    norm_back_kernel[(triton.cdiv(rows, blocks["BLOCK_M"]),)](
        g, x if p is None else p, x if a is None else a, x if residual is None else residual, x, weight, rho, dx, out,
        rows, width, R=r, PAD=_padded(r), RESIDUAL=residual is not None, AGAIN=again, **blocks,
    )  # fmt: skip
    return dx, out


def _build(kind: str, r: int, dtype: Any) -> Build:
    itemsize, pad = 2 if dtype == tl.bfloat16 else 4, _padded(r)
    arguments: dict[str, Any] = {"rows": 8192, "width": 4096, "R": r, "PAD": pad, "b_ptr": tl.float32, "scale": 2.0}
    arguments["TURNED"] = True
    arguments |= dict.fromkeys(("x_ptr", "y_ptr", "h_ptr", "out_ptr"), dtype)
    if kind == "add and expand":
        kernel, blocks = add_expand_kernel, _tiles(itemsize)
    elif kind == "add, norm and shrink":
        kernel, blocks = add_norm_shrink_kernel, _forward(8192, pad, itemsize)
        arguments |= dict.fromkeys(("a0_ptr", "a1_ptr", "a2_ptr", "rho_ptr"), tl.float32)
        arguments |= dict.fromkeys(("w_ptr", "total_ptr", "low_ptr", "stack_ptr"), dtype)
        arguments |= {"R0": r // 2, "R1": r // 4, "R2": r // 4, "PAD_A": pad, "eps": 1e-6}
    else:
        kernel, blocks = norm_back_kernel, _backward(8192, itemsize)
        names = ("x_ptr", "g_ptr", "p_ptr", "a_ptr", "residual_ptr", "w_ptr", "dx_ptr", "out_ptr")
        arguments = dict.fromkeys(names, dtype) | {"rho_ptr": tl.float32, "RESIDUAL": True, "AGAIN": True}
        arguments |= {"rows": 8192, "width": 4096, "R": r, "PAD": pad}
    options = {key: value for key, value in blocks.items() if key.startswith("num_")}
    sizes = {key: value for key, value in blocks.items() if key not in options}
    label = "bf16" if itemsize == 2 else "fp32"
    return Build(f"{kind}, {label}, r {r}", kernel, arguments | sizes, options, products=itemsize == 2)


KINDS = "add and expand", "add, norm and shrink", "norm back"
BUILDS = [_build(kind, r, tl.bfloat16) for kind in KINDS for r in (16, 64)]
BUILDS += [_build(kind, 16, tl.float32) for kind in KINDS[1:]]
