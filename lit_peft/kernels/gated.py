"""silu(e) g with the low-rank updates of e and g added on the way, and its gradients, one tile a program.

e = e0 + s_e H_e^T B_e^T and g = g0 + s_g H_g^T B_g^T are in registers only: e0 and g0 are read once and never written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from lit_peft.kernels.build import Build

if TYPE_CHECKING:
    from torch import Tensor


@triton.jit
def _expanded(
    y_ptr, h_ptr, b_ptr, row, column, rows, width, stride, scale,
    R: tl.constexpr, PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of y0 + s H^T B^T in float32: y0 (rows, width) `stride` apart, H (R, rows), B (width, R)."""
    inside = (row < rows)[:, None] & (column < width)[None, :]
    y = tl.load(y_ptr + row[:, None] * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if R > 0:
        at = tl.arange(0, PAD)
        h_inside, b_inside = (row < rows)[:, None] & (at < R)[None, :], (at < R)[:, None] & (column < width)[None, :]
        h = tl.load(h_ptr + at[None, :].to(tl.int64) * rows + row[:, None], mask=h_inside, other=0.0)
        b = tl.load(b_ptr + column[None, :] * R + at[:, None], mask=b_inside, other=0.0)
        y += scale * tl.dot(h, b.to(h.dtype), input_precision="ieee")
    return y


@triton.jit
def gated_kernel(
    e_ptr, g_ptr, he_ptr, be_ptr, hg_ptr, bg_ptr, out_ptr, rows, width, e_stride, g_stride, e_scale, g_scale,
    R_E: tl.constexpr, R_G: tl.constexpr, PAD_E: tl.constexpr, PAD_G: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of silu(e) g (rows, width)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    e = _expanded(e_ptr, he_ptr, be_ptr, row, column, rows, width, e_stride, e_scale, R_E, PAD_E, BLOCK_M, BLOCK_N)
    g = _expanded(g_ptr, hg_ptr, bg_ptr, row, column, rows, width, g_stride, g_scale, R_G, PAD_G, BLOCK_M, BLOCK_N)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    out = e * tl.sigmoid(e) * g
    tl.store(out_ptr + row[:, None] * width + column[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def gated_backward_kernel(
    d_ptr, e_ptr, g_ptr, he_ptr, be_ptr, hg_ptr, bg_ptr, out_ptr, rows, width, e_stride, g_stride, e_scale, g_scale,
    R_E: tl.constexpr, R_G: tl.constexpr, PAD_E: tl.constexpr, PAD_G: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of de and one of dg, beside each other in `out` (rows, 2 width), from the gradient d (rows, width)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    e = _expanded(e_ptr, he_ptr, be_ptr, row, column, rows, width, e_stride, e_scale, R_E, PAD_E, BLOCK_M, BLOCK_N)
    d = tl.load(d_ptr + row[:, None] * width + column[None, :], mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(e)
    at = out_ptr + row[:, None] * (2 * width) + column[None, :]
    tl.store(at + width, (d * e * share).to(out_ptr.dtype.element_ty), mask=inside)
    g = _expanded(g_ptr, hg_ptr, bg_ptr, row, column, rows, width, g_stride, g_scale, R_G, PAD_G, BLOCK_M, BLOCK_N)
    de = d * g * share * (1 + e * (1 - share))
    tl.store(at, de.to(out_ptr.dtype.element_ty), mask=inside)


def _padded(r: int) -> int:
    padded: int = max(16, triton.next_power_of_2(r))
    return padded


def _options(itemsize: int) -> dict[str, int]:
    return {"BLOCK_M": 32 if itemsize > 2 else 64, "BLOCK_N": 64, "num_warps": 4}


def _launch(kernel: Any, ends: tuple[Tensor, ...], e: Tensor, g: Tensor, low: tuple[Any, ...], out: Tensor) -> Tensor:
    h_e, b_e, s_e, h_g, b_g, s_g = low
    (rows, width), ranks = e.shape, tuple(0 if h is None else len(h) for h in (h_e, h_g))
    options = _options(e.element_size())
    grid = (triton.cdiv(rows, options["BLOCK_M"]), triton.cdiv(width, options["BLOCK_N"]))
    pairs = (e if part is None else part.contiguous() for part in (h_e, b_e, h_g, b_g))
    kernel[grid](
        *ends, e, g, *pairs, out, rows, width, e.stride(0), g.stride(0), s_e, s_g,
        R_E=ranks[0], R_G=ranks[1], PAD_E=_padded(ranks[0]), PAD_G=_padded(ranks[1]), **options,
    )  # fmt: skip
    return out


def gated(e: Tensor, g: Tensor, *low: Any) -> Tensor:
    """Return silu(e) g (rows, width), of e0 and g0 (rows, width) with unit stride in a row.

    Args:
        e: e0.
        g: g0.
        *low: H_e (r, rows), B_e (width, r), s_e, then the same of g; None for an H and a B that are not there.
    """
    import torch

    return _launch(gated_kernel, (), e, g, low, torch.empty(e.shape, dtype=e.dtype, device=e.device))


def gated_backward(d: Tensor, e: Tensor, g: Tensor, *low: Any) -> Tensor:
    """Return de and dg beside each other (rows, 2 width), of contiguous d (rows, width) and the rest as in `gated`."""
    import torch

    rows, width = e.shape
    out = torch.empty((rows, 2 * width), dtype=e.dtype, device=e.device)
    return _launch(gated_backward_kernel, (d,), e, g, low, out)


def _builds() -> list[Build]:
    made = []
    for label, dtype, size, r in (
        ("bf16", tl.bfloat16, 2, 16),
        ("bf16", tl.bfloat16, 2, 64),
        ("bf16", tl.bfloat16, 2, 0),
        ("fp16", tl.float16, 2, 16),
        ("fp32", tl.float32, 4, 16),
    ):
        names = ("e_ptr", "g_ptr", "he_ptr", "be_ptr", "hg_ptr", "bg_ptr", "out_ptr")
        arguments: dict[str, Any] = {
            **dict.fromkeys(names, dtype), "be_ptr": tl.float32, "bg_ptr": tl.float32,
            "rows": 8192, "width": 14336, "e_stride": 28672, "g_stride": 28672,
            "e_scale": 2.0, "g_scale": 2.0, "R_E": r, "R_G": r, "PAD_E": _padded(r), "PAD_G": _padded(r),
        }  # fmt: skip
        for name, kernel, more in (
            ("gated", gated_kernel, {}),
            ("gated backward", gated_backward_kernel, {"d_ptr": dtype}),
        ):
            blocks = _options(size)
            options = {"num_warps": blocks.pop("num_warps")}
            products = r > 0 and size == 2
            made.append(Build(f"{name}, {label}, r {r}", kernel, arguments | more | blocks, options, products))
    return made


BUILDS = _builds()
