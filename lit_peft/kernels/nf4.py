"""Decoding of a weight stored as NF4, scales included, in one launch.

    W = q(level) c,    c = value(8 bits) * scale of the group + mean,  or c as it is stored

A byte holds two levels, so a table of 256 entries gives both numbers at once: two float32 in one int64, a load that
stays in the first cache. Looked up level by level it would take about twice the instructions, which is what limits
this kernel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from lit_peft.kernels.build import Build

if TYPE_CHECKING:
    from torch import Tensor

BLOCKS = 64  # of 64 weights in one program: 16 bytes of levels a thread, the widest load there is
FEW = 16  # where every weight needs an address of its own
# Products and sums may not become one operation: bitsandbytes rounds in between, and the bits are to be the same.
OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def nf4_kernel(
    levels_ptr,
    small_ptr,
    scales_ptr,
    pairs_ptr,
    values_ptr,
    rows_ptr,
    out_ptr,
    count,
    stride,
    WIDE: tl.constexpr,
    NESTED: tl.constexpr,
    FLAT: tl.constexpr,
    WHOLE: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """W (out, WIDE), rows `stride` apart, of `count` weights; BLOCKS blocks of 64 a program.

    NESTED: the c are in 8 bits. FLAT: rows lie end to end and have no factor, so that WIDE does not matter. WHOLE: no
    block ends inside of a row (FLAT: of the weight). SCALED: every row has a factor.
    """
    blocks = (count - 1) // 64 + 1
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    there = block < blocks
    if NESTED:
        code = tl.load(small_ptr + block, mask=there, other=0).to(tl.int32)
        group = tl.load(scales_ptr + block // 256, mask=there, other=0.0)
        c = tl.load(values_ptr + code) * group + tl.load(scales_ptr + (blocks + 255) // 256)
    else:
        c = tl.load(scales_ptr + block, mask=there, other=0.0)
    start = block.to(tl.int64)
    byte = start[:, None] * 32 + tl.arange(0, 32)[None, :]
    stored = there[:, None] if WHOLE else 2 * byte < count
    pair = tl.load(pairs_ptr + tl.load(levels_ptr + byte, mask=stored, other=0).to(tl.int32))
    first = (pair & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True)
    second = (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    w = tl.reshape(tl.join(first * c[:, None], second * c[:, None]), (BLOCKS, 64))
    inner = tl.arange(0, 64)[None, :]
    if FLAT:
        at = start[:, None] * 64 + inner
        inside = there[:, None] if WHOLE else at < count
    elif WHOLE:
        row = block // (WIDE // 64)
        column = (block - row * (WIDE // 64)) * 64
        at = (row.to(tl.int64) * stride + column)[:, None] + inner
        inside = there[:, None]
        if SCALED:
            w = w * tl.load(rows_ptr + row, mask=there, other=0.0)[:, None]
    else:
        row = start * 64 // WIDE  # where the block begins; the divisions of single weights are 32 bits wide
        column = (start * 64 - row * WIDE).to(tl.int32)[:, None] + inner
        more = column // WIDE
        at = (row * stride)[:, None] + more * (stride - WIDE) + column
        inside = start[:, None] * 64 + inner < count
        if SCALED:
            w = w * tl.load(rows_ptr + row[:, None] + more, mask=inside, other=0.0)
    tl.store(out_ptr + at, w.to(out_ptr.dtype.element_ty), mask=inside)


def nf4(
    levels: Tensor,
    small: Tensor | None,
    scales: Tensor,
    pairs: Tensor,
    values: Tensor,
    rows: Tensor | None,
    out: Tensor,
) -> None:
    """Fill out (out, wide) in bfloat16, float16 or float32, whose rows may lie apart.

    Args:
        levels: two a byte, uint8.
        small: the 8-bit c of the blocks, uint8; None where they are not quantised.
        scales: float32: of the groups of c, and their mean; or the c themselves.
        pairs: (256,) int64: the two float32 numbers that a byte of levels stands for.
        values: (256,) float32: the numbers that the 8-bit c stand for.
        rows: factors of the rows (out,), float32, or None.
        out: numbers of a row lie side by side.
    """
    tall, wide = out.shape
    flat = rows is None and out.stride(0) == wide
    whole = (tall * wide if flat else wide) % 64 == 0
    blocks = BLOCKS if flat or whole else FEW
    nf4_kernel[(triton.cdiv(tall * wide, 64 * blocks),)](
        levels,
        scales if small is None else small,
        scales,
        pairs,
        values,
        scales if rows is None else rows,
        out,
        tall * wide,
        out.stride(0),
        WIDE=0 if flat else wide,  # known when it is compiled: models have few widths, and divisions are dear
        NESTED=small is not None,
        FLAT=flat,
        WHOLE=whole,
        SCALED=rows is not None,
        BLOCKS=blocks,
        **OPTIONS,
    )


def _build(
    label: str, dtype: Any, wide: int = 4096, border: int = 0, nested: bool = True, scaled: bool = False
) -> Build:
    flat = not (border or scaled)
    tensors = {"levels_ptr": tl.uint8, "small_ptr": tl.uint8, "scales_ptr": tl.float32, "pairs_ptr": tl.int64}
    whole = wide % 64 == 0
    numbers = {"count": 4096 * wide, "stride": wide + border, "WIDE": 0 if flat else wide}
    flags = {"NESTED": nested, "FLAT": flat, "WHOLE": whole, "SCALED": scaled, "BLOCKS": BLOCKS if whole else FEW}
    ends = {"values_ptr": tl.float32, "rows_ptr": tl.float32, "out_ptr": dtype}
    return Build(label, nf4_kernel, {**tensors, **ends, **numbers, **flags}, OPTIONS)


BUILDS = [
    _build("bf16", tl.bfloat16),
    _build("fp16", tl.float16),
    _build("fp32", tl.float32),
    _build("bf16, scales in float32", tl.bfloat16, nested=False),
    _build("bf16, bordered", tl.bfloat16, border=64),
    _build("bf16, bordered, rows scaled", tl.bfloat16, border=64, scaled=True),
    _build("bf16, bordered, uneven", tl.bfloat16, wide=4082, border=78, scaled=True),
]
