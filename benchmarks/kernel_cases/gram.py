"""AdaLoRA's penalty over all layers of a model, and its gradient."""

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.kernel_cases import Case
from lit_peft.ops.gram import orthogonality, reference

R = 12


def run(rows: list[Tensor], columns: list[Tensor], kernels: bool) -> Sequence[Tensor]:
    leaves = [[tensor.detach().requires_grad_() for tensor in side] for side in (rows, columns)]
    value = orthogonality(*leaves, kernels=kernels)
    return value.detach(), *torch.autograd.grad(value, [*leaves[0], *leaves[1]])


def exact(rows: list[Tensor], columns: list[Tensor]) -> Sequence[Tensor]:
    leaves = [[tensor.detach().double().requires_grad_() for tensor in side] for side in (rows, columns)]
    value = reference(*leaves)
    return value.detach(), *torch.autograd.grad(value, [*leaves[0], *leaves[1]])


def cases(small: bool) -> list[Case]:
    """The seven linear layers of each decoder layer of Llama 1B and 8B."""
    sizes = [(1, 32, 48, 8)] if small else [(16, 2048, 8192, 512), (32, 4096, 14336, 1024)]

    def case(layers: int, width: int, inner: int, shared: int) -> Case:
        ends = [(width, width), (width, shared), (width, shared), (width, width)]
        ends = [*ends, (width, inner), (width, inner), (inner, width)] * layers

        def make(device: torch.device) -> list[list[Tensor]]:
            return [
                [torch.randn(R, wide, device=device) / wide**0.5 for wide, _ in ends],
                [torch.randn(tall, R, device=device) / tall**0.5 for _, tall in ends],
            ]

        numbers = R * sum(wide + tall for wide, tall in ends)
        found = {"matrices": 2 * len(ends)}
        return Case("gram", found, make, run, exact, moved=4 * 3 * numbers, products=4 * R * numbers, tolerance=1e-5)

    return [case(*size) for size in sizes]
