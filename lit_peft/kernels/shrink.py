"""Down to the rank of an update: H = D(x) A^T, in one read of x, which can write [x | s H L] beside it.

D drops entries by a seed: entry (row, column) falls by a number that depends on the seed, the row and the column alone,
so that every kernel that draws it again draws the same, in blocks of any size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from lit_peft.kernels.build import Build

if TYPE_CHECKING:
    from torch import Tensor


@triton.jit
def stays(seed, row, start, width, p, BM: tl.constexpr, BK: tl.constexpr):
    """Which entries (BM, BK) of some rows (BM,) stay, from column `start` on, which is a multiple of 4."""
    fours = start // 4 + tl.arange(0, BK // 4)
    a, b, c, d = tl.rand4x(seed, row[:, None].to(tl.int64) * ((width + 3) // 4) + fours[None, :])  # one draw, 4 numbers
    return tl.reshape(tl.join(tl.join(a, b), tl.join(c, d)), (BM, BK)) >= p


@triton.jit
def shrink_kernel(
    x_ptr,
    a_ptr,
    gain_ptr,
    h_ptr,
    packed_ptr,
    rows,
    width,
    r,
    x_stride,
    a_stride,
    scale,
    p,
    seed,
    steps,
    BM: tl.constexpr,
    BK: tl.constexpr,
    RANK: tl.constexpr,
    PAD: tl.constexpr,
    GAIN: tl.constexpr,
    DROP: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """H (rows, r), or one part of its sum a program of axis 1; packed (rows, width + PAD) where PAD is above 0."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    rank, at = tl.arange(0, RANK), tl.arange(0, BK)
    here = (row < rows)[:, None]
    wide = width + PAD
    h = tl.zeros((BM, RANK), dtype=tl.float32)
    first = tl.program_id(1) * steps * BK
    for start in range(first, min(first + steps * BK, width), BK):
        column = start + at
        inside = (column < width)[None, :]
        x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=here & inside, other=0.0)
        if PAD:
            tl.store(packed_ptr + row[:, None] * wide + column[None, :], x, mask=here & inside)
        a = tl.load(a_ptr + rank[:, None].to(tl.int64) * a_stride + column[None, :], (rank < r)[:, None] & inside, 0.0)
        if DROP:
            x = tl.where(stays(seed, row, start, width, p, BM, BK), x, 0.0)
        h = tl.dot(x, tl.trans(a.to(x.dtype)), h, input_precision=PRECISION)
    if DROP:
        h = h / (1 - p)
    inner = (rank < r)[None, :]
    if WHOLE:
        tl.store(h_ptr + row[:, None] * r + rank[None, :], h.to(h_ptr.dtype.element_ty), mask=here & inner)
    else:
        part = tl.program_id(1).to(tl.int64) * rows
        tl.store(h_ptr + (part + row)[:, None] * r + rank[None, :], h, mask=here & inner)
    if PAD and WHOLE:
        z = h * scale
        if GAIN:
            z = z * tl.load(gain_ptr + rank, mask=rank < r, other=0.0).to(tl.float32)[None, :]
        border = packed_ptr + row[:, None] * wide + width
        tl.store(border + rank[None, :], z.to(packed_ptr.dtype.element_ty), mask=here)
        if PAD > RANK:
            rest = tl.arange(0, PAD)[None, :]
            nothing = tl.zeros((BM, PAD), dtype=packed_ptr.dtype.element_ty)
            tl.store(border + rest, nothing, mask=here & (rest >= RANK))


def padded(r: int) -> int:
    """Return the width of the blocks that hold a rank."""
    return max(16, 1 << (r - 1).bit_length())


def turned(h: Tensor | None) -> bool:
    """Return whether it is H^T that lies in memory row by row, of H (r, rows)."""
    return h is not None and not h.is_contiguous()


def blocks(r: int, itemsize: int, dropped: bool = False) -> dict[str, Any]:
    """Return the block sizes and warps for a rank, by the bytes of an entry; random numbers take registers."""
    if itemsize > 2:
        return {"BM": 32, "BK": 32, "num_warps": 4, "num_stages": 2}
    deep = 128 if r <= 32 else 64 if r <= 64 else 32
    return {"BM": 64, "BK": deep, "num_warps": 8 if r > 64 or dropped else 4, "num_stages": 3}


def parts(rows: int, width: int, device: Any, block: dict[str, Any]) -> int:
    """Return among how many programs a row is shared out: with few rows, most of a GPU would do nothing."""
    import torch

    if device.type != "cuda":
        return 1
    there = torch.cuda.get_device_properties(device).multi_processor_count
    found: int = min(there // triton.cdiv(rows, block["BM"]), width // (4 * block["BK"]))
    return max(1, found)


def precision() -> str:
    """Return how float32 is multiplied: as torch does it."""
    import torch

    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def shrink(
    x: Tensor,
    a: Tensor,
    gain: Tensor | None,
    scale: float,
    p: float,
    seed: int,
    pad: int,
    split: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return H = D(x) A^T (rows, r) in x's dtype, and [x | s H diag(gain) | 0] (rows, width + pad) if pad is not 0.

    Args:
        x: (rows, width), each row contiguous.
        a: (r, width), each row contiguous, in any floating dtype.
        gain: (r,) or none.
        scale: s.
        p: the share of entries that are dropped.
        seed: of the numbers that decide which.
        pad: columns of the border, a power of two, at least 64 and the rank.
        split: among how many programs a row is shared out; 0: as it fits the GPU.
    """
    import torch

    (rows, width), r, rank = x.shape, len(a), padded(len(a))
    block = blocks(rank, x.element_size(), p > 0)
    split = split or parts(rows, width, x.device, block)
    steps = triton.cdiv(triton.cdiv(width, block["BK"]), split)
    whole = split == 1
    h = x.new_empty((rows, r)) if whole else x.new_empty((split, rows, r), dtype=torch.float32)
    packed = x.new_empty((rows, width + pad) if pad else (0,))
    shrink_kernel[(triton.cdiv(rows, block["BM"]), split)](
        x,
        a,
        a if gain is None else gain,
        h,
        packed,
        rows,
        width,
        r,
        x.stride(0),
        a.stride(0),
        scale,
        p,
        seed,
        steps,
        RANK=rank,
        PAD=pad,
        GAIN=gain is not None,
        DROP=p > 0,
        WHOLE=whole,
        PRECISION=precision(),
        **block,
    )
    if whole:
        return h, packed
    total = h.sum(0)
    if pad:
        packed[:, width : width + r] = total * scale if gain is None else total * gain.float() * scale
        packed[:, width + r :] = 0
    return total.to(x.dtype), packed


def _builds() -> list[Build]:
    made = []
    numbers = {
        "rows": 8192,
        "x_stride": 4096,
        "a_stride": 4096,
        "width": 4096,
        "scale": 2.0,
        "seed": 2**61,
        "steps": 32,
    }
    for label, dtype, r, pad, p in (
        ("bf16, r 16", tl.bfloat16, 16, 0, 0.0),
        ("bf16, r 16, packed", tl.bfloat16, 16, 64, 0.0),
        ("bf16, r 16, packed, dropped", tl.bfloat16, 16, 64, 0.1),
        ("bf16, r 64, packed", tl.bfloat16, 64, 64, 0.0),
        ("bf16, r 128", tl.bfloat16, 128, 0, 0.0),
        ("fp16, r 16, packed", tl.float16, 16, 64, 0.0),
        ("fp32, r 16, packed", tl.float32, 16, 64, 0.0),
        ("fp32, r 64, dropped", tl.float32, 64, 0, 0.1),
    ):
        block = blocks(r, 4 if dtype == tl.float32 else 2, p > 0)
        options = {key: block[key] for key in ("num_warps", "num_stages")}
        pointers = {"x_ptr": dtype, "a_ptr": tl.float32, "gain_ptr": tl.float32, "h_ptr": dtype, "packed_ptr": dtype}
        choices = {"BM": block["BM"], "BK": block["BK"], "RANK": r, "PAD": pad, "GAIN": False, "DROP": p > 0}
        choices |= {"WHOLE": True, "PRECISION": "ieee"}
        arguments = pointers | numbers | choices | {"r": r, "p": p}
        made.append(Build(label, shrink_kernel, arguments, options, products=dtype != tl.float32))
    return made


BUILDS = _builds()
