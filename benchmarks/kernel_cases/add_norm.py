"""Before a layer's MLP: the sum with an update, its norm and the MLP's first narrow product; behind it the second sum;
and back through the norm."""

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.kernel_cases import Case
from lit_peft.ops.add_norm import add_expand, add_norm_shrink, norm_back

R, SCALE, EPS = 16, 2.0, 1e-6  # of the layer before the norm, and of each of the two behind it


def run(
    x: Tensor, y: Tensor, g: Tensor, h: Tensor, p: Tensor, b: Tensor, weight: Tensor, *factors: Tensor, kernels: bool
) -> Sequence[Tensor]:
    found = add_norm_shrink(x, y, h, b, SCALE, weight, EPS, factors, kernels=kernels)
    x2, _, rho, _, a = found
    last = add_expand(x2, y, h, b, SCALE, kernels=kernels)
    return *found, last, *norm_back(g, p, a, y, x2, weight, rho, True, kernels=kernels)


def exact(*tensors: Tensor) -> Sequence[Tensor]:
    return run(*(tensor.double() for tensor in tensors), kernels=False)


def cases(small: bool) -> list[Case]:
    sizes = [(5, 64)] if small else [(2048, 2048), (8192, 2048), (2048, 4096), (8192, 4096)]

    def case(rows: int, width: int) -> Case:
        def make(device: torch.device) -> list[Tensor]:
            x, y, g = torch.randn(3, rows, width, device=device, dtype=torch.bfloat16)
            h, p = (torch.randn(n * R, rows, device=device, dtype=torch.bfloat16) for n in (1, 2))
            b, weight = torch.randn(width, R, device=device) * 0.02, torch.ones(width, device=device, dtype=x.dtype)
            return [x, y, g, h, p, b, weight, *(torch.randn(R, width, device=device) * width**-0.5 for _ in range(2))]

        # x, y, x2 and the norm's output; x2, y and the sum; g, y, x2, dx and the output again
        moved = 2 * (4 + 3 + 5) * rows * width
        products = 2 * (1 + 2 + 1 + 2) * R * rows * width
        return Case("layer", {"rows": rows, "width": width}, make, run, exact, moved, products, part="norms")

    return [case(*size) for size in sizes]
