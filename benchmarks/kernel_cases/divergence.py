"""Divergence between a student and a teacher of frozen output layers, forward and backward."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.kernel_cases import Case
from lit_peft.ops.divergence import KINDS, linear_divergence, reference


def run(
    x: Tensor, weight: Tensor, teacher_x: Tensor, teacher_weight: Tensor, kernels: bool, kind: str
) -> Sequence[Tensor]:
    x = x.detach().requires_grad_()
    loss = linear_divergence(x, weight, teacher_x, teacher_weight, kind=kind, kernels=kernels)
    return loss.detach(), *torch.autograd.grad(loss, x)


def exact(x: Tensor, weight: Tensor, teacher_x: Tensor, teacher_weight: Tensor, kind: str) -> Sequence[Tensor]:
    """Returns the loss and its gradient, a few rows at a time."""
    total, gradients = torch.zeros((), device=x.device, dtype=torch.float64), []
    wide, teacher_wide = weight.double(), teacher_weight.double()
    for start in range(0, len(x), 256):
        some = x[start : start + 256].detach().double().requires_grad_()
        loss = reference(some, wide, teacher_x[start : start + 256].double(), teacher_wide, kind=kind)
        total += loss.detach()
        gradients += torch.autograd.grad(loss, some)
    return total, torch.cat(gradients)


def cases(small: bool) -> list[Case]:
    rows, width, entries = (5, 24, 100) if small else (8192, 4096, 128256)

    def make(device: torch.device) -> list[Tensor]:
        x, teacher_x = torch.randn(2, rows, width, device=device, dtype=torch.bfloat16)
        weight, teacher_weight = torch.randn(2, entries, width, device=device, dtype=torch.bfloat16) * width**-0.5
        return [x, weight, teacher_x, teacher_weight]

    told = {"rows": rows, "vocabulary": entries, "width": width}
    # both logits are written and read, and the student's replaced by slopes, which are read
    moved = 6 * 2 * rows * entries + 3 * 2 * entries * width
    return [
        Case(
            "divergence",
            told | {"kind": KINDS.index(kind)},
            make,
            partial(run, kind=kind),
            partial(exact, kind=kind),
            moved,
            products=3 * 2 * rows * entries * width,
            tolerance=3e-2,
        )
        for kind in KINDS
    ]
