"""A decoder layer as in `layer`, on kernels: twelve launches forward and sixteen backward, the attention's included.

    forward:   norm_shrink, product, expand_turn | attention | shrink, product, add_norm_shrink, product, gated, shrink,
               product, add_expand
    backward:  dyb_db, product, gated_back, dA of down, product, norm_back, dA of gate and up, dyb_db, product, its
               update, dA of o | attention | turn_spread, product, norm_back, dA of q, k and v

Queries, keys and values are one product, and so are gate and up: their frozen weights lie behind each other, see
`parts`. Queries and keys come out turned by their places. Every other elementwise step is in a kernel that reads its
input anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_peft.ops.add_norm import add_expand, add_norm_shrink, norm_back
from lit_peft.ops.gated import launch_gated
from lit_peft.ops.gated_back import fits as fits_gated
from lit_peft.ops.gated_back import gated_back
from lit_peft.ops.norm import launch_norm_shrink
from lit_peft.ops.packed import Pair, Parts, filled
from lit_peft.ops.shrink import dyb_db, shrink, spread
from lit_peft.ops.turned import expand_turn, turn_spread
from lit_peft.ops.turned import fits as fits_turned

_unsafe_view = torch.ops.aten._unsafe_view.default


@dataclass(frozen=True)
class Fused:
    """What a layer holds.

    Attributes:
        first: queries, keys and values.
        o: the layer that reads the attention, its bias and update.
        inner: gate and up.
        down: the layer that reads their product.
        norms: w and eps of both norms.
        turns: cosines and sines (batch or 1, length, width of a head).
    """

    first: Parts
    o: Parts
    inner: Parts
    down: Parts
    norms: tuple[tuple[Tensor, float], tuple[Tensor, float]]
    turns: tuple[Tensor, Tensor]


def fits(x: Tensor, layer: Fused) -> bool:
    """Return whether the kernels take a layer for x (batch, length, width): their dtypes, ranks and heads."""
    ranks = [[0 if pair is None else len(pair[0]) for pair in part.pairs] for part in (layer.first, layer.inner)]
    single = [max(16, len(pair[0])) for part in (layer.o, layer.down) for pair in part.pairs if pair is not None]
    cos, sin = layer.turns
    angles = cos.dim() == 3 and cos.shape == sin.shape and cos.shape[0] in (1, x.shape[0]) and cos.dtype == x.dtype
    return (
        x.dim() == 3
        and x.dtype in (torch.bfloat16, torch.float32)  # in float16, w x may be too large before it is normalised
        and all(weight.dtype == x.dtype for weight, _ in layer.norms)
        and angles
        and cos.shape[1] == x.shape[1]
        and not cos.requires_grad
        and fits_turned(x.dtype, layer.first.sizes, ranks[0], cos.shape[-1])
        and fits_gated(x.reshape(-1, x.shape[-1]), max(single, default=0), *ranks[1])
        and sum(ranks[1]) > 0
    )


def _there(pairs: Sequence[Pair | None]) -> list[Pair]:
    return [pair for pair in pairs if pair is not None]


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x @ weight.t() if bias is None else torch.addmm(bias, x, weight.t())


def _outer(p: Tensor, x: Tensor, kind: torch.dtype) -> Tensor:
    """Return P x (r, in) in the dtype of the parameter."""
    if p.is_cuda and kind == torch.float32 != p.dtype:
        return torch.mm(p, x, out_dtype=kind)  # as it is summed up: no launch for a cast
    return (p @ x).to(kind)


def _below(da: Tensor | None, pairs: Sequence[Pair | None]) -> list[Tensor]:
    """Return all dA_i, which lie below each other in dA."""
    return [] if da is None else list(torch.split(da, [len(pair[0]) for pair in _there(pairs)]))


def enter(x: Tensor, layer: Fused) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Return x, for the sum that follows; norm(x), without gradients; turned queries and keys, and values.

    Args:
        x: (batch, length, width), for which the layer `fits`.
        layer: what it holds.
    """
    passed, y, *found = _Enter.apply(x, layer, *(f for f in layer.first.factors() if f is not None))  # type: ignore[no-untyped-call]
    return passed, y, tuple(found)


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Fused, *factors: Tensor) -> tuple[Tensor, ...]:
        parts, (cos, sin), half = layer.first, layer.turns, len(factors) // 2
        weight, eps = layer.norms[0]
        rows = x.reshape(-1, x.shape[-1])
        y, rho, h, stack = launch_norm_shrink(rows, weight, list(factors[:half]), eps)
        base = _product(y, parts.weight, parts.bias)
        bs = filled([None if pair is None else pair[1].detach() for pair in parts.pairs], parts.sizes, base)
        length, width = x.shape[1], cos.shape[-1]
        expand_turn(base, h, bs, parts.scales, cos, sin, length, width, kernels=True)
        # of what needs no gradient itself, as in a model's first layer, y is all that is asked for later
        first = (rows, rho) if ctx.needs_input_grad[0] else (y, None)
        ctx.save_for_backward(*first, weight, parts.weight, cos, sin, h, stack, *factors)
        ctx.made = x.shape, parts.pairs, parts.sizes, parts.scales
        y = y.view(x.shape)
        ctx.mark_non_differentiable(y)
        ctx.set_materialize_grads(False)  # y would be given one
        found = torch.split(base, list(parts.sizes), 1)  # attention keeps all three, so that one tensor may hold them
        # not views, which could not be changed in place
        return x.view_as(x), y, *(_unsafe_view(out, (*x.shape[:-1], out.shape[-1])) for out in found)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, passed: Tensor | None, _: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        x, rho, weight, whole, cos, sin, h, stack, *factors = ctx.saved_tensors
        shape, pairs, sizes, scales = ctx.made
        length, width, half = shape[1], cos.shape[-1], len(factors) // 2
        rest = iter(factors[half:])
        bs = filled([None if pair is None else next(rest) for pair in pairs], sizes, x)
        hs = torch.split(h, [b.shape[1] for b in bs])
        wide = [x.new_zeros(*shape[:2], size) if g is None else g for g, size in zip(gradients, sizes, strict=True)]
        heads = [g.view(*shape[:2], -1, width).transpose(1, 2) for g in wide]
        p, g, *dbs = turn_spread(heads, bs, hs, scales, cos, sin, length, width, kernels=True)
        dx, y = None, x
        if rho is not None:
            past = None if passed is None else passed.reshape(x.shape)
            dx, y = norm_back(g @ whole, p, stack, past, x, weight, rho, True, kernels=True)
            dx = dx.view(shape)
        das = _below(_outer(p, y, factors[0].dtype), pairs)
        found = [db for db, pair in zip(dbs, pairs, strict=True) if pair is not None]
        kinds = [factor.dtype for factor in factors]
        reached = 2 * [g is not None for g, pair in zip(gradients, pairs, strict=True) if pair is not None]
        cast = (d.to(kind) if yes else None for d, kind, yes in zip([*das, *found], kinds, reached, strict=True))
        return dx, None, *cast


def leave(x: Tensor, a: Tensor, layer: Fused) -> Tensor:
    """Return the layer's output, of its input x (batch, length, width) and the attention's (batch, length, in)."""
    parts = (layer.o, layer.inner, layer.down)
    factors = [factor for part in parts for factor in part.factors() if factor is not None]
    out: Tensor = _Leave.apply(x, a, layer, *factors)  # type: ignore[no-untyped-call]
    return out


def _one(part: Parts) -> tuple[Tensor | None, Tensor | None, float]:
    """Return A, B and s of a layer by itself."""
    (pair,) = part.pairs
    return (None, None, 1.0) if pair is None else (pair[0].detach(), pair[1].detach(), pair[2])


def _narrow(x: Tensor, a: Tensor | None) -> Tensor | None:
    return None if a is None else shrink(x, a, None, 1.0, 0.0, 0, 0)[0]


def _low(h: Tensor, pairs: Sequence[Pair | None]) -> list[Any]:
    """Return H, B and s of gate and of up, None for what is not there."""
    found: list[Any] = []
    start = 0
    for pair in pairs:
        end = start + (0 if pair is None else len(pair[0]))
        found += [None, None, 1.0] if pair is None else [h[start:end], pair[1].detach(), pair[2]]
        start = end
    return found


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, layer: Fused, *factors: Tensor) -> Tensor:
        rows, seen = x.reshape(-1, x.shape[-1]), a.reshape(-1, a.shape[-1])
        o, inner, down, (weight, eps) = layer.o, layer.inner, layer.down, layer.norms[1]
        a_o, b_o, s_o = _one(o)
        a_d, b_d, s_d = _one(down)
        z_o = _narrow(seen, a_o)
        update = None if z_o is None else z_o.t()
        firsts = [pair[0].detach() for pair in _there(inner.pairs)]
        changed = _product(seen, o.weight, o.bias)
        middle, y, rho, h, stack = add_norm_shrink(rows, changed, update, b_o, s_o, weight, eps, firsts, kernels=True)
        base = _product(y, inner.weight, inner.bias)
        made = launch_gated(*base.chunk(2, 1), *_low(h, inner.pairs))
        z_d = _narrow(made, a_d)
        update = None if z_d is None else z_d.t()
        out = add_expand(middle, _product(made, down.weight, down.bias), update, b_d, s_d, kernels=True)
        weights = (weight, o.weight, inner.weight, down.weight)
        ctx.save_for_backward(None if z_o is None else seen, middle, rho, base, h, stack, z_o, z_d, *weights, *factors)
        ctx.made = x.shape, a.shape, layer
        return _unsafe_view(out, x.shape)  # type: ignore[no-any-return]

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        seen, middle, rho, base, h, stack, z_o, z_d, *rest = ctx.saved_tensors
        weight, w_o, w_inner, w_down, *factors = rest
        shape, a_shape, layer = ctx.made
        (a_o, b_o, s_o), (a_d, b_d, s_d) = _one(layer.o), _one(layer.down)
        kinds, slope = [factor.dtype for factor in factors], gradient.reshape(-1, shape[-1]).contiguous()

        p_d, db_d = _back(slope, b_d, z_d, s_d)
        turned = None if p_d is None else p_d.t()
        (e, g), (h_e, b_e, s_e, h_g, b_g, s_g) = base.chunk(2, 1), _low(h, layer.inner.pairs)
        both, made, p, db_e, db_g = gated_back(
            slope @ w_down, turned, a_d, e, g, h_e, b_e, s_e, h_g, b_g, s_g, p_d is not None, kernels=True
        )
        da_d = [] if turned is None else [_outer(turned, made, kinds[-1])]
        dx, y = norm_back(both @ w_inner, p, stack, slope, middle, weight, rho, True, kernels=True)
        das = _below(_outer(p, y, kinds[2 * (z_o is not None)]), layer.inner.pairs)
        dbs = [db for db, pair in zip((db_e, db_g), layer.inner.pairs, strict=True) if pair is not None]

        p_o, db_o = _back(dx, b_o, z_o, s_o)
        da = dx @ w_o
        da_o = []
        if p_o is not None and a_o is not None:
            if a_o.dtype == da.dtype:
                da.addmm_(p_o, a_o)
            else:
                spread(da, p_o, a_o, 0.0, 0)
            da_o = [_outer(p_o.t(), seen, kinds[0])]
        found = [*da_o, *db_o, *das, *dbs, *da_d, *db_d]
        cast = (d.to(kind) for d, kind in zip(found, kinds, strict=True))
        return dx.view(shape), da.view(a_shape), None, *cast


def _back(g: Tensor, b: Tensor | None, h: Tensor | None, scale: float) -> tuple[Tensor | None, list[Tensor]]:
    """Return P (rows, r) and dB of a layer by itself, if it has an update."""
    if b is None:
        return None, []
    p, db, _ = dyb_db(g, b, h, None, scale, 0)
    return p, [db]
