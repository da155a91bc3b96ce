"""Gate, up and their gated product under LoRA, forward and backward."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernel_cases import Case
from lit_peft.ops.gated import gated_linear, reference
from lit_peft.ops.packed import Parts

R, SCALE = 16, 2.0


def parts(tensors: Sequence[Tensor]) -> tuple[Tensor, Parts]:
    """Return x and the layers, of x, W, A_1, B_1, A_2, B_2, which get gradients but for W."""
    x, weight, *factors = (tensor.detach().requires_grad_(i != 1) for i, tensor in enumerate(tensors))
    half = len(weight) // 2
    return x, Parts(weight, None, (half, half), ((*factors[:2], SCALE), (*factors[2:], SCALE)))


def results(y: Tensor, x: Tensor, layers: Parts, slope: Tensor) -> Sequence[Tensor]:
    leaves = [x, *(factor for factor in layers.factors() if factor is not None)]
    return y.detach(), *torch.autograd.grad(y, leaves, slope.to(y.dtype))


def run(slope: Tensor, *tensors: Tensor, kernels: bool) -> Sequence[Tensor]:
    x, layers = parts(tensors)
    return results(gated_linear(x, layers, kernels=kernels), x, layers, slope)


def exact(slope: Tensor, *tensors: Tensor) -> Sequence[Tensor]:
    x, layers = parts([tensor.double() for tensor in tensors])
    return results(reference(x, layers), x, layers, slope)


def cases(small: bool) -> list[Case]:
    sizes = (
        [(5, 32, 24)] if small else [(2048, 2048, 8192), (8192, 2048, 8192), (2048, 4096, 14336), (8192, 4096, 14336)]
    )

    def case(rows: int, wide: int, f: int) -> Case:
        def make(device: torch.device) -> list[Any]:
            def drawn(*shape: int, std: float = 1.0) -> Tensor:
                return (std * torch.randn(*shape, device=device)).to(torch.bfloat16)

            factors = [tensor for _ in range(2) for tensor in (drawn(R, wide, std=wide**-0.5), drawn(f, R, std=0.02))]
            return [drawn(rows, f), drawn(rows, wide), drawn(2 * f, wide, std=wide**-0.5), *factors]

        # x, dx, and e0 and g0 written and read, h, dh, de and dg
        moved = 2 * rows * (2 * wide + 12 * f)
        products = 2 * 2 * rows * 2 * f * wide
        return Case("gated", {"rows": rows, "width": 2 * f}, make, run, exact, moved, products, tolerance=2e-2)

    return [case(*size) for size in sizes]
