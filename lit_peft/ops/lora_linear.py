"""A frozen linear layer with a low-rank update, as one function.

    out = x W^T + c + s D(x) A^T L B^T

as `low_rank` has it, with the update added into the layer's own product: neither the output nor the gradient of the
input is written twice.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from lit_peft.ops.low_rank import drawn, dropped, inner_gradients
from lit_peft.ops.recipes import Recipe, autocasting, recipe_of, recording


def joins(base: nn.Module, x: Tensor) -> TypeGuard[nn.Linear]:
    """Return whether `lora_linear` may stand for a call of the base: a plain frozen `nn.Linear`, watched by nobody."""
    if type(base) is not nn.Linear or not recording() or autocasting(x):
        return False
    weight, bias = base.weight, base.bias
    return (
        type(weight) is nn.Parameter
        and not weight.requires_grad
        and (bias is None or (type(bias) is nn.Parameter and not bias.requires_grad))
        and weight.dtype == x.dtype
        and x.numel() > 0
        and not (base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks)
        and "forward" not in base.__dict__
    )


def lora_linear(
    x: Tensor,
    base: nn.Linear,
    a: Tensor,
    b: Tensor,
    scale: float,
    *,
    dropout: float = 0.0,
    diagonal: Tensor | None = None,
) -> Tensor:
    """Return x W^T + c + s dropout(x) A^T L B^T.

    Args:
        x: the input (..., in).
        base: the layer, for which `joins` holds: W (out, in) and c (out,) or none, frozen, in x's dtype.
        a: A (r, in), in any floating dtype.
        b: B (out, r).
        scale: s.
        dropout: the probability with which an entry of x is left out of the update.
        diagonal: l (r,), as AdaLoRA has it; None: L is left out.

    Returns:
        (..., out). A second derivative is not there: asking for one raises.

    Example:
        >>> import torch
        >>> x, base = torch.ones(2, 4), torch.nn.Linear(4, 3, bias=False).requires_grad_(False)
        >>> out = lora_linear(x, base, torch.ones(1, 4), torch.ones(3, 1), scale=0.5)
        >>> bool(out.sub(base(x)).sub(2).abs().max() < 1e-6)
        True
    """
    a, b = a.to(x.dtype), b.to(x.dtype)
    diagonal = None if diagonal is None else diagonal.to(x.dtype)
    layer, settings = (base.weight, base.bias), (scale, dropout, drawn(dropout), recipe_of(x))
    out: Tensor = _Joined.apply(x, *layer, a, b, diagonal, *settings)  # type: ignore[no-untyped-call]
    return out


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        diagonal: Tensor | None,
        scale: float,
        p: float,
        seed: int,
        recipe: Recipe,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        # H is (r, rows), not (rows, r): products with narrow results are up to four times slower on CPUs
        h = a @ (dropped(x, p, seed).reshape(rows.shape) if p else rows).t()
        inner = h if diagonal is None else diagonal[:, None] * h
        out = rows @ weight.t() if bias is None else torch.addmm(bias, rows, weight.t())
        out.addmm_(inner.t(), b.t(), alpha=scale)
        needed = ctx.needs_input_grad
        ctx.save_for_backward(
            weight if needed[0] else None,
            a if needed[0] else None,
            b,
            diagonal,
            h if needed[4] or needed[5] else None,
            *(recipe.parts if needed[3] else ()),
        )
        ctx.made = recipe.make, x.shape, scale, p, seed
        return torch.ops.aten._unsafe_view(out, (*x.shape[:-1], len(b)))  # type: ignore[no-any-return]  # as in `low_rank`

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]  # a second derivative would lack H's
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, a, b, diagonal, h, *parts = ctx.saved_tensors
        make, shape, scale, p, seed = ctx.made
        needed = ctx.needs_input_grad
        g = gradient.reshape(-1, gradient.shape[-1])
        inner, db, dl = inner_gradients(g, b, diagonal, h, scale, (needed[0], *needed[3:6]))
        dx = da = None
        if needed[0]:
            dx = g @ weight
            if p:
                dx += dropped((inner.t() @ a).view(shape), p, seed).view(dx.shape)
            else:
                dx.addmm_(inner.t(), a)
            dx = dx.view(shape)
        if needed[3]:
            da = inner @ dropped(make(*parts), p, seed).reshape(-1, shape[-1])
        return dx, None, None, da, db, dl, None, None, None, None
