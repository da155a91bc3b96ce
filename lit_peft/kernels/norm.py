"""RMS normalisation, forward and backward, one program a row.

y = w x rho,   rho = 1 / sqrt(mean(x^2) + eps)        dx = rho (g w - u mean(g w u)),   u = x rho
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


def _builds() -> list[Build]:
    made = []
    for label, dtype in (("bf16", tl.bfloat16), ("fp16", tl.float16), ("fp32", tl.float32)):
        for width in (2048, 4096):
            common: dict[str, Any] = {"width": width, "BLOCK": width}
            ends = {"x_ptr": dtype, "w_ptr": dtype, "rho_ptr": tl.float32}
            forward, backward = ends | {"y_ptr": dtype, "eps": 1e-6}, ends | {"g_ptr": dtype, "dx_ptr": dtype}
            made.append(Build(f"norm, {label}, {width}", norm_kernel, forward | common, _options(width)))
            made.append(
                Build(f"norm backward, {label}, {width}", norm_backward_kernel, backward | common, _options(width))
            )
    return made


BUILDS = _builds()
