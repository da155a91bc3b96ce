"""Updates of queries, keys and values and the rotation of the first two in one launch, and the way back in another."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernel_cases import Case
from lit_peft.ops.turned import expand_turn, turn_spread

R, SCALES = 16, [2.0, 2.0, 2.0]


def results(head: int, h: Tensor, bs: Sequence[Tensor], gs: Sequence[Tensor], y: Tensor, **how: Any) -> list[Tensor]:
    """Returns turned queries and keys beside values, P, the gradients beside each other, and all dB."""
    y, dtype, length = y.clone(), y.dtype, gs[0].shape[2]
    cos, sin = angles(length, head, y.device, dtype)
    expand_turn(y, h, bs, SCALES, cos, sin, length, head, **how)
    back = turn_spread(gs, bs, torch.split(h, R), SCALES, cos, sin, length, head, **how)
    return [y, *back]


def angles(length: int, head: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns cosines and sines (1, length, head), rounded to bfloat16 as the models have them."""
    rates = 10_000.0 ** -(torch.arange(0, head, 2, device=device) / head)
    turned = torch.outer(torch.arange(length, device=device), rates).repeat(1, 2)[None]
    return turned.cos().bfloat16().to(dtype), turned.sin().bfloat16().to(dtype)


def run(head: int, h: Tensor, bs: Sequence[Tensor], gs: Sequence[Tensor], y: Tensor, kernels: bool) -> list[Tensor]:
    return results(head, h, bs, gs, y, kernels=kernels)


def exact(head: int, h: Tensor, bs: Sequence[Tensor], gs: Sequence[Tensor], y: Tensor) -> list[Tensor]:
    return results(head, h.double(), [b.double() for b in bs], [g.double() for g in gs], y.double())


def cases(small: bool) -> list[Case]:
    sizes = [(6, 32, 8)] if small else [(t, d, d // 32) for d in (2048, 4096) for t in (2048, 8192)]

    def case(rows: int, width: int, head: int) -> Case:
        sizes, length = (width, width // 4, width // 4), min(rows, 2048) // (2 if small else 1)

        def make(device: torch.device) -> list[Any]:
            drawn = partial(torch.randn, device=device, dtype=torch.bfloat16)
            # as attention hands them back, its heads behind the places
            gs = [drawn(rows // length, length, n // head, head).transpose(1, 2) for n in sizes]
            bs = [0.02 * torch.randn(n, R, device=device) for n in sizes]
            return [head, drawn(3 * R, rows), bs, gs, drawn(rows, sum(sizes))]

        # y copied, since it is changed, read and written; G read and written
        moved = 2 * rows * sum(sizes) * 6
        return Case(
            "layer", {"rows": rows, "width": width}, make, run, exact, moved, 6 * rows * sum(sizes) * R, part="turned"
        )

    return [case(*size) for size in sizes]
