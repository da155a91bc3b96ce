"""Linear layers that read the same input, with their low-rank updates, as one.

    y_i = x W_i^T + c_i + s_i x A_i^T B_i^T             i = 1 .. n: queries, keys and values; or gate and up

The frozen W_i are row slices of one buffer W (sum of out_i, in), and A (sum of r_i, in) is the A_i below each other.
For G the gradients of all y_i beside each other, H = A x^T (sum of r_i, rows) and P_i = s_i B_i^T G_i^T (r_i, rows):

    dx = G W + P^T A        dA = P x        dB_i = s_i (H_i G_i)^T

That is one product with W forward and one for dx, where layers by themselves have n each, and dx is written once. Kept:
x once for all (or what it is made of, see `recipes`), and H. With the kernels, all updates are added in one launch, and
all P_i come from one reading of the G_i, which are put beside each other on the way; all H_i G_i are one product, of
which the blocks on the diagonal are taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_peft.ops.choice import takes_kernel
from lit_peft.ops.recipes import Recipe, recipe_of

Pair = tuple[Tensor, Tensor, float]  # A, B and s
Shrunk = tuple[Tensor, Tensor]  # A and H
MOST = 64  # the highest rank that the kernels take: more does not fit into registers
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Parts:
    """Frozen linear layers that read one input, and what is added to each.

    Attributes:
        weight: W (sum of out_i, in).
        bias: c (sum of out_i,), or None.
        sizes: out_i.
        pairs: A_i (r_i, in), B_i (out_i, r_i) and s_i; None for a layer that stays as it is.
    """

    weight: Tensor
    bias: Tensor | None
    sizes: tuple[int, ...]
    pairs: tuple[Pair | None, ...]

    @property
    def scales(self) -> tuple[float, ...]:
        """Return s_i."""
        return tuple(1.0 if pair is None else pair[2] for pair in self.pairs)

    def factors(self) -> tuple[Tensor | None, ...]:
        """Return A_1, ..., A_n, B_1, ..., B_n."""
        firsts = tuple(None if pair is None else pair[0] for pair in self.pairs)
        return firsts + tuple(None if pair is None else pair[1] for pair in self.pairs)

    def launches(self, op: str, x: Tensor, kernels: bool | None) -> bool:
        """Return whether the kernels of an op are to add these updates to what the layers make of x."""
        ranks = [len(pair[0]) for pair in self.pairs if pair is not None]
        fits = max(ranks, default=0) <= MOST and len(self.sizes) <= 3 and x.dtype in DTYPES
        rows = x.numel() // max(1, x.shape[-1])
        return takes_kernel(op, x, kernels, rows=rows, width=sum(self.sizes)) if fits else False


def reference(x: Tensor, parts: Parts) -> tuple[Tensor, ...]:
    """Return all y_i with plain operations: x (..., in), y_i (..., out_i)."""
    biases = [None] * len(parts.sizes) if parts.bias is None else torch.split(parts.bias, list(parts.sizes))
    found = []
    for weight, bias, pair in zip(torch.split(parts.weight, list(parts.sizes)), biases, parts.pairs, strict=True):
        y = F.linear(x, weight, bias)
        if pair is not None:
            a, b, scale = pair
            y = y + scale * F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype))
        found.append(y)
    return tuple(found)


def packed_linear(
    x: Tensor, parts: Parts, *, apart: bool = False, shrunk: Shrunk | None = None, kernels: bool | None = None
) -> tuple[Tensor, ...]:
    """Return all y_i.

    Args:
        x: the input (..., in), in the weights' dtype.
        parts: the layers.
        apart: whether the last output gets memory of its own; the others are slices of one tensor.
        shrunk: A in x's dtype and H, where they are there already.
        kernels: whether to launch the kernels; None: as measured.

    Returns:
        y_i (..., out_i). A second derivative is not there: asking for one raises.

    Example:
        >>> import torch
        >>> x, pair = torch.ones(2, 4), (torch.ones(1, 4), torch.ones(3, 1), 0.5)
        >>> parts = Parts(torch.zeros(5, 4), None, (3, 2), (pair, None))
        >>> [y[0].tolist() for y in packed_linear(x, parts)]
        [[2.0, 2.0, 2.0], [0.0, 0.0]]
    """
    launch = any(parts.pairs) and parts.launches("packed", x, kernels)
    how = (parts.sizes, parts.scales, apart, launch, recipe_of(x))
    found: tuple[Tensor, ...] = _Packed.apply(x, parts.weight, parts.bias, shrunk, how, *parts.factors())  # type: ignore[no-untyped-call]
    return found


class _Packed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        shrunk: Shrunk | None,
        how: tuple[Any, ...],
        *factors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        sizes, scales, apart, launch, recipe = how
        base, stack, h = products(x, weight, bias, shrunk, factors[: len(sizes)])
        bs = ready(factors[len(sizes) :], x.dtype, launch)
        found = list(torch.split(base, sizes, 1))
        # of its own memory: what keeps a slice keeps all of the tensor
        own = len(sizes) - 1 if apart else None
        if launch:
            last = _expand(base, h, filled(bs, sizes, base), list(scales), apart)
            found = [*found[:-1], last] if apart else found
        else:
            for i, b, at in inner(bs):
                add = torch.addmm if i == own else Tensor.addmm_
                found[i] = add(found[i], h[at].t(), b.t(), alpha=scales[i])
            if own is not None and bs[own] is None:
                found[own] = found[own].clone()
        keep(ctx, weight, stack, h, bs, recipe)
        ctx.made = recipe.make, x.shape, sizes, scales, launch, [None if f is None else f.dtype for f in factors]
        return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in found)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]  # a second derivative would lack H's
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        pieces = [gradient.reshape(-1, gradient.shape[-1]) for gradient in gradients]
        return gradients_of(ctx, pieces, None, *kept(ctx)[0])


def products(
    x: Tensor, weight: Tensor, bias: Tensor | None, shrunk: Shrunk | None, factors: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return x W^T + c (rows, sum of out_i), A (sum of r_i, in) and H (sum of r_i, rows); the last two may be empty."""
    rows = x.reshape(-1, x.shape[-1])
    base = rows @ weight.t() if bias is None else torch.addmm(bias, rows, weight.t())
    there = [a for a in factors if a is not None]
    if shrunk is not None or not there:
        return base, *(shrunk or (x.new_empty(0), x.new_empty(0)))
    stack = (there[0] if len(there) == 1 else torch.cat(there)).to(x.dtype)
    # H is (r, rows), not (rows, r): products with narrow results are up to four times slower on CPUs
    return base, stack, stack @ rows.t()


def ready(bs: Sequence[Tensor | None], dtype: torch.dtype, launch: bool) -> tuple[Tensor | None, ...]:
    """Return the B_i in the dtype that is computed in; as they are for kernels, which round them in registers."""
    return tuple(b if b is None or launch else b.to(dtype) for b in bs)


def filled(bs: Sequence[Tensor | None], sizes: Sequence[int], like: Tensor) -> list[Tensor]:
    """Return the B_i (out_i, r_i), of rank 0 where there is none."""
    return [like.new_empty(size, 0) if b is None else b for b, size in zip(bs, sizes, strict=True)]


def inner(bs: Sequence[Tensor | None]) -> Iterator[tuple[int, Tensor, slice]]:
    """Yield i, B_i and the rows of H that are H_i, of all layers that have an update."""
    start = 0
    for i, b in enumerate(bs):
        if b is not None:
            yield i, b, slice(start, start + b.shape[1])
            start += b.shape[1]


def keep(
    ctx: Any,
    weight: Tensor,
    stack: Tensor,
    h: Tensor,
    bs: Sequence[Tensor | None],
    recipe: Recipe,
    more: Sequence[Tensor] = (),
) -> None:
    """Save what `gradients_of` needs of what is asked for, x being the first input and A_i, B_i the sixth and on."""
    needed = ctx.needs_input_grad
    of_a, of_b = any(needed[5 : 5 + len(bs)]), any(needed[5 + len(bs) :])
    parts = recipe.parts if of_a else ()
    first = (weight, stack) if needed[0] else (None, None)
    ctx.save_for_backward(*first, h if of_b else None, *bs, *parts, *more)
    ctx.of_x = len(parts)


def kept(ctx: Any) -> tuple[tuple[Any, ...], list[Tensor]]:
    """Return what `keep` saved: the further arguments of `gradients_of`, and what more there is."""
    weight, stack, h, *rest = ctx.saved_tensors  # read once: gradient checkpointing refuses a second time
    number = len(ctx.made[2])
    end = number + ctx.of_x
    return (weight, stack, h, rest[:number], rest[number:end]), rest[end:]


def gradients_of(
    ctx: Any,
    pieces: Sequence[Tensor],
    g: Tensor | None,
    weight: Tensor | None,
    stack: Tensor,
    h: Tensor,
    bs: Sequence[Tensor | None],
    parts: Sequence[Tensor],
) -> tuple[Any, ...]:
    """Return the gradients of x, four inputs that have none, all A_i and all B_i.

    Args:
        ctx: what `keep` was called with, and `made`.
        pieces: G_i (rows, out_i).
        g: G, of which they are slices, if they are.
        weight: W, and the others as `kept` returns them.
        stack: A.
        h: H.
        bs: B_i.
        parts: what x is made of.
    """
    make, shape, sizes, scales, launch, dtypes = ctx.made
    needed, number, found = ctx.needs_input_grad, len(sizes), list(inner(bs))
    of_a, of_b = needed[5 : 5 + number], needed[5 + number :]
    das: list[Tensor | None] = [None] * number
    dbs: list[Tensor | None] = [None] * number
    dx = None
    if launch:
        p, packed = _spread(list(pieces), filled(bs, sizes, pieces[0]), list(scales), g is None)
        g = packed if g is None else g
    else:
        g = torch.cat(list(pieces), 1) if g is None else g
        pieces = torch.split(g, sizes, 1)
        p = g.new_empty(found[-1][2].stop if found else 0, len(g))
        for i, b, at in found if needed[0] or any(of_a) else ():
            p[at].addmm_(b.t(), pieces[i].t(), beta=0, alpha=scales[i])
    if any(of_b):
        blocks = (
            _blocks(h, g, found, sizes, scales)
            if launch
            else [_product(h[at], pieces[i], scales[i]) for i, _, at in found]
        )
        for (i, _, _), block in zip(found, blocks, strict=True):
            dbs[i] = block.to(dtypes[number + i]).t() if of_b[i] else None
    if needed[0] and weight is not None:
        dx = g @ weight
        dx = (dx.addmm_(p.t(), stack) if found else dx).view(shape)
    if any(of_a):
        da = p @ make(*parts).reshape(-1, shape[-1])
        for i, _, at in found:
            das[i] = da[at].to(dtypes[i]) if of_a[i] else None
    return dx, None, None, None, None, *das, *dbs


def _product(h: Tensor, g: Tensor, scale: float) -> Tensor:
    """Return s H G (r, n)."""
    return g.new_empty(len(h), g.shape[1]).addmm_(h, g, beta=0, alpha=scale)


def _blocks(
    h: Tensor, g: Tensor, found: Sequence[tuple[int, Tensor, slice]], sizes: Sequence[int], scales: Sequence[float]
) -> list[Tensor]:
    """Return all s_i H_i G_i from one product: on a GPU the products of layers with others cost less than a launch."""
    same = len({scales[i] for i, _, _ in found}) == 1
    every = _product(h, g, scales[found[0][0]] if same else 1.0)
    ends = list(accumulate(sizes))
    blocks = [every[at, ends[i] - sizes[i] : ends[i]] for i, _, at in found]
    return blocks if same else [block * scales[i] for (i, _, _), block in zip(found, blocks, strict=True)]


# As registered operations the launches have shapes without data: fake tensors, the memory count and compilers see them.
@torch.library.custom_op("lit_peft::expand", mutates_args=("y",))
def _expand(y: Tensor, h: Tensor, bs: Sequence[Tensor], scales: Sequence[float], apart: bool) -> Tensor:
    from lit_peft.kernels.packed import expand

    return expand(y, h, bs, scales, apart)


@_expand.register_fake
def _(y: Tensor, h: Tensor, bs: Sequence[Tensor], scales: Sequence[float], apart: bool) -> Tensor:
    return y.new_empty((len(y), len(bs[-1])) if apart else (0,))


@torch.library.custom_op("lit_peft::packed_spread", mutates_args=())
def _spread(gs: Sequence[Tensor], bs: Sequence[Tensor], scales: Sequence[float], pack: bool) -> tuple[Tensor, Tensor]:
    from lit_peft.kernels.packed import spread

    return spread([g if g.stride(-1) == 1 else g.contiguous() for g in gs], bs, scales, pack)


@_spread.register_fake
def _(gs: Sequence[Tensor], bs: Sequence[Tensor], scales: Sequence[float], pack: bool) -> tuple[Tensor, Tensor]:
    rows, width = len(gs[0]), sum(len(b) for b in bs)
    return gs[0].new_empty(sum(b.shape[1] for b in bs), rows), gs[0].new_empty((rows, width) if pack else (0,))
