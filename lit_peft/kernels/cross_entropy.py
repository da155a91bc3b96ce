"""Losses and slopes of logits, one program a row, which it reads twice from left to right and writes once.

z = f v,  or h tanh(f v)        lse = log sum exp z        l = z[t] - lse        H = - sum p log p,   p = exp(z - lse)
dv = (g (onehot(t) - p)  -  h' p (log p + H)) dz/dv        g, h': the gradients of l and H; v's own memory takes dv
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from lit_peft.kernels.build import Build

if TYPE_CHECKING:
    from torch import Tensor

WIDEST = 2048


@triton.jit
def shaped(v, factor, height, CAPPED: tl.constexpr):
    """z and dz/dv, of v in float32."""
    if CAPPED:
        e = tl.exp(-2.0 * tl.abs(factor * v))
        size = height * (1.0 - e) / (1.0 + e)
        z = tl.where(v < 0, -size, size)
        slope = factor * height * 4.0 * e / ((1.0 + e) * (1.0 + e))
    else:
        z = factor * v
        slope = factor
    return z, slope


@triton.jit
def scanned(row_ptr, target, width, factor, height, CAPPED: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr):
    """Of one row: z at the target, the largest z, and over all but the target the sums of e = exp(z - largest) and of
    e (z - largest). The sums are kept for every lane and follow the largest z so far.
    """
    at = tl.arange(0, BLOCK)
    top = float("-inf")
    others = tl.zeros((BLOCK,), tl.float32)
    moment = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        inside = start + at < width
        v = tl.load(row_ptr + start + at, mask=inside, other=0.0).to(tl.float32)
        z, _ = shaped(v, factor, height, CAPPED)
        z = tl.where(inside, z, float("-inf"))
        new = tl.maximum(top, tl.max(z, 0))
        base = tl.where(new == float("-inf"), 0.0, new)
        e = tl.where(start + at == target, 0.0, tl.exp(z - base))
        shrunk = tl.exp(top - base)
        if ENTROPY:  # before the sum that it follows
            moment = (moment + others * (tl.maximum(top, -1e30) - base)) * shrunk + e * (tl.maximum(z, -1e30) - base)
        others = others * shrunk + e
        top = new
    known = (target >= 0) & (target < width)  # another one gives NaN, and reads nothing
    v = tl.load(row_ptr + target, mask=known, other=float("nan")).to(tl.float32)
    picked, _ = shaped(v, factor, height, CAPPED)
    return picked, top, tl.sum(others, 0), tl.sum(moment, 0)


@triton.jit
def put_slopes(
    row_ptr, target, width, lse, miss, entropy, g, h, factor, height, CAPPED: tl.constexpr, ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """dv of one row in the place of v; `miss` is 1 - p[t], which the rounding of p[t] would lose."""
    at = tl.arange(0, BLOCK)
    for start in range(0, width, BLOCK):
        inside = start + at < width
        v = tl.load(row_ptr + start + at, mask=inside, other=0.0).to(tl.float32)
        z, slope = shaped(v, factor, height, CAPPED)
        p = tl.exp(z - lse)
        d = tl.where(start + at == target, g * miss, -g * p)
        if ENTROPY:
            d -= h * p * (tl.maximum(z - lse, -1e30) + entropy)
        tl.store(row_ptr + start + at, (d * slope).to(row_ptr.dtype.element_ty), mask=inside)


@triton.jit
def cross_entropy_kernel(
    v_ptr, targets_ptr, losses_ptr, stride, width, factor, height, gain, CAPPED: tl.constexpr, SLOPES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """lse - z[t] of each row, and with SLOPES its gradient times `gain` in the place of v (rows, width)."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = v_ptr + row * stride
    target = tl.load(targets_ptr + row)
    picked, top, others, _ = scanned(row_ptr, target, width, factor, height, CAPPED, False, BLOCK)
    total = others + tl.exp(picked - top)
    lse = top + tl.log(total)
    tl.store(losses_ptr + row, lse - picked)
    if SLOPES:
        tl.debug_barrier()  # the target's v has been read by all before one changes it
        put_slopes(row_ptr, target, width, lse, others / total, 0.0, -gain, 0.0, factor, height, CAPPED, False, BLOCK)


@triton.jit
def log_probabilities_kernel(
    v_ptr, targets_ptr, logs_ptr, lse_ptr, miss_ptr, entropy_ptr, stride, width, factor, height,
    CAPPED: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """z[t] - lse, lse, 1 - p[t] and, with ENTROPY, H of each row of v (rows, width)."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    picked, top, others, moment = scanned(v_ptr + row * stride, target, width, factor, height, CAPPED, ENTROPY, BLOCK)
    total = others + tl.exp(picked - top)
    lse = top + tl.log(total)
    tl.store(logs_ptr + row, picked - lse)
    tl.store(lse_ptr + row, lse)
    tl.store(miss_ptr + row, others / total)
    if ENTROPY:
        moment += tl.exp(picked - top) * (tl.maximum(picked, -1e30) - top)
        tl.store(entropy_ptr + row, tl.log(total) - moment / total)


@triton.jit
def log_probabilities_backward_kernel(
    v_ptr, targets_ptr, lse_ptr, miss_ptr, entropy_ptr, g_ptr, h_ptr, stride, width, factor, height,
    CAPPED: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dv of each row in the place of v (rows, width)."""
    row = tl.program_id(0).to(tl.int64)
    entropy = 0.0
    h = 0.0
    if ENTROPY:
        entropy = tl.load(entropy_ptr + row)
        h = tl.load(h_ptr + row)
    put_slopes(
        v_ptr + row * stride, tl.load(targets_ptr + row), width, tl.load(lse_ptr + row), tl.load(miss_ptr + row),
        entropy, tl.load(g_ptr + row), h, factor, height, CAPPED, ENTROPY, BLOCK,
    )  # fmt: skip


def sizes(width: int) -> dict[str, Any]:
    """Return how many logits a program works on at once, and with how many warps."""
    block = min(WIDEST, max(16, triton.next_power_of_2(width)))
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 256))}


def cross_entropy(v: Tensor, targets: Tensor, factor: float, height: float, gain: float) -> Tensor:
    """Return the losses (rows,), and put slopes times `gain` in the place of v (rows, width) if that is not 0."""
    import torch

    losses = torch.empty(len(v), device=v.device)
    cross_entropy_kernel[(len(v),)](
        v, targets.contiguous(), losses, v.stride(0), v.shape[1], factor, height, gain,
        CAPPED=bool(height), SLOPES=bool(gain), **sizes(v.shape[1]),
    )  # fmt: skip
    return losses


def log_probabilities(
    v: Tensor, targets: Tensor, factor: float, height: float, entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return l, lse, 1 - p[t] and H (rows,) of v (rows, width); H is 0 if it is not asked for."""
    import torch

    logs, lse, miss, entropies = (torch.zeros(len(v), device=v.device) for _ in range(4))
    log_probabilities_kernel[(len(v),)](
        v, targets.contiguous(), logs, lse, miss, entropies, v.stride(0), v.shape[1], factor, height,
        CAPPED=bool(height), ENTROPY=entropy, **sizes(v.shape[1]),
    )  # fmt: skip
    return logs, lse, miss, entropies


def log_probabilities_backward(
    v: Tensor,
    targets: Tensor,
    lse: Tensor,
    miss: Tensor,
    entropies: Tensor | None,
    g: Tensor,
    h: Tensor | None,
    factor: float,
    height: float,
) -> None:
    """Put dv in the place of v (rows, width); all others are (rows,)."""
    g = g.contiguous()
    h = None if h is None or entropies is None else h.contiguous()
    log_probabilities_backward_kernel[(len(v),)](
        v, targets.contiguous(), lse, miss, lse if h is None else entropies, g, g if h is None else h,
        v.stride(0), v.shape[1], factor, height, CAPPED=bool(height), ENTROPY=h is not None, **sizes(v.shape[1]),
    )  # fmt: skip


def _builds() -> list[Build]:
    width = 128256
    row = {"targets_ptr": tl.int64, "stride": width, "width": width, "factor": 1.0, "height": 0.0, "CAPPED": False}
    options = sizes(width)
    row["BLOCK"] = options.pop("BLOCK")
    numbers = {f"{name}_ptr": tl.float32 for name in ("lse", "miss", "entropy")}
    made = []
    for label, dtype in (("bf16", tl.bfloat16), ("fp16", tl.float16), ("fp32", tl.float32)):
        loss = row | {"v_ptr": dtype, "losses_ptr": tl.float32, "gain": 1.0, "SLOPES": True}
        made.append(Build(f"cross entropy, {label}", cross_entropy_kernel, loss, options))
        back = row | numbers | {"v_ptr": dtype, "g_ptr": tl.float32, "h_ptr": tl.float32}
        if dtype == tl.bfloat16:
            logs = row | numbers | {"v_ptr": dtype, "logs_ptr": tl.float32, "ENTROPY": False}
            made.append(Build(f"log-probabilities, {label}", log_probabilities_kernel, logs, options))
            capped = loss | {"factor": 1 / 30, "height": 30.0, "CAPPED": True}
            made.append(Build(f"cross entropy, capped, {label}", cross_entropy_kernel, capped, options))
            name = f"log-probabilities, entropies, {label}"
            made.append(Build(name, log_probabilities_kernel, logs | {"ENTROPY": True}, options))
            both = back | {"ENTROPY": True}
            name = f"log-probabilities backward, entropies, {label}"
            made.append(Build(name, log_probabilities_backward_kernel, both, options))
        made.append(
            Build(
                f"log-probabilities backward, {label}",
                log_probabilities_backward_kernel,
                back | {"ENTROPY": False},
                options,
            )
        )
    return made


BUILDS = _builds()
