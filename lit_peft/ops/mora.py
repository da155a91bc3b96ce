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


def reference(y: Tensor, x: Tensor, m: Tensor, kind: int, turn: Tensor | None = None) -> Tensor:
    """Return y + widen(M narrow(x)) with plain operations; arguments as for `square_update`."""
    width, outputs = m.shape[0], y.shape[-1]
    if kind == 6:
        assert turn is not None
        h = F.linear(_turned(_chunks(x, width, needed(x.shape[-1], outputs, width)), turn), m.to(x.dtype))
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
                    _add_chunks(out, read, blocks(m, turn, needed(rows.shape[1], out.shape[1], len(m)), out.dtype))
            else:
                h = narrowed(read, len(m), kind in (1, 4))
                _add_widened(out, F.linear(h, m.to(h.dtype)), kind in (1, 3))
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
            push = _folded(g, needed(wide, g.shape[1], width) * width)
        else:
            push = narrowed(g, width, kind in (1, 3), wraps=False)
        if wants[1]:
            dx = g.new_zeros(len(g), wide) if weight is None else g @ weight
            more = torch.zeros_like(dx) if p and weight is not None else dx
            if kind != 6:
                _add_widened(more, push @ m.to(g.dtype), kind in (1, 4), wraps=True)
            elif launch:
                _launch_backward(more, push, m.to(g.dtype), turn.float())
            else:
                _add_chunks_back(more, push, blocks(m, turn, needed(wide, g.shape[1], width), g.dtype))
            if p:
                more = dropped(more.view(shape), p, seed).view(more.shape)
                dx = more if weight is None else dx.add_(more)
            dx = dx.view(shape).to(dtype)
        if wants[4]:
            read = parts[0] if sums else dropped(make(*parts), p, seed).reshape(-1, wide).to(g.dtype)
            if kind == 6:
                dm = unturned(_chunk_products(push, read, width), turn, kept)
            else:
                dm = (push.t() @ (read if sums else narrowed(read, width, kind in (1, 4)))).to(kept)
        return gradient if wants[0] else None, dx, None, None, dm, *[None] * 6


# Types 1 to 4 --------------------------------------------------------------------------------------------------------


def slots(length: int, width: int, interleaved: bool, device: torch.device) -> Tensor:
    """Return the slot of each of `length` entries: every r̂-th share one, or neighbours do, larger groups first."""
    place = torch.arange(length, device=device)
    if interleaved:
        return place % width
    few, larger = divmod(length, width)
    head = larger * (few + 1)
    return torch.where(place < head, place // (few + 1), larger + (place - head) // few)


def narrowed(x: Tensor, width: int, interleaved: bool, wraps: bool = True) -> Tensor:
    """Return the sums (rows, r̂) of x (rows, in); interleaved ones are filled up with the head of x if it wraps."""
    few, rest = divmod(x.shape[1], width)
    if interleaved:
        h = _split(x[:, : few * width], few, width).sum(1)
        if rest:
            h[:, :rest] += x[:, few * width :]
            if wraps:
                h[:, rest:] += x[:, : width - rest]
        return h
    head = rest * (few + 1)
    tail = _split(x[:, head:], width - rest, few).sum(2)
    return torch.cat([_split(x[:, :head], rest, few + 1).sum(2), tail], dim=1) if rest else tail


def _add_widened(out: Tensor, h: Tensor, interleaved: bool, wraps: bool = False) -> None:
    """Add each slot of h (rows, r̂) to the entries of out (rows, n) that share it; the transpose of `narrowed`."""
    width = h.shape[1]
    few, rest = divmod(out.shape[1], width)
    if interleaved:
        _split(out[:, : few * width], few, width).add_(h[:, None])
        if rest:
            out[:, few * width :].add_(h[:, :rest])
            if wraps:
                out[:, : width - rest].add_(h[:, rest:])
        return
    head = rest * (few + 1)
    if rest:
        _split(out[:, :head], rest, few + 1).add_(h[:, :rest, None])
    _split(out[:, head:], width - rest, few).add_(h[:, rest:, None])


def _split(x: Tensor, first: int, second: int) -> Tensor:
    """View (rows, first second) as (rows, first, second); sizes are spelled out because there may be no row."""
    return x.view(len(x), first, second)


# Type 6 --------------------------------------------------------------------------------------------------------------


def needed(inputs: int, outputs: int, width: int) -> int:
    """Return how many chunks there are of x that reach an output."""
    return min(-(-inputs // width), -(-outputs // width))


def _chunks(x: Tensor, width: int, number: int) -> Tensor:
    """Return the first chunks of x, (..., number, r̂), the last one filled up with the head of x."""
    missing = number * width - x.shape[-1]
    x = x[..., : number * width] if missing <= 0 else torch.cat([x, x[..., :missing]], dim=-1)
    return x.reshape(*x.shape[:-1], number, width)


def _turned(chunks: Tensor, turn: Tensor) -> Tensor:
    """Rotate each chunk: entry j and entry j + r̂/2 are a pair."""
    cos, sin = turn[:, : chunks.shape[-2]].to(chunks.dtype)
    first, second = chunks.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def blocks(m: Tensor, turn: Tensor, number: int, dtype: torch.dtype) -> Tensor:
    """Return M R_c of each of the first chunks, (number, r̂, r̂)."""
    half = m.shape[1] // 2
    cos, sin = turn[:, :number, None].to(m.dtype)
    first, second = m[:, :half], m[:, half:]
    found = m.new_empty(number, *m.shape)
    torch.mul(first, cos, out=found[..., :half]).addcmul_(second, sin)
    torch.mul(second, cos, out=found[..., half:]).addcmul_(first, sin, value=-1)
    return found.to(dtype)


def unturned(products: Tensor, turn: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sum over chunks of N_c R_c^T, (r̂, r̂), of all N_c (number, r̂, r̂)."""
    half = products.shape[2] // 2
    cos, sin = turn[:, : len(products), None].to(dtype)
    first, second = products[..., :half].to(dtype), products[..., half:].to(dtype)
    return torch.cat([(first * cos).sub_(second * sin).sum(0), (first * sin).add_(second * cos).sum(0)], dim=1)


def _whole(x: Tensor, number: int, width: int) -> Tensor:
    """View the first chunks of (rows, n) as (number, rows, r̂)."""
    return x[:, : number * width].view(len(x), number, width).transpose(0, 1)


def _edges(inputs: int, outputs: int, width: int) -> tuple[int, list[tuple[slice, slice, slice, slice]]]:
    """Return how many chunks are whole at both ends, and the pieces of the one behind them, if there is one.

    A piece is the part of x, the part of the block's columns, of its rows, and of the output.
    """
    number = needed(inputs, outputs, width)
    limit = min(outputs, number * width)
    whole = min(inputs // width, limit // width)
    if whole == number:
        return whole, []
    start = whole * width
    inside, height = min(width, inputs - start), min(width, limit - start)
    ends = slice(0, height), slice(start, start + height)
    pieces = [(slice(start, start + inside), slice(0, inside), *ends)]
    if inside < width:
        pieces.append((slice(0, width - inside), slice(inside, width), *ends))
    return whole, pieces


def _add_chunks(out: Tensor, x: Tensor, found: Tensor) -> None:
    """Add M R_c x_c to each chunk of out (rows, out), over and over if it is longer: of x (rows, in)."""
    number, width = found.shape[:2]
    most = number * width
    whole, pieces = _edges(x.shape[1], out.shape[1], width)
    if out.shape[1] <= most:
        _whole(out, whole, width).baddbmm_(_whole(x, whole, width), found[:whole].transpose(1, 2))
        for source, columns, rows, aim in pieces:
            out[:, aim].addmm_(x[:, source], found[whole, rows, columns].t())
        return
    h = out.new_empty(number, len(out), width)
    torch.bmm(_whole(x, whole, width), found[:whole].transpose(1, 2), out=h[:whole])
    for beta, (source, columns, _, _) in enumerate(pieces):
        h[whole].addmm_(x[:, source], found[whole, :, columns].t(), beta=beta)
    for start in range(0, out.shape[1], most):
        piece = out[:, start : start + most]
        chunks, rest = divmod(piece.shape[1], width)
        _whole(piece, chunks, width).add_(h[:chunks])
        if rest:
            piece[:, chunks * width :] += h[chunks, :, :rest]


def _add_chunks_back(dx: Tensor, g: Tensor, found: Tensor) -> None:
    """Add g_c M R_c to each chunk of dx (rows, in): of g (rows, up to number r̂)."""
    width = found.shape[1]
    whole, pieces = _edges(dx.shape[1], g.shape[1], width)
    _whole(dx, whole, width).baddbmm_(_whole(g, whole, width), found[:whole])
    for source, columns, rows, aim in pieces:
        dx[:, source].addmm_(g[:, aim], found[whole, rows, columns])


def _chunk_products(g: Tensor, x: Tensor, width: int) -> Tensor:
    """Return N_c = g_c^T x_c of each chunk, (number, r̂, r̂)."""
    whole, pieces = _edges(x.shape[1], g.shape[1], width)
    products = g.new_empty(whole + bool(pieces), width, width)
    torch.bmm(_whole(g, whole, width).transpose(1, 2), _whole(x, whole, width), out=products[:whole])
    if pieces:
        products[whole] = 0
    for source, columns, rows, aim in pieces:
        products[whole, rows, columns] = g[:, aim].t() @ x[:, source]
    return products


def _folded(g: Tensor, most: int) -> Tensor:
    """Return the gradient (rows, most) of what is repeated to g's width; g itself where nothing is."""
    if g.shape[1] <= most:
        return g
    total = g[:, :most].clone(memory_format=torch.contiguous_format)
    for start in range(most, g.shape[1], most):
        piece = g[:, start : start + most]
        total[:, : piece.shape[1]] += piece
    return total


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
