"""MoRA's update of type 6 beside a layer, forward and backward."""

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.kernel_cases import Case
from lit_peft.low_rank import square
from lit_peft.ops.mora import square_update


def run(y: Tensor, x: Tensor, m: Tensor, slope: Tensor, turn: Tensor, kernels: bool) -> Sequence[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in (y, x, m)]
    out = square_update(*leaves, 6, turn, kernels=kernels)
    return out.detach(), *torch.autograd.grad(out, leaves, slope)


def exact(y: Tensor, x: Tensor, m: Tensor, slope: Tensor, turn: Tensor) -> Sequence[Tensor]:
    leaves = [tensor.detach().double().requires_grad_() for tensor in (y, x, m)]
    out = leaves[0] + leaves[1] @ square.delta(leaves[2], x.shape[1], y.shape[1], 6).t()
    return out.detach(), *torch.autograd.grad(out, leaves, slope.double())


def cases(small: bool) -> list[Case]:
    # rows, in, out; r = 8
    sizes = (
        [(5, 24, 40)] if small else [(8192, 2048, 2048), (2048, 4096, 4096), (8192, 4096, 4096), (8192, 4096, 14336)]
    )

    def case(rows: int, inputs: int, outputs: int) -> Case:
        width = square.size(inputs, outputs, 2 if small else 8, 6)
        chunks = -(-inputs // width)

        def make(device: torch.device) -> list[Tensor]:
            y, slope = torch.randn(2, rows, outputs, device=device, dtype=torch.bfloat16)
            x = torch.randn(rows, inputs, device=device, dtype=torch.bfloat16)
            m = torch.randn(width, width, device=device) / width**0.5
            return [y, x, m, slope, square.angles(chunks, width, device)]

        # forward: x and y read, out written; backward: g and x read, dx written; the product for dM reads g and x again
        moved = 2 * rows * (4 * inputs + 4 * outputs)
        products = 2 * 3 * rows * min(chunks, -(-outputs // width)) * width**2
        sizes = {"rows": rows, "width": inputs, "outputs": outputs}
        return Case("mora", sizes, make, run, exact, moved=moved, products=products)

    return [case(*size) for size in sizes]
