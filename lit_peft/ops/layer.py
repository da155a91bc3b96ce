"""A decoder layer of the Llama kind, from its input to its output, as two functions around the attention itself.

    y = norm(x),  q, k, v = linear layers of y                                          -> attention -> a
    x' = x + o(a),  y' = norm(x'),  e, g = linear layers of y',  h = silu(e) g,  x'' = x' + down(h)

All linear layers are frozen, each with a low-rank update s B A or none; the norms are frozen RMS norms, see `norm`. The
sums over the layers that read y, and over what reads x, are made in place: none has a tensor of its own. Kept are x,
x', a, e and g, and what is rank r; y, y' and h are made again, and silu(e) once for both of its uses on the way back.
Where e and g are very wide, so that they are most of it, x' is computed again too, by one more product with W of o.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_peft.ops.low_rank import product
from lit_peft.ops.norm import normalised
from lit_peft.ops.packed import Pair

_unsafe_view = torch.ops.aten._unsafe_view.default
# how many times wider e is than x where x' is computed again: else, more than 24 bytes of x's width would be kept
WIDE = 4


@dataclass(frozen=True)
class Group:
    """Frozen linear layers that read one input, each where it lies in memory, and what is added to each.

    Attributes:
        weights: W_i (out_i, in).
        biases: c_i (out_i,) or None.
        pairs: A_i (r_i, in), B_i (out_i, r_i) and s_i, or None.
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    pairs: tuple[Pair | None, ...]

    @property
    def scales(self) -> tuple[float | None, ...]:
        """Return s_i."""
        return tuple(None if pair is None else pair[2] for pair in self.pairs)

    @property
    def factors(self) -> tuple[Tensor, ...]:
        """Return all A_i, then all B_i, of the updates that are there."""
        there = [pair for pair in self.pairs if pair is not None]
        return tuple(pair[0] for pair in there) + tuple(pair[1] for pair in there)


@dataclass
class _Read:
    """One group in a call: its factors in the dtype that is computed in, and which rows of H are whose."""

    weights: Sequence[Tensor]
    scales: Sequence[float | None]  # None: no update
    stack: Tensor | None  # A (sum of r_i, in)
    bs: Sequence[Tensor]
    h: Tensor | None = None  # (sum of r_i, rows)

    def updates(self) -> list[tuple[int, Tensor, slice, float]]:
        """Return i, B_i, the rows of H that are H_i, and s_i."""
        found, start, rest = [], 0, iter(self.bs)
        for i, scale in enumerate(self.scales):
            if scale is not None:
                b = next(rest)
                found.append((i, b, slice(start, start + b.shape[1]), scale))
                start += b.shape[1]
        return found

    def outputs(self, y: Tensor, biases: Sequence[Tensor | None], onto: Tensor | None = None) -> list[Tensor]:
        """Return y W_i^T + c_i + s_i H_i^T B_i^T (rows, out_i), added to what is there already; H is kept."""
        if self.stack is not None and self.h is None:
            self.h = self.stack @ y.t()
        found = []
        for weight, bias in zip(self.weights, biases, strict=True):
            start = bias if onto is None else onto
            out = y @ weight.t() if start is None else torch.addmm(start, y, weight.t())
            found.append(out if onto is None or bias is None else out.add_(bias))
        for i, b, at, scale in self.updates():
            assert self.h is not None
            found[i].addmm_(self.h[at].t(), b.t(), alpha=scale)
        return found

    def narrow(self, gs: Sequence[Tensor]) -> tuple[Tensor | None, list[Tensor]]:
        """Return P (sum of r_i, rows) and all dB_i^T (r_i, out_i), of G_i (rows, out_i)."""
        if self.h is None:
            return None, []
        p, dbs = torch.empty_like(self.h), []
        for i, b, at, scale in self.updates():
            dbs.append(product(self.h[at], gs[i], scale))
            p[at].addmm_(b.t(), gs[i].t(), beta=0, alpha=scale)
        return p, dbs

    def wide(self, gs: Sequence[Tensor], p: Tensor | None) -> Tensor:
        """Return the gradient of y (rows, in)."""
        dy = gs[0] @ self.weights[0]
        for g, weight in zip(gs[1:], self.weights[1:], strict=True):
            dy.addmm_(g, weight)
        return dy if p is None or self.stack is None else dy.addmm_(p.t(), self.stack)

    def split(self, da: Tensor | None) -> list[Tensor]:
        """Return dA_i, which lie below each other in dA."""
        return [] if da is None else [da[at] for _, _, at, _ in self.updates()]


def _read(weights: Sequence[Tensor], scales: Sequence[float | None], factors: Sequence[Tensor], like: Tensor) -> _Read:
    """Return a group with its factors, A_i first, in the dtype that is computed in."""
    half = len(factors) // 2
    stack = None
    if half:
        stack = (factors[0] if half == 1 else torch.cat(list(factors[:half]))).to(like.dtype)
    return _Read(weights, scales, stack, [b.to(like.dtype) for b in factors[half:]])


def _parted(scales: Sequence[Sequence[float | None]], tensors: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    """Return the factors of each group, of those of all groups behind each other."""
    found, start = [], 0
    for some in scales:
        end = start + 2 * sum(scale is not None for scale in some)
        found.append(tensors[start:end])
        start = end
    return found


def _again(scales: Sequence[Sequence[float | None]], saved: Sequence[Tensor], like: Tensor) -> list[_Read]:
    """Return all groups, of their weights, their H or None, and their factors: what is saved of them."""
    number = sum(map(len, scales))
    weights, hs, factors = saved[:number], saved[number : number + len(scales)], saved[number + len(scales) :]
    found, start = [], 0
    for some, h, mine in zip(scales, hs, _parted(scales, factors), strict=True):
        read = _read(weights[start : start + len(some)], some, mine, like)
        read.h = h
        found.append(read)
        start += len(some)
    return found


def _normed(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rho = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    return normalised(x, weight, rho), rho


def _unnormed(dy: Tensor, unit: Tensor, weight: Tensor, rho: Tensor) -> Tensor:
    """Return the gradient of x, of that of y, in the place of u = x rho in float32, which is lost."""
    inner = dy.mul_(weight).float()
    return inner.sub_(unit.mul_((inner * unit).mean(-1, keepdim=True))).mul_(rho)


def _cast(gradients: Sequence[Tensor], kinds: Sequence[torch.dtype]) -> list[Tensor]:
    return [gradient.to(kind) for gradient, kind in zip(gradients, kinds, strict=True)]


def enter(x: Tensor, weight: Tensor, eps: float, group: Group) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Return x, for the sum that follows; norm(x), without gradients; and what the layers make of it.

    Args:
        x: (..., in).
        weight: the norm's w (in,), frozen.
        eps: the norm's.
        group: the layers that read the norm: queries, keys and values.

    Returns:
        (..., in), (..., in) and all (..., out_i). A second derivative is not there: asking for one raises.
    """
    passed, y, *found = _Enter.apply(x, weight, eps, group, *group.factors)  # type: ignore[no-untyped-call]
    return passed, y, tuple(found)


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, group: Group, *factors: Tensor) -> tuple[Tensor, ...]:
        rows = x.reshape(-1, x.shape[-1])
        read = _read(group.weights, group.scales, factors, x)
        y, rho = _normed(rows, weight, eps)
        found = read.outputs(y, group.biases)
        # of what needs no gradient itself, as in a model's first layer, y is all that is asked for later
        first = (rows, rho) if ctx.needs_input_grad[0] else (y, None)
        ctx.save_for_backward(*first, weight, *group.weights, read.h, *factors)
        ctx.made = x.shape, (read.scales,), [factor.dtype for factor in factors]
        y = y.view(x.shape)
        ctx.mark_non_differentiable(y)
        ctx.set_materialize_grads(False)  # y would be given one
        # not views, which could not be changed in place
        return x.view_as(x), y, *(_unsafe_view(out, (*x.shape[:-1], out.shape[-1])) for out in found)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, passed: Tensor | None, _: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        x, rho, weight, *saved = ctx.saved_tensors
        shape, scales, kinds = ctx.made
        (read,) = _again(scales, saved, x)
        gs = [
            x.new_zeros(len(x), len(w)) if g is None else g.reshape(-1, len(w))
            for g, w in zip(gradients, read.weights, strict=True)
        ]
        p, dbs = read.narrow(gs)
        unit = None if rho is None else x.float() * rho
        y, dx = x if unit is None else weight * unit.to(x.dtype), None
        das = [] if p is None else read.split(p @ y)
        if unit is not None:
            dx = _unnormed(read.wide(gs, p), unit, weight, rho).to(x.dtype)
            dx = (dx if passed is None else dx.add_(passed.reshape(x.shape))).view(shape)
        found = _cast([*das, *(db.t() for db in dbs)], kinds)
        reached = 2 * [gradients[i] is not None for i, *_ in read.updates()]
        return dx, None, None, None, *(d if yes else None for d, yes in zip(found, reached, strict=True))


@dataclass(frozen=True)
class Rest:
    """What follows the attention.

    Attributes:
        o: the layer that reads it.
        weight: the norm's w (width,), frozen.
        eps: the norm's.
        inner: gate and up.
        down: the layer that reads their product.
    """

    o: Group
    weight: Tensor
    eps: float
    inner: Group
    down: Group

    @property
    def groups(self) -> tuple[Group, Group, Group]:
        """Return the three groups of layers."""
        return self.o, self.inner, self.down


def leave(x: Tensor, a: Tensor, rest: Rest) -> Tensor:
    """Return x'' of x (..., width) and the attention's a (..., in); a second derivative is not there."""
    factors = [factor for group in rest.groups for factor in group.factors]
    out: Tensor = _Leave.apply(x, a, rest, *factors)  # type: ignore[no-untyped-call]
    return out


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, rest: Rest, *factors: Tensor) -> Tensor:
        rows, seen = x.reshape(-1, x.shape[-1]), a.reshape(-1, a.shape[-1])
        scales = [group.scales for group in rest.groups]
        parted = zip(rest.groups, _parted(scales, factors), strict=True)
        o, inner, down = (_read(group.weights, group.scales, mine, x) for group, mine in parted)
        (middle,) = o.outputs(seen, rest.o.biases, rows)
        y, rho = _normed(middle, rest.weight, rest.eps)
        e, g = inner.outputs(y, rest.inner.biases)
        (out,) = down.outputs(F.silu(e).mul_(g), rest.down.biases, middle)
        weights = [weight for group in rest.groups for weight in group.weights]
        again = e.shape[1] >= WIDE * rows.shape[1]
        first = (None if o.h is None and not again else seen, rows if again else middle, rest.o.biases[0])
        kept = (*first, rho, rest.weight, e, g)
        ctx.save_for_backward(*kept, *weights, o.h, inner.h, down.h, *factors)
        ctx.made = x.shape, a.shape, scales, [factor.dtype for factor in factors], again
        return _unsafe_view(out, x.shape)  # type: ignore[no-any-return]

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        seen, middle, bias, rho, weight, e, g, *saved = ctx.saved_tensors
        shape, a_shape, scales, kinds, again = ctx.made
        o, inner, down = _again(scales, saved, middle)
        if again:  # x is kept in any case, for the norm in front of the attention
            (middle,) = o.outputs(seen, [bias], middle)
        slope = gradient.reshape(-1, gradient.shape[-1])

        p, down_dbs = down.narrow([slope])
        d = down.wide([slope], p)
        share = F.silu(e)
        down_das = [] if p is None else [p @ (share * g)]
        dg = share.mul_(d)
        de = torch.ops.aten.silu_backward.grad_input(d.mul_(g), e, grad_input=d)

        p, inner_dbs = inner.narrow([de, dg])
        dy = inner.wide([de, dg], p)
        unit = middle.float() * rho
        inner_das = [] if p is None else inner.split(p @ (weight * unit.to(middle.dtype)))
        dx = _unnormed(dy, unit, weight, rho).to(middle.dtype).add_(slope)

        p, o_dbs = o.narrow([dx])
        o_das = [] if p is None else [p @ seen]
        da = o.wide([dx], p).view(a_shape) if ctx.needs_input_grad[1] else None
        lists = ((o_das, o_dbs), (inner_das, inner_dbs), (down_das, down_dbs))
        found = [each for das, dbs in lists for each in (*das, *(db.t() for db in dbs))]
        return dx.view(shape) if ctx.needs_input_grad[0] else None, da, None, *_cast(found, kinds)
