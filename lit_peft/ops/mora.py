"""MoRA's update of a layer's output by a square matrix, and its gradients.

    out = y + widen(M narrow(D(x)))        x (..., in), y (..., out), M (r̂, r̂)

with D the dropout. The maps, by the types of `lit_peft.low_rank.square`:

    1 to 4:  narrow sums entries of x, widen repeats those of M's product; each is done in one pass, into place
    6:       chunk c of the output is M R_c times chunk c of x, with R_c a rotation in pairs

For type 6 neither x nor the output is rotated, filled up or cut: M R_c is formed, chunks x r̂ x r̂ numbers, and the
products read and write the chunks where they lie. For g the gradient of out, with N_c = g_c^T x_c:

    dy = g        dx_c = g_c M R_c        dM = sum over c of N_c R_c^T

What is kept: x, or what it is made of (see `recipes`); of types 1 to 4 the narrow sums, where x would be kept for this
alone. M (and with it dM) stays in its own dtype, and is rotated in it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_peft.ops.choice import takes_kernel
from lit_peft.ops.low_rank import drawn, dropped
from lit_peft.ops.recipes import Recipe, as_written, eager, recipe_of
from lit_peft.ops.square_maps import (
    add_chunks,
    add_chunks_back,
    add_widened,
    blocks,
    chunk_products,
    filled,
    folded,
    narrowed,
    needed,
    slots,
    turned,
    unturned,
)


def reference(y: Tensor, x: Tensor, m: Tensor, kind: int, turn: Tensor | None = None) -> Tensor:
    """Return y + widen(M narrow(x)) with plain operations; arguments as for `square_update`."""
    width, outputs = m.shape[0], y.shape[-1]
    if kind == 6:
        assert turn is not None
        h = F.linear(turned(filled(x, width, needed(x.shape[-1], outputs, width)), turn), m.to(x.dtype))
        h = h.flatten(-2).to(y.dtype)
        return y + torch.cat([h] * -(-outputs // h.shape[-1]), dim=-1)[..., :outputs]
    h = narrowed(x.reshape(-1, x.shape[-1]), width, kind in (1, 4)).view(*x.shape[:-1], width)
    h = F.linear(h, m.to(h.dtype)).to(y.dtype)
    return y + h.index_select(-1, slots(outputs, width, kind in (1, 3), y.device))


def square_update(
    y: Tensor,
    x: Tensor,
    m: Tensor,
    kind: int,
    turn: Tensor | None = None,
    *,
    dropout: float = 0.0,
    kernels: bool | None = None,
) -> Tensor:
    """Return y + widen(M narrow(dropout(x))).

    Args:
        y: the layer's output (..., out); its dtype is the result's.
        x: the layer's input (..., in).
        m: M (r̂, r̂), r̂ no larger than in and out.
        kind: the type: 1, 2, 3, 4 or 6.
        turn: cos and sin (2, chunks, r̂ / 2) of each chunk's and pair's angle, for type 6.
        dropout: the probability with which an entry of x is left out, the others divided by 1 - p.
        kernels: whether to launch the kernel, which there is for type 6; None: as measured.

    Returns:
        (..., out). A second derivative is not there: asking for one raises.

    Example:
        >>> import torch
        >>> square_update(torch.zeros(1, 4), torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.eye(2), kind=1).tolist()
        [[4.0, 6.0, 4.0, 6.0]]
    """
    return _apply(y, x, None, None, m, kind, turn, dropout, kernels)


def square_linear(
    x: Tensor,
    base: nn.Linear,
    m: Tensor,
    kind: int,
    turn: Tensor | None = None,
    *,
    dropout: float = 0.0,
    kernels: bool | None = None,
) -> Tensor:
    """Return x W^T + c + widen(M narrow(dropout(x))): the output and the gradient of x are written once.

    Args:
        x: the input (..., in).
        base: the layer, for which `lora_linear.joins` holds.
        m: M (r̂, r̂).
        kind: the type: 1, 2, 3, 4 or 6.
        turn: cos and sin, for type 6.
        dropout: the probability with which an entry of x is left out of the update.
        kernels: whether to launch the kernel; None: as measured.

    Returns:
        (..., out). A second derivative is not there: asking for one raises.

    Example:
        >>> import torch
        >>> x, base = torch.ones(1, 4), torch.nn.Linear(4, 2, bias=False).requires_grad_(False)
        >>> bool(square_linear(x, base, torch.eye(2), kind=2).sub(base(x)).sub(2).abs().max() < 1e-6)
        True
    """
    return _apply(None, x, base.weight, base.bias, m, kind, turn, dropout, kernels)


def _apply(
    y: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    m: Tensor,
    kind: int,
    turn: Tensor | None,
    dropout: float,
    kernels: bool | None,
) -> Tensor:
    dtype = x.dtype if y is None else y.dtype
    launch = eager() and kind == 6 and not dropout and x.dtype == dtype
    if launch:
        rows, outputs = x.numel() // x.shape[-1], 0 if y is None else y.shape[-1]
        outputs = outputs if weight is None else len(weight)
        launch = takes_kernel("mora", x, kernels, rows=rows, width=x.shape[-1], outputs=outputs)
    if y is not None and (not eager() or not (torch.is_grad_enabled() or dropout or launch)):
        return reference(y, F.dropout(x, dropout) if dropout else x, m, kind, turn)
    settings = (dropout, drawn(dropout), recipe_of(x), launch)
    out: Tensor = _Square.apply(y, x, weight, bias, m, kind, turn, *settings)  # type: ignore[no-untyped-call]
    return out


class _Square(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor | None,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        m: Tensor,
        kind: int,
        turn: Tensor | None,
        p: float,
        seed: int,
        recipe: Recipe,
        launch: bool,
    ) -> Tensor:
        wants = ctx.needs_input_grad
        with as_written(x):
            rows = x.reshape(-1, x.shape[-1])
            if y is not None:
                out = y.reshape(-1, y.shape[-1]).clone(memory_format=torch.contiguous_format)
            else:
                assert weight is not None
                out = rows @ weight.t() if bias is None else torch.addmm(bias, rows, weight.t())
            read = (dropped(x, p, seed).reshape(rows.shape) if p else rows).to(out.dtype)
            parts = recipe.parts if wants[4] else ()
            sums = False
            if kind == 6:
                assert turn is not None
                if launch:
                    _launch(out, read, m.to(out.dtype), turn.float())
                else:
                    add_chunks(out, read, blocks(m, turn, needed(rows.shape[1], out.shape[1], len(m)), out.dtype))
            else:
                h = narrowed(read, len(m), kind in (1, 4))
                add_widened(out, F.linear(h, m.to(h.dtype)), kind in (1, 3))
                sums = len(parts) == 1 and parts[0] is x and not p
                parts = (h,) if sums else parts
        ctx.save_for_backward(weight if wants[1] else None, m if wants[1] else None, turn, *parts)
        ctx.made = recipe.make, x.shape, x.dtype, len(m), m.dtype
        ctx.how = kind, p, seed, sums, launch
        shape = (*x.shape[:-1], out.shape[-1])
        return torch.ops.aten._unsafe_view(out, shape)  # type: ignore[no-any-return]  # as in `low_rank`

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, m, turn, *parts = ctx.saved_tensors
        make, shape, dtype, width, kept = ctx.made
        kind, p, seed, sums, launch = ctx.how
        wants, wide = ctx.needs_input_grad, shape[-1]
        g = gradient.reshape(-1, gradient.shape[-1]).contiguous()
        dx = dm = None
        # what of g reaches M's product, narrow (types 1 to 4) or with repeats summed up
        if kind == 6:
            push = folded(g, needed(wide, g.shape[1], width) * width)
        else:
            push = narrowed(g, width, kind in (1, 3), wraps=False)
        if wants[1]:
            dx = g.new_zeros(len(g), wide) if weight is None else g @ weight
            more = torch.zeros_like(dx) if p and weight is not None else dx
            if kind != 6:
                add_widened(more, push @ m.to(g.dtype), kind in (1, 4), wraps=True)
            elif launch:
                _launch_backward(more, push, m.to(g.dtype), turn.float())
            else:
                add_chunks_back(more, push, blocks(m, turn, needed(wide, g.shape[1], width), g.dtype))
            if p:
                more = dropped(more.view(shape), p, seed).view(more.shape)
                dx = more if weight is None else dx.add_(more)
            dx = dx.view(shape).to(dtype)
        if wants[4]:
            read = parts[0] if sums else dropped(make(*parts), p, seed).reshape(-1, wide).to(g.dtype)
            if kind == 6:
                dm = unturned(chunk_products(push, read, width), turn, kept)
            else:
                dm = (push.t() @ (read if sums else narrowed(read, width, kind in (1, 4)))).to(kept)
        return gradient if wants[0] else None, dx, None, None, dm, *[None] * 6


# As registered operations the launches have no data in compilers and fake tensors. They add to their first argument.
@torch.library.custom_op("lit_peft::mora", mutates_args=("out",))
def _launch(out: Tensor, x: Tensor, m: Tensor, turn: Tensor) -> None:
    from lit_peft.kernels.mora import mora

    mora(out, x.contiguous(), m.contiguous(), turn.contiguous())


@_launch.register_fake
def _(out: Tensor, x: Tensor, m: Tensor, turn: Tensor) -> None:
    return None


@torch.library.custom_op("lit_peft::mora_backward", mutates_args=("dx",))
def _launch_backward(dx: Tensor, g: Tensor, m: Tensor, turn: Tensor) -> None:
    from lit_peft.kernels.mora import mora_backward

    mora_backward(dx, g.contiguous(), m.contiguous(), turn.contiguous())


@_launch_backward.register_fake
def _(dx: Tensor, g: Tensor, m: Tensor, turn: Tensor) -> None:
    return None
