"""Cross entropy of a frozen output layer, without the logits of all tokens at once.

    loss = sum_i  lse_i - z_i[t_i]          z = x W^T + c (n, V),   lse_i = log sum_v exp z_i[v]
    dx_i = (softmax(z_i) - onehot(t_i)) W

Rows are taken in pieces: each piece's logits live only until its part of the loss and of dx is there. That is two
matrix products a row, forward and backward together, as with all logits kept; V numbers a row are stored for one piece.
Rows that are to be ignored take part in neither product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_peft.ops.choice import takes_kernel
from lit_peft.ops.logits import (
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
    scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Return the summed cross entropy with plain operations."""
    logits = shaped(F.linear(x, weight, bias).float(), shape_of(scale, softcap))
    return F.cross_entropy(logits, targets, reduction="sum", ignore_index=ignore_index)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int | None = -100,
    kernels: bool | None = None,
) -> Tensor:
    """Return the cross entropy of softmax(x W^T + c), summed over the rows, in float32.

    Args:
        x: hidden states (n, d).
        weight: W (V, d), frozen.
        targets: (n,), each in [0, V) or `ignore_index`.
        bias: c (V,), frozen.
        scale: what the model multiplies its logits by.
        softcap: with it, the logits are cap tanh(scale (x W^T + c) / cap), as Gemma 2 has them.
        ignore_index: the target of rows that are left out. None: there are none, and nobody has to look.
        kernels: whether to launch the kernel; None: as measured.

    Returns:
        A number; 0 with zero gradients if there is no row. A second derivative is not there: asking for one raises.

    Raises:
        ValueError: if W or c is to be trained.

    Example:
        >>> import torch
        >>> x, weight = torch.zeros(3, 3), torch.ones(4, 3)
        >>> round(float(linear_cross_entropy(x, weight, torch.tensor([0, -100, 3]))), 4)  # 2 log 4
        2.7726
    """
    refuse_trained(weight, bias)
    shape = shape_of(scale, softcap)
    if autocasting(x):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    rows = kept_rows(targets, ignore_index)
    launch = launches("cross_entropy", x, weight, kernels)
    loss: Tensor = _CrossEntropy.apply(x, weight, targets, bias, rows, shape, launch)  # type: ignore[no-untyped-call]
    return loss


def launches(op: str, x: Tensor, weight: Tensor, kernels: bool | None, **sizes: int) -> bool:
    """Return whether an op on logits is to launch its kernel, which works in float32."""
    exact = torch.promote_types(x.dtype, torch.float32) == torch.float32
    return exact and takes_kernel(op, x, kernels, rows=len(x), vocabulary=len(weight), width=x.shape[1], **sizes)


@torch.no_grad()
def token_scores(x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return each row's cross entropy (n,) in float32, and whether its target is the likeliest token (n,)."""
    losses = torch.empty(len(x), device=x.device)
    hits = torch.empty(len(x), device=x.device)
    if autocasting(x):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    with as_written(x):
        buffer = as_rows(weight, bias, x)
        for part in parts(x, weight):
            v, aims = buffer.logits(x[part]), targets[part]
            hits[part] = (v.argmax(-1) == aims).float()
            for strip in strips(v):
                losses[part][strip] = F.cross_entropy(v[strip].float(), aims[strip], reduction="none")
    return losses, hits


def _losses(v: Tensor, aims: Tensor, shape: Shape, gain: float) -> Tensor:
    """Return a strip's losses (rows, 1), and put the slopes times `gain`, if that is not 0, in the place of v."""
    z, damping = widened(v, shape)
    picked, top = z.gather(1, aims), z.amax(1, keepdim=True)
    # the others by themselves: 1 - p of a token that is all but learned would be lost in the rounding of p
    others = z.sub_(top).exp_().scatter_(1, aims, 0.0).sum(1, keepdim=True)
    total = others + (picked - top).exp_()
    if gain:
        gains = gain * shape.slope / total
        returned(v, z.mul_(gains).scatter_(1, aims, -others * gains), damping)
    return total.log_().add_(top).sub_(picked)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        rows: Tensor | None,
        shape: Shape,
        launch: bool,
    ) -> Tensor:
        total = x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32))
        needed = ctx.needs_input_grad[0]
        dx = (torch.empty_like(x) if rows is None else torch.zeros_like(x)) if needed else None
        lift = LIFT.get(x.dtype, 1.0)
        gain = lift if needed else 0.0
        with as_written(x):
            buffer = as_rows(weight, bias, x)
            for part in parts(x, weight, rows):
                v, aims = buffer.logits(chosen(x, rows, part)), chosen(targets, rows, part)
                if launch:
                    total += _cross_entropy(v, aims, shape.factor, shape.height, gain).sum()
                else:
                    for strip in strips(v):
                        total += _losses(v[strip], aims[strip, None], shape, gain).sum()
                if dx is not None:
                    put_product(dx, v, buffer.weight, rows, part)
        ctx.save_for_backward(dx)
        ctx.lift = lift
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (dx,) = ctx.saved_tensors
        return (dx * (gradient / ctx.lift)).to(dx.dtype), None, None, None, None, None, None


# As a registered operation the launch has shapes without data: fake tensors, the memory count and compilers see it.
@torch.library.custom_op("lit_peft::cross_entropy", mutates_args=("v",))
def _cross_entropy(v: Tensor, targets: Tensor, factor: float, height: float, gain: float) -> Tensor:
    from lit_peft.kernels.cross_entropy import cross_entropy

    return cross_entropy(v, targets, factor, height, gain)


@_cross_entropy.register_fake
def _(v: Tensor, targets: Tensor, factor: float, height: float, gain: float) -> Tensor:
    return torch.empty(len(v), device=v.device)
