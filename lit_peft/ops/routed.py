"""Low-rank updates of several sets of weights in one batch, each row under the sets that are its own.

    out[n] = y[n] + sum over the sets i of row n of  s_i x[n] A_i^T B_i^T       x (rows, ..., in), y (rows, ..., out)

A row is a sequence: all its tokens have the same sets, often one, or none; then out[n] is y[n], to the bit. Ranks
differ. Backward, for g the gradient of out, and with sums over the tokens of the rows of set i:

    dy = g      dx[n] = sum of s_i g[n] B_i A_i      dA_i = sum of s_i B_i^T g^T x      dB_i = sum of s_i g^T (x A_i^T)

Three forms, which differ by rounding only:

    stacked   one product with all A, what is not a row's own set to zero, one product with all B: two large products
              each way, and (number of sets) times the arithmetic. A set with a NaN in it reaches every row.
    by run    two products for each run of neighbouring rows with the same sets, on slices: nothing is copied or sorted
    grouped   Triton kernels that look up each token's own set (`lit_peft.kernels.grouped`), one set a row

What is kept: x (or what it is made of, see `recipes`) and H = x A^T; as for one set alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_peft.ops.choice import takes_kernel
from lit_peft.ops.grouped import Grouped
from lit_peft.ops.recipes import Recipe, as_written, eager, recipe_of
from lit_peft.ops.routed_forms import ByRun, Form, Stacked
from lit_peft.ops.routing import Routing, Sets

# the stacked form keeps H of all ranks for each token
MOST_RANKS = 256
# multiplications that take as long as the calls of one more pair of products; below it, stacked is faster.
# Measured on a CPU with 2 to 64 sets of rank 8, widths 576 and 2048, in two and in four bytes; estimated for CUDA.
CALLS = {("cpu", 2): 2**20, ("cpu", 4): 2**17, ("cuda", 2): 2**31, ("cuda", 4): 2**29}


def reference(
    y: Tensor, x: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], scales: Sequence[float], rows: Routing
) -> Tensor:
    """Return out with plain operations, run by run."""
    pieces = []
    for start, stop, sets in rows.runs:
        piece, taken = y[start:stop], x[start:stop].to(y.dtype)
        for i in sets:
            piece = piece + scales[i] * F.linear(F.linear(taken, a[i].to(y.dtype)), b[i].to(y.dtype))
        pieces.append(piece)
    return torch.cat(pieces)


def routed_update(
    y: Tensor,
    x: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    rows: Routing,
    *,
    kernels: bool | None = None,
) -> Tensor:
    """Return y, each row with the updates of its own sets added.

    Args:
        y: the layer's output (rows, ..., out); its dtype is the result's.
        x: the layer's input (rows, ..., in).
        a: A_i (r_i, in) of every set, in any floating dtype.
        b: B_i (out, r_i).
        scales: s_i.
        rows: which sets act on which rows. A set without rows has a gradient of zeros.
        kernels: whether to launch the kernels; None: as measured. They take one set a row and ranks up to 128.

    Returns:
        (rows, ..., out). A second derivative is not there: asking for one raises.

    Raises:
        ValueError: if x has not as many rows as are routed.

    Example:
        >>> import torch
        >>> x, y, a, b = torch.ones(3, 2, 4), torch.zeros(3, 2, 1), torch.ones(1, 4), torch.ones(1, 1)
        >>> routed_update(y, x, [a, a], [b, 2 * b], [1.0, 1.0], Routing([(1,), (), (0,)]))[:, 0, 0].tolist()
        [8.0, 0.0, 4.0]
    """
    _check(x, rows)
    if not eager() or not x.numel():  # a compiler fuses the plain form, and chooses what it keeps
        return reference(y, x, a, b, scales, rows)
    return _run(y, x, None, None, Sets(a, b, scales, rows), kernels)


def routed_linear(
    x: Tensor,
    base: nn.Linear,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    rows: Routing,
    *,
    kernels: bool | None = None,
) -> Tensor:
    """Return the output of a frozen layer for x (rows, ..., in), each row with the updates of its own sets added.

    As `routed_update`, with the layer's own product in the same function: neither its output nor the gradient of x is
    written twice. For a layer for which `lora_linear.joins` holds.

    Example:
        >>> import torch
        >>> x, base, a = torch.ones(2, 1, 4), torch.nn.Linear(4, 3).requires_grad_(False), torch.ones(1, 4)
        >>> out = routed_linear(x, base, [a], [torch.ones(3, 1)], [0.5], Routing([(0,), ()]))
        >>> bool(out[1].equal(base(x)[1])), round(float((out - base(x))[0, 0, 0].detach()), 4)
        (True, 2.0)
    """
    _check(x, rows)
    return _run(None, x, base.weight, base.bias, Sets(a, b, scales, rows), kernels)


def _check(x: Tensor, rows: Routing) -> None:
    if len(x) != rows.count:
        raise ValueError(f"x has {len(x)} rows and {rows.count} are routed. Give the sets of every row.")


def _run(
    y: Tensor | None, x: Tensor, weight: Tensor | None, bias: Tensor | None, sets: Sets, kernels: bool | None
) -> Tensor:
    form = _form(x, x.dtype if y is None else y.dtype, sets, kernels)
    if torch.is_grad_enabled():
        settings = (sets.scales, sets.rows, form, recipe_of(x))
        out: Tensor = _Routed.apply(y, x, weight, bias, settings, *sets.a, *sets.b)  # type: ignore[no-untyped-call]
        return out
    return _added(y, x, weight, bias, sets, form)[0]


def _form(x: Tensor, dtype: torch.dtype, sets: Sets, kernels: bool | None) -> type[Form]:
    """Return which form is to be used."""
    ranks, tokens, rows = sets.ranks, x.numel() // x.shape[-1], sets.rows
    fits = rows.alone and dtype != torch.float64 and 0 < max(ranks) <= Grouped.MOST_RANK
    if fits and takes_kernel("routed", x, kernels, sets=len(ranks), rows=tokens, width=x.shape[-1]):
        return Grouped
    pairs = sum(len(run.sets) for run in rows.runs)
    work = tokens * sum(ranks) * (x.shape[-1] + len(sets.b[0]))
    kind = "cpu" if x.device.type == "cpu" else "cuda"
    few = CALLS[kind, 2 if dtype.itemsize == 2 else 4] * (pairs - 1)
    return Stacked if 0 < sum(ranks) <= MOST_RANKS and work <= few else ByRun


def _added(
    y: Tensor | None, x: Tensor, weight: Tensor | None, bias: Tensor | None, sets: Sets, form: type[Form]
) -> tuple[Tensor, Tensor]:
    """Return out, and H in the form's own layout."""
    with as_written(x):
        if y is None:
            assert weight is not None
            out = F.linear(x, weight, bias).contiguous()  # as the layer itself does it: rows without sets stay its own
        else:
            out = y.clone(memory_format=torch.contiguous_format)
        rows = x.reshape(-1, x.shape[-1]).to(out.dtype)
        return out, form.add(out.view(-1, out.shape[-1]), rows, sets)


class _Routed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor | None,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        settings: tuple[Sequence[float], Routing, type[Form], Recipe],
        *pairs: Tensor,
    ) -> Tensor:
        scales, rows, form, recipe = settings
        number, needed = len(scales), ctx.needs_input_grad
        out, h = _added(y, x, weight, bias, Sets(pairs[:number], pairs[number:], scales, rows), form)
        ctx.save_for_backward(
            weight if needed[1] else None,
            h if any(needed[5 + number :]) else None,
            *pairs,  # not their casts: those are made again
            *(recipe.parts if any(needed[5 : 5 + number]) else ()),
        )
        ctx.made = scales, rows, form, recipe.make, x.shape, x.dtype
        return torch.ops.aten._unsafe_view(out, out.shape)  # type: ignore[no-any-return]  # as in `low_rank`

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]  # a second derivative would lack H's
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        scales, rows, form, make, shape, dtype = ctx.made
        weight, h, *rest = ctx.saved_tensors
        number, needed = len(scales), ctx.needs_input_grad
        for_a, for_b = needed[5 : 5 + number], needed[5 + number :]
        sets, parts = Sets(rest[:number], rest[number : 2 * number], scales, rows), rest[2 * number :]
        g = gradient.reshape(-1, gradient.shape[-1])
        dx = x = None
        if needed[1]:
            dx = g.new_empty(len(g), shape[-1]) if weight is None else g @ weight
        if any(for_a):
            x = make(*parts).reshape(-1, shape[-1]).to(g.dtype)
        da, db = form.back(g, x, h, sets, dx, weight is None, for_a, for_b)
        dx = None if dx is None else dx.view(shape).to(dtype)
        return gradient if needed[0] else None, dx, None, None, None, *da, *db
