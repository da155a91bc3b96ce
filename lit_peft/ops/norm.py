"""RMS normalisation with a frozen weight, which keeps less for the backward pass.

    y = w u,   u = x rho,   rho = 1 / sqrt(mean(x^2) + eps)        dx = rho (g w - u mean(g w u))

with g the gradient of y, and means over the last dimension. Kept: x and rho. The mean is taken in float32; u is rounded
to x's dtype before it is multiplied by w, as the models' own code does.

Where low-rank updates read y, their first product H = A y^T = rho (A (w x)^T) can be had from the same reading of x.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lit_peft.ops.choice import takes_kernel
from lit_peft.ops.recipes import note


def reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return y with plain operations: x (..., width), w (width,)."""
    rho = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    return normalised(x, weight, rho)


def normalised(x: Tensor, weight: Tensor, rho: Tensor) -> Tensor:
    """Return w (x rho) in x's dtype: x (..., width), w (width,), rho (..., 1) in float32."""
    return weight * (x.float() * rho).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, kernels: bool | None = None) -> Tensor:
    """Return y, with a note of how it is made again for what would keep it.

    Args:
        x: (..., width).
        weight: w (width,), frozen.
        eps: added to the mean square.
        kernels: whether to launch the kernel; None: as measured.

    Returns:
        (..., width) in x's dtype. A second derivative is not there: asking for one raises.

    Example:
        >>> import torch
        >>> rms_norm(torch.tensor([[3.0, -3.0]]), torch.ones(2), 0.0).tolist()
        [[1.0, -1.0]]
    """
    launch = weight.dtype == x.dtype and takes_kernel("norm", x, kernels, **_sizes(x))
    if launch:
        with torch.no_grad():
            y, rho = _norm(x.detach(), weight, eps)
    else:
        with torch.no_grad():
            rho = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
            y = normalised(x, weight, rho)
    out: Tensor = _Norm.apply(x, weight, rho, y, launch)  # type: ignore[no-untyped-call]
    if launch:
        return note(out, x, weight, make=partial(_launched, eps=eps))
    return note(out, x, weight, rho, make=normalised)


def _launched(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y: Tensor = _norm(x, weight, eps)[0]
    return y


def norm_shrink(
    x: Tensor, weight: Tensor, eps: float, factors: Sequence[Tensor], *, kernels: bool | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y as `rms_norm` does; and A, the factors below each other, and H = A y^T, without gradients.

    Args:
        x: (..., width).
        weight: w (width,), frozen.
        eps: added to the mean square.
        factors: A_i (r_i, width), one to three, in any floating dtype.
        kernels: whether to launch the kernel; None: as measured.

    Returns:
        y (..., width), A (sum of r_i, width) and H (sum of r_i, rows), in x's dtype.

    Example:
        >>> y, a, h = norm_shrink(torch.tensor([[3.0, -3.0]]), torch.ones(2), 0.0, [torch.tensor([[2.0, 0.0]])])
        >>> y.tolist(), h.tolist()
        ([[1.0, -1.0]], [[2.0]])
    """
    if not shrinks(x, weight, factors, kernels):
        y = rms_norm(x, weight, eps, kernels=kernels)
        a = torch.cat([factor.detach() for factor in factors]).to(x.dtype)
        return y, a, a @ y.detach().reshape(-1, y.shape[-1]).t()
    with torch.no_grad():
        made, rho, h, a = launch_norm_shrink(x.detach(), weight, [factor.detach() for factor in factors], eps)
    out: Tensor = _Norm.apply(x, weight, rho, made, True)  # type: ignore[no-untyped-call]
    return note(out, x, weight, make=partial(_launched, eps=eps)), a, h


def shrinks(x: Tensor, weight: Tensor, factors: Sequence[Tensor], kernels: bool | None = None) -> bool:
    """Return whether `norm_shrink` launches its kernel.

    Not in float16, in which w x could be too large before it is normalised.
    """
    ranks = sum(map(len, factors))  # more than 64 do not fit into registers
    fits = weight.dtype == x.dtype in (torch.bfloat16, torch.float32) and 0 < ranks <= 64 and len(factors) <= 3
    return fits and takes_kernel("norm_shrink", x, kernels, **_sizes(x))


def _sizes(x: Tensor) -> dict[str, int]:
    return {"rows": x.numel() // max(1, x.shape[-1]), "width": x.shape[-1]}


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, rho: Tensor, y: Tensor, launch: bool) -> Tensor:
        ctx.save_for_backward(x, weight, rho)
        ctx.launch = launch
        return y.view_as(y)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rho = ctx.saved_tensors
        if ctx.launch:
            return _norm_backward(gradient, x, weight, rho), None, None, None, None
        inner = (gradient * weight).float()
        unit = x.float() * rho
        dx = inner.sub_(unit.mul_((inner * unit).mean(-1, keepdim=True))).mul_(rho)
        return dx.to(x.dtype), None, None, None, None


# As registered operations the launches have shapes without data: fake tensors, the memory count and compilers see them.
@torch.library.custom_op("lit_peft::norm", mutates_args=())
def _norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    from lit_peft.kernels.norm import norm

    y, rho = norm(x.reshape(-1, x.shape[-1]).contiguous(), weight, eps)
    return y.view(x.shape), rho.view(*x.shape[:-1], 1)


@_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


@torch.library.custom_op("lit_peft::norm_backward", mutates_args=())
def _norm_backward(g: Tensor, x: Tensor, weight: Tensor, rho: Tensor) -> Tensor:
    from lit_peft.kernels.norm import norm_backward

    g_rows, x_rows = (tensor.reshape(-1, x.shape[-1]).contiguous() for tensor in (g, x))
    return norm_backward(g_rows, x_rows, weight, rho.reshape(-1)).view(x.shape)


@_norm_backward.register_fake
def _(g: Tensor, x: Tensor, weight: Tensor, rho: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op("lit_peft::norm_shrink", mutates_args=())
def launch_norm_shrink(
    x: Tensor, weight: Tensor, factors: Sequence[Tensor], eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y (..., width), rho (..., 1) in float32, H (sum of r_i, rows) and A (sum of r_i, width)."""
    from lit_peft.kernels.norm import norm_shrink

    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y, rho, h, a = norm_shrink(rows, weight, [factor.contiguous() for factor in factors], eps)
    return y.view(x.shape), rho.view(*x.shape[:-1], 1), h, a


@launch_norm_shrink.register_fake
def _(x: Tensor, weight: Tensor, factors: Sequence[Tensor], eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rho = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    r, width = sum(len(factor) for factor in factors), x.shape[-1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return y, rho, x.new_empty(r, x.numel() // width), x.new_empty(r, width)
