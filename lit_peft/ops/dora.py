"""A frozen linear layer turned by a low-rank update and scaled row by row: DoRA (arXiv 2402.09353).

    y = b + c (W x + s B A x),    c = m / n (out,),    n_i = |W_i + s (B A)_i|, a constant to the backward pass (4.3)

For g the gradient of y, u = g c, P = s B^T u^T and H = A x^T (r, rows):

    dx = u W + P^T A        dA = P x        dB = s (H u)^T        dm = sum_t g (y - b) / m

What is kept: x (or what it is made of, see `recipes`), H, and y, not W x: y is what many readers of a layer's output
keep anyway. (Beside a large bias, in half precision, dm is as exact as the digits of y - b.) With more rows than
inputs, c scales W for the product u W = g (c W), which is less to write than u.

n comes from `row_norms`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lit_peft.ops.choice import takes_kernel
from lit_peft.ops.low_rank import inner_gradients
from lit_peft.ops.recipes import Recipe, as_written, recipe_of
from lit_peft.ops.row_norms import exact
from lit_peft.ops.scaled import nonzero, sums

MOST = 64  # the largest rank that the kernels take


def reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, m: Tensor, n: Tensor, scale: float
) -> Tensor:
    """Return b + (m / n) (W x + s B A x) with plain operations."""
    turned = x @ weight.t() + scale * (x @ a.t() @ b.t())
    y = turned * (m / n)
    return y if bias is None else y + bias


def dora_linear(
    x: Tensor,
    base: nn.Linear,
    a: Tensor,
    b: Tensor,
    m: Tensor,
    n: Tensor,
    scale: float,
    *,
    product: Tensor | None = None,
    kernels: bool | None = None,
) -> Tensor:
    """Return c + (m / n) (W x + s B A x), with c the layer's bias.

    Args:
        x: the input (..., in).
        base: the layer, for which `joins` holds: W (out, in) and c (out,) or none, frozen, in x's dtype.
        a: A (r, in), in any floating dtype.
        b: B (out, r).
        m: the lengths (out,).
        n: the norms (out,), in float32 or better; gets no gradient.
        scale: s.
        product: W x (rows, out) where it is there already, from `products`; it is overwritten.
        kernels: whether to launch the kernels; None: as measured.

    Returns:
        (..., out). It must not be changed in place before the backward pass. A second derivative is not there: asking
        for one raises.

    Example:
        >>> import torch
        >>> x, base = torch.ones(2, 4), torch.nn.Linear(4, 3, bias=False).requires_grad_(False)
        >>> n = base.weight.norm(dim=1)
        >>> out = dora_linear(x, base, torch.ones(1, 4), torch.zeros(3, 1), 2 * n, n, scale=0.5)
        >>> bool((out == 2 * base(x)).all())
        True
    """
    sizes = {"rows": x.numel() // max(1, x.shape[-1]), "inputs": x.shape[-1], "outputs": len(b)}
    launch = takes_kernel("dora", x, kernels, **sizes) and 0 < len(a) <= MOST
    layer, factors = (base.weight, base.bias), (a.to(x.dtype), b.to(x.dtype), exact(m))
    settings = (n, scale, recipe_of(x), launch, product)
    out: Tensor = _Joined.apply(x, *layer, *factors, *settings)  # type: ignore[no-untyped-call]
    return out


def stacks(x: Tensor, base: nn.Linear) -> bool:
    """Return whether `products` pays: on a CPU, where x is smaller than W. (The result has no bias.)"""
    return base.bias is None and x.device.type == "cpu" and x.numel() <= base.weight.numel()


@torch.no_grad()
def products(x: Tensor, weight: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """Return x W^T (rows, out) and A W^T (r, out), as one product: W, the largest of the three, is read once.

    Args:
        x: (..., in).
        weight: W (out, in), in x's dtype.
        a: A (r, in), which the norms need multiplied.
    """
    rows = x.reshape(-1, x.shape[-1])
    both = torch.cat([rows, a.to(x.dtype)]) @ weight.t()
    return both[: len(rows)], both[len(rows) :]


def dora_update(
    y: Tensor, x: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, m: Tensor, n: Tensor, scale: float
) -> Tensor:
    """Return c + (m / n) (y - c + s B A x), where y is what the layer made of x and c its bias.

    Args:
        y: the layer's output (..., out); its dtype is the result's.
        x: the layer's input (..., in).
        bias: c (out,) or none.
        a: A (r, in), in any floating dtype.
        b: B (out, r).
        m: the lengths (out,).
        n: the norms (out,), in float32 or better; gets no gradient.
        scale: s.

    Returns:
        (..., out). It must not be changed in place before the backward pass. A second derivative is not there: asking
        for one raises.
    """
    factors = a.to(y.dtype), b.to(y.dtype), exact(m)
    out: Tensor = _Update.apply(y, x, bias, *factors, n, scale, recipe_of(x))  # type: ignore[no-untyped-call]
    return out


def stretch_(y: Tensor, bias: Tensor | None, c: Tensor) -> Tensor:
    """Return b + c (y - b), in place, for y (rows, out) and c (out,): exactly y where c is 1."""
    if bias is None:
        return torch.mul(y, c, out=y)
    return torch.addcmul((1 - c) * bias, y, c, out=y) if c.dtype == y.dtype else y.copy_(y * c + (1 - c) * bias)


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        m: Tensor,
        n: Tensor,
        scale: float,
        recipe: Recipe,
        launch: bool,
        product: Tensor | None,
    ) -> Tensor:
        needed = ctx.needs_input_grad
        rows = x.reshape(-1, x.shape[-1])
        h = a @ rows.t()  # (r, rows): see `low_rank`
        if product is None:
            out = rows @ weight.t() if bias is None else torch.addmm(bias, rows, weight.t())
        else:
            out = product
        m = nonzero(m)
        c = m / n
        if launch:
            torch.ops.lit_peft.turn(out, h, b, c, bias, scale)
        else:
            stretch_(out.addmm_(h.t(), b.t(), alpha=scale), bias, c)
        out = torch.ops.aten._unsafe_view(out, (*x.shape[:-1], len(b)))
        ctx.save_for_backward(
            weight if needed[0] else None,
            bias if needed[5] else None,
            a if needed[0] else None,
            b,
            c,
            m if needed[5] else None,
            h if needed[4] else None,
            out if needed[5] else None,
            *(recipe.parts if needed[3] else ()),
        )
        ctx.made = recipe.make, x.shape, scale, launch
        return out  # type: ignore[no-any-return]

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]  # a second derivative would lack H's
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, bias, a, b, c, m, h, y, *parts = ctx.saved_tensors
        make, shape, scale, launch = ctx.made
        needed = ctx.needs_input_grad
        g = gradient.reshape(-1, gradient.shape[-1])
        dx = da = db = dm = None
        if launch and (h is not None or y is not None):
            db, dm = torch.ops.lit_peft.turn_backward(g.contiguous(), None if y is None else y.view(g.shape), h, bias)
            db = None if h is None else db.mul_(scale * c[:, None]).to(g.dtype)
            dm = None if y is None else dm.div_(m)
        into_weight = launch or len(g) > shape[-1]  # c goes into W or into g, whichever is smaller
        room = None if into_weight else torch.empty_like(g)
        if not launch:
            dm = _lengths(g, y, bias, m, room)
        u = g if room is None else torch.mul(g, c, out=room)
        turned = (c[:, None] * b).to(b.dtype) if into_weight else b
        wanted = needed[0], needed[3], needed[4] and db is None, False
        inner, found, _ = inner_gradients(u, turned, None, h, scale, wanted)
        if found is not None:
            db = (found * c[:, None]).to(g.dtype) if into_weight else found
        if needed[0]:
            weight = torch.mul(weight, c[:, None], out=torch.empty_like(weight)) if into_weight else weight
            dx = (u @ weight).addmm_(inner.t(), a).view(shape)
        if needed[3]:
            da = inner @ make(*parts).reshape(-1, shape[-1])
        return dx, None, None, da, db, dm, *[None] * 5


class _Update(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        m: Tensor,
        n: Tensor,
        scale: float,
        recipe: Recipe,
    ) -> Tensor:
        needed = ctx.needs_input_grad
        with as_written(y):
            h = a @ x.reshape(-1, x.shape[-1]).to(y.dtype).t()
            m = nonzero(m)
            c = m / n
            out = torch.addmm(y.reshape(-1, y.shape[-1]), h.t(), b.t(), alpha=scale)
            out = torch.ops.aten._unsafe_view(stretch_(out, bias, c), y.shape)
        ctx.save_for_backward(
            bias if needed[5] else None,
            a if needed[1] else None,
            b,
            c,
            m if needed[5] else None,
            h if needed[4] else None,
            out if needed[5] else None,
            *(recipe.parts if needed[3] else ()),
        )
        ctx.made = recipe.make, x.shape, x.dtype, scale
        return out  # type: ignore[no-any-return]

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        bias, a, b, c, m, h, y, *parts = ctx.saved_tensors
        make, shape, dtype, scale = ctx.made
        needed = ctx.needs_input_grad
        g = gradient.reshape(-1, gradient.shape[-1])
        dx = da = None
        room = torch.empty_like(g)
        dm = _lengths(g, y, bias, m, room)
        u = torch.mul(g, c, out=room)
        inner, db, _ = inner_gradients(u, b, None, h, scale, (needed[1], needed[3], needed[4], False))
        if needed[1]:
            dx = (inner.t() @ a).view(shape).to(dtype)
        if needed[3]:
            da = inner @ make(*parts).reshape(-1, shape[-1]).to(g.dtype)
        return u.view(gradient.shape) if needed[0] else None, dx, None, da, db, dm, None, None, None


def _lengths(g: Tensor, y: Tensor | None, bias: Tensor | None, m: Tensor, room: Tensor | None) -> Tensor | None:
    """Return dm (out,) where y is there.

    Args:
        g: the gradient (rows, out).
        y: the output (..., out), or None where dm is not asked for.
        bias: b (out,) or none.
        m: (out,), none of it zero.
        room: memory like g that may be overwritten, or None.
    """
    if y is None:
        return None
    y = y.reshape(g.shape)
    if bias is None:
        return sums(g, y, room).div_(m)
    if y.dtype.itemsize < 4:  # products in half precision are rounded: the bias must be gone before
        return sums(g, y - bias, room).div_(m)
    total = sums(g, y, room)
    return total.sub_(bias * g.sum(0, dtype=total.dtype)).div_(m)


# Launches ------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("lit_peft::turn", mutates_args=("out",))
def _turn(out: Tensor, h: Tensor, b: Tensor, c: Tensor, bias: Tensor | None, scale: float) -> None:
    from lit_peft.kernels.dora import turn

    turn(out, h.contiguous(), b.contiguous(), c, bias, scale)


@_turn.register_fake
def _(out: Tensor, h: Tensor, b: Tensor, c: Tensor, bias: Tensor | None, scale: float) -> None:
    return None


@torch.library.custom_op("lit_peft::turn_backward", mutates_args=())
def _turn_backward(g: Tensor, y: Tensor | None, h: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    from lit_peft.kernels.dora import turn_backward

    return turn_backward(g, y, h, bias)


@_turn_backward.register_fake
def _(g: Tensor, y: Tensor | None, h: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    width, r = g.shape[1], 0 if h is None else h.shape[0]
    return g.new_empty(width, r, dtype=torch.float32), g.new_empty(width, dtype=torch.float32)
