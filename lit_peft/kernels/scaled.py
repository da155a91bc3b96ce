"""The backward pass of column factors: g l, and the sums over rows of g z, both operands read once.

The sums are taken in two stages, always in the same order: each program adds up the rows of its share, and the shares
are added up afterwards.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from lit_peft.kernels.build import Build

if TYPE_CHECKING:
    from torch import Tensor

COLUMNS, ROWS = 128, 32
SHARES = 64  # of the rows, at most
OPTIONS = {"num_warps": 4}


@triton.jit
def scale_and_sum_kernel(
    g_ptr, z_ptr, factor_ptr, out_ptr, total_ptr, rows, width, share, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """out = g l (rows, width), and each share's sum of g z (shares, width) in float32; a block of columns a program."""
    at = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.program_id(1)
    inside = at < width
    factor = tl.load(factor_ptr + at, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    for first in range(part * share, tl.minimum((part + 1) * share, rows), ROWS):
        row = first + tl.arange(0, ROWS)
        spot = row.to(tl.int64)[:, None] * width + at[None, :]
        here = (row < rows)[:, None] & inside[None, :]
        g = tl.load(g_ptr + spot, mask=here, other=0.0).to(tl.float32)
        z = tl.load(z_ptr + spot, mask=here, other=0.0).to(tl.float32)
        total += tl.sum(g * z, 0)
        tl.store(out_ptr + spot, (g * factor[None, :]).to(out_ptr.dtype.element_ty), mask=here)
    tl.store(total_ptr + part.to(tl.int64) * width + at, total, mask=inside)


def shared_out(rows: int) -> tuple[int, int]:
    """Return into how many shares some rows fall, and how many rows one has: a multiple of `ROWS`."""
    share = ROWS * max(1, triton.cdiv(rows, ROWS * SHARES))
    return max(1, triton.cdiv(rows, share)), share


def scale_and_sum(g: Tensor, z: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Return g l (rows, width) and sum_t g z (width,) in float32, of contiguous g and z (rows, width), l (width,)."""
    import torch

    rows, width = g.shape
    shares, share = shared_out(rows)
    out = torch.empty_like(g)
    total = torch.empty(shares, width, device=g.device, dtype=torch.float32)
    grid = (triton.cdiv(width, COLUMNS), shares)
    scale_and_sum_kernel[grid](
        g, z, factor.contiguous(), out, total, rows, width, share, ROWS=ROWS, COLUMNS=COLUMNS, **OPTIONS
    )
    return out, total.sum(0)


def _builds() -> list[Build]:
    made = []
    sizes: dict[str, Any] = {"rows": 8192, "width": 4096, "share": 128, "ROWS": ROWS, "COLUMNS": COLUMNS}
    for label, dtype in (("bf16", tl.bfloat16), ("fp16", tl.float16), ("fp32", tl.float32)):
        ends = {"g_ptr": dtype, "z_ptr": dtype, "out_ptr": dtype, "factor_ptr": tl.float32, "total_ptr": tl.float32}
        made.append(Build(f"scale and sum, {label}", scale_and_sum_kernel, ends | sizes, OPTIONS))
    return made


BUILDS = _builds()
