"""A bottleneck adapter behind a module and beside it, forward and backward."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.kernel_cases import Case
from lit_peft.ops.bottleneck import bottleneck, reference


def run(*inputs: Tensor, behind: bool, kernels: bool) -> Sequence[Tensor]:
    y, x, slope, *weights = inputs
    leaves = [tensor.detach().requires_grad_() for tensor in ((x, *weights) if behind else (y, x, *weights))]
    read = leaves if behind else leaves[1:]
    out = bottleneck(leaves[0], *read, "relu", 2.0, kernels=kernels)
    return out.detach(), *torch.autograd.grad(out, leaves, slope)


def exact(*inputs: Tensor, behind: bool) -> Sequence[Tensor]:
    y, x, slope, *weights = (tensor.detach().double() for tensor in inputs)
    leaves = [tensor.requires_grad_() for tensor in ((x, *weights) if behind else (y, x, *weights))]
    read = leaves if behind else leaves[1:]
    out = reference(leaves[0], *read, "relu", 2.0)
    return out.detach(), *torch.autograd.grad(out, leaves, slope)


def cases(small: bool) -> list[Case]:
    sizes = [(5, 48, 8)] if small else [(8192, 2048, 64), (2048, 4096, 64), (8192, 4096, 64), (8192, 4096, 256)]

    def case(rows: int, width: int, inner: int, behind: bool) -> Case:
        def make(device: torch.device) -> list[Tensor]:
            y, x, slope = torch.randn(3, rows, width, device=device, dtype=torch.bfloat16)
            down, up = torch.randn(2, inner, width, device=device, dtype=torch.bfloat16) / width**0.5
            # far from 0, where the rounding of z would decide on which side of the corner it lies
            bias = torch.where(torch.arange(inner, device=device) % 2 == 0, 8.0, -8.0).to(torch.bfloat16)
            return [y, x, slope, down, bias, up.t().contiguous(), torch.zeros_like(y[0])]

        # forward: x (and y) read, out written; backward: g and x read, dx written; D and U twice each
        moved = 2 * (rows * width * (5 if behind else 6) + 4 * inner * width)
        return Case(
            "bottleneck",
            {"rows": rows, "width": width, "inner": inner, "behind": int(behind)},
            make,
            partial(run, behind=behind),
            partial(exact, behind=behind),
            moved=moved,
            products=2 * 6 * rows * width * inner,
        )

    return [case(*size, behind) for size in sizes for behind in (True, False)]
