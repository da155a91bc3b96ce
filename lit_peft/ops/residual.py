"""The update of PiSSA and OLoRA, s (B A - B0 A0) D(x), and its gradients.

    out = y + s [B - B0 | B0] [A ; A - A0] D(x)          one product of rank 2r

which is exactly zero at the start in any precision. For g the gradient of out, P = s B^T g^T and P0 = s B0^T g^T:

    dy = g        dx = D((P - P0)^T A + P0^T (A - A0))        dA = P D(x)        dB = s (A D(x)^T g)^T

with P - P0 from B - B0: in half precision the difference of two products would be all rounding.

What is kept is what plain LoRA keeps, x (or what it is made of) and A x. Written with plain operations, autograd would
keep a copy of every sum and difference of parameters, in each layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_peft.ops.low_rank import drawn, dropped, low_rank_update
from lit_peft.ops.low_rank import reference as plain
from lit_peft.ops.recipes import Recipe, as_written, eager, recipe_of


def reference(y: Tensor, x: Tensor, a: Tensor, b: Tensor, a0: Tensor, b0: Tensor, scale: float) -> Tensor:
    """Return y + s (B A - B0 A0) x with plain operations."""
    return plain(y, x, torch.cat([a, a - a0]), torch.cat([b - b0, b0], dim=1), scale)


def residual_update(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, a0: Tensor, b0: Tensor, scale: float, *, dropout: float = 0.0
) -> Tensor:
    """Return y + s (B A - B0 A0) dropout(x).

    Args:
        y: the layer's output (..., out); its dtype is the result's.
        x: the layer's input (..., in).
        a: A (r, in).
        b: B (out, r).
        a0: A0 (r, in), where A started; gets no gradient.
        b0: B0 (out, r), where B started; gets no gradient.
        scale: s.
        dropout: the probability with which an entry of x is left out, the others divided by 1 - p.

    Returns:
        (..., out). A second derivative is not there: asking for one raises.

    Example:
        >>> import torch
        >>> x, y, a, b = torch.ones(2, 4), torch.zeros(2, 3), torch.ones(1, 4), torch.ones(3, 1)
        >>> residual_update(y, x, 2 * a, b, a, b, scale=1.0)[0].tolist()
        [4.0, 4.0, 4.0]
    """
    if not eager():
        return reference(y, F.dropout(x, dropout) if dropout else x, a, b, a0, b0, scale)
    return _applied(y, x, (None, None), a, b, a0, b0, scale, dropout)


def residual_linear(
    x: Tensor, base: nn.Linear, a: Tensor, b: Tensor, a0: Tensor, b0: Tensor, scale: float, *, dropout: float = 0.0
) -> Tensor:
    """Return x W^T + c + s (B A - B0 A0) dropout(x), added up in the layer's own product.

    Args:
        x: the input (..., in).
        base: the layer, for which `lora_linear.joins` holds: W (out, in) and c (out,) or none, frozen, in x's dtype.
        a: as for `residual_update`, and so are the others.
        b: B (out, r).
        a0: A0 (r, in).
        b0: B0 (out, r).
        scale: s.
        dropout: the probability with which an entry of x is left out of the update.

    Returns:
        (..., out). A second derivative is not there: asking for one raises.

    Example:
        >>> import torch
        >>> x, base = torch.ones(2, 4), torch.nn.Linear(4, 3).requires_grad_(False)
        >>> a, b = torch.ones(1, 4), torch.ones(3, 1)
        >>> bool(residual_linear(x, base, a, b, a, b, scale=1.0).equal(base(x)))
        True
    """
    return _applied(None, x, (base.weight, base.bias), a, b, a0, b0, scale, dropout)


def _applied(
    y: Tensor | None,
    x: Tensor,
    layer: tuple[Tensor | None, Tensor | None],
    a: Tensor,
    b: Tensor,
    a0: Tensor,
    b0: Tensor,
    scale: float,
    dropout: float,
) -> Tensor:
    dtype = x.dtype if y is None else y.dtype
    # the differences are taken before rounding: in half precision a small step would be lost in them
    steps = (b.detach() - b0).to(dtype), (a.detach() - a0).to(dtype)
    a, b, a0, b0 = (part.to(dtype) for part in (a, b, a0, b0))
    if y is not None and not (
        torch.is_grad_enabled() or dropout
    ):  # as the plain LoRA that is saved: equal to the last bit
        return low_rank_update(y, x, torch.cat([a, steps[1]]), torch.cat([steps[0], b0], dim=1), scale)
    settings = scale, dropout, drawn(dropout), recipe_of(x)
    out: Tensor = _Residual.apply(y, x, a, b, *layer, a0, b0, *steps, *settings)  # type: ignore[no-untyped-call]
    return out


class _Residual(torch.autograd.Function):
    """On top of a given y; or with a layer's weight and bias, whose product y is."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor | None,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        a0: Tensor,
        b0: Tensor,
        b_step: Tensor,
        a_step: Tensor,
        scale: float,
        p: float,
        seed: int,
        recipe: Recipe,
    ) -> Tensor:
        dtype = a.dtype
        # in one product of rank 2r, as the saved folder is computed: loaded again, it is equal to the last bit
        with as_written(x):
            rows = x.reshape(-1, x.shape[-1])
            kept = dropped(x, p, seed).reshape(rows.shape) if p else rows
            inner = torch.cat([a, a_step]) @ kept.to(dtype).t()
            b_both = torch.cat([b_step, b0], dim=1)
            if weight is None:
                assert y is not None
                out = torch.addmm(y.reshape(-1, y.shape[-1]), inner.t(), b_both.t(), alpha=scale)
            else:
                out = rows @ weight.t() if bias is None else torch.addmm(bias, rows, weight.t())
                out.addmm_(inner.t(), b_both.t(), alpha=scale)
        needed = ctx.needs_input_grad
        h = inner[: a.shape[0]].clone() if needed[3] else None
        # steps in half precision cannot be taken again; in full precision they are not kept
        ends = (a0, b) if dtype.itemsize >= 4 else (a_step, b_step)
        ctx.save_for_backward(weight if needed[1] else None, a, *ends, b0, h, *(recipe.parts if needed[2] else ()))
        ctx.made = recipe.make, x.shape, x.dtype, scale, p, seed
        return torch.ops.aten._unsafe_view(out, (*x.shape[:-1], len(b)))  # type: ignore[no-any-return]  # as in `low_rank`

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, a, a_step, b_step, b0, h, *parts = ctx.saved_tensors
        make, shape, dtype, scale, p, seed = ctx.made
        r, needed = a.shape[0], ctx.needs_input_grad
        if a.dtype.itemsize >= 4:
            a_step, b_step = a - a_step, b_step - b0
        g = gradient.reshape(-1, gradient.shape[-1])
        dx = da = db = None
        both = (torch.cat([b_step, b0], dim=1).t() @ g.t()).mul_(scale)
        if needed[1]:
            stacked = torch.cat([a, a_step])
            if p or weight is None:
                dx = dropped((both.t() @ stacked).view(shape), p, seed)
                dx = dx.to(dtype) if weight is None else dx.view(-1, shape[-1]).addmm_(g, weight).view(shape)
            else:
                dx = (g @ weight).addmm_(both.t(), stacked).view(shape)
        if needed[2]:
            inner = both[:r] + both[r:]
            da = inner @ dropped(make(*parts), p, seed).reshape(-1, shape[-1]).to(g.dtype)
        if needed[3]:
            db = (h @ g).mul_(scale).t()
        return gradient if needed[0] else None, dx, da, db, *[None] * 10
