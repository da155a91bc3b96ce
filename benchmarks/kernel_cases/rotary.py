"""Rotary positions of queries and keys, forward and backward."""

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.kernel_cases import Case
from lit_peft.ops.rotary import reference, rotate


def run(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, dq: Tensor, dk: Tensor, kernels: bool) -> Sequence[Tensor]:
    q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
    turned = rotate(q, k, cos, sin, kernels=kernels)
    return *(y.detach() for y in turned), *torch.autograd.grad(turned, (q, k), (dq, dk))


def exact(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, dq: Tensor, dk: Tensor) -> Sequence[Tensor]:
    q, k = q.detach().double().requires_grad_(), k.detach().double().requires_grad_()
    turned = reference(q, k, cos.double(), sin.double())
    return *(y.detach() for y in turned), *torch.autograd.grad(turned, (q, k), (dq.double(), dk.double()))


def cases(small: bool) -> list[Case]:
    sizes = [(3, 4, 2, 8)] if small else [(2048, 32, 8, 64), (8192, 32, 8, 64), (2048, 32, 8, 128), (8192, 32, 8, 128)]

    def case(length: int, heads: int, shared: int, width: int) -> Case:
        def make(device: torch.device) -> list[Tensor]:
            def drawn(number: int) -> Tensor:  # as attention has them: heads of a token beside each other
                found = torch.randn(1, length, number, width, device=device, dtype=torch.bfloat16)
                return found.transpose(1, 2)

            angles = torch.randn(1, length, width, device=device)
            turns = [f(angles).to(torch.bfloat16) for f in (torch.cos, torch.sin)]
            return [drawn(heads), drawn(shared), *turns, drawn(heads), drawn(shared)]

        moved = 2 * 4 * length * (heads + shared) * width
        return Case("rotary", {"rows": length}, make, run, exact, moved)

    return [case(*size) for size in sizes]
