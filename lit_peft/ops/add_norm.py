"""A decoder layer's additions and norms with the low-rank updates around them, one launch each; without autograd.

    add_expand:         x + y + s H^T B^T
    add_norm_shrink:    x2 = x + y + s H^T B^T,   out = w u,   u = x2 rho,   rho = 1 / sqrt(mean(x2^2) + eps),
                        and A out^T for the layers that read out
    norm_back:          dx = rho (t w - u mean(t w u)) + residual,   t = g + P^T A   the gradient at the norm's output

All work on rows: x, y, g and the results (rows, width), H and P (r, rows), A (r, width), B (width, r). Means are over a
row and in float32; u is rounded to x's dtype before it is multiplied by w, as the models' own code does. A program has
whole rows: no sums by atomics, and the same numbers every time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lit_peft.ops.choice import takes_kernel
from lit_peft.ops.packed import DTYPES, MOST
from lit_peft.ops.shrink import either


def fits(x: Tensor, weight: Tensor | None, *ranks: int) -> bool:
    """Return whether the kernels take x (rows, width), w (width,), and an update or factors of these total ranks.

    Example:
        >>> import torch
        >>> fits(torch.ones(2, 4), torch.ones(4), 16, 48), fits(torch.ones(2, 4), None, 65)
        (True, False)
    """
    alike = weight is None or weight.dtype == x.dtype
    return alike and x.dtype in DTYPES and x.dim() == 2 and max(ranks, default=0) <= MOST


def _launches(x: Tensor, weight: Tensor | None, kernels: bool | None, *ranks: int) -> bool:
    if not fits(x, weight, *ranks):
        return False
    return takes_kernel("layer", x, kernels, rows=len(x), width=x.shape[1])


def add_expand(
    x: Tensor, y: Tensor, h: Tensor | None, b: Tensor | None, scale: float, *, kernels: bool | None = None
) -> Tensor:
    """Return x + y + s H^T B^T (rows, width), rounded once.

    Args:
        x: (rows, width).
        y: (rows, width), in x's dtype.
        h: H (r, rows) in x's dtype, or None.
        b: B (width, r) in any floating dtype, or None.
        scale: s.
        kernels: whether to launch the kernel; None: as measured.

    Example:
        >>> import torch
        >>> x, h, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]]), torch.tensor([[1.0], [0.0]])
        >>> add_expand(x, x, h, b, 2.0).tolist()
        [[8.0, 4.0]]
    """
    if _launches(x, None, kernels, 0 if h is None else len(h)):
        made: Tensor = _add_expand(x, y, h, b, scale)
        return made
    return add_expand_reference(x, y, h, b, scale)


def add_expand_reference(x: Tensor, y: Tensor, h: Tensor | None, b: Tensor | None, scale: float) -> Tensor:
    """Return what `add_expand` returns, with plain operations."""
    if h is None or b is None:
        return x + y
    return torch.addmm(x + y, h.t(), b.t().to(h.dtype), alpha=scale)


def add_norm_shrink(
    x: Tensor,
    y: Tensor,
    h: Tensor | None,
    b: Tensor | None,
    scale: float,
    weight: Tensor,
    eps: float,
    factors: Sequence[Tensor],
    *,
    kernels: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return x2 = x + y + s H^T B^T, rounded to x's dtype, its RMS norm, and the first product of what reads that.

    Args:
        x: (rows, width).
        y: (rows, width), in x's dtype.
        h: H (r, rows) in x's dtype, or None.
        b: B (width, r) in any floating dtype, or None.
        scale: s.
        weight: w (width,), in x's dtype.
        eps: added to the mean square.
        factors: A_i (r_i, width), one to three, in any floating dtype.
        kernels: whether to launch the kernel; None: as measured.

    Returns:
        x2 (rows, width), the norm's output (rows, width), rho (rows,) in float32, A out^T (sum of r_i, rows), and A
        (sum of r_i, width), the factors below each other; all but rho in x's dtype.

    Example:
        >>> import torch
        >>> x, half, a = torch.tensor([[4.0, -4.0]]), torch.tensor([[-1.0, 1.0]]), torch.tensor([[2.0, 0.0]])
        >>> x2, out, rho, h, _ = add_norm_shrink(x, half, None, None, 1.0, torch.ones(2), 0.0, [a])
        >>> x2.tolist(), out.tolist(), h.tolist()
        ([[3.0, -3.0]], [[1.0, -1.0]], [[2.0]])
    """
    ranks = 0 if h is None else len(h), sum(map(len, factors))
    if len(factors) <= 3 and _launches(x, weight, kernels, *ranks):
        made: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
        made = _add_norm_shrink(x, y, h, b, scale, weight, eps, list(factors))
        return made
    return add_norm_shrink_reference(x, y, h, b, scale, weight, eps, factors)


def add_norm_shrink_reference(
    x: Tensor,
    y: Tensor,
    h: Tensor | None,
    b: Tensor | None,
    scale: float,
    weight: Tensor,
    eps: float,
    factors: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return what `add_norm_shrink` returns, with plain operations; rho of float64 stays in float64."""
    total = add_expand_reference(x, y, h, b, scale)
    rho = torch.rsqrt(_wide(total).pow(2).mean(-1) + eps)
    out = weight * (_wide(total) * rho[:, None]).to(x.dtype)
    a = torch.cat(list(factors)).to(x.dtype)
    return total, out, rho, a @ out.t(), a


def norm_back(
    g: Tensor,
    p: Tensor | None,
    a: Tensor | None,
    residual: Tensor | None,
    x: Tensor,
    weight: Tensor,
    rho: Tensor,
    again: bool,
    *,
    kernels: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the gradient of a norm's input, what passes it by included, and the norm's output made again.

    Args:
        g: (rows, width), in x's dtype.
        p: P (r, rows) in x's dtype, or None.
        a: A (r, width) in any floating dtype, or None.
        residual: the gradient (rows, width) that reaches the input on another way, in x's dtype, or None.
        x: the input (rows, width).
        weight: w (width,), in x's dtype, frozen.
        rho: (rows,) as `add_norm_shrink` returns it.
        again: whether the output is wanted.
        kernels: whether to launch the kernel; None: as measured.

    Returns:
        dx (rows, width), and the norm's output (rows, width), or an empty tensor where it is not wanted.

    Example:
        >>> import torch
        >>> x, g = torch.tensor([[1.0, -1.0]]), torch.tensor([[1.0, 0.0]])
        >>> dx, out = norm_back(g, None, None, torch.ones(1, 2), x, torch.ones(2), torch.ones(1), True)
        >>> dx.tolist(), out.tolist()
        ([[1.5, 1.5]], [[1.0, -1.0]])
    """
    if _launches(x, weight, kernels, 0 if p is None else len(p)):
        made: tuple[Tensor, Tensor] = _norm_back(g, p, a, residual, x, weight, rho, again)
        return made
    return norm_back_reference(g, p, a, residual, x, weight, rho, again)


def norm_back_reference(
    g: Tensor,
    p: Tensor | None,
    a: Tensor | None,
    residual: Tensor | None,
    x: Tensor,
    weight: Tensor,
    rho: Tensor,
    again: bool,
) -> tuple[Tensor, Tensor]:
    """Return what `norm_back` returns, with plain operations."""
    if p is not None and a is not None:
        g = torch.addmm(g, p.t(), a.to(p.dtype))
    inner, unit = _wide(g) * weight, _wide(x) * rho[:, None]
    out = weight * unit.to(x.dtype) if again else x.new_empty(0)
    dx = (inner - unit * (inner * unit).mean(-1, keepdim=True)) * rho[:, None]
    return (dx if residual is None else dx + residual).to(x.dtype), out


def _wide(x: Tensor) -> Tensor:
    """Return x in float32, or as it is in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _solid(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


# As registered operations the launches have shapes without data: fake tensors, the memory count and compilers see them.
@torch.library.custom_op("lit_peft::add_expand", mutates_args=())
def _add_expand(x: Tensor, y: Tensor, h: Tensor | None, b: Tensor | None, scale: float) -> Tensor:
    from lit_peft.kernels.add_norm import add_expand

    return add_expand(x.contiguous(), y.contiguous(), either(h), _solid(b), scale)


@_add_expand.register_fake
def _(x: Tensor, y: Tensor, h: Tensor | None, b: Tensor | None, scale: float) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("lit_peft::add_norm_shrink", mutates_args=())
def _add_norm_shrink(
    x: Tensor,
    y: Tensor,
    h: Tensor | None,
    b: Tensor | None,
    scale: float,
    weight: Tensor,
    eps: float,
    factors: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from lit_peft.kernels.add_norm import add_norm_shrink

    update = either(h), _solid(b), scale
    parts = [factor.contiguous() for factor in factors]
    return add_norm_shrink(x.contiguous(), y.contiguous(), *update, weight.contiguous(), eps, parts)


@_add_norm_shrink.register_fake
def _(
    x: Tensor,
    y: Tensor,
    h: Tensor | None,
    b: Tensor | None,
    scale: float,
    weight: Tensor,
    eps: float,
    factors: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (rows, width), r = x.shape, sum(len(factor) for factor in factors)
    rho = x.new_empty((rows,), dtype=torch.float32)
    return x.new_empty(x.shape), x.new_empty(x.shape), rho, x.new_empty(r, rows), x.new_empty(r, width)


@torch.library.custom_op("lit_peft::norm_back", mutates_args=())
def _norm_back(
    g: Tensor,
    p: Tensor | None,
    a: Tensor | None,
    residual: Tensor | None,
    x: Tensor,
    weight: Tensor,
    rho: Tensor,
    again: bool,
) -> tuple[Tensor, Tensor]:
    from lit_peft.kernels.add_norm import norm_back

    kept = x.contiguous(), weight.contiguous(), rho.contiguous()
    return norm_back(g.contiguous(), _solid(p), _solid(a), _solid(residual), *kept, again)


@_norm_back.register_fake
def _(
    g: Tensor,
    p: Tensor | None,
    a: Tensor | None,
    residual: Tensor | None,
    x: Tensor,
    weight: Tensor,
    rho: Tensor,
    again: bool,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape if again else (0,))
