"""A factor for each column: (IA)3's backward pass, from one read of both operands."""

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.kernel_cases import Case
from lit_peft.ops.scaled import scaled_output


def run(y: Tensor, factor: Tensor, slope: Tensor, kernels: bool) -> Sequence[Tensor]:
    y, factor = y.detach().requires_grad_(), factor.detach().requires_grad_()
    out = scaled_output(y, factor, kernels=kernels)
    return out.detach(), *torch.autograd.grad(out, [y, factor], slope)


def exact(y: Tensor, factor: Tensor, slope: Tensor) -> Sequence[Tensor]:
    y, factor = y.detach().double().requires_grad_(), factor.detach().double().requires_grad_()
    out = y * factor
    return out.detach(), *torch.autograd.grad(out, [y, factor], slope.double())


def cases(small: bool) -> list[Case]:
    sizes = [(40, 70)] if small else [(8192, 1024), (2048, 8192), (8192, 8192), (8192, 14336)]

    def case(rows: int, width: int) -> Case:
        def make(device: torch.device) -> list[Tensor]:
            y, slope = torch.randn(2, rows, width, device=device, dtype=torch.bfloat16)
            return [y, torch.rand(width, device=device) + 0.5, slope]

        return Case("scaled", {"rows": rows, "width": width}, make, run, exact, moved=2 * 5 * rows * width)

    return [case(*size) for size in sizes]
