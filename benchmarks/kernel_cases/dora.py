"""DoRA's linear layer, forward and backward: three products, and what the kernels do beside them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.kernel_cases import Case
from lit_peft.ops.dora import dora_linear, reference

R = 16


def run(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, m: Tensor, slope: Tensor, kernels: bool) -> Sequence[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in (x, a, b, m)]
    with torch.device("meta"):
        base = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    base.weight = nn.Parameter(weight, requires_grad=False)
    y = dora_linear(leaves[0], base, *leaves[1:], torch.ones_like(m), 0.5, kernels=kernels)
    return y.detach(), *torch.autograd.grad(y, leaves, slope)


def exact(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, m: Tensor, slope: Tensor) -> Sequence[Tensor]:
    leaves = [tensor.detach().double().requires_grad_() for tensor in (x, a, b, m)]
    y = reference(leaves[0], weight.double(), None, *leaves[1:], torch.ones_like(m).double(), 0.5)
    return y.detach(), *torch.autograd.grad(y, leaves, slope.double())


def cases(small: bool) -> list[Case]:
    shapes = [(40, 32, 70)] if small else [(2048, 2048, 2048), (8192, 2048, 8192), (8192, 4096, 4096)]

    def case(rows: int, wide: int, tall: int) -> Case:
        def make(device: torch.device) -> list[Tensor]:
            def half(*shape: int) -> Tensor:
                return torch.randn(*shape, device=device, dtype=torch.bfloat16)

            a, b = torch.randn(R, wide, device=device) / wide**0.5, torch.randn(tall, R, device=device) / R**0.5
            m = torch.rand(tall, device=device) + 0.5
            return [half(rows, wide), half(tall, wide) / wide**0.5, a, b, m, half(rows, tall)]

        # x, W and y forward; g, W, y and dx backward
        moved = 2 * (2 * rows * wide + 3 * rows * tall + 2 * wide * tall)
        products = 2 * rows * (2 * wide * tall + 3 * R * (wide + tall))
        sizes = {"rows": rows, "inputs": wide, "outputs": tall}
        return Case("dora", sizes, make, run, exact, moved=moved, products=products, tolerance=2e-2)

    return [case(*shape) for shape in shapes]
