"""A frozen linear layer with a low-rank update, as one function.

    out = x W^T + c + s D(x) A^T L B^T

as `low_rank` has it, with the update added into the layer's own product: neither the output nor the gradient of the
input is written twice. There are three ways, which differ by rounding only:

    plain      x W^T, then the update is added to it by a product that accumulates; backwards in the same way
    kernels    the narrow products are read off x and off the gradient in one pass each, see `shrink`
    border     [x | z] [W | B]^T and [g | p] [W ; A], one product each, see `border`

Under autocast everything is computed in autocast's dtype, and gradients come back in the parameters' dtypes. Kept is x
as it is computed with (or what it is made of, see `recipes`) and D(x) A^T, and W as it is stored: autocast by itself
would keep a copy of each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from lit_peft.ops import border as borders
from lit_peft.ops import low_rank
from lit_peft.ops.border import Border
from lit_peft.ops.choice import takes_kernel
from lit_peft.ops.low_rank import dropped, inner_gradients, narrow, outer, scaled
from lit_peft.ops.recipes import Recipe, as_dtype, autocasting, recipe_of, recording
from lit_peft.ops.shrink import dyb_db, shrink, spread, takes_shrink, takes_spread

FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # which autocast casts


def joins(base: nn.Module, x: Tensor) -> TypeGuard[nn.Linear]:
    """Return whether `lora_linear` may stand for a call of the base: a plain frozen `nn.Linear`, watched by nobody."""
    if type(base) is not nn.Linear or not recording():
        return False
    weight, bias = base.weight, base.bias
    return (
        type(weight) is nn.Parameter
        and not weight.requires_grad
        and (bias is None or (type(bias) is nn.Parameter and not bias.requires_grad))
        and (x.dtype in FLOATS and weight.dtype in FLOATS if autocasting(x) else weight.dtype == x.dtype)
        and x.numel() > 0
        and not (base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks)
        and "forward" not in base.__dict__
    )


def lora_linear(
    x: Tensor,
    base: nn.Linear,
    a: Tensor,
    b: Tensor,
    scale: float,
    *,
    dropout: float = 0.0,
    diagonal: Tensor | None = None,
    kernels: bool | None = None,
) -> Tensor:
    """Return x W^T + c + s dropout(x) A^T L B^T.

    Args:
        x: the input (..., in).
        base: the layer, for which `joins` holds: W (out, in) and c (out,) or none, frozen, in x's dtype.
        a: A (r, in), in any floating dtype.
        b: B (out, r).
        scale: s.
        dropout: the probability with which an entry of x is left out of the update.
        diagonal: l (r,), as AdaLoRA has it; None: L is left out.
        kernels: whether to launch the kernels, and to put the weight into a border where `border.allow` has been asked;
            None: as measured. A border that is there is used, unless this is False.

    Returns:
        (..., out), under autocast in its dtype. A second derivative is not there: asking for one raises.

    Example:
        >>> import torch
        >>> x, base = torch.ones(2, 4), torch.nn.Linear(4, 3, bias=False).requires_grad_(False)
        >>> out = lora_linear(x, base, torch.ones(1, 4), torch.ones(3, 1), scale=0.5)
        >>> bool(out.sub(base(x)).sub(2).abs().max() < 1e-6)
        True
    """
    r, tall = len(a), len(b)
    dtype = torch.get_autocast_dtype(x.device.type) if autocasting(x) else x.dtype
    recipe = recipe_of(x)
    cast = as_dtype(x, dtype)
    if dtype != x.dtype and recipe.parts[0] is x:
        recipe = recipe_of(cast)
    shrinks = takes_shrink(cast, r, dropout, kernels)
    spreads = takes_spread(cast, tall, r, dropout, kernels)
    if dropout:  # both draw the same mask, or neither does
        shrinks = spreads = shrinks and spreads
    around = None if kernels is False else _border(base, cast, r, kernels)
    filling = 0 if around is None else around.hold(base.weight, a, b)
    seed = low_rank.drawn(dropout)
    call = _Call(scale, dropout, seed, cast, recipe, shrinks, spreads, around, filling)
    out: Tensor = _Joined.apply(x, base.weight, base.bias, a, b, diagonal, call)  # type: ignore[no-untyped-call]
    return out


def _border(base: nn.Linear, x: Tensor, r: int, kernels: bool | None) -> Border | None:
    weight = base.weight
    if weight.dtype != x.dtype or not r:
        return None
    found = borders.bordered(base)
    if found is None or found.width < r:
        sizes = {"rows": x.numel() // x.shape[-1], "width": weight.shape[1], "tall": weight.shape[0]}
        wanted = found is not None or (borders.allowed(base) and takes_kernel("border", x, kernels, **sizes))
        return borders.surround(base, r) if wanted and not borders.complaint(base) else None
    return found


@dataclass
class _Call:
    """How one call is computed."""

    scale: float
    p: float
    seed: int
    x: Tensor | None  # in the dtype of the products; let go after the forward pass
    recipe: Recipe | None
    shrinks: bool
    spreads: bool
    border: Border | None
    filling: int


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        diagonal: Tensor | None,
        call: _Call,
    ) -> Tensor:
        needed = ctx.needs_input_grad
        assert call.x is not None
        assert call.recipe is not None
        rows, recipe, scale = call.x.reshape(-1, x.shape[-1]), call.recipe, call.scale
        call.x = call.recipe = None
        ctx.kinds = x.dtype, None, None, a.dtype, b.dtype, None if diagonal is None else diagonal.dtype
        dtype = rows.dtype
        bias = None if bias is None else bias.to(dtype)
        diagonal = None if diagonal is None else diagonal.to(dtype)
        around = call.border if call.border is not None and borders.pays_forward(weight) else None
        both = None
        if call.shrinks:
            h, both = shrink(rows, a, diagonal, scale, call.p, call.seed, around.width if around else 0)
            h = h.t()
        else:
            a = a.to(dtype)  # which the kernels do by themselves
            h = narrow(rows, a, call.p, call.seed, False)
        if around is None or both is None:
            inner = h if diagonal is None else diagonal[:, None] * h
        if around is None:
            b = b.to(dtype)
            turned = weight.to(dtype).t()
            out = rows @ turned if bias is None else torch.addmm(bias, rows, turned)
            out.addmm_(inner.t(), b.t(), alpha=scale)
        else:
            both = borders.packed(rows, inner.t(), scale, around.width) if both is None else both
            out = borders.forward_product(weight, around.width, both, bias)
        ctx.save_for_backward(
            weight if needed[0] else None,
            a if needed[0] else None,
            b,
            diagonal,
            h if needed[4] or needed[5] else None,
            *(recipe.parts if needed[3] else ()),
        )
        ctx.made = recipe.make, x.shape, call
        return torch.ops.aten._unsafe_view(out, (*x.shape[:-1], len(b)))  # type: ignore[no-any-return]  # as in `low_rank`

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]  # a second derivative would lack H's
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, a, b, diagonal, h, *parts = ctx.saved_tensors
        make, shape, call = ctx.made
        needed, scale, p, seed = ctx.needs_input_grad, call.scale, call.p, call.seed
        g = gradient.reshape(-1, gradient.shape[-1])
        around = _still(call, weight) if needed[0] else None
        asked = needed[0], *needed[3:6]
        both = None
        b = b if call.spreads else b.to(g.dtype)
        if around is not None and call.spreads:
            inner, db, both = dyb_db(g, b, h.t() if needed[4] else None, diagonal, scale, around.width)
            db, dl = scaled(db, diagonal, scale) if needed[4] else None, None
            inner = inner.t()
            if diagonal is not None:
                dl = (inner * h).sum(1) if needed[5] else None
                inner.mul_(diagonal[:, None])
        else:
            inner, db, dl = inner_gradients(g, b, diagonal, h, scale, asked, call.spreads)
        dx = da = None
        if around is not None:
            both = borders.packed(g, inner.t(), 1.0, around.width) if both is None else both
            dx = borders.backward_product(weight, around.width, both)
        elif needed[0]:
            dx = g @ weight.to(g.dtype)
            if not p:
                dx.addmm_(inner.t(), a.to(g.dtype))
            elif call.shrinks:
                spread(dx, inner.t(), a, p, seed)
            else:
                dx += dropped(inner.t() @ a.to(g.dtype), p, seed)
        if needed[3]:
            da = outer(inner, make(*parts).reshape(-1, shape[-1]).to(g.dtype), p, seed, call.shrinks)
        if call.border is not None:
            call.border.again = True
        grads = (dx if dx is None else dx.view(shape), None, None, da, db, dl)
        return *(d if d is None else d.to(kind) for d, kind in zip(grads, ctx.kinds, strict=True)), None


def _still(call: _Call, weight: Tensor) -> Border | None:
    """Return the border in which A still stands as in the forward pass, where the gradient is to be had from it."""
    found: Border | None = call.border
    if found is None or call.p or found.filled != call.filling or not borders.lies(weight, found.width):
        return None
    return found if borders.pays_backward(weight) else None
