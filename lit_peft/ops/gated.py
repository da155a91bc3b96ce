"""The gated product of Llama's MLP and its kin, by itself or with the two layers in front of it, keeping less.

    h = silu(e) g,      de = d g s(e) (1 + e (1 - s(e))),   dg = d silu(e)         s the logistic function, d = dh
    e = x We^T + s_e H_e^T B_e^T,   g = x Wg^T + s_g H_g^T B_g^T                    as in `packed`

Kept: e and g, not silu(e), and h is made again where it is needed. With the kernels, what is kept of e and g are the
products with We and Wg, and the low-rank updates are added in registers, forward and backward: neither the outputs of
the two layers nor their gradients are written twice.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_peft.ops.choice import takes_kernel
from lit_peft.ops.packed import Parts, Shrunk, gradients_of, inner, keep, kept, products, ready
from lit_peft.ops.packed import reference as layers
from lit_peft.ops.recipes import note, recipe_of


def reference(x: Tensor, parts: Parts) -> Tensor:
    """Return silu(y_1) y_2 with plain operations: x (..., in), y_i (..., f)."""
    e, g = layers(x, parts)
    return F.silu(e) * g


def silu_product(e: Tensor, g: Tensor) -> Tensor:
    """Return silu(e) g, of e and g of one shape."""
    return F.silu(e).mul_(g)


def gated_product(e: Tensor, g: Tensor, *, kernels: bool | None = None) -> Tensor:
    """Return silu(e) g, with a note of how it is made again for what would keep it.

    Args:
        e: (..., f).
        g: as e, of the same dtype.
        kernels: whether to launch the kernels; None: as measured.

    Returns:
        (..., f). A second derivative is not there: asking for one raises.

    Example:
        >>> import torch
        >>> gated_product(torch.tensor([0.0, 100.0]), torch.ones(2)).tolist()
        [0.0, 100.0]
    """
    launch = takes_kernel("gated", e, kernels, rows=e.numel() // max(1, e.shape[-1]), width=2 * e.shape[-1])
    product: Tensor = _Product.apply(e, g, launch)  # type: ignore[no-untyped-call]
    return note(product, e, g, make=_launched if launch else silu_product)


def _launched(e: Tensor, g: Tensor) -> Tensor:
    product: Tensor = launch_gated(_rows(e), _rows(g), None, None, 1.0, None, None, 1.0)
    return product.view(e.shape)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, e: Tensor, g: Tensor, launch: bool) -> Tensor:
        ctx.save_for_backward(e, g)
        ctx.launch = launch
        return _launched(e, g) if launch else silu_product(e, g)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        e, g = ctx.saved_tensors
        if ctx.launch:
            both = _gated_backward(_rows(gradient), _rows(e), _rows(g), None, None, 1.0, None, None, 1.0)
            de, dg = (part.view(e.shape) for part in both.split(e.shape[-1], 1))
            return de, dg, None
        de = torch.ops.aten.silu_backward(gradient * g, e) if ctx.needs_input_grad[0] else None
        dg = F.silu(e).mul_(gradient) if ctx.needs_input_grad[1] else None
        return de, dg, None


def gated_linear(x: Tensor, parts: Parts, *, shrunk: Shrunk | None = None, kernels: bool | None = None) -> Tensor:
    """Return silu(y_1) y_2 of two layers that read x, with a note of how it is made again.

    Args:
        x: the input (..., in), in the weights' dtype.
        parts: the two layers, both of width f.
        shrunk: A in x's dtype and H, where they are there already.
        kernels: whether to launch the kernels; None: as measured.

    Returns:
        (..., f). A second derivative is not there: asking for one raises.

    Example:
        >>> import torch
        >>> parts = Parts(torch.tensor([[0.0], [3.0]]), None, (1, 1), (None, (torch.ones(1, 1), torch.ones(1, 1), 1.0)))
        >>> gated_linear(torch.ones(1, 1), parts).tolist()
        [[0.0]]
    """
    launch, factors = parts.launches("gated", x, kernels), parts.factors()
    how = (parts.sizes, parts.scales, launch, recipe_of(x))
    product, base, h = _Gated.apply(x, parts.weight, parts.bias, shrunk, how, *factors)  # type: ignore[no-untyped-call]
    make = partial(_again, scales=parts.scales, there=tuple(b is not None for b in factors[2:]), launch=launch)
    made: Tensor = product
    return note(made, base, h, *(b for b in factors[2:] if b is not None), make=make)


def _low(h: Tensor, bs: tuple[Tensor | None, ...], scales: tuple[float, ...]) -> tuple[Any, ...]:
    """Return what the kernels are told of the updates: H, B and s of e, then of g."""
    found: list[Any] = [None, None, scales[0], None, None, scales[1]]
    for i, b, at in inner(bs):
        found[3 * i : 3 * i + 2] = h[at], b
    return tuple(found)


def _again(
    base: Tensor, h: Tensor, *found: Tensor, scales: tuple[float, ...], there: tuple[bool, ...], launch: bool
) -> Tensor:
    e, g = base.chunk(2, 1)
    if not launch:
        return silu_product(e, g)
    rest = iter(found)
    product: Tensor = launch_gated(e, g, *_low(h, tuple(next(rest) if yes else None for yes in there), scales))
    return product


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        shrunk: Shrunk | None,
        how: tuple[Any, ...],
        *factors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        sizes, scales, launch, recipe = how
        bs = ready(factors[2:], x.dtype, launch)
        base, stack, h = products(x, weight, bias, shrunk, factors[:2])
        e, g = torch.split(base, sizes, 1)
        if launch:
            product = launch_gated(e, g, *_low(h, bs, scales))
        else:
            for i, b, at in inner(bs):
                (e, g)[i].addmm_(h[at].t(), b.t(), alpha=scales[i])
            product = silu_product(e, g)
        keep(ctx, weight, stack, h, bs, recipe, (base, h))
        ctx.made = recipe.make, x.shape, sizes, scales, launch, [None if f is None else f.dtype for f in factors]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(base, h)
        return product.view(*x.shape[:-1], sizes[0]), base, h

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Any, ...]:
        saved, (base, h) = kept(ctx)
        e, g = base.chunk(2, 1)
        d = _rows(gradient)
        if ctx.made[4]:
            both = _gated_backward(d, e, g, *_low(h, saved[3], ctx.made[3]))
        else:
            both = torch.empty_like(base)
            de, dg = both.chunk(2, 1)
            torch.ops.aten.silu_backward.grad_input(torch.mul(d, g, out=de), e, grad_input=de)
            torch.mul(F.silu(e), d, out=dg)
        return gradients_of(ctx, both.chunk(2, 1), both, *saved)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


# As registered operations the launches have shapes without data: fake tensors, the memory count and compilers see them.
@torch.library.custom_op("lit_peft::gated", mutates_args=())
def launch_gated(
    e: Tensor,
    g: Tensor,
    h_e: Tensor | None,
    b_e: Tensor | None,
    s_e: float,
    h_g: Tensor | None,
    b_g: Tensor | None,
    s_g: float,
) -> Tensor:
    """Return silu(e) g (rows, f), of e0 and g0 and their updates; see `_low` for those that are not there."""
    from lit_peft.kernels.gated import gated

    return gated(e, g, h_e, b_e, s_e, h_g, b_g, s_g)


@launch_gated.register_fake
def _(e: Tensor, g: Tensor, *low: Any) -> Tensor:
    return torch.empty(e.shape, dtype=e.dtype, device=e.device)


@torch.library.custom_op("lit_peft::gated_backward", mutates_args=())
def _gated_backward(
    d: Tensor,
    e: Tensor,
    g: Tensor,
    h_e: Tensor | None,
    b_e: Tensor | None,
    s_e: float,
    h_g: Tensor | None,
    b_g: Tensor | None,
    s_g: float,
) -> Tensor:
    from lit_peft.kernels.gated import gated_backward

    return gated_backward(d, e, g, h_e, b_e, s_e, h_g, b_g, s_g)


@_gated_backward.register_fake
def _(d: Tensor, e: Tensor, g: Tensor, *low: Any) -> Tensor:
    return torch.empty((len(e), 2 * e.shape[1]), dtype=e.dtype, device=e.device)
