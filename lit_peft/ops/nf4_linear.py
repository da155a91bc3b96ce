"""A linear layer whose frozen weight is stored as NF4, alone and with a low-rank update.

    y = x W^T + c                                  W = decoded for the product, and again for its gradient
    out = y + s D(x) A^T L B^T                     as `lora_linear` has it for a plain layer (QLoRA, equation 5)

Kept for the backward pass: the weight's bytes; for the update, x (or what it is made of, see `recipes`) and H, as in
`low_rank`. No weight, no y, no copy of x in another dtype.
"""

from __future__ import annotations

from typing import Any, Protocol, TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_peft.ops.choice import takes_kernel
from lit_peft.ops.low_rank import drawn, dropped, inner_gradients
from lit_peft.ops.nf4 import BLOCK, KNOWN, decode, decoded, parts, values
from lit_peft.ops.recipes import Recipe, as_written, autocasting, eager, recipe_of, recording

Sizes = tuple[int, int, bool]  # out, in, whether the c are in 8 bits; as `decode` takes them


class NF4Layer(Protocol):
    """A layer as `lit_peft.quantised.linear.NF4Linear` is."""

    packed: nn.Parameter
    out_features: int
    in_features: int
    double_quant: bool

    @property
    def bias(self) -> Tensor | None:
        """c (out,)."""
        ...


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


def joins_nf4(base: nn.Module, x: Tensor) -> TypeGuard[NF4Layer]:
    """Return whether `nf4_lora_linear` may stand for a call of the base: NF4, frozen, watched by nobody."""
    if type(base).__dict__.get("stores") != "nf4" or not recording():
        return False
    packed, bias = base._parameters["packed"], base._parameters["bias"]
    return (
        type(packed) is nn.Parameter  # not one shard of many
        and (bias is None or (type(bias) is nn.Parameter and not bias.requires_grad))
        and x.numel() > 0
        and not (base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks)
        and "forward" not in base.__dict__
    )


def nf4_lora_linear(
    x: Tensor,
    base: NF4Layer,
    a: Tensor,
    b: Tensor,
    scale: float,
    *,
    dropout: float = 0.0,
    diagonal: Tensor | None = None,
    kernels: bool | None = None,
) -> Tensor:
    """Return x W^T + c + s dropout(x) A^T L B^T.

    Args:
        x: the input (..., in).
        base: the layer, for which `joins_nf4` holds.
        a: A (r, in), in any floating dtype.
        b: B (out, r).
        scale: s.
        dropout: the probability with which an entry of x is left out of the update.
        diagonal: l (r,), as AdaLoRA has it; None: L is left out.
        kernels: whether W is decoded by the kernel; None: as measured.

    Returns:
        (..., out), in x's dtype or autocast's. A second derivative is not there: asking for one raises.

    Example:
        >>> import torch
        >>> from lit_peft.quantised.linear import NF4Linear
        >>> x, base = torch.ones(2, 4), NF4Linear(torch.ones(3, 4))
        >>> nf4_lora_linear(x, base, torch.ones(1, 4), torch.ones(3, 1), scale=0.5)[0].tolist()
        [6.0, 6.0, 6.0]
    """
    dtype = torch.get_autocast_dtype(x.device.type) if autocasting(x) else x.dtype
    # cast out here, so that the gradients come back in the parameters' dtype
    a, b = a.to(dtype), b.to(dtype)
    bias = None if base.bias is None else base.bias.detach().to(dtype)
    diagonal = None if diagonal is None else diagonal.to(dtype)
    layer = base.packed, bias, (base.out_features, base.in_features, base.double_quant)
    settings = (scale, dropout, drawn(dropout), recipe_of(x), kernels)
    out: Tensor = _Joined.apply(x, *layer, a, b, diagonal, *settings)  # type: ignore[no-untyped-call]
    return out


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        packed: Tensor,
        bias: Tensor | None,
        sizes: Sizes,
        a: Tensor,
        b: Tensor,
        diagonal: Tensor | None,
        scale: float,
        p: float,
        seed: int,
        recipe: Recipe,
        kernels: bool | None,
    ) -> Tensor:
        needed = ctx.needs_input_grad
        with as_written(x):
            rows = x.reshape(-1, x.shape[-1]).to(a.dtype)
            # H is (r, rows), not (rows, r): products with narrow results are up to four times slower on CPUs
            h = a @ (dropped(x, p, seed).reshape(rows.shape).to(a.dtype) if p else rows).t()
            with decoded(packed, *sizes, a.dtype, kernels) as weight:
                out = rows @ weight.t() if bias is None else torch.addmm(bias, rows, weight.t())
            inner = h if diagonal is None else diagonal[:, None] * h
            out.addmm_(inner.t(), b.t(), alpha=scale)
        ctx.save_for_backward(
            packed if needed[0] else None,
            a if needed[0] else None,
            b,
            diagonal,
            h if needed[5] or needed[6] else None,
            *(recipe.parts if needed[4] else ()),
        )
        ctx.made = recipe.make, x.shape, x.dtype, sizes, scale, p, seed, kernels
        return torch.ops.aten._unsafe_view(out, (*x.shape[:-1], len(b)))  # type: ignore[no-any-return]  # as in `low_rank`

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]  # a second derivative would lack H's
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        packed, a, b, diagonal, h, *parts = ctx.saved_tensors
        sizes: Sizes
        make, shape, dtype, sizes, scale, p, seed, kernels = ctx.made
        needed = ctx.needs_input_grad
        g = gradient.reshape(-1, gradient.shape[-1])
        inner, db, dl = inner_gradients(g, b, diagonal, h, scale, (needed[0], *needed[4:7]))
        dx = da = None
        if needed[4]:
            da = inner @ dropped(make(*parts), p, seed).reshape(-1, shape[-1]).to(g.dtype)
        if needed[0]:
            with decoded(packed, *sizes, g.dtype, kernels) as weight:
                dx = g @ weight
            if p:
                dx += dropped((inner.t() @ a).view(shape), p, seed).view(dx.shape)
            else:
                dx.addmm_(inner.t(), a)
            dx = dx.view(shape).to(dtype)
        return dx, None, None, None, da, db, dl, None, None, None, None, None
