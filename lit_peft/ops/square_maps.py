"""The fixed maps of MoRA's types, of rows of numbers into place: without copies of what is read or written.

Types 1 to 4 sum entries of x into r̂ slots, and repeat the slots of M's product; type 6 works on chunks of r̂ entries.
`lit_peft.low_rank.square` has the table, `lit_peft.ops.mora` the function that puts them together.
"""

from __future__ import annotations

import torch
from torch import Tensor

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


def add_widened(out: Tensor, h: Tensor, interleaved: bool, wraps: bool = False) -> None:
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


def filled(x: Tensor, width: int, number: int) -> Tensor:
    """Return the first chunks of x, (..., number, r̂), the last one filled up with the head of x."""
    missing = number * width - x.shape[-1]
    x = x[..., : number * width] if missing <= 0 else torch.cat([x, x[..., :missing]], dim=-1)
    return x.reshape(*x.shape[:-1], number, width)


def turned(chunks: Tensor, turn: Tensor) -> Tensor:
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
    """Return the sum over chunks of N_c R_c^T, (r̂, r̂), of all N_c (number, r̂, r̂), which may be overwritten."""
    products, half = products.to(dtype), products.shape[2] // 2
    cos, sin = turn[:, : len(products), None].to(dtype)
    first, second = products[..., :half], products[..., half:]
    total = products.new_empty(products.shape[1:])
    torch.sum((first * cos).addcmul_(second, sin, value=-1), 0, out=total[:, :half])
    torch.sum(first.mul_(sin).addcmul_(second, cos), 0, out=total[:, half:])
    return total


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


def add_chunks(out: Tensor, x: Tensor, found: Tensor) -> None:
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


def add_chunks_back(dx: Tensor, g: Tensor, found: Tensor) -> None:
    """Add g_c M R_c to each chunk of dx (rows, in): of g (rows, up to number r̂)."""
    width = found.shape[1]
    whole, pieces = _edges(dx.shape[1], g.shape[1], width)
    _whole(dx, whole, width).baddbmm_(_whole(g, whole, width), found[:whole])
    for source, columns, rows, aim in pieces:
        dx[:, source].addmm_(g[:, aim], found[whole, rows, columns])


def chunk_products(g: Tensor, x: Tensor, width: int) -> Tensor:
    """Return N_c = g_c^T x_c of each chunk, (number, r̂, r̂)."""
    whole, pieces = _edges(x.shape[1], g.shape[1], width)
    products = g.new_empty(whole + bool(pieces), width, width)
    torch.bmm(_whole(g, whole, width).transpose(1, 2), _whole(x, whole, width), out=products[:whole])
    if pieces:
        products[whole] = 0
    for source, columns, rows, aim in pieces:
        products[whole, rows, columns] = g[:, aim].t() @ x[:, source]
    return products


def folded(g: Tensor, most: int) -> Tensor:
    """Return the gradient (rows, most) of what is repeated to g's width; g itself where nothing is."""
    if g.shape[1] <= most:
        return g
    total = g[:, :most].clone(memory_format=torch.contiguous_format)
    for start in range(most, g.shape[1], most):
        piece = g[:, start : start + most]
        total[:, : piece.shape[1]] += piece
    return total
