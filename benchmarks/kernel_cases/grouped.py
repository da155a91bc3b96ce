"""Many sets of weights in one batch, each row under another, forward and backward."""

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.kernel_cases import Case
from lit_peft.ops.routed import reference, routed_update
from lit_peft.ops.routing import Routing


def run(y: Tensor, x: Tensor, slope: Tensor, rows: Routing, *pairs: Tensor, kernels: bool) -> Sequence[Tensor]:
    asked = [tensor.detach().requires_grad_() for tensor in (x, *pairs)]
    number = len(pairs) // 2
    a, b = asked[1 : 1 + number], asked[1 + number :]
    out = routed_update(y, asked[0], a, b, [2.0] * number, rows, kernels=kernels)
    return out.detach(), *torch.autograd.grad(out, asked, slope)


def exact(y: Tensor, x: Tensor, slope: Tensor, rows: Routing, *pairs: Tensor) -> Sequence[Tensor]:
    asked = [tensor.detach().double().requires_grad_() for tensor in (x, *pairs)]
    number = len(pairs) // 2
    a, b = asked[1 : 1 + number], asked[1 + number :]
    out = reference(y.double(), asked[0], a, b, [2.0] * number, rows)
    return out.detach(), *torch.autograd.grad(out, asked, slope.double())


def cases(small: bool) -> list[Case]:
    # sets, tokens of all rows, width, rank; one row for each set, and the last set has two
    sizes = [(3, 20, 48, 8)] if small else [(s, t, 4096, 16) for s in (4, 16, 63) for t in (64, 2048, 8192)]

    def case(sets: int, tokens: int, width: int, rank: int) -> Case:
        def make(device: torch.device) -> list[Tensor | Routing]:
            x, y, slope = torch.randn(3, sets + 1, tokens // (sets + 1), width, device=device, dtype=torch.bfloat16)
            a = [torch.randn(rank, width, device=device) / width**0.5 for _ in range(sets)]
            b = [torch.randn(width, rank, device=device) for _ in range(sets)]
            return [y, x, slope, Routing([(sets - 1,), *((i,) for i in range(sets))]), *a, *b]

        # x twice, g twice, y and dx read and written
        moved = 2 * 8 * tokens * width + 4 * 6 * sets * rank * width
        sizes = {"sets": sets, "rows": tokens, "width": width}
        return Case("routed", sizes, make, run, exact, moved, products=12 * tokens * width * rank, tolerance=2e-2)

    return [case(*size) for size in sizes]
