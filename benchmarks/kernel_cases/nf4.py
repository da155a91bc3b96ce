"""Decoding of NF4, alone and in front of a product."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernel_cases import Case
from lit_peft.ops.nf4 import decode, parts
from lit_peft.ops.nf4_linear import nf4_linear
from lit_peft.ops.nf4_lora import nf4_lora_linear
from lit_peft.quantised.linear import NF4Linear, codec, encode


def weight_of(packed: Tensor, out: int, wide: int) -> Tensor:
    """Return the weight level by level, in float64."""
    levels, small, numbers = parts(out, wide, True)
    halves = torch.stack([packed[levels] >> 4, packed[levels] & 15], dim=1).flatten().int()
    scales = packed[numbers].view(torch.float32).double()
    groups = scales[:-1].repeat_interleave(256)[: small.stop - small.start]
    c = codec().create_dynamic_map().to(packed.device).double()[packed[small].int()] * groups + scales[-1]
    known: Tensor = codec().get_4bit_type("nf4", device=packed.device).double()
    return (known[halves] * c.repeat_interleave(64)).view(out, wide)


def decoding(out: int, wide: int, border: int) -> Case:
    """A weight decoded into a buffer with a border, or without one."""

    def make(device: torch.device) -> Sequence[Any]:
        buffer = torch.empty(out, wide + border, device=device, dtype=torch.bfloat16)
        return encode(torch.randn(out, wide, device=device)), buffer[:, :wide]

    def run(packed: Tensor, into: Tensor, kernels: bool) -> Sequence[Tensor]:
        return (decode(packed, out, wide, True, into.dtype, into=into, kernels=kernels),)

    def exact(packed: Tensor, into: Tensor) -> Sequence[Tensor]:
        return (weight_of(packed, out, wide),)

    moved = out * wide // 2 + out * wide // 64 + out * wide // 4096 + 2 * out * wide
    return Case("nf4_bordered" if border else "nf4", {"weights": out * wide}, make, run, exact, moved, tolerance=4e-3)


def product(rows: int, out: int, wide: int) -> Case:
    """x W^T without gradients: decoded by the kernel, or left to bitsandbytes' `gemm_4bit`."""

    def make(device: torch.device) -> Sequence[Any]:
        x = torch.randn(rows, wide, device=device, dtype=torch.bfloat16)
        return x, encode(torch.randn(out, wide, device=device))

    def run(x: Tensor, packed: Tensor, kernels: bool) -> Sequence[Tensor]:
        with torch.no_grad():
            return (nf4_linear(x, packed, None, (out, wide, True), kernels=kernels),)

    def exact(x: Tensor, packed: Tensor) -> Sequence[Tensor]:
        return (x.double() @ weight_of(packed, out, wide).t(),)

    moved = out * wide // 2 + out * wide // 64 + 2 * rows * (out + wide)
    return Case("nf4_product", {"rows": rows}, make, run, exact, moved, products=2 * rows * out * wide)


def layer(rows: int, out: int, wide: int, r: int) -> Case:
    """QLoRA's layer, forward and backward: with a border, or by plain operations."""

    def make(device: torch.device) -> Sequence[Any]:
        base = NF4Linear(torch.randn(out, wide, device=device))
        shapes = (rows, wide), (r, wide), (out, r), (rows, out)
        return base, *(torch.randn(*shape, device=device, dtype=torch.bfloat16) for shape in shapes)

    def run(base: NF4Linear, x: Tensor, a: Tensor, b: Tensor, slope: Tensor, kernels: bool) -> Sequence[Tensor]:
        inputs = [part.detach().requires_grad_() for part in (x, a, b)]
        y = nf4_lora_linear(inputs[0], base, *inputs[1:], 0.5, kernels=kernels)
        return y.detach(), *torch.autograd.grad(y, inputs, slope)

    def exact(base: NF4Linear, x: Tensor, a: Tensor, b: Tensor, slope: Tensor) -> Sequence[Tensor]:
        inputs = [part.detach().double().requires_grad_() for part in (x, a, b)]
        weight = weight_of(base.packed.detach(), out, wide)
        y = inputs[0] @ weight.t() + 0.5 * inputs[0] @ inputs[1].t() @ inputs[2].t()
        return y.detach(), *torch.autograd.grad(y, inputs, slope.double())

    moved = 2 * (out * wide // 2 + out * wide // 64) + 2 * 3 * rows * (out + wide)
    sizes = {"rows": rows, "width": wide, "tall": out}
    return Case(
        "nf4_border", sizes, make, run, exact, moved, products=4 * rows * out * wide + 6 * rows * r * (out + wide)
    )


def cases(small: bool) -> list[Case]:
    if small:
        return [decoding(6, 128, 0), decoding(6, 128, 8), product(3, 6, 64), layer(5, 24, 64, 3)]
    weights = [(2048, 2048), (4096, 4096), (14336, 4096)]
    return [
        *(decoding(*shape, border) for shape in weights for border in (0, 64)),
        *(product(rows, 4096, 4096) for rows in (1, 16, 64, 256, 512, 2048)),
        *(layer(8192, *shape, 16) for shape in weights),
    ]
