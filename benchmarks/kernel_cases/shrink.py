"""LoRA's linear layer, forward and backward: with its kernels, and with its weight in a border."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.kernel_cases import Case
from lit_peft.ops import border
from lit_peft.ops.lora_linear import lora_linear

SCALE = 2.0


def run(
    x: Tensor, layer: nn.Linear, plain: nn.Linear, a: Tensor, b: Tensor, slope: Tensor, kernels: bool
) -> Sequence[Tensor]:
    parts = [part.detach().requires_grad_() for part in (x, a, b)]
    y = lora_linear(parts[0], layer if kernels else plain, parts[1], parts[2], SCALE, kernels=kernels)
    return y.detach(), *torch.autograd.grad(y, parts, slope)


def exact(x: Tensor, layer: nn.Linear, plain: nn.Linear, a: Tensor, b: Tensor, slope: Tensor) -> Sequence[Tensor]:
    parts = [part.detach().double().requires_grad_() for part in (x, a, b)]
    y = F.linear(parts[0], layer.weight.double()) + SCALE * F.linear(F.linear(parts[0], parts[1]), parts[2])
    return y.detach(), *torch.autograd.grad(y, parts, slope.double())


def cases(small: bool) -> list[Case]:
    """The layers of Llamas of 1 and 8 billion: q and o, k and v, gate and up, down."""
    wide = [(2048, 2048), (2048, 512), (2048, 8192), (8192, 2048)]
    wider = [(4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)]
    sizes = [(9, 40, 24)] if small else [(rows, *pair) for rows in (2048, 8192) for pair in wide + wider]

    def case(rows: int, width: int, tall: int, lined: bool) -> Case:
        r = 16

        def make(device: torch.device) -> list[Tensor | nn.Linear]:
            half = {"device": device, "dtype": torch.bfloat16}
            layer = nn.Linear(width, tall, bias=False, **half).requires_grad_(False)  # type: ignore[arg-type]
            plain = copy.deepcopy(layer)
            if lined:
                border.allow(layer)  # which gets one when it is first called
            x, slope = torch.randn(rows, width, **half), torch.randn(rows, tall, **half)  # type: ignore[call-overload]
            a, b = torch.randn(r, width, device=device) / 50, torch.randn(tall, r, device=device) / 50
            return [x, layer, plain, a, b, slope]

        moved = 2 * (3 * rows * (width + tall) + 2 * width * tall)
        sizes = {"rows": rows, "width": width, "tall": tall, "r": r}
        op = "border" if lined else "shrink"
        return Case(op, sizes, make, run, exact, moved, 4 * rows * width * tall, tolerance=2e-2)

    return [case(*size, lined) for size in sizes for lined in (False, True)]
