"""MoRA's update of type 6, forward and for the input's gradient: rotation, product and sum in one pass.

    out_c += M R_c x_c        dx_c += (M R_c)^T g_c        chunk c of r̂ entries, R_c a rotation in pairs (j, j + r̂/2)

The last chunk is filled up with the head of x, and the output is repeated where it is longer than all chunks: both are
a matter of where is read and written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from lit_peft.kernels.build import Build

if TYPE_CHECKING:
    from torch import Tensor


@triton.jit
def mora_kernel(
    out_ptr,
    x_ptr,
    m_ptr,
    turn_ptr,
    rows,
    inputs,
    outputs,
    width,
    chunks,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add to out (rows, outputs): a block of rows, a chunk, and COLS of its entries a program."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    chunk, slot = tl.program_id(1), tl.program_id(2) * COLS + tl.arange(0, COLS)
    there, held, half = row < rows, slot < width, width // 2
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    total = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, half, TILE):
        pair = start + tl.arange(0, TILE)
        inside = pair < half
        cos = tl.load(turn_ptr + chunk * half + pair, mask=inside, other=0.0)
        sin = tl.load(turn_ptr + (chunks + chunk) * half + pair, mask=inside, other=0.0)
        at = chunk * width + pair
        other = at + half
        at, other = tl.where(at < inputs, at, at - inputs), tl.where(other < inputs, other, other - inputs)
        read = there[:, None] & inside
        first = tl.load(x_ptr + row[:, None] * inputs + at, mask=read, other=0.0).to(tl.float32)
        second = tl.load(x_ptr + row[:, None] * inputs + other, mask=read, other=0.0).to(tl.float32)
        spot = m_ptr + slot[None, :] * width + pair[:, None]
        given = held[None, :] & inside[:, None]
        turned = (first * cos - second * sin).to(dtype)
        total = tl.dot(turned, tl.load(spot, mask=given, other=0.0), total, input_precision=PRECISION)
        turned = (second * cos + first * sin).to(dtype)
        total = tl.dot(turned, tl.load(spot + half, mask=given, other=0.0), total, input_precision=PRECISION)
    for start in range(0, outputs, tl.num_programs(1) * width):
        at = start + chunk * width + slot
        aim = out_ptr + row[:, None] * outputs + at
        mask = there[:, None] & (held & (at < outputs))
        tl.store(aim, (tl.load(aim, mask=mask, other=0.0).to(tl.float32) + total).to(dtype), mask=mask)


@triton.jit
def mora_backward_kernel(
    dx_ptr,
    g_ptr,
    m_ptr,
    turn_ptr,
    rows,
    inputs,
    outputs,
    width,
    chunks,
    from_chunk,
    WRAPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add to dx (rows, inputs): a block of rows, a chunk, and TILE of its pairs a program.

    What the last chunk has of the head of x is added by a launch of its own (WRAPS): the first chunk adds there, too.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    chunk, pair = from_chunk + tl.program_id(1), tl.program_id(2) * TILE + tl.arange(0, TILE)
    half = width // 2
    there, inside = row < rows, pair < half
    dtype: tl.constexpr = dx_ptr.dtype.element_ty
    first, second = tl.zeros((ROWS, TILE), tl.float32), tl.zeros((ROWS, TILE), tl.float32)
    for start in range(0, width, COLS):
        slot = start + tl.arange(0, COLS)
        at = chunk * width + slot
        held = (slot < width) & (at < outputs)
        g = tl.load(g_ptr + row[:, None] * outputs + at, mask=there[:, None] & held, other=0.0)
        spot = m_ptr + slot[:, None] * width + pair[None, :]
        given = held[:, None] & inside[None, :]
        first = tl.dot(g, tl.load(spot, mask=given, other=0.0), first, input_precision=PRECISION)
        second = tl.dot(g, tl.load(spot + half, mask=given, other=0.0), second, input_precision=PRECISION)
    cos = tl.load(turn_ptr + chunk * half + pair, mask=inside, other=0.0)
    sin = tl.load(turn_ptr + (chunks + chunk) * half + pair, mask=inside, other=0.0)
    at = chunk * width + pair
    other = at + half
    if WRAPS:
        here, there_too = inside & (at >= inputs), inside & (other >= inputs)
        at, other = at - inputs, other - inputs
    else:
        here, there_too = inside & (at < inputs), inside & (other < inputs)
    aim, mask = dx_ptr + row[:, None] * inputs + at, there[:, None] & here
    more = first * cos + second * sin
    tl.store(aim, (tl.load(aim, mask=mask, other=0.0).to(tl.float32) + more).to(dtype), mask=mask)
    aim, mask = dx_ptr + row[:, None] * inputs + other, there[:, None] & there_too
    more = second * cos - first * sin
    tl.store(aim, (tl.load(aim, mask=mask, other=0.0).to(tl.float32) + more).to(dtype), mask=mask)


def _sizes(itemsize: int, width: int) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the blocks and the options for the bytes of a number and r̂."""
    if itemsize > 2:  # exact products of float32, which have no tensor cores
        return {"ROWS": 32, "COLS": 32, "TILE": 32, "PRECISION": "ieee"}, {"num_warps": 4, "num_stages": 2}
    if width % 32:  # numbers come one by one: fewer of them at a time
        return {"ROWS": 64, "COLS": 32, "TILE": 32, "PRECISION": "tf32"}, {"num_warps": 4, "num_stages": 2}
    return {"ROWS": 64, "COLS": 64, "TILE": 64, "PRECISION": "tf32"}, {"num_warps": 4, "num_stages": 3}


def mora(out: Tensor, x: Tensor, m: Tensor, turn: Tensor) -> None:
    """Add M R_c x_c to each chunk of contiguous out (rows, outputs).

    Args:
        out: what is added to.
        x: (rows, inputs).
        m: M (r̂, r̂).
        turn: cos and sin (2, chunks, r̂ / 2) in float32.
    """
    (rows, outputs), inputs, width = out.shape, x.shape[1], len(m)
    number = min(triton.cdiv(inputs, width), triton.cdiv(outputs, width))
    blocks, options = _sizes(x.element_size(), width)
    grid = triton.cdiv(rows, blocks["ROWS"]), number, triton.cdiv(width, blocks["COLS"])
    if rows:
        mora_kernel[grid](out, x, m, turn, rows, inputs, outputs, width, turn.shape[1], **blocks, **options)


def mora_backward(dx: Tensor, g: Tensor, m: Tensor, turn: Tensor) -> None:
    """Add (M R_c)^T g_c to each chunk of contiguous dx (rows, inputs), g (rows, outputs) not longer than all chunks."""
    (rows, inputs), outputs, width = dx.shape, g.shape[1], len(m)
    number = min(triton.cdiv(inputs, width), triton.cdiv(outputs, width))
    blocks, options = _sizes(g.element_size(), width)
    sizes = rows, inputs, outputs, width, turn.shape[1]
    across, tiles = triton.cdiv(rows, blocks["ROWS"]), triton.cdiv(width // 2, blocks["TILE"])
    if not rows:
        return
    mora_backward_kernel[across, number, tiles](dx, g, m, turn, *sizes, 0, WRAPS=False, **blocks, **options)
    if number * width > inputs:
        mora_backward_kernel[across, 1, tiles](dx, g, m, turn, *sizes, number - 1, WRAPS=True, **blocks, **options)


def _builds() -> list[Build]:
    made = []
    for label, dtype, inputs, outputs, width in (
        ("bf16", tl.bfloat16, 4096, 4096, 256),
        ("bf16", tl.bfloat16, 4096, 14336, 384),
        ("fp16", tl.float16, 2048, 2048, 182),
        ("fp32", tl.float32, 576, 576, 96),
    ):
        blocks, options = _sizes(4 if dtype == tl.float32 else 2, width)
        name = f"{label}, {inputs} to {outputs}, r̂ {width}"
        common: dict[str, Any] = {"m_ptr": dtype, "turn_ptr": tl.float32, "rows": 8192, "inputs": inputs}
        common |= {"outputs": outputs, "width": width, "chunks": -(-inputs // width), **blocks}
        forward = {"out_ptr": dtype, "x_ptr": dtype} | common
        backward = {"dx_ptr": dtype, "g_ptr": dtype, "from_chunk": 0, "WRAPS": False} | common
        half = dtype != tl.float32
        made.append(Build(f"mora, {name}", mora_kernel, forward, options, half))
        made.append(Build(f"mora backward, {name}", mora_backward_kernel, backward, options, half))
    return made


BUILDS = _builds()
