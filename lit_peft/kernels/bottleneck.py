"""A bottleneck adapter, forward and backward, one program a block of rows.

    z = D x + b_d,   out = y + s c (U act(z) + b_u)        p = s U^T g,   dz = c p act'(z),   dx = [g +] D^T dz

The narrow z leaves the program once, for the backward pass. D and U are streamed in tiles; a program reads its rows of
x twice where y is x, the second time from the cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from lit_peft.kernels.build import Build

if TYPE_CHECKING:
    from torch import Tensor


@triton.jit
def _erf_half(z):
    """(1 + erf(z / sqrt 2)) / 2."""
    return 0.5 * (1 + tl.erf(z * 0.7071067811865476))


@triton.jit
def _gelu_sigmoid(z):
    """(1 + tanh(u)) / 2 = sigmoid(2 u), u = sqrt(2 / pi) (z + 0.044715 z^3)."""
    return tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))


@triton.jit
def _value(z, ACT: tl.constexpr):
    """act(z), in float32."""
    if ACT == "relu":
        out = tl.maximum(z, 0.0)
    elif ACT == "gelu":
        out = z * _erf_half(z)
    elif ACT == "gelu_tanh":
        out = z * _gelu_sigmoid(z)
    elif ACT == "silu":
        out = z * tl.sigmoid(z)
    elif ACT == "tanh":
        out = 2 * tl.sigmoid(2 * z) - 1
    elif ACT == "sigmoid":
        out = tl.sigmoid(z)
    else:
        out = z
    return out


@triton.jit
def _slope(z, ACT: tl.constexpr):
    """act'(z), in float32."""
    if ACT == "relu":
        out = tl.where(z > 0, 1.0, 0.0)
    elif ACT == "gelu":
        out = _erf_half(z) + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    elif ACT == "gelu_tanh":
        half = _gelu_sigmoid(z)
        out = half + z * half * (1 - half) * 1.5957691216057308 * (1 + 0.134145 * z * z)
    elif ACT == "silu":
        half = tl.sigmoid(z)
        out = half * (1 + z * (1 - half))
    elif ACT == "tanh":
        value = 2 * tl.sigmoid(2 * z) - 1
        out = 1 - value * value
    elif ACT == "sigmoid":
        half = tl.sigmoid(z)
        out = half * (1 - half)
    else:
        out = tl.full(z.shape, 1.0, tl.float32)
    return out


@triton.jit
def bottleneck_kernel(
    x_ptr,
    y_ptr,
    down_ptr,
    down_bias_ptr,
    up_ptr,
    up_bias_ptr,
    gate_ptr,
    out_ptr,
    z_ptr,
    rows,
    width,
    tall,
    inner,
    scale,
    ADDS: tl.constexpr,
    GATED: tl.constexpr,
    ACT: tl.constexpr,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out (rows, tall) and z (rows, inner); ROWS rows a program."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    narrow = tl.arange(0, INNER)
    there, held = row < rows, narrow < inner
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    total = tl.zeros((ROWS, INNER), tl.float32)
    for start in range(0, width, TILE):
        at = start + tl.arange(0, TILE)
        inside = at < width
        x = tl.load(x_ptr + row[:, None] * width + at, mask=there[:, None] & inside, other=0.0)
        down = tl.load(
            down_ptr + narrow[None, :] * width + at[:, None], mask=held[None, :] & inside[:, None], other=0.0
        )
        total = tl.dot(x, down, total, input_precision=PRECISION)
    total += tl.load(down_bias_ptr + narrow, mask=held, other=0.0).to(tl.float32)
    # rounded before it is used, so that the backward pass sees the same number
    z = total.to(dtype)
    tl.store(z_ptr + row[:, None] * inner + narrow, z, mask=there[:, None] & held)
    h = tl.where(held, _value(z.to(tl.float32), ACT), 0.0)
    factor = tl.full((ROWS,), 1.0, tl.float32) * scale
    if GATED:
        factor *= tl.load(gate_ptr + row, mask=there, other=0.0).to(tl.float32)
    h = h.to(dtype)
    for start in range(0, tall, TILE):
        at = start + tl.arange(0, TILE)
        inside = at < tall
        up = tl.load(up_ptr + at[None, :] * inner + narrow[:, None], mask=held[:, None] & inside[None, :], other=0.0)
        more = tl.dot(h, up, input_precision=PRECISION)
        more += tl.load(up_bias_ptr + at, mask=inside, other=0.0).to(tl.float32)
        out = more * factor[:, None]
        spot = row[:, None] * tall + at
        if ADDS:
            out += tl.load(y_ptr + spot, mask=there[:, None] & inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + spot, out.to(dtype), mask=there[:, None] & inside)


@triton.jit
def bottleneck_backward_kernel(
    g_ptr,
    z_ptr,
    down_ptr,
    up_ptr,
    up_bias_ptr,
    gate_ptr,
    dz_ptr,
    h_ptr,
    dx_ptr,
    dgate_ptr,
    rows,
    width,
    tall,
    inner,
    wide,
    scale,
    SAME: tl.constexpr,
    GATED: tl.constexpr,
    INPUT: tl.constexpr,
    GATE: tl.constexpr,
    ACT: tl.constexpr,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dz (rows, inner), c act(z) and behind it c in h (rows, wide), dx (rows, width), dc (rows,)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    narrow = tl.arange(0, INNER)
    there, held = row < rows, narrow < inner
    dtype: tl.constexpr = g_ptr.dtype.element_ty
    push = tl.zeros((ROWS, INNER), tl.float32)
    dgate = tl.zeros((ROWS,), tl.float32)
    for start in range(0, tall, TILE):
        at = start + tl.arange(0, TILE)
        inside = at < tall
        g = tl.load(g_ptr + row[:, None] * tall + at, mask=there[:, None] & inside, other=0.0)
        up = tl.load(up_ptr + at[:, None] * inner + narrow[None, :], mask=held[None, :] & inside[:, None], other=0.0)
        push = tl.dot(g, up, push, input_precision=PRECISION)
        if GATE:
            bias = tl.load(up_bias_ptr + at, mask=inside, other=0.0).to(tl.float32)
            dgate += tl.sum(g.to(tl.float32) * bias, 1)
    push *= scale
    z = tl.load(z_ptr + row[:, None] * inner + narrow, mask=there[:, None] & held, other=0.0).to(tl.float32)
    h = tl.where(held, _value(z, ACT), 0.0)
    if GATE:
        tl.store(dgate_ptr + row, (dgate * scale + tl.sum(push * h, 1)).to(dtype), mask=there)
    factor = tl.full((ROWS,), 1.0, tl.float32)
    if GATED:
        factor = tl.load(gate_ptr + row, mask=there, other=0.0).to(tl.float32)
    tl.store(h_ptr + row[:, None] * wide + narrow, (h * factor[:, None]).to(dtype), mask=there[:, None] & held)
    tl.store(h_ptr + row * wide + inner, factor.to(dtype), mask=there)
    # read again: held in registers all along, it would not leave enough of them
    z = tl.load(z_ptr + row[:, None] * inner + narrow, mask=there[:, None] & held, other=0.0).to(tl.float32)
    dz = (push * factor[:, None] * _slope(z, ACT)).to(dtype)
    tl.store(dz_ptr + row[:, None] * inner + narrow, dz, mask=there[:, None] & held)
    if INPUT:
        for start in range(0, width, TILE):
            at = start + tl.arange(0, TILE)
            inside = at < width
            down = tl.load(
                down_ptr + narrow[:, None] * width + at[None, :], mask=held[:, None] & inside[None, :], other=0.0
            )
            dx = tl.dot(dz, down, input_precision=PRECISION)
            spot = row[:, None] * width + at
            if SAME:
                dx += tl.load(g_ptr + spot, mask=there[:, None] & inside, other=0.0).to(tl.float32)
            tl.store(dx_ptr + spot, dx.to(dtype), mask=there[:, None] & inside)


def _sizes(inner: int, itemsize: int) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the blocks and the options for a bottleneck and the bytes of a number."""
    block = max(16, triton.next_power_of_2(inner))
    if itemsize > 2:  # exact products of float32, which have no tensor cores
        return {"ROWS": 16, "INNER": block, "TILE": 32, "PRECISION": "ieee"}, {"num_warps": 4, "num_stages": 2}
    # "ieee" means nothing to half precision, but would keep Hopper's instructions away
    blocks = {"ROWS": 64, "INNER": block, "TILE": 32 if block > 128 else 64, "PRECISION": "tf32"}
    return blocks, {"num_warps": 8 if block > 64 else 4, "num_stages": 3}


def bottleneck(
    y: Tensor | None,
    x: Tensor,
    down: Tensor,
    down_bias: Tensor,
    up: Tensor,
    up_bias: Tensor,
    gate: Tensor | None,
    act: str,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return out (rows, tall) and z (rows, inner), of contiguous x (rows, width), D (inner, width), U (tall, inner)."""
    rows, width = x.shape
    tall, inner = up.shape
    out, z = x.new_empty(rows, tall), x.new_empty(rows, inner)
    blocks, options = _sizes(inner, x.element_size())
    ends = (x if y is None else y), down, down_bias, up, up_bias, (x if gate is None else gate)
    flags: dict[str, Any] = {"ADDS": y is not None, "GATED": gate is not None, "ACT": act}
    grid = (triton.cdiv(rows, blocks["ROWS"]),)
    if rows:
        bottleneck_kernel[grid](x, *ends, out, z, rows, width, tall, inner, scale, **flags, **blocks, **options)
    return out, z


def bottleneck_backward(
    g: Tensor,
    z: Tensor,
    down: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    gate: Tensor | None,
    act: str,
    scale: float,
    same: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dz, c act(z) with c in the column behind it, dx if D is given, and dc if b_u is; with g added if same."""
    rows, inner = z.shape
    tall = g.shape[1]
    width = tall if down is None else down.shape[1]
    wide = inner // 8 * 8 + 8  # so that rows begin at multiples of 16 bytes
    dz, h = g.new_empty(rows, inner), g.new_empty(rows, wide)
    dx = g.new_empty(0) if down is None else g.new_empty(rows, width)
    dgate = g.new_empty(0 if up_bias is None else rows)
    blocks, options = _sizes(inner, g.element_size())
    ends = (g if down is None else down), up, (g if up_bias is None else up_bias), (g if gate is None else gate)
    flags: dict[str, Any] = {"SAME": same, "GATED": gate is not None, "ACT": act}
    flags |= {"INPUT": down is not None, "GATE": up_bias is not None}
    sizes = rows, width, tall, inner, wide, scale
    grid = (triton.cdiv(rows, blocks["ROWS"]),)
    if rows:
        bottleneck_backward_kernel[grid](g, z, *ends, dz, h, dx, dgate, *sizes, **flags, **blocks, **options)
    return dz, h, dx, dgate


def _builds() -> list[Build]:
    made = []
    for label, dtype, width, inner, act, gated in (
        ("bf16", tl.bfloat16, 2048, 64, "gelu", False),
        ("bf16", tl.bfloat16, 4096, 256, "relu", False),
        ("bf16, gated", tl.bfloat16, 4096, 128, "silu", True),
        ("fp16", tl.float16, 4096, 16, "gelu_tanh", False),
        ("fp32", tl.float32, 4096, 64, "relu", False),
    ):
        blocks, options = _sizes(inner, 4 if dtype == tl.float32 else 2)
        name = f"{label}, {width} to {inner}, {act}"
        common: dict[str, Any] = {"rows": 8192, "width": width, "tall": width, "inner": inner, "scale": 4.0}
        common |= {"GATED": gated, "ACT": act, **blocks}
        parts = {f"{part}_ptr": dtype for part in ("down", "up", "up_bias", "gate", "z")}
        forward = {f"{part}_ptr": dtype for part in ("x", "y", "down_bias", "out")} | parts | common
        backward = {f"{part}_ptr": dtype for part in ("g", "dz", "h", "dx", "dgate")} | parts | common
        flags = {"SAME": True, "INPUT": True, "GATE": gated, "wide": inner + 8}
        half = dtype != tl.float32
        made.append(Build(f"bottleneck, {name}", bottleneck_kernel, forward | {"ADDS": True}, options, half))
        made.append(Build(f"backward, {name}", bottleneck_backward_kernel, backward | flags, options, half))
    return made


BUILDS = _builds()
