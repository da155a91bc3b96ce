"""RMS normalisation, forward and backward, one program a row; and with a narrow product behind it, a block of rows.

y = w x rho,   rho = 1 / sqrt(mean(x^2) + eps)        dx = rho (g w - u mean(g w u)),   u = x rho
H = A y^T = rho (A (w x)^T)
"""

from __future__ import annotations

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
def norm_shrink_kernel(
    x_ptr, w_ptr, a_ptr, y_ptr, rho_ptr, h_ptr, rows, width, eps,
    R: tl.constexpr, PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y (rows, width), rho (rows,) in float32 and H (R, rows), of A (R, width); BLOCK_M rows a program.

    The sum of squares and A (w x)^T come from one pass over x; the second, for y, finds x in the cache.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.arange(0, PAD)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    h = tl.zeros((BLOCK_M, PAD), tl.float32)
    for start in range(0, width, BLOCK_K):
        at = start + tl.arange(0, BLOCK_K)
        inside = (row < rows)[:, None] & (at < width)[None, :]
        x = tl.load(x_ptr + row[:, None] * width + at[None, :], mask=inside, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + at, mask=at < width, other=0.0).to(tl.float32)
        a_inside = (at < width)[:, None] & (r < R)[None, :]
        a = tl.load(a_ptr + r[None, :] * width + at[:, None], mask=a_inside, other=0.0)
        squares += tl.sum(x * x, 1)
        h += tl.dot((x * w[None, :]).to(a.dtype), a, input_precision="ieee")
    rho = 1 / tl.sqrt(squares / width + eps)
    tl.store(rho_ptr + row, rho, mask=row < rows)
    h_inside = (row < rows)[:, None] & (r < R)[None, :]
    h = (h * rho[:, None]).to(h_ptr.dtype.element_ty)
    tl.store(h_ptr + r[None, :].to(tl.int64) * rows + row[:, None], h, mask=h_inside)
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
    return {"PAD": pad, "BLOCK_M": 16 if itemsize > 2 else 64, "BLOCK_K": 64}


def norm_shrink(x: Tensor, weight: Tensor, a: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return y (rows, width), rho (rows,) and H (r, rows), of contiguous x (rows, width), w (width,), A (r, width)."""
    import torch

    (rows, width), r = x.shape, len(a)
    y, rho = torch.empty_like(x), torch.empty(rows, device=x.device, dtype=torch.float32)
    h = torch.empty((r, rows), device=x.device, dtype=x.dtype)
    blocks = _blocks(r, x.element_size())
    grid = (triton.cdiv(rows, blocks["BLOCK_M"]),)
    norm_shrink_kernel[grid](x, weight, a, y, rho, h, rows, width, eps, R=r, **blocks, num_warps=4)
    return y, rho, h


def _builds() -> list[Build]:
    made = []
    for label, dtype, size, r in (("bf16", tl.bfloat16, 2, 128), ("fp32", tl.float32, 4, 48)):
        tensors = dict.fromkeys(("x_ptr", "w_ptr", "a_ptr", "y_ptr", "h_ptr"), dtype) | {"rho_ptr": tl.float32}
        sizes = {"rows": 8192, "width": 4096, "eps": 1e-6, "R": r, **_blocks(r, size)}
        name = f"norm and shrink, {label}, r {r}"
        made.append(Build(name, norm_shrink_kernel, tensors | sizes, {"num_warps": 4}, products=size == 2))
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
