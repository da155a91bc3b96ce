"""A whole decoder layer under LoRA, forward and backward: on kernels, or as the two functions of plain operations."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.kernel_cases import Case
from benchmarks.kernel_cases.turned import angles
from lit_peft.ops import fused_layer, layer
from lit_peft.ops.choice import takes_kernel
from lit_peft.ops.packed import Pair, Parts
from lit_peft.ops.rotary import reference

R, SCALE, EPS = 16, 2.0, 1e-6
Shape = tuple[int, int, int, int]  # width, inner width, heads, shared heads


def sizes_of(shape: Shape) -> list[list[int]]:
    """Returns the widths of the outputs of q, k and v, of o, of gate and up, and of down."""
    width, inner, heads, shared = shape
    narrow = width // heads * shared
    return [[width, narrow, narrow], [width], [inner, inner], [width]]


def attended(q: Tensor, k: Tensor, v: Tensor, head: int, turns: tuple[Tensor, Tensor] | None) -> Tensor:
    """Returns the attention over q, k and v (batch, length, ...), which are turned before where there are turns."""
    q, k, v = (part.view(*part.shape[:2], -1, head).transpose(1, 2) for part in (q, k, v))
    if turns is not None:
        q, k = reference(q, k, *turns)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2)


def run(shape: Shape, x: Tensor, slope: Tensor, *tensors: Tensor, kernels: bool | None) -> Sequence[Tensor]:
    """Returns the output, and the gradients of x and all factors; given four weights, two norms, A and B of each."""
    x = x.detach().requires_grad_()
    weights, norms, factors = tensors[:4], tensors[4:6], [t.detach().requires_grad_() for t in tensors[6:]]
    pairs: list[Pair] = [(a, b, SCALE) for a, b in zip(factors[::2], factors[1::2], strict=True)]
    ends = [0, 3, 4, 6, 7]
    parts = [
        Parts(weight, None, tuple(sizes), tuple(pairs[start:end]))
        for weight, sizes, (start, end) in zip(weights, sizes_of(shape), pairwise(ends), strict=True)
    ]
    head = shape[0] // shape[2]
    turns = angles(x.shape[1], head, x.device, x.dtype)
    if takes_kernel("layer", x, kernels, rows=x.shape[0] * x.shape[1], width=shape[0]):
        first, o, inner, down = parts
        fused = fused_layer.Fused(first, o, inner, down, ((norms[0], EPS), (norms[1], EPS)), turns)
        passed, _, found = fused_layer.enter(x, fused)
        y = fused_layer.leave(passed, attended(*found, head, None), fused)
    else:
        groups = [
            layer.Group(torch.split(part.weight, list(part.sizes)), (None,) * len(part.sizes), part.pairs)
            for part in parts
        ]
        passed, _, found = layer.enter(x, norms[0], EPS, groups[0])
        rest = layer.Rest(groups[1], norms[1], EPS, groups[2], groups[3])
        y = layer.leave(passed, attended(*found, head, turns), rest)
    return y.detach(), *torch.autograd.grad(y, [x, *factors], slope.to(y.dtype))


def exact(shape: Shape, *tensors: Tensor) -> Sequence[Tensor]:
    return run(shape, *(tensor.double() for tensor in tensors), kernels=False)


def cases(small: bool) -> list[Case]:
    shapes: list[Shape] = [(32, 48, 4, 2)] if small else [(2048, 8192, 32, 8), (4096, 14336, 32, 8)]

    def case(rows: int, shape: Shape) -> Case:
        width, inner = shape[:2]
        length = 3 if small else 2048
        reads = [width, width, width, inner]
        weights = sum(sum(tall) * wide for tall, wide in zip(sizes_of(shape), reads, strict=True))

        def make(device: torch.device) -> list[Any]:
            def drawn(*sizes: int, std: float = 1.0) -> Tensor:
                return (std * torch.randn(*sizes, device=device)).to(torch.bfloat16)

            wholes = [
                drawn(sum(sizes), wide, std=wide**-0.5) for sizes, wide in zip(sizes_of(shape), reads, strict=True)
            ]
            norms = [drawn(width, std=0.1) + 1 for _ in range(2)]
            factors = [
                factor
                for sizes, wide in zip(sizes_of(shape), reads, strict=True)
                for tall in sizes
                for factor in (
                    wide**-0.5 * torch.randn(R, wide, device=device),
                    0.02 * torch.randn(tall, R, device=device),
                )
            ]
            ends = [drawn(rows // length, length, width) for _ in range(2)]
            return [shape, *ends, *wholes, *norms, *factors]

        # forward, and back to x; and the halves of the squares of a causal attention, with what comes back five of them
        products = 4 * rows * weights + 7 * rows * length * width
        sizes = {"rows": rows, "width": width}
        return Case("layer", sizes, make, run, exact, 0, products, tolerance=3e-2, part="whole")

    return [case(rows, shape) for shape in shapes for rows in ([6] if small else [2048, 8192])]
