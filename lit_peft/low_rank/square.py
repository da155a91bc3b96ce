"""MoRA's square matrix: how large it is, and what it adds to a weight; `lit_peft.ops.mora` applies it.

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

from lit_peft.ops.square_maps import slots

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


def delta(m: Tensor, inputs: int, outputs: int, mora_type: int) -> Tensor:
    """Return the change of the weight, (out, in), in M's dtype: placed entry by entry, with no product."""
    width = m.shape[0]
    if mora_type == 6:
        return _rotated_blocks(m, inputs, outputs)
    rows = m[slots(outputs, width, mora_type in (1, 3), m.device)]
    found = rows[:, slots(inputs, width, mora_type in (1, 4), m.device)]
    if mora_type in (2, 3):
        return found
    if inputs % width:  # the head of x is summed a second time, in the slots that its last chunk left empty
        found[:, : width - inputs % width] += rows[:, inputs % width :]
    return found


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
