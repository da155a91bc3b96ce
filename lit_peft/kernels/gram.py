"""R R^T - I of many matrices of different sizes in one launch, and the gradient of the sum of their squares.

A table holds a line for each matrix: the address of its numbers, its rank, its width, and whether it lies as (width, r)
instead of (r, width). Everything is float32; products are not rounded to fewer digits for tensor cores.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from lit_peft.kernels.build import Build

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 32  # columns of R at a time
STEP = 16  # of the rank, in the backward pass
OPTIONS = {"num_warps": 4, "num_stages": 2}


@triton.jit
def gram_kernel(table_ptr, gap_ptr, square_ptr, most, RANK: tl.constexpr, BLOCK: tl.constexpr):
    """G = R R^T - I (number, most, most), with zeros beyond a matrix's rank, and ||G||^2; one matrix a program."""
    number = tl.program_id(0).to(tl.int64)
    line = table_ptr + number * 4
    start = tl.load(line).to(tl.pointer_type(tl.float32))
    r, width, tall = tl.load(line + 1), tl.load(line + 2), tl.load(line + 3)
    down = tl.where(tall == 1, 1, width)
    along = tl.where(tall == 1, r, 1)
    rank = tl.arange(0, RANK).to(tl.int64)
    other = tl.arange(0, RANK)
    product = tl.zeros((RANK, RANK), dtype=tl.float32)
    for first in range(0, width, BLOCK):
        at = first + tl.arange(0, BLOCK).to(tl.int64)
        mask = (rank < r)[:, None] & (at < width)[None, :]
        piece = tl.load(start + rank[:, None] * down + at[None, :] * along, mask=mask, other=0.0)
        product = tl.dot(piece, tl.trans(piece), product, input_precision="ieee")
    one = (rank[:, None] == other[None, :]) & (rank < r)[:, None]
    gap = product - tl.where(one, 1.0, 0.0)
    spot = gap_ptr + number * most * most + rank[:, None] * most + other[None, :]
    tl.store(spot, gap, mask=(rank < most)[:, None] & (other < most)[None, :])
    tl.store(square_ptr + number, tl.sum(tl.sum(gap * gap, 1), 0))


@triton.jit
def gram_backward_kernel(
    table_ptr, gap_ptr, slope_ptr, out_ptr, most, RANK: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr
):
    """4 slope G R, at the addresses of a second table (number,), laid out as the matrices; BLOCK columns a program."""
    number = tl.program_id(0).to(tl.int64)
    line = table_ptr + number * 4
    start = tl.load(line).to(tl.pointer_type(tl.float32))
    r, width, tall = tl.load(line + 1), tl.load(line + 2), tl.load(line + 3)
    out = tl.load(out_ptr + number).to(tl.pointer_type(tl.float32))
    down = tl.where(tall == 1, 1, width)
    along = tl.where(tall == 1, r, 1)
    rank = tl.arange(0, RANK).to(tl.int64)
    at = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    product = tl.zeros((RANK, BLOCK), dtype=tl.float32)
    for first in range(0, most, STEP):  # in steps: a product of whole blocks in float32 would not fit in the registers
        other = first + tl.arange(0, STEP).to(tl.int64)
        spots = gap_ptr + number * most * most + rank[:, None] * most + other[None, :]
        gap = tl.load(spots, mask=(rank < most)[:, None] & (other < most)[None, :], other=0.0)
        mask = (other < r)[:, None] & (at < width)[None, :]
        piece = tl.load(start + other[:, None] * down + at[None, :] * along, mask=mask, other=0.0)
        product = tl.dot(gap, piece, product, input_precision="ieee")
    spot = out + rank[:, None] * down + at[None, :] * along
    tl.store(spot, product * (4 * tl.load(slope_ptr)), mask=(rank < r)[:, None] & (at < width)[None, :])


def table_of(matrices: list[Tensor], tall: list[bool]) -> tuple[Tensor, int, int]:
    """Return the table (number, 4), the largest rank and the largest width."""
    import torch

    lines = [
        [m.data_ptr(), m.shape[high], m.shape[1 - high], int(high)] for m, high in zip(matrices, tall, strict=True)
    ]
    table = torch.tensor(lines, dtype=torch.int64).to(matrices[0].device)
    return table, max(line[1] for line in lines), max(line[2] for line in lines)


def gram(matrices: list[Tensor], tall: list[bool]) -> tuple[Tensor, Tensor]:
    """Return the G (number, most, most), of contiguous float32 matrices, and the sum of their squares."""
    table, most, _ = table_of(matrices, tall)
    first = matrices[0]
    gaps, squares = first.new_empty(len(matrices), most, most), first.new_empty(len(matrices))
    gram_kernel[(len(matrices),)](table, gaps, squares, most, RANK=_padded(most), BLOCK=BLOCK, **OPTIONS)
    return gaps, squares.sum()


def gram_backward(matrices: list[Tensor], tall: list[bool], gaps: Tensor, slope: Tensor) -> list[Tensor]:
    """Return 4 slope G R for each matrix, of the G that `gram` returned and a scalar slope."""
    import torch

    table, most, widest = table_of(matrices, tall)
    found = [torch.empty_like(matrix) for matrix in matrices]
    places = torch.tensor([matrix.data_ptr() for matrix in found], dtype=torch.int64).to(gaps.device)
    grid = (len(matrices), triton.cdiv(widest, BLOCK))
    gram_backward_kernel[grid](table, gaps, slope, places, most, RANK=_padded(most), BLOCK=BLOCK, STEP=STEP, **OPTIONS)
    return found


def _padded(rank: int) -> int:
    return max(16, int(triton.next_power_of_2(rank)))


def _builds() -> list[Build]:
    made = []
    for rank in (12, 64):
        ends: dict[str, Any] = {"table_ptr": tl.int64, "gap_ptr": tl.float32, "most": rank}
        ends |= {"RANK": _padded(rank), "BLOCK": BLOCK}
        forward, backward = {"square_ptr": tl.float32}, {"slope_ptr": tl.float32, "out_ptr": tl.int64, "STEP": STEP}
        made.append(Build(f"gram, r {rank}", gram_kernel, ends | forward, OPTIONS))
        made.append(Build(f"gram backward, r {rank}", gram_backward_kernel, ends | backward, OPTIONS))
    return made


BUILDS = _builds()
