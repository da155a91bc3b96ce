"""Factors on the output or the input of a frozen linear layer, and their gradients: (IA)3 (arXiv 2205.05638).

    output:  y = l (x W^T + c)          dx = (g l) W             dl = sum_t g y / l
    input:   y = (x l) W^T + c          dx = l u,  u = g W       dl = sum_t u x

with g the gradient of y, and sums over the rows t. Kept: y, which keys and values are kept as anyway by what reads
them; or x, or what x is made of (see `recipes`): behind a gated MLP that is nothing that is not kept already. Products
with l are computed in float32 and rounded once: bfloat16 has no number between 1 and 1.0078, and training moves l by
less.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lit_peft.ops.choice import takes_kernel
from lit_peft.ops.recipes import Recipe, note, recipe_of

TINY = 1e-20  # stands for a factor of zero: y / l is still there, and y is as good as zero


def reference(x: Tensor, factor: Tensor) -> Tensor:
    """Return x l in x's dtype with plain operations: x (..., width), l (width,) or any shape that fits x."""
    return (x * factor).to(x.dtype)


def scaled(x: Tensor, factor: Tensor, *, kernels: bool | None = None) -> Tensor:
    """Return x l, keeping what x is made of, with a note of how the product is made again.

    Args:
        x: (..., width).
        factor: l (width,).
        kernels: whether the backward pass launches the kernel; None: as measured.

    Returns:
        (..., width) in x's dtype. A second derivative is not there: asking for one raises.

    Example:
        >>> import torch
        >>> scaled(torch.ones(2, 2), torch.tensor([1.0, 3.0])).tolist()
        [[1.0, 3.0], [1.0, 3.0]]
    """
    recipe = recipe_of(x)
    out: Tensor = _Scaled.apply(x, factor, recipe, _launches(x, kernels))  # type: ignore[no-untyped-call]
    return note(out, *recipe.parts, factor, make=partial(_made, recipe.make))


def scaled_output(y: Tensor, factor: Tensor, *, kernels: bool | None = None) -> Tensor:
    """Return y l, keeping the product and not y; it must not be changed in place before the backward pass.

    Args:
        y: a layer's output (..., width).
        factor: l (width,).
        kernels: whether the backward pass launches the kernel; None: as measured.

    Returns:
        (..., width) in y's dtype. A second derivative is not there: asking for one raises.
    """
    out: Tensor = _ScaledOutput.apply(y, factor, _launches(y, kernels))  # type: ignore[no-untyped-call]
    return out


def scaled_linear(
    x: Tensor, base: nn.Linear, factor: Tensor, *, inside: bool = False, kernels: bool | None = None
) -> Tensor:
    """Return l (x W^T + c), or (x l) W^T + c, as one function.

    Args:
        x: the input (..., in).
        base: the layer, for which `joins` holds: W (out, in) and c (out,) or none, frozen, in x's dtype.
        factor: l (out,) or, inside, (in,).
        inside: whether the input is scaled, not the output.
        kernels: whether the backward pass launches the kernel; None: as measured.

    Returns:
        (..., out). It must not be changed in place before the backward pass. A second derivative is not there: asking
        for one raises.

    Example:
        >>> import torch
        >>> base = torch.nn.Linear(2, 2, bias=False).requires_grad_(False)
        >>> x, factor = torch.ones(1, 2), torch.tensor([2.0, 3.0])
        >>> bool((scaled_linear(x, base, factor) == base(x) * factor).all())
        True
    """
    launch = _launches(x, kernels, None if inside else len(factor))
    if inside:
        out: Tensor = _Inside.apply(x, base.weight, base.bias, factor, recipe_of(x), launch)  # type: ignore[no-untyped-call]
        return out
    out = _Outside.apply(x, base.weight, base.bias, factor, launch)  # type: ignore[no-untyped-call]
    return out


def _launches(x: Tensor, kernels: bool | None, width: int | None = None) -> bool:
    rows = x.numel() // max(1, x.shape[-1])
    return takes_kernel("scaled", x, kernels, rows=rows, width=width or x.shape[-1])


def _made(make: Any, *parts: Tensor) -> Tensor:
    return reference(make(*parts[:-1]), parts[-1])


def scale_(x: Tensor, factor: Tensor) -> Tensor:
    """Multiply x (rows, width) by l (width,) in place, in float32 or better, and return it."""
    return torch.mul(x, factor, out=x)


def nonzero(factor: Tensor) -> Tensor:
    """Return the factors (width,) with `TINY` for zero, so that what they multiply can be told from the product.

    Any other factor is larger by far than the last digit of it that this could change.
    """
    return factor + TINY


def sums(g: Tensor, z: Tensor, room: Tensor | None = None) -> Tensor:
    """Return sum_t g z (width,), in float32 or better, of g and z (rows, width); room like g is overwritten."""
    return torch.mul(g, z, out=room).sum(0, dtype=torch.promote_types(g.dtype, torch.float32))


def scale_and_sum(g: Tensor, z: Tensor | None, factor: Tensor, launch: bool, own: bool) -> tuple[Tensor, Tensor | None]:
    """Return g l (rows, width) and sum_t g z (width,).

    Args:
        g: (rows, width).
        z: (rows, width), or None where the sum is not asked for.
        factor: l (width,).
        launch: whether to take the kernel.
        own: whether g may be overwritten.
    """
    if z is not None and launch:
        product, total = torch.ops.lit_peft.scale_and_sum(g.contiguous(), z.contiguous(), factor)
        return product, total
    product = torch.empty_like(g)  # one piece of memory for both products: it is still in the cache
    total = None if z is None else sums(g, z, product)
    return torch.mul(g, factor, out=g if own else product), total


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor, recipe: Recipe, launch: bool) -> Tensor:
        ctx.save_for_backward(factor, *(recipe.parts if ctx.needs_input_grad[1] else ()))
        ctx.made = recipe.make, launch
        return reference(x, factor)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        factor, *parts = ctx.saved_tensors
        make, launch = ctx.made
        g = gradient.reshape(-1, gradient.shape[-1])
        x = make(*parts).reshape(g.shape) if ctx.needs_input_grad[1] else None
        dx, dl = scale_and_sum(g, x, factor, launch, own=False)
        return dx.view(gradient.shape), None if dl is None else dl.to(factor.dtype), None, None


class _ScaledOutput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, factor: Tensor, launch: bool) -> Tensor:
        factor = nonzero(factor)
        out = reference(y, factor)
        ctx.save_for_backward(factor, out if ctx.needs_input_grad[1] else None)
        ctx.launch = launch
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        factor, out = ctx.saved_tensors
        g = gradient.reshape(-1, gradient.shape[-1])
        z = None if out is None else out.reshape(g.shape)
        dy, dl = scale_and_sum(g, z, factor, ctx.launch, own=False)
        return dy.view(gradient.shape), None if dl is None else (dl / factor).to(factor.dtype), None


class _Outside(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, factor: Tensor, launch: bool) -> Tensor:
        needed, factor = ctx.needs_input_grad, nonzero(factor)
        rows = x.reshape(-1, x.shape[-1])
        out = scale_(rows @ weight.t() if bias is None else torch.addmm(bias, rows, weight.t()), factor)
        out = torch.ops.aten._unsafe_view(out, (*x.shape[:-1], len(weight)))
        ctx.save_for_backward(weight if needed[0] else None, factor, out if needed[3] else None)
        ctx.made = x.shape, launch
        return out  # type: ignore[no-any-return]

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, factor, out = ctx.saved_tensors
        shape, launch = ctx.made
        g = gradient.reshape(-1, gradient.shape[-1])
        z = None if out is None else out.view(g.shape)
        dx: Tensor | None = None
        if weight is None:  # nothing below is trained
            dl = None if z is None else sums(g, z)
        else:
            product, dl = scale_and_sum(g, z, factor, launch, own=False)
            dx = (product @ weight).view(shape)
        return dx, None, None, None if dl is None else (dl / factor).to(factor.dtype), None


class _Inside(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, factor: Tensor, recipe: Recipe, launch: bool
    ) -> Tensor:
        rows = reference(x.reshape(-1, x.shape[-1]), factor)
        out = rows @ weight.t() if bias is None else torch.addmm(bias, rows, weight.t())
        ctx.save_for_backward(weight, factor, *(recipe.parts if ctx.needs_input_grad[3] else ()))
        ctx.made = recipe.make, x.shape, launch
        return torch.ops.aten._unsafe_view(out, (*x.shape[:-1], len(weight)))  # type: ignore[no-any-return]

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, factor, *parts = ctx.saved_tensors
        make, shape, launch = ctx.made
        u = gradient.reshape(-1, gradient.shape[-1]) @ weight
        x = make(*parts).reshape(u.shape) if ctx.needs_input_grad[3] else None
        dx, dl = scale_and_sum(u, x, factor, launch, own=True)
        return dx.view(shape), None, None, None if dl is None else dl.to(factor.dtype), None, None


@torch.library.custom_op("lit_peft::scale_and_sum", mutates_args=())
def _scale_and_sum(g: Tensor, z: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    from lit_peft.kernels.scaled import scale_and_sum

    return scale_and_sum(g, z, factor)


@_scale_and_sum.register_fake
def _(g: Tensor, z: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(g), g.new_empty(g.shape[1], dtype=torch.float32)
