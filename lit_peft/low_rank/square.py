"""MoRA's square matrix: narrowing x (..., in) to width r̂, and widening back to (..., out), without weights.

    change(x) = widen(M narrow(x)),    M (r̂, r̂)

Narrowing and widening are fixed linear maps (https://arxiv.org/abs/2405.12130, section 3.2; numbers as in its code):

| type | narrow: slot j sums                  | widen: output a is                       |
|------|--------------------------------------|------------------------------------------|
| 1    | x_i with i = j mod r̂                 | slot a mod r̂                             |
| 2    | the j-th group of neighbours         | the slot of a's group                    |
| 3    | the j-th group of neighbours         | slot a mod r̂                             |
| 4    | x_i with i = j mod r̂                 | the slot of a's group                    |
| 6    | no sum: chunk c of x, rotated by RoPE angles of position c, is multiplied by M on its own | chunk by chunk |

Where r̂ does not divide: types 1, 4 and 6 fill up the last chunk of x with the first entries of x again; groups of
neighbours (types 2, 3 on x; 2, 4 on the output) are larger by one at the beginning; the output is cut, in type 6
repeated if it is too short.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

TYPES = (1, 2, 3, 4, 6)
BASE = 10000.0  # of the rotation, as in RoPE


def size(inputs: int, outputs: int, r: int, mora_type: int) -> int:
    """Return r̂, the size of the matrix with as many weights as a LoRA of rank r; even for type 6."""
    found = math.floor(math.sqrt((inputs + outputs) * r) + 0.5)
    return found // 2 * 2 if mora_type == 6 else found


def largest_rank(inputs: int, outputs: int, mora_type: int) -> int:
    """Return the largest r whose matrix is no larger than the layer in either direction; 0 if there is none."""
    r = min(inputs, outputs) ** 2 // (inputs + outputs) + 3  # too large for sure: rounding gains less
    while r > 0 and size(inputs, outputs, r, mora_type) > min(inputs, outputs):
        r -= 1
    return r


def angles(chunks: int, width: int, device: torch.device | None = None) -> Tensor:
    """Return cos and sin of the angle of each chunk and pair, (2, chunks, width / 2), in float32."""
    position = torch.arange(chunks, device=device, dtype=torch.float32)
    frequency = BASE ** (-torch.arange(0, width, 2, device=device, dtype=torch.float32) / width)
    angle = position[:, None] * frequency
    return torch.stack([angle.cos(), angle.sin()])


def apply(m: Tensor, x: Tensor, y: Tensor, mora_type: int, turn: Tensor | None = None) -> Tensor:
    """Return y + widen(M narrow(x)): (..., in), (..., out) -> (..., out).

    Args:
        m: M (r̂, r̂).
        x: input of the layer.
        y: output of the layer without the change.
        mora_type: 1, 2, 3, 4 or 6.
        turn: from `angles`, for type 6.
    """
    width, outputs = m.shape[0], y.shape[-1]
    if mora_type == 6:
        assert turn is not None
        h = F.linear(_turned(_chunks(x, width, min(turn.shape[1], -(-outputs // width))), turn), m.to(x.dtype))
        return y + _cut(h.flatten(-2).to(y.dtype), outputs)
    h = _interleaved(x, width) if mora_type in (1, 4) else _neighbours(x, width)
    h = F.linear(h, m.to(h.dtype)).to(y.dtype)
    if mora_type in (1, 3):
        if outputs % width == 0:  # broadcast: nothing of the output's size but the output
            return (_split(y, width) + h.unsqueeze(-2)).flatten(-2)
        return y + _cut(h, outputs)
    return y + h.index_select(-1, _groups(outputs, width, y.device))


def delta(m: Tensor, inputs: int, outputs: int, mora_type: int) -> Tensor:
    """Return the change of the weight, (out, in), in M's dtype: placed entry by entry, with no product."""
    width = m.shape[0]
    if mora_type == 6:
        return _rotated_blocks(m, inputs, outputs)
    device = m.device
    row = torch.arange(outputs, device=device) % width
    rows = m[row if mora_type in (1, 3) else _groups(outputs, width, device)]
    if mora_type in (2, 3):
        return rows[:, _groups(inputs, width, device)]
    found = rows[:, torch.arange(inputs, device=device) % width]
    if inputs % width:  # the head of x is summed a second time, in the slots that its last chunk left empty
        found[:, : width - inputs % width] += rows[:, inputs % width :]
    return found


def _split(x: Tensor, width: int) -> Tensor:
    """View (..., n width) as (..., n, width); sizes are spelled out because a batch may have no row."""
    return x.view(*x.shape[:-1], x.shape[-1] // width, width)


def _interleaved(x: Tensor, width: int) -> Tensor:
    whole = x.shape[-1] // width * width
    h = _split(x[..., :whole], width).sum(-2)
    return h if whole == x.shape[-1] else h + _last_chunk(x, whole, width)


def _last_chunk(x: Tensor, whole: int, width: int) -> Tensor:
    return torch.cat([x[..., whole:], x[..., : width - (x.shape[-1] - whole)]], dim=-1)


def _neighbours(x: Tensor, width: int) -> Tensor:
    few, larger = divmod(x.shape[-1], width)
    head = larger * (few + 1)
    tail = _split(x[..., head:], few).sum(-1)
    return torch.cat([_split(x[..., :head], few + 1).sum(-1), tail], dim=-1) if larger else tail


def _groups(length: int, width: int, device: torch.device) -> Tensor:
    """Return the slot of each of `length` entries: neighbours share one, the first groups are larger by one."""
    few, larger = divmod(length, width)
    place = torch.arange(length, device=device)
    head = larger * (few + 1)
    return torch.where(place < head, place // (few + 1), larger + (place - head) // few)


def _chunks(x: Tensor, width: int, needed: int) -> Tensor:
    """Return the first `needed` chunks of x, (..., needed, r̂): later ones reach no output."""
    if needed * width <= x.shape[-1]:
        return _split(x[..., : needed * width], width)
    whole = x.shape[-1] // width * width
    return _split(torch.cat([x[..., :whole], _last_chunk(x, whole, width)], dim=-1), width)


def _turned(chunks: Tensor, turn: Tensor) -> Tensor:
    """Rotate each chunk: entry j and entry j + r̂/2 are a pair."""
    cos, sin = turn[:, : chunks.shape[-2]].to(chunks.dtype)
    first, second = chunks.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _cut(h: Tensor, outputs: int) -> Tensor:
    times = -(-outputs // h.shape[-1])
    return (h if times == 1 else torch.cat([h] * times, dim=-1))[..., :outputs]


def _rotated_blocks(m: Tensor, inputs: int, outputs: int) -> Tensor:
    width = m.shape[0]
    chunks = -(-inputs // width)
    cos, sin = angles(chunks, width, m.device).to(m.dtype)
    first, second = m.chunk(2, dim=-1)
    found = m.new_zeros(chunks * width, inputs)
    for c in range(chunks):
        # M R_c, column by column: R_c as in `_turned`
        block = torch.cat([first * cos[c] + second * sin[c], second * cos[c] - first * sin[c]], dim=-1)
        here, start = slice(c * width, (c + 1) * width), c * width
        inside = min(width, inputs - start)
        found[here, start : start + inside] = block[:, :inside]
        if inside < width:
            found[here, : width - inside] += block[:, inside:]
    return found[torch.arange(outputs, device=m.device) % (chunks * width)]
