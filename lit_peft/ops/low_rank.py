"""A low-rank update of a layer's output, and its gradients.

    out = y + s D(x) A^T L B^T          x (..., in), y (..., out), A (r, in), B (out, r), L = diag(l) (r, r) or none

with D the dropout. In the backward pass, for g the gradient of out, P = s B^T g^T (r, rows) and H = A D(x)^T (r, rows):

    dy = g        dx = D(P^T L A)        dA = L P D(x)        dB = s (L H g)^T        dl = sum of P * H over the rows

What is kept: x in its own dtype (or what x is made of, see `recipes`) and H. No copy of x in another dtype, no dropped
copy, no mask: the mask is drawn again from its seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_peft.ops.recipes import Recipe, as_written, eager, recipe_of
from lit_peft.ops.shrink import dyb_db, shrink, spread, taken, takes


def reference(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, diagonal: Tensor | None = None) -> Tensor:
    """Return y + s x A^T L B^T with plain operations."""
    h = F.linear(x.to(y.dtype), a.to(y.dtype))
    if diagonal is not None:
        h = h * diagonal.to(y.dtype)
    return y + scale * F.linear(h, b.to(y.dtype))


def low_rank_update(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float,
    *,
    dropout: float = 0.0,
    diagonal: Tensor | None = None,
    kernels: bool | None = None,
) -> Tensor:
    """Return y + s dropout(x) A^T L B^T.

    Args:
        y: the layer's output (..., out); its dtype is the result's.
        x: the layer's input (..., in).
        a: A (r, in), in any floating dtype.
        b: B (out, r).
        scale: s.
        dropout: the probability with which an entry of x is left out, the others divided by 1 - p.
        diagonal: l (r,), as AdaLoRA has it; None: L is left out.
        kernels: whether to launch the kernels; None: as measured.

    Returns:
        (..., out). A second derivative is not there: asking for one raises.

    Example:
        >>> import torch
        >>> x, y = torch.ones(2, 4), torch.zeros(2, 3)
        >>> low_rank_update(y, x, torch.ones(1, 4), torch.ones(3, 1), scale=0.5)[0].tolist()
        [2.0, 2.0, 2.0]
    """
    if not eager():  # a compiler fuses the plain form, and chooses what it keeps
        return reference(y, F.dropout(x, dropout) if dropout else x, a, b, scale, diagonal)
    if not (torch.is_grad_enabled() or dropout):
        a, b = a.to(y.dtype), b.to(y.dtype)
        diagonal = None if diagonal is None else diagonal.to(y.dtype)
        rows = y.reshape(-1, y.shape[-1])
        h = F.linear(x.to(y.dtype), a if diagonal is None else diagonal[:, None] * a).reshape(len(rows), len(a))
        return torch.addmm(rows, h, b.t(), alpha=scale).view(y.shape)
    launch = kernels is not False and y.numel() > 0
    launch = launch and all(takes(op, x, len(b), len(a), dropout, kernels) for op in ("shrink", "spread"))
    settings = scale, dropout, drawn(dropout), recipe_of(x), launch
    out: Tensor = _Update.apply(y, x, a, b, diagonal, *settings)  # type: ignore[no-untyped-call]
    return out


def drawn(p: float) -> int:
    """Return a seed for `dropped` from the global generator; 0 where nothing is dropped."""
    return int(torch.randint(2**62, ())) if p else 0


def dropped(x: Tensor, p: float, seed: int) -> Tensor:
    """Return x with a share p of its entries at 0 and the others divided by 1 - p; the same for the same seed."""
    if not p:
        return x
    if p == 1 or x.is_meta:
        return torch.zeros_like(x)
    generator = torch.Generator(x.device).manual_seed(seed)
    mask = torch.empty_like(x, memory_format=torch.contiguous_format).bernoulli_(1 - p, generator=generator)
    return mask.div_(1 - p).mul_(x)


def narrow(x: Tensor, a: Tensor, p: float, seed: int, launch: bool) -> Tensor:
    """Return H = A D(x)^T (r, rows), of x (rows, in) and A (r, in) in any dtype."""
    if launch:
        h: Tensor = shrink(x, a, None, 1.0, p, seed, 0)[0]
        return h.t()
    # (r, rows), not (rows, r): products with narrow results are up to four times slower on CPUs
    return a.to(x.dtype) @ dropped(x, p, seed).t()


def inner_gradients(
    g: Tensor,
    b: Tensor,
    diagonal: Tensor | None,
    h: Tensor,
    scale: float,
    needed: Sequence[bool],
    launch: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return L P (r, rows), dB (out, r) and dl (r,), as in the formulas above, from the output's gradient.

    Args:
        g: the gradient (rows, out).
        b: B (out, r).
        diagonal: l (r,), or None.
        h: H (r, rows); may be None where neither dB nor dl is needed.
        scale: s.
        needed: which gradients are asked for, of x, A, B and l.
        launch: whether to launch the kernel.
    """
    db = dl = None
    inner = b.new_empty(0)
    if launch:
        inner, db, _ = dyb_db(g, b, h.t() if needed[2] else None, diagonal, scale, 0)
        inner, db = inner.t(), db if needed[2] else None
    else:
        if needed[2]:
            db = product(h if diagonal is None else diagonal[:, None] * h, g, scale).t()
        if needed[0] or needed[1] or needed[3]:
            inner = product(b.t(), g.t(), scale)
    if needed[3]:
        dl = (inner * h).sum(1)
    if diagonal is not None and inner.numel():
        inner = inner.mul_(diagonal[:, None])
    return inner, db, dl


def product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """Return s left right, in one operation."""
    return torch.addmm(left.new_empty(1, 1), left, right, beta=0, alpha=scale)


def outer(inner: Tensor, x: Tensor, p: float, seed: int, launch: bool) -> Tensor:
    """Return dA = P D(x) (r, in), of P (r, rows) and x (rows, in)."""
    if launch and p:
        da: Tensor = taken(x, inner.t(), p, seed)
        return da.t()
    return inner @ dropped(x, p, seed)


class _Update(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        diagonal: Tensor | None,
        scale: float,
        p: float,
        seed: int,
        recipe: Recipe,
        launch: bool,
    ) -> Tensor:
        needed = ctx.needs_input_grad
        kinds = x.dtype, a.dtype, b.dtype, None if diagonal is None else diagonal.dtype
        a, b = a.to(y.dtype), b.to(y.dtype)
        diagonal = None if diagonal is None else diagonal.to(y.dtype)
        with as_written(y):
            h = narrow(x.reshape(-1, x.shape[-1]).to(y.dtype), a, p, seed, launch)
            inner = h if diagonal is None else diagonal[:, None] * h
            out = torch.addmm(y.reshape(-1, y.shape[-1]), inner.t(), b.t(), alpha=scale)
        ctx.save_for_backward(
            a if needed[1] else None,
            b,
            diagonal,
            h if needed[3] or needed[4] else None,
            *(recipe.parts if needed[2] else ()),
        )
        recipe.again.users += needed[2]
        ctx.made = recipe.again, recipe.make, x.shape, kinds, scale, p, seed, launch
        return torch.ops.aten._unsafe_view(out, y.shape)  # type: ignore[no-any-return]  # a view could not be changed in place

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]  # a second derivative would lack H's
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        a, b, diagonal, h, *parts = ctx.saved_tensors
        again, make, shape, kinds, scale, p, seed, launch = ctx.made
        needed = ctx.needs_input_grad
        g = gradient.reshape(-1, gradient.shape[-1])
        inner, db, dl = inner_gradients(g, b, diagonal, h, scale, needed[1:5], launch)
        dx = da = None
        if needed[1]:
            if launch and p:
                dx = g.new_zeros(len(g), shape[-1])
                spread(dx, inner.t(), a, p, seed)
            else:
                dx = dropped(inner.t() @ a, p, seed)
            dx = dx.view(shape)
        if needed[2]:
            da = outer(inner, again.take(make, parts, g.dtype).reshape(-1, shape[-1]), p, seed, launch)
        grads = (None if d is None else d.to(kind) for d, kind in zip((dx, da, db, dl), kinds, strict=True))
        return gradient if needed[0] else None, *grads, None, None, None, None, None
