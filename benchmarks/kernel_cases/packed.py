"""Queries, keys and values under LoRA as one product, forward and backward."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernel_cases import Case
from lit_peft.ops.packed import Parts, packed_linear, reference

R, SCALE = 16, 2.0


def parts(sizes: tuple[int, ...], tensors: Sequence[Tensor]) -> tuple[Tensor, Parts]:
    """Return x and the layers, of x, W, A_1, B_1 and so on, which get gradients but for W."""
    x, weight, *factors = (tensor.detach().requires_grad_(i != 1) for i, tensor in enumerate(tensors))
    pairs = tuple((a, b, SCALE) for a, b in zip(factors[::2], factors[1::2], strict=True))
    return x, Parts(weight, None, sizes, pairs)


def results(ys: tuple[Tensor, ...], x: Tensor, layers: Parts, slopes: Sequence[Tensor]) -> Sequence[Tensor]:
    leaves = [x, *(factor for factor in layers.factors() if factor is not None)]
    found = torch.autograd.grad(ys, leaves, [slope.to(ys[0].dtype) for slope in slopes])
    return *(y.detach() for y in ys), *found


def run(sizes: tuple[int, ...], slopes: Sequence[Tensor], *tensors: Tensor, kernels: bool) -> Sequence[Tensor]:
    x, layers = parts(sizes, tensors)
    return results(packed_linear(x, layers, apart=True, kernels=kernels), x, layers, slopes)


def exact(sizes: tuple[int, ...], slopes: Sequence[Tensor], *tensors: Tensor) -> Sequence[Tensor]:
    x, layers = parts(sizes, [tensor.double() for tensor in tensors])
    return results(reference(x, layers), x, layers, slopes)


def cases(small: bool) -> list[Case]:
    shapes = [(5, 32, 24, 8)] if small else [(t, d, d, d // 4) for d in (2048, 4096) for t in (2048, 8192)]

    def case(rows: int, wide: int, tall: int, shared: int) -> Case:
        sizes = (tall, shared, shared)

        def make(device: torch.device) -> list[Any]:
            def drawn(*shape: int, std: float = 1.0) -> Tensor:
                return (std * torch.randn(*shape, device=device)).to(torch.bfloat16)

            factors = [tensor for n in sizes for tensor in (drawn(R, wide, std=wide**-0.5), drawn(n, R, std=0.02))]
            slopes = [drawn(rows, n) for n in sizes]
            return [sizes, slopes, drawn(rows, wide), drawn(sum(sizes), wide, std=wide**-0.5), *factors]

        # x, dx; y written and read again, G read twice and written
        moved = 2 * rows * (2 * wide + 5 * sum(sizes))
        products = 2 * 2 * rows * sum(sizes) * wide
        named = {"rows": rows, "width": sum(sizes)}
        return Case("packed", named, make, run, exact, moved, products, tolerance=2e-2)

    return [case(*shape) for shape in shapes]
