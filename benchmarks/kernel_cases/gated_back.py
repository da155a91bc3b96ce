"""Back through the gated product and the updates of gate, up and down, in one launch."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernel_cases import Case
from lit_peft.ops.gated_back import gated_back

R, SCALE = 16, 2.0


def run(*tensors: Tensor, kernels: bool | None) -> Sequence[Tensor]:
    d, p_d, a_d, e, g, h_e, b_e, h_g, b_g = tensors
    return gated_back(d, p_d, a_d, e, g, h_e, b_e, SCALE, h_g, b_g, SCALE, True, kernels=kernels)


def exact(*tensors: Tensor) -> Sequence[Tensor]:
    return run(*(tensor.double() for tensor in tensors), kernels=False)


def cases(small: bool) -> list[Case]:
    sizes = (
        [(5, 32, 72)] if small else [(2048, 2048, 8192), (8192, 2048, 8192), (2048, 4096, 14336), (8192, 4096, 14336)]
    )

    def case(rows: int, width: int, f: int) -> Case:
        def make(device: torch.device) -> list[Any]:
            def drawn(*shape: int, std: float = 1.0) -> Tensor:
                return std * torch.randn(*shape, device=device, dtype=torch.bfloat16)

            e, g = drawn(rows, 2 * f).split(f, 1)  # as one product with both weights gives them
            d, p_d, a_d = drawn(rows, f), drawn(R, rows, std=0.1), drawn(R, f, std=f**-0.5)
            low = [part for _ in range(2) for part in (drawn(R, rows), drawn(f, R, std=0.02))]
            return [d, p_d, a_d, e, g, *low]

        moved = 2 * rows * 6 * f  # d, e0 and g0 read; de, dg and h written
        return Case(
            "layer",
            {"rows": rows, "width": width},
            make,
            run,
            exact,
            moved,
            7 * 2 * R * rows * f,
            part="back through the MLP",
        )

    return [case(*size) for size in sizes]
