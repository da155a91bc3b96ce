"""The backward pass of a low-rank update alone: both narrow products in one read of the gradient."""

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.kernel_cases import Case
from lit_peft.ops.low_rank import inner_gradients
from lit_peft.ops.shrink import takes

SCALE = 2.0


def run(g: Tensor, b: Tensor, h: Tensor, kernels: bool | None) -> Sequence[Tensor]:
    """Returns P and dB: g (rows, out), B (out, r), H (r, rows)."""
    launch = takes("spread", g, len(b), len(h), 0.0, kernels)
    inner, db, _ = inner_gradients(g, b if launch else b.to(g.dtype), None, h, SCALE, (True, True, True, False), launch)
    assert db is not None
    return inner, db


def exact(g: Tensor, b: Tensor, h: Tensor) -> Sequence[Tensor]:
    g, b, h = g.double(), b.double(), h.double()
    return SCALE * (g @ b).t(), SCALE * g.t() @ h.t()


def cases(small: bool) -> list[Case]:
    sizes = [(9, 40)] if small else [(rows, tall) for rows in (2048, 8192) for tall in (2048, 4096, 14336)]

    def case(rows: int, tall: int) -> Case:
        r = 16

        def make(device: torch.device) -> list[Tensor]:
            g = torch.randn(rows, tall, device=device, dtype=torch.bfloat16)
            h = torch.randn(r, rows, device=device, dtype=torch.bfloat16)
            return [g, torch.randn(tall, r, device=device), h]

        moved = 2 * rows * tall + 8 * r * tall + 4 * rows * r
        return Case("spread", {"rows": rows, "tall": tall, "r": r}, make, run, exact, moved, 4 * rows * tall * r)

    return [case(*size) for size in sizes]
