"""An edit of chosen rows, in place: gather, two narrow products, scatter, in one launch.

    h_t += Q (E h_t + b)

A program edits some of the rows. It reads them twice, the second time from the cache, and notes them and E h + b for
the backward pass, which is the same launch with E and Q^T exchanged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from lit_peft.kernels.build import Build

if TYPE_CHECKING:
    from torch import Tensor


@triton.jit
def edit_kernel(
    h_ptr,
    rows_ptr,
    matrix_ptr,
    bias_ptr,
    rotation_ptr,
    read_ptr,
    inner_ptr,
    number,
    width,
    rank,
    matrix_row,
    matrix_column,
    rotation_row,
    rotation_column,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    RANK: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Edit rows of h (.., width) in place; read (number, width) and inner (number, rank) note what they were."""
    line = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    narrow = tl.arange(0, RANK)
    there, held = line < number, narrow < rank
    row = tl.load(rows_ptr + line, mask=there, other=0).to(tl.int64)
    dtype: tl.constexpr = h_ptr.dtype.element_ty
    total = tl.zeros((ROWS, RANK), tl.float32)
    for start in range(0, width, TILE):
        at = start + tl.arange(0, TILE)
        inside = at < width
        mask = there[:, None] & inside
        h = tl.load(h_ptr + row[:, None] * width + at, mask=mask, other=0.0)
        tl.store(read_ptr + line[:, None] * width + at, h, mask=mask)
        spot = matrix_ptr + narrow[None, :] * matrix_row + at[:, None] * matrix_column
        matrix = tl.load(spot, mask=held[None, :] & inside[:, None], other=0.0)
        total = tl.dot(h, matrix, total, input_precision=PRECISION)
    if BIAS:
        total += tl.load(bias_ptr + narrow, mask=held, other=0.0).to(tl.float32)
    inner = total.to(dtype)
    tl.store(inner_ptr + line[:, None] * rank + narrow, inner, mask=there[:, None] & held)
    for start in range(0, width, TILE):
        at = start + tl.arange(0, TILE)
        inside = at < width
        mask = there[:, None] & inside
        spot = rotation_ptr + at[None, :] * rotation_row + narrow[:, None] * rotation_column
        rotation = tl.load(spot, mask=held[:, None] & inside[None, :], other=0.0)
        aim = h_ptr + row[:, None] * width + at
        more = tl.dot(inner, rotation, input_precision=PRECISION)
        tl.store(aim, (tl.load(aim, mask=mask, other=0.0).to(tl.float32) + more).to(dtype), mask=mask)


def _sizes(rank: int, itemsize: int) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the blocks and the options for a rank and the bytes of a number; few rows a program, as they are few."""
    rank = max(16, triton.next_power_of_2(rank))
    blocks = {"ROWS": 16, "RANK": rank, "TILE": 64 if itemsize > 2 or rank > 64 else 128}
    return blocks | {"PRECISION": "ieee" if itemsize > 2 else "tf32"}, {"num_warps": 4, "num_stages": 3}


def edit(h: Tensor, rows: Tensor, matrix: Tensor, bias: Tensor | None, rotation: Tensor) -> tuple[Tensor, Tensor]:
    """Edit rows of contiguous h (tokens, width) in place; return what they were (n, width), and E h + b (n, rank).

    Args:
        h: hidden states.
        rows: (n,), none twice.
        matrix: E (rank, width), of any strides.
        bias: b (rank,), or none.
        rotation: Q (width, rank), of any strides.
    """
    number, (rank, width) = len(rows), matrix.shape
    read, inner = h.new_empty(number, width), h.new_empty(number, rank)
    blocks, options = _sizes(rank, h.element_size())
    strides = matrix.stride(0), matrix.stride(1), rotation.stride(0), rotation.stride(1)
    if number:
        edit_kernel[(triton.cdiv(number, blocks["ROWS"]),)](
            *(h, rows, matrix, h if bias is None else bias, rotation, read, inner, number, width, rank),
            *strides,
            BIAS=bias is not None,
            **blocks,
            **options,
        )
    return read, inner


def _builds() -> list[Build]:
    made = []
    for label, dtype, width, rank in (
        ("bf16", tl.bfloat16, 2048, 8),
        ("bf16", tl.bfloat16, 4096, 8),
        ("bf16", tl.bfloat16, 4096, 64),
        ("fp16", tl.float16, 4096, 8),
        ("fp32", tl.float32, 4096, 8),
    ):
        blocks, options = _sizes(rank, 4 if dtype == tl.float32 else 2)
        parts = ("h", "matrix", "bias", "rotation", "read", "inner")
        arguments: dict[str, Any] = {f"{part}_ptr": dtype for part in parts}
        arguments |= {"rows_ptr": tl.int64, "number": 112, "width": width, "rank": rank, "BIAS": True, **blocks}
        arguments |= {"matrix_row": width, "matrix_column": 1, "rotation_row": rank, "rotation_column": 1}
        made.append(Build(f"edit, {label}, {width}, r {rank}", edit_kernel, arguments, options, dtype != tl.float32))
    return made


BUILDS = _builds()
