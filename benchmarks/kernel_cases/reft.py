"""An edit of the first and last tokens of some prompts, forward and backward."""

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.kernel_cases import Case
from lit_peft.ops.reft import edit_rows


def run(h: Tensor, rows: Tensor, slope: Tensor, *weights: Tensor, kernels: bool) -> Sequence[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in (h, *weights)]
    out = edit_rows(leaves[0], rows, *leaves[1:], kernels=kernels)
    return out.detach(), *torch.autograd.grad(out, leaves, slope)


def exact(h: Tensor, rows: Tensor, slope: Tensor, *weights: Tensor) -> Sequence[Tensor]:
    h, matrix, bias, rotation = leaves = [tensor.detach().double().requires_grad_() for tensor in (h, *weights)]
    out = h.index_add(0, rows, (h[rows] @ matrix.t() + bias) @ rotation.t())
    return out.detach(), *torch.autograd.grad(out, leaves, slope.double())


def cases(small: bool) -> list[Case]:
    # tokens, edited ones, width, rank
    sizes = [(40, 6, 48, 3)] if small else [(8192, 112, 2048, 8), (2048, 56, 4096, 8), (8192, 112, 4096, 8)]

    def case(tokens: int, number: int, width: int, rank: int) -> Case:
        def make(device: torch.device) -> list[Tensor]:
            h, slope = torch.randn(2, tokens, width, device=device, dtype=torch.bfloat16)
            matrix = torch.randn(rank, width, device=device, dtype=torch.bfloat16) / width**0.5
            rotation = torch.randn(width, rank, device=device, dtype=torch.bfloat16) / rank**0.5
            bias = torch.randn(rank, device=device, dtype=torch.bfloat16)
            return [h, torch.randperm(tokens, device=device)[:number], slope, matrix, bias, rotation]

        # h and the gradient are copied; the chosen rows are read twice, and written twice, in each direction
        moved = 2 * (4 * tokens * width + 8 * number * width)
        sizes = {"rows": number, "width": width, "tokens": tokens}
        return Case("reft", sizes, make, run, exact, moved=moved)

    return [case(*size) for size in sizes]
