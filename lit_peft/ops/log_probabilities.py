"""Log-probabilities of given tokens under a frozen output layer, without the logits of all tokens at once.

    l_i = z_i[t_i] - lse_i          z = x W^T + c (n, V),   p_i = softmax(z_i),   lse_i = log sum_v exp z_i[v]
    H_i = - sum_v p_i[v] log p_i[v]

    dx_i = (g_i (onehot(t_i) - p_i)  -  h_i p_i (log p_i + H_i)) W          g, h: the gradients of l and H

Losses such as DPO's, ORPO's, KTO's, PPO's and GRPO's are functions of sums of l, so g is not known before all of them
are there. Kept are x and a few numbers a row; the backward pass computes the logits again, piece by piece. That is
three matrix products a row, and V numbers a row are stored for one piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_peft.ops.cross_entropy import launches
from lit_peft.ops.logits import (
    LEAST,
    LIFT,
    Shape,
    as_rows,
    chosen,
    kept_rows,
    parts,
    put_product,
    refuse_trained,
    returned,
    shape_of,
    shaped,
    strips,
    widened,
)
from lit_peft.ops.recipes import as_written, autocasting


def reference(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return log-probabilities (n,) and entropies (n,) with plain operations: x (n, d), targets (n,)."""
    z = shaped(F.linear(x, weight, bias), shape_of(scale, softcap, temperature))
    logs = z.log_softmax(-1, dtype=torch.promote_types(z.dtype, torch.float32))
    return logs.gather(1, targets[:, None])[:, 0], -(logs.exp() * logs).sum(-1)


@overload
def linear_log_probabilities(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int | None = -100,
    entropy: Literal[False] = False,
    kernels: bool | None = None,
) -> Tensor: ...


@overload
def linear_log_probabilities(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int | None = -100,
    entropy: Literal[True],
    kernels: bool | None = None,
) -> tuple[Tensor, Tensor]: ...


def linear_log_probabilities(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int | None = -100,
    entropy: bool = False,
    kernels: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return log softmax(z)[t] of each row in float32, with z = (x W^T + c) / temperature; or that and the entropies.

    Args:
        x: hidden states (..., d).
        weight: W (V, d), frozen.
        targets: t (...), each in [0, V) or `ignore_index`.
        bias: c (V,), frozen.
        temperature: what the logits are divided by, after a cap: that of sampling, in PPO and GRPO.
        scale: what the model multiplies its logits by.
        softcap: with it, the logits are cap tanh(scale (x W^T + c) / cap) / temperature, as Gemma 2 has them.
        ignore_index: the target of rows that are left out, and get 0 and no gradient. None: there are none.
        entropy: whether to return the entropies too; both have gradients.
        kernels: whether to launch the kernels; None: as measured.

    Returns:
        (...), or two of these. A second derivative is not there: asking for one raises.

    Raises:
        ValueError: if W or c is to be trained, or the temperature is not above 0.

    Example:
        >>> import torch
        >>> x, weight = torch.zeros(2, 3), torch.ones(4, 3)
        >>> found = linear_log_probabilities(x, weight, torch.tensor([0, -100]))  # - log 4, ignored
        >>> [round(float(value), 4) for value in found]
        [-1.3863, 0.0]
    """
    refuse_trained(weight, bias)
    shape = shape_of(scale, softcap, temperature)
    if autocasting(x):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    flat, aims = x.reshape(-1, x.shape[-1]), targets.reshape(-1)
    rows = kept_rows(aims, ignore_index)
    launch = launches("log_probabilities", flat, weight, kernels)
    logs, entropies = _LogProbabilities.apply(flat, weight, aims, bias, rows, shape, entropy, launch)  # type: ignore[no-untyped-call]
    return (logs.view(targets.shape), entropies.view(targets.shape)) if entropy else logs.view(targets.shape)


def _scores(v: Tensor, aims: Tensor, shape: Shape, entropy: bool) -> tuple[Tensor, ...]:
    """Return a strip's l, lse, 1 - p[t] and H (rows,); v is overwritten."""
    z, _ = widened(v, shape)
    picked, top = z.gather(1, aims), z.amax(1, keepdim=True)
    if entropy:
        e = z.sub_(top).exp()
        # sum of p (z - top), of which the entropy is made
        mean = z.clamp_(min=LEAST).mul_(e).sum(1, keepdim=True)
    else:
        e, mean = z.sub_(top).exp_(), torch.zeros_like(top)
    others = e.scatter_(1, aims, 0.0).sum(1, keepdim=True)
    total = others + (picked - top).exp_()
    rest = total.log()
    lse = rest + top
    return tuple(part[:, 0] for part in (picked - lse, lse, others / total, rest - mean / total))


def _put_slopes(v: Tensor, aims: Tensor, numbers: Sequence[Any], shape: Shape) -> None:
    """Put the slopes of a strip in the place of v; the numbers lse, 1 - p[t], H, g and h are (rows, 1)."""
    lse, miss, entropies, g, h = numbers
    z, damping = widened(v, shape)
    z.sub_(lse).clamp_(min=LEAST)
    if shape.slope != 1:
        g, h = g * shape.slope, None if h is None else h * shape.slope
    if h is None:
        slopes = z.exp_().mul_(-g).scatter_(1, aims, g * miss)
    else:
        at_target = z.gather(1, aims)
        at_target = g * miss - h * at_target.exp() * (at_target + entropies)
        p = z.exp()
        slopes = z.add_(entropies).mul_(-h).sub_(g).mul_(p).scatter_(1, aims, at_target)
    returned(v, slopes, damping)


class _LogProbabilities(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        rows: Tensor | None,
        shape: Shape,
        entropy: bool,
        launch: bool,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(x.dtype, torch.float32)
        kept = [x.new_empty(len(x if rows is None else rows), dtype=wide) for _ in range(4)]
        with as_written(x):
            buffer = as_rows(weight, bias, x)
            for part in parts(x, weight, rows):
                v, aims = buffer.logits(chosen(x, rows, part)), chosen(targets, rows, part)
                if launch:
                    found = _log_probabilities(v, aims, shape.factor, shape.height, entropy)
                    for whole, some in zip(kept, found, strict=True):
                        whole[part] = some
                else:
                    for strip in strips(v):
                        found = _scores(v[strip], aims[strip, None], shape, entropy)
                        for whole, some in zip(kept, found, strict=True):
                            whole[part][strip] = some
        logs, lse, miss, entropies = kept
        ctx.save_for_backward(x, weight, targets, bias, rows, lse, miss, entropies if entropy else None)
        ctx.made = shape, launch
        ctx.set_materialize_grads(False)
        if rows is not None:
            logs, entropies = (x.new_zeros(len(x), dtype=wide).index_copy_(0, rows, part) for part in (logs, entropies))
        elif entropy:
            entropies = entropies.clone()  # the one is kept, the other is the caller's
        if not entropy:
            ctx.mark_non_differentiable(entropies)
        return logs, entropies

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, g: Tensor | None, h: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, targets, bias, rows, lse, miss, entropies = ctx.saved_tensors
        shape, launch = ctx.made
        if entropies is None:
            h = None
        g = torch.zeros_like(x[:, 0], dtype=lse.dtype) if g is None else g
        if rows is not None:
            g, h = g[rows], None if h is None else h[rows]
        unit: Tensor | None = None
        if x.dtype in LIFT:  # products of the largest slopes that are possible: g may be of any size
            unit = g.abs() if h is None else torch.maximum(g.abs(), h.abs())
            unit = torch.where(unit > 0, unit, torch.ones_like(unit)) / LIFT[x.dtype]
            g, h = g / unit, None if h is None else h / unit
        dx = torch.empty_like(x) if rows is None else torch.zeros_like(x)
        with as_written(x):
            buffer = as_rows(weight, bias, x)
            for part in parts(x, weight, rows):
                v, aims = buffer.logits(chosen(x, rows, part)), chosen(targets, rows, part)
                numbers: Any = [None if whole is None else whole[part] for whole in (lse, miss, entropies, g, h)]
                if launch:
                    _log_probabilities_backward(v, aims, *numbers, shape.factor, shape.height)
                else:
                    for strip in strips(v):
                        some = [None if whole is None else whole[strip, None] for whole in numbers]
                        _put_slopes(v[strip], aims[strip, None], some, shape)
                put_product(dx, v, buffer.weight, rows, part)
        if unit is not None and rows is None:
            dx = (dx * unit[:, None]).to(x.dtype)
        elif unit is not None:
            dx.index_copy_(0, rows, (dx[rows] * unit[:, None]).to(x.dtype))
        return dx, None, None, None, None, None, None, None


@torch.library.custom_op("lit_peft::log_probabilities", mutates_args=())
def _log_probabilities(
    v: Tensor, targets: Tensor, factor: float, height: float, entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from lit_peft.kernels.cross_entropy import log_probabilities

    return log_probabilities(v, targets, factor, height, entropy)


@_log_probabilities.register_fake
def _(v: Tensor, targets: Tensor, factor: float, height: float, entropy: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    one, two, three, four = (torch.empty(len(v), device=v.device) for _ in range(4))
    return one, two, three, four


@torch.library.custom_op("lit_peft::log_probabilities_backward", mutates_args=("v",))
def _log_probabilities_backward(
    v: Tensor,
    targets: Tensor,
    lse: Tensor,
    miss: Tensor,
    entropies: Tensor | None,
    g: Tensor,
    h: Tensor | None,
    factor: float,
    height: float,
) -> None:
    from lit_peft.kernels.cross_entropy import log_probabilities_backward

    log_probabilities_backward(v, targets, lse, miss, entropies, g, h, factor, height)


@_log_probabilities_backward.register_fake
def _(
    v: Tensor,
    targets: Tensor,
    lse: Tensor,
    miss: Tensor,
    entropies: Tensor | None,
    g: Tensor,
    h: Tensor | None,
    factor: float,
    height: float,
) -> None:
    return None
