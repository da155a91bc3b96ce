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

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from lit_peft.ops import border as borders
from lit_peft.ops import low_rank
from lit_peft.ops.border import Border
from lit_peft.ops.choice import takes_kernel
from lit_peft.ops.low_rank import dropped, inner_gradients, narrow, outer
from lit_peft.ops.recipes import as_dtype, autocasting, noted, recording, watched, whole
from lit_peft.ops.shrink import dyb_db, shrink, sizes, spread, takes

_unsafe_view = torch.ops.aten._unsafe_view.default
FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # which autocast casts


def joins(base: nn.Module, x: Tensor, *, casts: bool = False) -> TypeGuard[nn.Linear]:
    """Return whether one function may stand for a call of the base: a plain frozen `nn.Linear`, watched by nobody.

    Args:
        base: the layer.
        x: its input.
        casts: whether the function does under autocast what autocast does, as `lora_linear`.
    """
    if type(base) is not nn.Linear or not recording() or (autocasting(x) and not casts):
        return False
    weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
    return (
        weight is not None  # pruned, or under weight norm, it is made of others
        and whole(weight)
        and not weight.requires_grad
        and (bias is None or (whole(bias) and not bias.requires_grad))
        and (x.dtype in FLOATS and weight.dtype in FLOATS if autocasting(x) else weight.dtype == x.dtype)
        and x.numel() > 0
        and not watched(base)
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
    recipe, rows = noted(x), x
    if autocasting(x):
        rows = as_dtype(x, torch.get_autocast_dtype(x.device.type))
    kept: tuple[Any, ...] = (None, None, rows) if recipe is None else (recipe.again, recipe.make, *recipe.parts)
    weight, bias = base._parameters["weight"], base._parameters["bias"]
    way = _way(rows, base, a, b, dropout, kernels)
    call = rows, kept, scale, dropout, low_rank.drawn(dropout) if dropout else 0, way  # each argument of `apply` costs
    out: Tensor = _Joined.apply(x, weight, bias, a, b, diagonal, call)  # type: ignore[no-untyped-call]
    return out


@dataclass
class _Way:
    """How one call is computed, where not by plain operations alone.

    Attributes:
        shrinks: whether H is made by a kernel.
        spreads: whether P and dB are.
        border: around the weight, or none.
        filling: which filling of the border the forward pass has used.
    """

    shrinks: bool
    spreads: bool
    border: Border | None
    filling: int


def _way(x: Tensor, base: nn.Linear, a: Tensor, b: Tensor, p: float, kernels: bool | None) -> _Way | None:
    if not borders.lined(base) and (
        kernels is False or (kernels is None and x.device.type != "cuda" and "TRITON_INTERPRET" not in os.environ)
    ):
        return None
    r, tall = a.shape[0], b.shape[0]
    shrinks, spreads = (takes(op, x, tall, r, p, kernels) for op in ("shrink", "spread"))
    if p:  # both draw the same mask, or neither does
        shrinks = spreads = shrinks and spreads
    around = None if kernels is False else _border(base, x, r, kernels)
    return _Way(shrinks, spreads, around, 0 if around is None else around.hold(base.weight, a, b))


def _border(base: nn.Linear, x: Tensor, r: int, kernels: bool | None) -> Border | None:
    weight = base.weight
    if weight.dtype != x.dtype or not r:
        return None
    found = borders.bordered(base)
    if found is None or found.width < r:
        told = sizes(x, weight.shape[0], r)
        wanted = found is not None or (borders.allowed(base) and takes_kernel("border", x, kernels, **told))
        return borders.surround(base, r) if wanted and not borders.complaint(base) else None
    return found


def _once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Like torch's own, which costs as much as a small product, but only where a second derivative is asked for."""
    refusing = torch.autograd.function.once_differentiable(backward)

    @wraps(backward)
    def checked(ctx: Any, gradient: Tensor) -> Any:
        return (refusing if torch.is_grad_enabled() else backward)(ctx, gradient)

    return checked


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
        call: tuple[Any, ...],
    ) -> Tensor:
        x_here, (again, make, *parts), scale, p, seed, way = call
        needed, dtype, width = ctx.needs_input_grad, x_here.dtype, x_here.shape[-1]
        kinds = x.dtype, a.dtype, b.dtype, None if diagonal is None else diagonal.dtype
        rows = x_here if x_here.dim() == 2 else x_here.reshape(-1, width)
        bias = bias if bias is None or bias.dtype == dtype else bias.to(dtype)
        diagonal = diagonal if diagonal is None or diagonal.dtype == dtype else diagonal.to(dtype)
        launch, around, both = way is not None and way.shrinks, None if way is None else way.border, None
        if around is not None and not borders.pays_forward(weight):
            around = None
        if launch:  # the kernels cast A by themselves
            h, both = shrink(rows, a, diagonal, scale, p, seed, around.width if around else 0)
            h = h.t()
        else:
            a = a if a.dtype == dtype else a.to(dtype)
            h = narrow(rows, a, p, seed, False)
        if around is None or not launch:
            inner = (h if diagonal is None else diagonal[:, None] * h).t()
        if around is None:
            b = b if b.dtype == dtype else b.to(dtype)
            turned = (weight if weight.dtype == dtype else weight.to(dtype)).t()
            out = torch.mm(rows, turned) if bias is None else torch.addmm(bias, rows, turned)
            out.addmm_(inner, b.t(), alpha=scale)
        else:
            both = borders.packed(rows, inner, scale, around.width) if both is None else both
            out = borders.forward_product(weight, around.width, both, bias)
        ctx.save_for_backward(
            weight if needed[0] else None,
            a if needed[0] else None,
            b,
            diagonal,
            h if needed[4] or needed[5] else None,
            *(parts if needed[3] else ()),
        )
        if again is not None and needed[3]:
            again.users += 1
        ctx.made = again, make, x.shape, kinds, scale, p, seed, way
        # not a view, which could not be changed in place
        return out if x.dim() == 2 else _unsafe_view(out, (*x.shape[:-1], out.shape[-1]))

    @staticmethod
    @_once_differentiable  # a second derivative would lack H's
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, a, b, diagonal, h, *parts = ctx.saved_tensors
        again, make, shape, kinds, scale, p, seed, way = ctx.made
        need_x, _, _, need_a, need_b, need_l, _ = ctx.needs_input_grad
        g = gradient if gradient.dim() == 2 else gradient.reshape(-1, gradient.shape[-1])
        dtype, launch, around, both = g.dtype, way is not None and way.spreads, None, None
        if way is not None:
            around = _still(way, weight, p) if need_x else None
        if around is not None and launch:
            inner, db, both = dyb_db(g, b, h.t() if need_b else None, diagonal, scale, around.width)
            inner, db, dl = inner.t(), db if need_b else None, None
            if diagonal is not None:
                dl = (inner * h).sum(1) if need_l else None
                inner.mul_(diagonal[:, None])
        else:
            b = b if launch or b.dtype == dtype else b.to(dtype)
            inner, db, dl = inner_gradients(g, b, diagonal, h, scale, (need_x, need_a, need_b, need_l), launch)
        dx = da = None
        if around is not None:
            both = borders.packed(g, inner.t(), 1.0, around.width) if both is None else both
            dx = borders.backward_product(weight, around.width, both)
        elif need_x:
            dx = g @ (weight if weight.dtype == dtype else weight.to(dtype))
            a = a if a.dtype == dtype else a.to(dtype)
            if not p:
                dx.addmm_(inner.t(), a)
            elif launch:
                spread(dx, inner.t(), a, p, seed)
            else:
                dx += dropped(inner.t() @ a, p, seed)
        if need_a:
            x = parts[0] if again is None else again.take(make, parts, dtype)
            da = outer(inner, x if x.dim() == 2 else x.reshape(-1, shape[-1]), p, seed, launch)
        if way is not None and way.border is not None:
            way.border.again = True
        dx = dx if dx is None else dx.view(shape)
        dx, da, db, dl = (
            d if d is None or d.dtype == k else d.to(k) for d, k in zip((dx, da, db, dl), kinds, strict=True)
        )
        return dx, None, None, da, db, dl, None


def _still(way: _Way, weight: Tensor, p: float) -> Border | None:
    """Return the border in which A still stands as in the forward pass, where the gradient is to be had from it."""
    found = way.border
    if found is None or p or found.filled != way.filling or not borders.lies(weight, found.width):
        return None
    return found if borders.pays_backward(weight) else None
