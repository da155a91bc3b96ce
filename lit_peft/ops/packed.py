"""Linear layers that read the same input, with their low-rank updates, as one.

    y_i = x W_i^T + c_i + s_i x A_i^T B_i^T             i = 1 .. n: queries, keys and values; or gate and up

The frozen W_i are row slices of one buffer W (sum of out_i, in), and A (sum of r_i, in) is the A_i below each other. For
G the gradients of all y_i beside each other, H = A x^T (sum of r_i, rows) and P_i = s_i B_i^T G_i^T (r_i, rows):

    dx = G W + P^T A        dA = P x        dB_i = s_i (H_i G_i)^T

That is one product with W forward and one for dx, where layers by themselves have n each, and dx is written once. Kept:
x once for all (or what it is made of, see `recipes`), and H.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_peft.ops.recipes import Recipe, recipe_of

Pair = tuple[Tensor, Tensor, float]  # A, B and s
Shrunk = tuple[Tensor, Tensor]  # A and H


@dataclass(frozen=True)
class Parts:
    """Frozen linear layers that read one input, and what is added to each.

    Attributes:
        weight: W (sum of out_i, in).
        bias: c (sum of out_i,), or None.
        sizes: out_i.
        pairs: A_i (r_i, in), B_i (out_i, r_i) and s_i; None for a layer that stays as it is.
    """

    weight: Tensor
    bias: Tensor | None
    sizes: tuple[int, ...]
    pairs: tuple[Pair | None, ...]

    @property
    def scales(self) -> tuple[float, ...]:
        """Return s_i."""
        return tuple(1.0 if pair is None else pair[2] for pair in self.pairs)

    def factors(self, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
        """Return A_1, ..., A_n, B_1, ..., B_n in the dtype that is computed in."""
        # cast here, outside of the function, so that gradients come back in the parameters' dtype
        return tuple(None if pair is None else pair[i].to(dtype) for i in (0, 1) for pair in self.pairs)


def reference(x: Tensor, parts: Parts) -> tuple[Tensor, ...]:
    """Return all y_i with plain operations: x (..., in), y_i (..., out_i)."""
    biases = [None] * len(parts.sizes) if parts.bias is None else parts.bias.split(parts.sizes)
    found = []
    for weight, bias, pair in zip(parts.weight.split(parts.sizes), biases, parts.pairs, strict=True):
        y = F.linear(x, weight, bias)
        if pair is not None:
            a, b, scale = pair
            y = y + scale * F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype))
        found.append(y)
    return tuple(found)


def packed_linear(x: Tensor, parts: Parts, *, apart: int = 0, shrunk: Shrunk | None = None) -> tuple[Tensor, ...]:
    """Return all y_i.

    Args:
        x: the input (..., in), in the weights' dtype.
        parts: the layers.
        apart: how many of the last outputs get memory of their own; the others are slices of one tensor.
        shrunk: A in x's dtype and H, where they are there already.

    Returns:
        y_i (..., out_i). A second derivative is not there: asking for one raises.

    Example:
        >>> import torch
        >>> x, pair = torch.ones(2, 4), (torch.ones(1, 4), torch.ones(3, 1), 0.5)
        >>> parts = Parts(torch.zeros(5, 4), None, (3, 2), (pair, None))
        >>> [y[0].tolist() for y in packed_linear(x, parts)]
        [[2.0, 2.0, 2.0], [0.0, 0.0]]
    """
    how = (parts.sizes, parts.scales, apart, recipe_of(x))
    found: tuple[Tensor, ...] = _Packed.apply(x, parts.weight, parts.bias, shrunk, how, *parts.factors(x.dtype))  # type: ignore[no-untyped-call]
    return found


class _Packed(torch.autograd.Function):
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
        sizes, scales, apart, recipe = how
        bs = factors[len(sizes) :]
        base, stack, h = products(x, weight, bias, shrunk, factors[: len(sizes)])
        found = list(base.split(sizes, 1))
        for i, b, at in inner(bs):
            # of its own memory: what keeps a slice keeps all of the tensor
            add = Tensor.addmm_ if i < len(sizes) - apart else torch.addmm
            found[i] = add(found[i], h[at].t(), b.t(), alpha=scales[i])
        for i in range(len(sizes) - apart, len(sizes)):
            found[i] = found[i].clone() if bs[i] is None else found[i]
        keep(ctx, weight, stack, h, bs, recipe)
        ctx.made = recipe.make, x.shape, sizes, scales
        return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in found)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]  # a second derivative would lack H's
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        g = torch.cat([gradient.reshape(-1, gradient.shape[-1]) for gradient in gradients], 1)
        return gradients_of(ctx, g, *kept(ctx)[0])


def products(
    x: Tensor, weight: Tensor, bias: Tensor | None, shrunk: Shrunk | None, factors: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return x W^T + c (rows, sum of out_i), A (sum of r_i, in) and H (sum of r_i, rows); the last two may be empty."""
    rows = x.reshape(-1, x.shape[-1])
    base = rows @ weight.t() if bias is None else torch.addmm(bias, rows, weight.t())
    there = [a for a in factors if a is not None]
    if shrunk is not None or not there:
        return base, *(shrunk or (x.new_empty(0), x.new_empty(0)))
    stack = there[0] if len(there) == 1 else torch.cat(there)
    # H is (r, rows), not (rows, r): products with narrow results are up to four times slower on CPUs
    return base, stack, stack @ rows.t()


def inner(bs: Sequence[Tensor | None]) -> Iterator[tuple[int, Tensor, slice]]:
    """Yield i, B_i and the rows of H that are H_i, of all layers that have an update."""
    start = 0
    for i, b in enumerate(bs):
        if b is not None:
            yield i, b, slice(start, start + b.shape[1])
            start += b.shape[1]


def keep(
    ctx: Any,
    weight: Tensor,
    stack: Tensor,
    h: Tensor,
    bs: Sequence[Tensor | None],
    recipe: Recipe,
    more: Sequence[Tensor] = (),
) -> None:
    """Save what `gradients_of` needs of what is asked for, x being the first input and A_i, B_i the sixth and on."""
    needed = ctx.needs_input_grad
    of_a, of_b = any(needed[5 : 5 + len(bs)]), any(needed[5 + len(bs) :])
    parts = recipe.parts if of_a else ()
    first = (weight, stack) if needed[0] else (None, None)
    ctx.save_for_backward(*first, h if of_b else None, *bs, *parts, *more)
    ctx.of_x = len(parts)


def kept(ctx: Any) -> tuple[tuple[Any, ...], list[Tensor]]:
    """Return what `keep` saved: the further arguments of `gradients_of`, and what more there is."""
    weight, stack, h, *rest = ctx.saved_tensors  # read once: gradient checkpointing refuses a second time
    number = len(ctx.made[2])
    end = number + ctx.of_x
    return (weight, stack, h, rest[:number], rest[number:end]), rest[end:]


def gradients_of(
    ctx: Any,
    g: Tensor,
    weight: Tensor | None,
    stack: Tensor,
    h: Tensor,
    bs: Sequence[Tensor | None],
    parts: Sequence[Tensor],
) -> tuple[Any, ...]:
    """Return the gradients of x, four inputs that have none, all A_i and all B_i, from G (rows, sum of out_i)."""
    make, shape, sizes, scales = ctx.made
    needed = ctx.needs_input_grad
    of_a, of_b = needed[5 : 5 + len(sizes)], needed[5 + len(sizes) :]
    pieces, found = g.split(sizes, 1), list(inner(bs))
    dx = None
    das: list[Tensor | None] = [None] * len(sizes)
    dbs: list[Tensor | None] = [None] * len(sizes)
    for i, b, at in found:
        if of_b[i]:
            db = g.new_empty(b.shape[1], b.shape[0])
            dbs[i] = db.addmm_(h[at], pieces[i], beta=0, alpha=scales[i]).t()
    p = g.new_empty(found[-1][2].stop if found else 0, len(g))
    if needed[0] or any(of_a):
        for i, b, at in found:
            p[at].addmm_(b.t(), pieces[i].t(), beta=0, alpha=scales[i])
    if needed[0] and weight is not None:
        dx = g @ weight
        dx = (dx.addmm_(p.t(), stack) if found else dx).view(shape)
    if any(of_a):
        da = p @ make(*parts).reshape(-1, shape[-1])
        for i, _, at in found:
            das[i] = da[at] if of_a[i] else None
    return dx, None, None, None, None, *das, *dbs
