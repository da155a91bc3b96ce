"""Cross entropy and log-probabilities of a frozen output layer, forward and backward."""

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.kernel_cases import Case
from lit_peft.ops.cross_entropy import linear_cross_entropy
from lit_peft.ops.log_probabilities import linear_log_probabilities


def losses(x: Tensor, weight: Tensor, targets: Tensor, slope: Tensor, kernels: bool) -> Sequence[Tensor]:
    x = x.detach().requires_grad_()
    loss = linear_cross_entropy(x, weight, targets, ignore_index=None, kernels=kernels)
    return loss.detach(), *torch.autograd.grad(loss, x)


def logs(x: Tensor, weight: Tensor, targets: Tensor, slope: Tensor, kernels: bool) -> Sequence[Tensor]:
    x = x.detach().requires_grad_()
    found = linear_log_probabilities(x, weight, targets, ignore_index=None, kernels=kernels)
    return found.detach(), *torch.autograd.grad(found, x, slope)


def exact(x: Tensor, weight: Tensor, targets: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """Returns log-probabilities (rows,) and their gradient for x, a few rows at a time."""
    wide, found, gradients = weight.double(), [], []
    for start in range(0, len(x), 256):
        some = x[start : start + 256].detach().double().requires_grad_()
        z = (some @ wide.t()).log_softmax(1).gather(1, targets[start : start + 256, None])[:, 0]
        found.append(z.detach())
        gradients += torch.autograd.grad(z, some, slope[start : start + 256].double())
    return torch.cat(found), torch.cat(gradients)


def exact_losses(x: Tensor, weight: Tensor, targets: Tensor, slope: Tensor) -> Sequence[Tensor]:
    found, gradients = exact(x, weight, targets, -torch.ones_like(slope))
    return -found.sum(), gradients


def cases(small: bool) -> list[Case]:
    sizes = [(5, 24, 100)] if small else [(rows, width, 128256) for rows in (2048, 8192) for width in (2048, 4096)]
    made = []
    for rows, width, entries in sizes:

        def make(device: torch.device, rows: int = rows, width: int = width, entries: int = entries) -> list[Tensor]:
            x = torch.randn(rows, width, device=device, dtype=torch.bfloat16)
            weight = torch.randn(entries, width, device=device, dtype=torch.bfloat16) * width**-0.5
            return [x, weight, torch.randint(entries, (rows,), device=device), torch.randn(rows, device=device)]

        told = {"rows": rows, "vocabulary": entries, "width": width}
        product, all_logits = 2 * rows * entries * width, 2 * rows * entries
        # logits are written, read and replaced by slopes, which are read; the weight is read by each product
        once = [(4 * all_logits, 2, losses, exact_losses), (5 * all_logits, 3, logs, exact)]
        for op, (moved, products, run, right) in zip(("cross_entropy", "log_probabilities"), once, strict=True):
            moved += products * 2 * entries * width
            made.append(Case(op, told, make, run, right, moved, products * product, tolerance=2e-2))
    return made
