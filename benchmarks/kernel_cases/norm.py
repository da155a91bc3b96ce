"""RMS normalisation, forward and backward."""

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.kernel_cases import Case
from lit_peft.ops.norm import rms_norm


def run(x: Tensor, weight: Tensor, slope: Tensor, kernels: bool) -> Sequence[Tensor]:
    x = x.detach().requires_grad_()
    y = rms_norm(x, weight, 1e-6, kernels=kernels)
    return y.detach(), *torch.autograd.grad(y, x, slope)


def exact(x: Tensor, weight: Tensor, slope: Tensor) -> Sequence[Tensor]:
    x = x.detach().double().requires_grad_()
    y = weight.double() * x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()
    return y.detach(), *torch.autograd.grad(y, x, slope.double())


def cases(small: bool) -> list[Case]:
    sizes = [(5, 64)] if small else [(2048, 2048), (8192, 2048), (2048, 4096), (8192, 4096)]

    def case(rows: int, width: int) -> Case:
        def make(device: torch.device) -> list[Tensor]:
            x, slope = torch.randn(2, rows, width, device=device, dtype=torch.bfloat16)
            return [x, torch.ones(width, device=device, dtype=torch.bfloat16), slope]

        return Case("norm", {"rows": rows, "width": width}, make, run, exact, moved=2 * 5 * rows * width)

    return [case(*size) for size in sizes]
