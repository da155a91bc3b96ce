"""RMS normalisation, forward and backward; and with the first product of LoRA behind it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.kernel_cases import Case
from lit_peft.ops.norm import norm_shrink, rms_norm

R = 16  # of three layers


def run(x: Tensor, weight: Tensor, slope: Tensor, kernels: bool) -> Sequence[Tensor]:
    x = x.detach().requires_grad_()
    y = rms_norm(x, weight, 1e-6, kernels=kernels)
    return y.detach(), *torch.autograd.grad(y, x, slope)


def exact(x: Tensor, weight: Tensor, slope: Tensor) -> Sequence[Tensor]:
    x = x.detach().double().requires_grad_()
    y = weight.double() * x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()
    return y.detach(), *torch.autograd.grad(y, x, slope.double())


def run_shrink(x: Tensor, weight: Tensor, *factors: Tensor, kernels: bool) -> Sequence[Tensor]:
    return norm_shrink(x, weight, 1e-6, factors, kernels=kernels)


def exact_shrink(x: Tensor, weight: Tensor, *factors: Tensor) -> Sequence[Tensor]:
    x, a = x.double(), torch.cat(factors).to(x.dtype).double()
    y = weight.double() * x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()
    return y, a, a @ y.t()


def cases(small: bool) -> list[Case]:
    sizes = [(5, 64)] if small else [(2048, 2048), (8192, 2048), (2048, 4096), (8192, 4096)]

    def case(rows: int, width: int) -> Case:
        def make(device: torch.device) -> list[Tensor]:
            x, slope = torch.randn(2, rows, width, device=device, dtype=torch.bfloat16)
            return [x, torch.ones(width, device=device, dtype=torch.bfloat16), slope]

        return Case("norm", {"rows": rows, "width": width}, make, run, exact, moved=2 * 5 * rows * width)

    def shrinking(rows: int, width: int) -> Case:
        def make(device: torch.device) -> list[Tensor]:
            x = torch.randn(rows, width, device=device, dtype=torch.bfloat16)
            factors = [torch.randn(R, width, device=device) * width**-0.5 for _ in range(3)]
            return [x, torch.ones(width, device=device, dtype=torch.bfloat16), *factors]

        named = {"rows": rows, "width": width}
        return Case("norm_shrink", named, make, run_shrink, exact_shrink, moved=2 * 2 * rows * width)

    return [kind(*size) for kind in (case, shrinking) for size in sizes]
