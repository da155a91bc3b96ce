"""A linear layer whose frozen weight is stored as NF4 (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314).

    y = x W^T + c        dx = g W        with W (out, in) decoded for each of the two products

Kept for the backward pass: the weight's bytes. `nf4_lora` joins the layer with a low-rank update.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_peft.ops.choice import takes_kernel
from lit_peft.ops.nf4 import BLOCK, KNOWN, codec, decode, decoded, parts, values
from lit_peft.ops.recipes import eager

Sizes = tuple[int, int, bool]  # out, in, whether the c are in 8 bits; as `decode` takes them


def reference(x: Tensor, packed: Tensor, bias: Tensor | None, sizes: Sizes) -> Tensor:
    """Return x W^T + c with plain operations, for which autograd keeps W."""
    return F.linear(x, decode(packed, *sizes, x.dtype, kernels=False), bias)


def nf4_linear(x: Tensor, packed: Tensor, bias: Tensor | None, sizes: Sizes, *, kernels: bool | None = None) -> Tensor:
    """Return x W^T + c.

    Args:
        x: (..., in).
        packed: the weight's bytes, as `encode` returns them.
        bias: c (out,) in x's dtype, or None.
        sizes: out, in, and whether the c of the blocks are in 8 bits.
        kernels: whether W is decoded by the kernel; None: as measured.

    Returns:
        (..., out) in x's dtype.

    Example:
        >>> import torch
        >>> from lit_peft.quantised.linear import encode
        >>> nf4_linear(torch.tensor([[1.0, 2.0]]), encode(torch.eye(2)), None, (2, 2, True)).tolist()
        [[1.0, 2.0]]
    """
    if takes_few(x, sizes, kernels):
        return few_tokens(x, packed, bias, sizes)
    return cast(Tensor, _Product.apply(x, packed, bias, sizes, kernels))  # type: ignore[no-untyped-call]


def takes_few(x: Tensor, sizes: Sizes, kernels: bool | None = None) -> bool:
    """Return whether a product is left to bitsandbytes' `gemm_4bit`, which decodes while it multiplies.

    On CUDA, where no gradient is needed. It wins for few rows, and decides by itself: on an H200 up to 64 rows if W has
    3 * 132 * 64 of its own, 48, 32, 16 where it has fewer, up to 512 for small wide W, never beyond 1536; else it
    decodes and multiplies, in four launches. From the rows on that were measured ("nf4_product" in `crossovers.json`),
    our decoding is faster. Never on the CPU: there bitsandbytes may repack weights in place.
    """
    if x.device.type != "cuda" or (torch.is_grad_enabled() and x.requires_grad):
        return False
    fits = sizes[2] and sizes[1] % BLOCK == 0 and x.dtype in KNOWN and x.numel() > 0
    return fits and not (eager() and takes_kernel("nf4_product", x, kernels, rows=x.numel() // x.shape[-1]))


def few_tokens(x: Tensor, packed: Tensor, bias: Tensor | None, sizes: Sizes) -> Tensor:
    """Return x W^T + c of `gemm_4bit`: c of the blocks in 8 bits, rows of W of whole blocks, no gradients."""
    out, wide, double = sizes
    levels, small, numbers = parts(out, wide, double)
    scales = packed[numbers].view(torch.float32)
    if not torch.compiler.is_compiling():
        codec()  # registers it
    return cast(
        Tensor,
        torch.ops.bitsandbytes.gemm_4bit.default(
            x,
            packed[levels].view(-1, 1),
            [out, wide],
            scales[:-1],
            BLOCK,
            "nf4",
            bias=bias,
            absmax_8bit=packed[small],
            absmax_code=values(packed),
            absmax_offset=scales[-1],
        ),
    )


class _Product(torch.autograd.Function):
    """x W^T + c; a compiler goes through it too: of the plain form it might keep W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, bias: Tensor | None, sizes: Sizes, kernels: bool | None) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.settings = sizes, kernels
        with decoded(packed, *sizes, x.dtype, kernels) as weight:
            return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (packed,) = gradients, ctx.saved_tensors
        sizes: Sizes
        sizes, kernels = ctx.settings
        for_x = None
        if ctx.needs_input_grad[0]:
            if torch.is_grad_enabled():  # a second derivative keeps W
                for_x = gradient @ decode(packed, *sizes, gradient.dtype, kernels=kernels)
            else:
                with decoded(packed, *sizes, gradient.dtype, kernels) as weight:
                    for_x = gradient @ weight
        for_bias = gradient.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return for_x, None, for_bias, None, None
