"""How far a student's predictions are from a teacher's, for distillation, with a frozen output layer on both sides.

    p = softmax(z),  z = (x W^T + c) / T   of the student,        q of the teacher in the same way,        rows summed

    forward_kl   D = sum q log(q / p)                                     dz = p - q
    reverse_kl   D = sum p log(p / q)                                     dz = p (log(p / q) - D)
    jsd          D = b sum q log(q / m) + (1 - b) sum p log(p / m)        dz = (1 - b) p (log(p / m) - sum p log(p / m))
                 with m = b q + (1 - b) p

    loss = T^2 D        dx = T dz W

The forward KL divergence with T^2 is that of Hinton et al. 2015 (arXiv:1503.02531, section 2); the generalised
Jensen-Shannon divergence that of Agarwal et al. 2024 (GKD, arXiv:2306.13649, section 2). Rows are taken in pieces, as
in `cross_entropy`: three matrix products a row, and 2 V numbers a row are stored for one piece.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_peft.ops.cross_entropy import launches
from lit_peft.ops.logits import (
    LEAST,
    LIFT,
    Shape,
    as_rows,
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

KINDS = ("forward_kl", "reverse_kl", "jsd")


def reference(
    x: Tensor,
    weight: Tensor,
    teacher_x: Tensor,
    teacher_weight: Tensor,
    *,
    kind: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
) -> Tensor:
    """Return T^2 D with plain operations."""
    z = shaped(F.linear(x, weight, bias), shape_of(1.0, softcap, temperature))
    u = shaped(F.linear(teacher_x, teacher_weight, teacher_bias), shape_of(1.0, teacher_softcap, temperature))
    wide = torch.promote_types(x.dtype, torch.float32)
    a, b = z.log_softmax(-1, dtype=wide), u.log_softmax(-1, dtype=wide)
    if kind == "forward_kl":
        found = b.exp() * (b - a)
    elif kind == "reverse_kl":
        found = a.exp() * (a - b)
    else:
        m = (beta * b.exp() + (1 - beta) * a.exp()).log()
        found = beta * b.exp() * (b - m) + (1 - beta) * a.exp() * (a - m)
    return temperature**2 * found.sum()


def linear_divergence(
    x: Tensor,
    weight: Tensor,
    teacher_x: Tensor,
    teacher_weight: Tensor,
    *,
    kind: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    kernels: bool | None = None,
) -> Tensor:
    """Return T^2 D, summed over the rows, in float32.

    D of `jsd` goes to 0 as beta goes to 0 or 1; D / (beta (1 - beta)) goes to that of `forward_kl` as beta goes to 0,
    and to that of `reverse_kl` as it goes to 1. The factor T^2 keeps the gradient's size when T changes; for a loss
    without it, divide.

    Args:
        x: the student's hidden states (n, d).
        weight: its output layer's W (V, d), frozen.
        teacher_x: the teacher's hidden states (n, d'), in any floating dtype; a constant.
        teacher_weight: (V, d').
        kind: "forward_kl" (student covers all that the teacher may say), "reverse_kl" (student says nothing that the
            teacher would not) or "jsd".
        beta: b, the teacher's share in the mixture m; for `jsd` only.
        temperature: T.
        bias: c (V,), frozen.
        teacher_bias: the teacher's.
        softcap: the student's cap, where its logits are cap tanh((x W^T + c) / cap).
        teacher_softcap: the teacher's.
        kernels: whether to launch the kernel; None: as measured.

    Returns:
        A number with a gradient for x. A second derivative is not there: asking for one raises.

    Raises:
        ValueError: if the vocabularies or the numbers of rows differ, the kind is not known, beta is not between 0 and
            1, the temperature is not above 0, or the student's W or c is to be trained.

    Example:
        >>> import torch
        >>> x, weight = torch.eye(2), torch.eye(2)
        >>> float(linear_divergence(x, weight, x, weight, kind="jsd"))
        0.0
    """
    refuse_trained(weight, bias)
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(KINDS)}.")
    if kind == "jsd" and not 0 < beta < 1:
        raise ValueError(f"beta is {beta}; between 0 and 1 it must be. For the limits take 'forward_kl', 'reverse_kl'.")
    if len(weight) != len(teacher_weight):
        raise ValueError(
            f"The student's vocabulary has {len(weight)} entries and the teacher's {len(teacher_weight)}: cut both "
            "output layers to the entries that they share."
        )
    if len(x) != len(teacher_x):
        raise ValueError(f"The student has {len(x)} rows and the teacher {len(teacher_x)}: give both the same tokens.")
    shapes = shape_of(1.0, softcap, temperature), shape_of(1.0, teacher_softcap, temperature)
    if autocasting(x):
        x, teacher_x = (part.to(torch.get_autocast_dtype(x.device.type)) for part in (x, teacher_x))
    sides = (x, weight), (teacher_x, teacher_weight)
    launch = all(launches("divergence", *side, kernels, kind=KINDS.index(kind)) for side in sides)
    teacher = teacher_x.detach(), teacher_weight.detach(), None if teacher_bias is None else teacher_bias.detach()
    how = KINDS.index(kind), beta, temperature, shapes, launch
    loss: Tensor = _Divergence.apply(x, weight, bias, *teacher, *how)  # type: ignore[no-untyped-call]
    return loss


def _losses(v: Tensor, w: Tensor, shapes: tuple[Shape, Shape], kind: int, beta: float, gain: float) -> Tensor:
    """Return a strip's D (rows,), and put the slopes times `gain`, if that is not 0, in the place of v."""
    z, damping = widened(v, shapes[0])
    u, _ = widened(w, shapes[1])
    a, b = z.log_softmax(1).clamp_(min=LEAST), u.log_softmax(1).clamp_(min=LEAST)
    wide = torch.promote_types(a.dtype, b.dtype)
    a, b = a.to(wide), b.to(wide)
    p = torch.exp(a, out=z) if z.dtype == wide else a.exp()
    q = torch.exp(b, out=u) if u.dtype == wide else b.exp()
    if kind == 0:
        losses = b.sub_(a).mul_(q).sum(1)
        slopes = p.sub_(q)
    else:
        if kind == 2:
            m = (q * beta).add_(p, alpha=1 - beta).log_().clamp_(min=LEAST)
            losses = b.sub_(m).mul_(q).sum(1) * beta
        else:
            m, losses = b, torch.zeros_like(a[:, 0])
        ratio = a.sub_(m)
        mean = (ratio * p).sum(1)
        share = 1 - beta if kind == 2 else 1.0
        losses += share * mean
        gain *= share
        slopes = ratio.sub_(mean[:, None]).mul_(p)
    if gain:
        returned(v, slopes.mul_(gain * shapes[0].slope), damping)
    return losses


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher_x: Tensor,
        teacher_weight: Tensor,
        teacher_bias: Tensor | None,
        kind: int,
        beta: float,
        temperature: float,
        shapes: tuple[Shape, Shape],
        launch: bool,
    ) -> Tensor:
        wide = torch.promote_types(torch.promote_types(x.dtype, teacher_x.dtype), torch.float32)
        total = x.new_zeros((), dtype=wide)
        needed = ctx.needs_input_grad[0]
        dx = torch.empty_like(x) if needed else None
        lift = LIFT.get(x.dtype, 1.0)
        # temperature^2 of the loss; 1 / temperature is in the shapes
        gain = lift * temperature**2 if needed else 0.0
        share = 1 + math.ceil(teacher_x.element_size() / x.element_size())
        with as_written(x):
            buffer = as_rows(weight, bias, x)
            beside = as_rows(teacher_weight, teacher_bias, teacher_x)
            for part in parts(x, weight, share=share):
                v, w = buffer.logits(x[part]), beside.logits(teacher_x[part])
                if launch:
                    numbers = [number for shape in shapes for number in (shape.factor, shape.height)]
                    total += _divergence(v, w, kind, beta, gain, *numbers).sum()
                else:
                    for strip in strips(v, share=2):
                        total += _losses(v[strip], w[strip], shapes, kind, beta, gain).sum()
                if dx is not None:
                    put_product(dx, v, buffer.weight, None, part)
        ctx.save_for_backward(dx)
        ctx.lift = lift
        return total.mul_(temperature**2)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (dx,) = ctx.saved_tensors
        return (dx * (gradient / ctx.lift)).to(dx.dtype), *[None] * 10


@torch.library.custom_op("lit_peft::divergence", mutates_args=("v",))
def _divergence(
    v: Tensor,
    w: Tensor,
    kind: int,
    beta: float,
    gain: float,
    factor: float,
    height: float,
    teacher_factor: float,
    teacher_height: float,
) -> Tensor:
    from lit_peft.kernels.divergence import divergence

    return divergence(v, w, kind, beta, gain, (factor, height), (teacher_factor, teacher_height))


@_divergence.register_fake
def _(
    v: Tensor,
    w: Tensor,
    kind: int,
    beta: float,
    gain: float,
    factor: float,
    height: float,
    teacher_factor: float,
    teacher_height: float,
) -> Tensor:
    return torch.empty(len(v), device=v.device)
