"""QLoRA's layer as one function: a frozen weight in NF4, and a low-rank update.

    out = x W^T + c + s D(x) A^T L B^T        (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314, equation 5)

as `low_rank` has it, with W decoded for the product, and again for its gradient. There are two ways, which differ by
rounding only:

    plain      x W^T, then the update is added to it by a product that accumulates; backwards in the same way
    border     [x | z] [W | B]^T with z = s D(x) A^T L, and [g | p] [W ; A] with p = s g B L: W is decoded into a larger
               matrix beside B, or above A, so that y and dx are written once

Kept: the weight's bytes, x (or what it is made of, see `recipes`), and H = A D(x)^T. No weight, no y, and no copy of x,
A or B in another dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor, nn

from lit_peft.ops import low_rank
from lit_peft.ops.choice import takes_kernel
from lit_peft.ops.low_rank import dropped, inner_gradients
from lit_peft.ops.nf4 import KNOWN, decode, decoded, scratch
from lit_peft.ops.nf4_linear import Sizes
from lit_peft.ops.recipes import as_written, autocasting, recipe_of, recording, watched

BORDER = 64  # the border is a multiple of it: rows begin at multiples of 128 bytes, which cuBLAS wants


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


def joins_nf4(base: nn.Module, x: Tensor) -> TypeGuard[NF4Layer]:
    """Return whether `nf4_lora_linear` may stand for a call of the base: NF4, frozen, watched by nobody."""
    if type(base).__dict__.get("stores") != "nf4" or not recording():
        return False
    packed, bias = base._parameters["packed"], base._parameters["bias"]
    return (
        type(packed) is nn.Parameter  # not one shard of many
        and (bias is None or (type(bias) is nn.Parameter and not bias.requires_grad))
        and x.numel() > 0
        and not watched(base)
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
    sizes = base.out_features, base.in_features, base.double_quant
    recipe, seed = recipe_of(x), low_rank.drawn(dropout) if dropout else 0
    call = sizes, dtype, scale, dropout, seed, recipe, kernels  # each argument of `apply` costs
    out: Tensor = _Joined.apply(x, base.packed, base.bias, a, b, diagonal, call)  # type: ignore[no-untyped-call]
    return out


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        packed: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        diagonal: Tensor | None,
        call: tuple[Any, ...],
    ) -> Tensor:
        sizes: Sizes
        sizes, dtype, scale, p, seed, recipe, kernels = call
        need_x, _, _, need_a, need_b, need_l, _ = ctx.needs_input_grad
        with as_written(x):
            rows = _cast(x, dtype).reshape(-1, x.shape[-1])
            # H is (r, rows), not (rows, r): products with narrow results are up to four times slower on CPUs
            h = _cast(a, dtype) @ (_cast(dropped(x, p, seed), dtype).reshape(rows.shape) if p else rows).t()
            inner = h if diagonal is None else _cast(diagonal, dtype)[:, None] * h
            c = None if bias is None else _cast(bias, dtype)
            if sizes[1] < 2 * sizes[0] and takes_border(rows, sizes, kernels):  # else y is cheaper to change
                with _beside(packed, sizes, _cast(b, dtype)) as whole:
                    out = _product(_widened(rows, inner.t(), scale, whole.shape[1]), whole.t(), c)
            else:
                with decoded(packed, *sizes, dtype, kernels) as weight:
                    out = _product(rows, weight.t(), c)
                out.addmm_(inner.t(), _cast(b, dtype).t(), alpha=scale)
        ctx.save_for_backward(
            packed if need_x else None,
            a if need_x else None,
            b,
            diagonal,
            h if need_b or need_l else None,
            *(recipe.parts if need_a else ()),
        )
        ctx.made = recipe.make, x.shape, x.dtype, sizes, scale, p, seed, kernels
        return torch.ops.aten._unsafe_view(out, (*x.shape[:-1], len(b)))  # type: ignore[no-any-return]  # as in `low_rank`

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]  # a second derivative would lack H's
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        packed, a, b, diagonal, h, *parts = ctx.saved_tensors
        sizes: Sizes
        make, shape, kind, sizes, scale, p, seed, kernels = ctx.made
        need_x, _, _, need_a, need_b, need_l, _ = ctx.needs_input_grad
        g = gradient.reshape(-1, gradient.shape[-1])
        dtype, gain = g.dtype, None if diagonal is None else _cast(diagonal, g.dtype)
        inner, db, dl = inner_gradients(g, _cast(b, dtype), gain, h, scale, (need_x, need_a, need_b, need_l))
        dx = da = None
        if need_a:
            x = _cast(dropped(make(*parts), p, seed).reshape(-1, shape[-1]), dtype)
            da = _cast(inner @ x, b.dtype)
            del x
        if need_x and not p and sizes[0] < 2 * sizes[1] and takes_border(g, sizes, kernels):
            with _above(packed, sizes, _cast(a, dtype)) as whole:
                dx = _widened(g, inner.t(), 1.0, len(whole)) @ whole
        elif need_x:
            with decoded(packed, *sizes, dtype, kernels) as weight:
                dx = g @ weight
            if p:
                dx += dropped((inner.t() @ _cast(a, dtype)).view(shape), p, seed).view(dx.shape)
            else:
                dx.addmm_(inner.t(), _cast(a, dtype))
        if dx is not None:
            dx = _cast(dx.view(shape), kind)
        db = None if db is None else _cast(db, b.dtype)
        dl = None if dl is None or diagonal is None else _cast(dl, diagonal.dtype)
        return dx, None, None, da, db, dl, None


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _product(rows: Tensor, turned: Tensor, bias: Tensor | None) -> Tensor:
    return rows @ turned if bias is None else torch.addmm(bias, rows, turned)


def takes_border(rows: Tensor, sizes: Sizes, kernels: bool | None = None) -> bool:
    """Return whether W is decoded into a matrix with a border: by the kernel, where that has been measured to pay."""
    known = rows.dtype in KNOWN
    return known and takes_kernel("nf4_border", rows, kernels, rows=len(rows), width=sizes[1], tall=sizes[0])


@contextmanager
def _beside(packed: Tensor, sizes: Sizes, b: Tensor) -> Iterator[Tensor]:
    """Lend [W | B | 0], (out, in + R)."""
    (tall, wide, _), r = sizes, b.shape[1]
    with scratch(tall * (wide + _padded(r)), b.dtype, b.device) as memory:
        whole = memory.view(tall, -1)
        decode(packed, *sizes, b.dtype, into=whole[:, :wide], kernels=True)
        whole[:, wide : wide + r].copy_(b)
        whole[:, wide + r :].zero_()
        yield whole


@contextmanager
def _above(packed: Tensor, sizes: Sizes, a: Tensor) -> Iterator[Tensor]:
    """Lend [W ; A ; 0], (out + R, in)."""
    (tall, wide, _), r = sizes, len(a)
    with scratch((tall + _padded(r)) * wide, a.dtype, a.device) as memory:
        whole = memory.view(-1, wide)
        decode(packed, *sizes, a.dtype, into=whole[:tall], kernels=True)
        whole[tall : tall + r].copy_(a)
        whole[tall + r :].zero_()
        yield whole


def _padded(r: int) -> int:
    return -(-r // BORDER) * BORDER


def _widened(rows: Tensor, z: Tensor, scale: float, width: int) -> Tensor:
    """Return [x | s z | 0], (rows, width), of x (rows, n) and z (rows, r)."""
    (count, n), r = rows.shape, z.shape[1]
    out = rows.new_empty(count, width)
    out[:, :n].copy_(rows)
    torch.mul(z, scale, out=out[:, n : n + r])
    out[:, n + r :].zero_()
    return out
