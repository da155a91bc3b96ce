"""Rotary positions for queries and keys in one launch, one token a program; backward with the angles' signs changed.

(u, v) -> (u cos - v sin, v cos' + u sin')         u, v the two halves of a head, cos and cos' those of the angles
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from lit_peft.kernels.build import Build

if TYPE_CHECKING:
    from torch import Tensor


@triton.jit
def angles(cos_ptr, sin_ptr, place, inside, half):
    """Cosines and sines of the two halves of heads, in float32: those of the first from `place` on."""
    low = tl.load(cos_ptr + place, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(cos_ptr + place + half, mask=inside, other=0.0).to(tl.float32)
    low_sin = tl.load(sin_ptr + place, mask=inside, other=0.0).to(tl.float32)
    high_sin = tl.load(sin_ptr + place + half, mask=inside, other=0.0).to(tl.float32)
    return low, high, low_sin, high_sin


@triton.jit
def turned(u, v, low, high, low_sin, high_sin, BACKWARD: tl.constexpr):
    """The two halves of heads turned, or turned back."""
    if BACKWARD:
        first, second = u * low + v * high_sin, v * high - u * low_sin
    else:
        first, second = u * low - v * low_sin, v * high + u * high_sin
    return first, second


@triton.jit
def _turned(
    x_ptr, y_ptr, low, high, low_sin, high_sin, batch, place, token, heads, half, x_batch, x_head, x_token,
    HEADS: tl.constexpr, HALF: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """All heads of one token: x with any strides but 1 in a head, y (tokens, heads, 2 half) contiguous."""
    head, at = tl.arange(0, HEADS)[:, None].to(tl.int64), tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (at < half)
    source = x_ptr + batch * x_batch + place * x_token + head * x_head + at
    u = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
    target = y_ptr + (token * heads + head) * (2 * half) + at
    first, second = turned(u, v, low, high, low_sin, high_sin, BACKWARD)
    tl.store(target, first.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(target + half, second.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def rotary_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_out, k_out, length, q_heads, k_heads, half, angles_batch,
    q_batch, q_head, q_token, k_batch, k_head, k_token,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HALF: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Queries and keys of one token, turned by its angles (batch or 1, length, 2 half)."""
    token = tl.program_id(0).to(tl.int64)
    batch, place = token // length, token % length
    at = tl.arange(0, HALF)[None, :]
    angle = batch * angles_batch + place * (2 * half) + at
    low, high, low_sin, high_sin = angles(cos_ptr, sin_ptr, angle, at < half, half)
    _turned(
        q_ptr, q_out, low, high, low_sin, high_sin, batch, place, token, q_heads, half, q_batch, q_head, q_token,
        Q_HEADS, HALF, BACKWARD,
    )  # fmt: skip
    _turned(
        k_ptr, k_out, low, high, low_sin, high_sin, batch, place, token, k_heads, half, k_batch, k_head, k_token,
        K_HEADS, HALF, BACKWARD,
    )  # fmt: skip


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> tuple[Tensor, Tensor]:
    """Return turned q and k (batch, length, heads, width), contiguous.

    Args:
        q: (batch, heads, length, width), with unit stride in a head.
        k: as q, with heads of its own number.
        cos: (batch or 1, length, width), contiguous.
        sin: as cos.
        backward: whether q and k are gradients, to be turned back.
    """
    import torch

    (batch, q_heads, length, width), k_heads = q.shape, k.shape[1]
    q_out, k_out = (
        torch.empty((batch, length, heads, width), dtype=x.dtype, device=x.device)
        for x, heads in ((q, q_heads), (k, k_heads))
    )
    strides = [x.stride(i) for x in (q, k) for i in (0, 1, 2)]
    size = {"Q_HEADS": q_heads, "K_HEADS": k_heads, "HALF": width // 2}
    rotary_kernel[(batch * length,)](
        q, k, cos, sin, q_out, k_out, length, q_heads, k_heads, width // 2,
        0 if len(cos) == 1 else length * width, *strides,
        **{key: triton.next_power_of_2(value) for key, value in size.items()}, BACKWARD=backward, num_warps=4,
    )  # fmt: skip
    return q_out, k_out


def _builds() -> list[Build]:
    made = []
    for label, dtype in (("bf16", tl.bfloat16), ("fp32", tl.float32)):
        for backward in (False, True):
            tensors = dict.fromkeys(("q_ptr", "k_ptr", "cos_ptr", "sin_ptr", "q_out", "k_out"), dtype)
            arguments: dict[str, Any] = {
                **tensors, "length": 2048, "q_heads": 32, "k_heads": 8, "half": 64, "angles_batch": 0,
                "q_batch": 2048 * 6144, "q_head": 128, "q_token": 6144,
                "k_batch": 2048 * 6144, "k_head": 128, "k_token": 6144,
                "Q_HEADS": 32, "K_HEADS": 8, "HALF": 64, "BACKWARD": backward,
            }  # fmt: skip
            name = f"rotary{' backward' if backward else ''}, {label}"
            made.append(Build(name, rotary_kernel, arguments, {"num_warps": 4}))
    return made


BUILDS = _builds()
