"""RMS normalisation, forward and backward, one program a row; and with a narrow product behind it, a block of rows.

y = w x rho,   rho = 1 / sqrt(mean(x^2) + eps)        dx = rho (g w - u mean(g w u)),   u = x rho
H = A y^T = rho (A (w x)^T)
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
def norm_kernel(x_ptr, w_ptr, y_ptr, rho_ptr, width, eps, BLOCK: tl.constexpr):
    """y (rows, width) and rho (rows,) in float32; one row a program."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    x = tl.load(x_ptr + row * width + at, mask=inside, other=0.0).to(tl.float32)
    rho = 1 / tl.sqrt(tl.sum(x * x, 0) / width + eps)
    w = tl.load(w_ptr + at, mask=inside, other=0.0).to(tl.float32)
    # rounded before the weight is multiplied, as the model's own code does
    unit = (x * rho).to(y_ptr.dtype.element_ty).to(tl.float32)
    tl.store(y_ptr + row * width + at, (unit * w).to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(rho_ptr + row, rho)


@triton.jit
def norm_backward_kernel(g_ptr, x_ptr, w_ptr, rho_ptr, dx_ptr, width, BLOCK: tl.constexpr):
    """dx (rows, width); one row a program."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    g = tl.load(g_ptr + row * width + at, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row * width + at, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + at, mask=inside, other=0.0).to(tl.float32)
    rho = tl.load(rho_ptr + row)
    inner, unit = g * w, x * rho
    dx = rho * (inner - unit * (tl.sum(inner * unit, 0) / width))
    tl.store(dx_ptr + row * width + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def stacked(
    a0_ptr, a1_ptr, a2_ptr, stack_ptr, at, r, width, first, R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr,
):  # fmt: skip
    """Some columns of A (R, width), turned (BLOCK_K, PAD): A_i (R_i, width) rounded as `stack`, put in if `first`."""
    here = r * width + at[:, None]
    reach = (at < width)[:, None]
    a = tl.load(a0_ptr + here, mask=reach & (r < R0), other=0.0).to(tl.float32)
    if R1 > 0:
        inner = reach & (r >= R0) & (r < R0 + R1)
        a += tl.load(a1_ptr + here - R0 * width, mask=inner, other=0.0).to(tl.float32)
    if R2 > 0:
        inner = reach & (r >= R0 + R1) & (r < R0 + R1 + R2)
        a += tl.load(a2_ptr + here - (R0 + R1) * width, mask=inner, other=0.0).to(tl.float32)
    rounded = a.to(stack_ptr.dtype.element_ty)
    if first:
        tl.store(stack_ptr + here, rounded, mask=reach & (r < R0 + R1 + R2))
    return rounded


@triton.jit
def norm_shrink_kernel(
    x_ptr, w_ptr, a0_ptr, a1_ptr, a2_ptr, y_ptr, rho_ptr, h_ptr, stack_ptr, rows, width, eps,
    R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr,
    PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y (rows, width), rho (rows,) in float32, H (R, rows), and A (R, width) of A_i (R_i, width); a block of rows.

    The sum of squares and A (w x)^T come from one pass over x; the second, for y, finds x in the cache.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    r, first, R = tl.arange(0, PAD)[None, :], tl.program_id(0) == 0, R0 + R1 + R2
    squares = tl.zeros((BLOCK_M,), tl.float32)
    h = tl.zeros((BLOCK_M, PAD), tl.float32)
    for start in range(0, width, BLOCK_K):
        at = start + tl.arange(0, BLOCK_K)
        inside = (row < rows)[:, None] & (at < width)[None, :]
        x = tl.load(x_ptr + row[:, None] * width + at[None, :], mask=inside, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + at, mask=at < width, other=0.0).to(tl.float32)
        a = stacked(a0_ptr, a1_ptr, a2_ptr, stack_ptr, at, r, width, first, R0, R1, R2)
        squares += tl.sum(x * x, 1)
        h += tl.dot((x * w[None, :]).to(a.dtype), a, input_precision="ieee")
    rho = 1 / tl.sqrt(squares / width + eps)
    tl.store(rho_ptr + row, rho, mask=row < rows)
    h = (h * rho[:, None]).to(h_ptr.dtype.element_ty)
    tl.store(h_ptr + r.to(tl.int64) * rows + row[:, None], h, mask=(row < rows)[:, None] & (r < R))
    for start in range(0, width, BLOCK_K):
        at = start + tl.arange(0, BLOCK_K)
        inside = (row < rows)[:, None] & (at < width)[None, :]
        x = tl.load(x_ptr + row[:, None] * width + at[None, :], mask=inside, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + at, mask=at < width, other=0.0).to(tl.float32)
        unit = (x * rho[:, None]).to(y_ptr.dtype.element_ty).to(tl.float32)
        y = (unit * w[None, :]).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + row[:, None] * width + at[None, :], y, mask=inside)


def _options(width: int) -> dict[str, int]:
    return {"num_warps": min(16, max(1, triton.next_power_of_2(width) // 512))}


def norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return y (rows, width) and rho (rows,), of contiguous x (rows, width) and w (width,)."""
    import torch

    y, rho = torch.empty_like(x), torch.empty(len(x), device=x.device, dtype=torch.float32)
    width = x.shape[1]
    norm_kernel[(len(x),)](x, weight, y, rho, width, eps, BLOCK=triton.next_power_of_2(width), **_options(width))
    return y, rho


def norm_backward(g: Tensor, x: Tensor, weight: Tensor, rho: Tensor) -> Tensor:
    """Return dx (rows, width), of contiguous g, x (rows, width), w (width,), rho (rows,)."""
    import torch

    dx, width = torch.empty_like(x), x.shape[1]
    norm_backward_kernel[(len(x),)](
        g, x, weight, rho, dx, width, BLOCK=triton.next_power_of_2(width), **_options(width)
    )
    return dx


def _blocks(r: int, itemsize: int) -> dict[str, int]:
    pad = max(16, triton.next_power_of_2(r))
    return {"PAD": pad, "BLOCK_M": 16 if itemsize > 2 else 64, "BLOCK_K": 64, "num_warps": 8 if pad > 32 else 4}


def norm_shrink(
    x: Tensor, weight: Tensor, factors: Sequence[Tensor], eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y (rows, width), rho (rows,), H (r, rows) and A (r, width) in x's dtype.

    Args:
        x: (rows, width), contiguous.
        weight: w (width,).
        factors: A_i (r_i, width), one to three, contiguous, in any dtype.
        eps: added to the mean square.
    """
    import torch

    (rows, width), ranks = x.shape, [len(a) for a in factors]
    r, absent = sum(ranks), 3 - len(ranks)
    y, rho = torch.empty_like(x), torch.empty(rows, device=x.device, dtype=torch.float32)
    h, stack = (torch.empty(shape, device=x.device, dtype=x.dtype) for shape in ((r, rows), (r, width)))
    blocks, (r0, r1, r2) = _blocks(r, x.element_size()), [*ranks, *[0] * absent]
    norm_shrink_kernel[(triton.cdiv(rows, blocks["BLOCK_M"]),)](
        x, weight, *factors, *[x] * absent, y, rho, h, stack, rows, width, eps, R0=r0, R1=r1, R2=r2, **blocks,
    )  # fmt: skip
    return y, rho, h, stack


def _builds() -> list[Build]:
    made = []
    for label, dtype, size, r in (("bf16", tl.bfloat16, 2, 64), ("fp32", tl.float32, 4, 64)):
        tensors = dict.fromkeys(("x_ptr", "w_ptr", "y_ptr", "h_ptr", "stack_ptr"), dtype)
        tensors |= dict.fromkeys(("rho_ptr", "a0_ptr", "a1_ptr", "a2_ptr"), tl.float32)
        ranks = {"R0": r // 2, "R1": r // 4, "R2": r // 4}
        blocks = _blocks(r, size)
        options = {"num_warps": blocks.pop("num_warps")}
        sizes = {"rows": 8192, "width": 4096, "eps": 1e-6, **ranks, **blocks}
        name = f"norm and shrink, {label}, r {r}"
        made.append(Build(name, norm_shrink_kernel, tensors | sizes, options, products=size == 2))
    for label, dtype in (("bf16", tl.bfloat16), ("fp16", tl.float16), ("fp32", tl.float32)):
        for width in (2048, 4096) if label == "bf16" else (4096,):
            common: dict[str, Any] = {"width": width, "BLOCK": width}
            ends = {"x_ptr": dtype, "w_ptr": dtype, "rho_ptr": tl.float32}
            forward, backward = ends | {"y_ptr": dtype, "eps": 1e-6}, ends | {"g_ptr": dtype, "dx_ptr": dtype}
            made.append(Build(f"norm, {label}, {width}", norm_kernel, forward | common, _options(width)))
            made.append(
                Build(f"norm backward, {label}, {width}", norm_backward_kernel, backward | common, _options(width))
            )
    return made


BUILDS = _builds()
