"""Divergence of two rows of logits and its slopes, one program a row; see `lit_peft.ops.divergence` for the formulas.

A program reads both rows twice (forward KL) or three times, and writes the slopes in the place of the student's logits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from lit_peft.kernels.build import Build
from lit_peft.kernels.cross_entropy import WIDEST, scanned, shaped, sizes

if TYPE_CHECKING:
    from torch import Tensor


@triton.jit
def _log(row_ptr, at, inside, lse, factor, height, CAPPED: tl.constexpr):
    """log softmax of a part of a row, and dz/dv."""
    v = tl.load(row_ptr + at, mask=inside, other=0.0).to(tl.float32)
    z, slope = shaped(v, factor, height, CAPPED)
    return tl.maximum(z - lse, -1e30), slope


@triton.jit
def divergence_kernel(
    v_ptr, w_ptr, losses_ptr, stride, teacher_stride, width, beta, gain, factor, height, teacher_factor,
    teacher_height, KIND: tl.constexpr, CAPPED: tl.constexpr, TEACHER_CAPPED: tl.constexpr, SLOPES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """D of each row, with SLOPES its gradient times `gain` in the place of v; KIND: 0 forward KL, 1 reverse, 2 JSD."""
    row = tl.program_id(0).to(tl.int64)
    v_row, w_row = v_ptr + row * stride, w_ptr + row * teacher_stride
    picked, top, others, _ = scanned(v_row, 0, width, factor, height, CAPPED, False, BLOCK)
    lse = top + tl.log(others + tl.exp(picked - top))
    picked, top, others, _ = scanned(w_row, 0, width, teacher_factor, teacher_height, TEACHER_CAPPED, False, BLOCK)
    teacher_lse = top + tl.log(others + tl.exp(picked - top))
    tl.debug_barrier()  # the rows' first logits have been read by all before one changes them

    at = tl.arange(0, BLOCK)
    from_teacher = tl.zeros((BLOCK,), tl.float32)
    from_student = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        inside = start + at < width
        a, slope = _log(v_row, start + at, inside, lse, factor, height, CAPPED)
        b, _ = _log(w_row, start + at, inside, teacher_lse, teacher_factor, teacher_height, TEACHER_CAPPED)
        p, q = tl.where(inside, tl.exp(a), 0.0), tl.where(inside, tl.exp(b), 0.0)
        if KIND == 0:
            from_teacher += q * (b - a)
            if SLOPES:
                tl.store(v_row + start + at, (gain * (p - q) * slope).to(v_ptr.dtype.element_ty), mask=inside)
        elif KIND == 1:
            from_student += p * (a - b)
        else:
            m = tl.log(tl.maximum(beta * q + (1 - beta) * p, 1e-37))
            from_teacher += q * (b - m)
            from_student += p * (a - m)
    mean = tl.sum(from_student, 0)
    if KIND == 0:
        tl.store(losses_ptr + row, tl.sum(from_teacher, 0))
    elif KIND == 1:
        tl.store(losses_ptr + row, mean)
    else:
        tl.store(losses_ptr + row, beta * tl.sum(from_teacher, 0) + (1 - beta) * mean)

    if SLOPES and KIND != 0:
        if KIND == 2:
            gain *= 1 - beta
        for start in range(0, width, BLOCK):
            inside = start + at < width
            a, slope = _log(v_row, start + at, inside, lse, factor, height, CAPPED)
            b, _ = _log(w_row, start + at, inside, teacher_lse, teacher_factor, teacher_height, TEACHER_CAPPED)
            p = tl.exp(a)
            if KIND == 2:
                b = tl.log(tl.maximum(beta * tl.exp(b) + (1 - beta) * p, 1e-37))
            d = gain * p * (a - b - mean) * slope
            tl.store(v_row + start + at, d.to(v_ptr.dtype.element_ty), mask=inside)


def divergence(
    v: Tensor,
    w: Tensor,
    kind: int,
    beta: float,
    gain: float,
    shape: tuple[float, float],
    teacher_shape: tuple[float, float],
) -> Tensor:
    """Return D (rows,), and put slopes times `gain` in the place of v (rows, width) if that is not 0."""
    import torch

    losses = torch.empty(len(v), device=v.device)
    divergence_kernel[(len(v),)](
        v, w, losses, v.stride(0), w.stride(0), v.shape[1], beta, gain, *shape, *teacher_shape, KIND=kind,
        CAPPED=bool(shape[1]), TEACHER_CAPPED=bool(teacher_shape[1]), SLOPES=bool(gain), **_sizes(v.shape[1]),
    )  # fmt: skip
    return losses


def _sizes(width: int) -> dict[str, int]:
    found = sizes(min(width, WIDEST // 2))  # twice as many numbers are worked on
    return found | {"num_warps": min(16, found["num_warps"] * 2)}


def _builds() -> list[Build]:
    width = 128256
    common = {
        "losses_ptr": tl.float32, "stride": width, "teacher_stride": width, "width": width, "beta": 0.5, "gain": 1.0,
        "factor": 1.0, "height": 0.0, "teacher_factor": 1.0, "teacher_height": 0.0, "CAPPED": False,
        "TEACHER_CAPPED": False, "SLOPES": True,
    }  # fmt: skip
    options = _sizes(width)
    common["BLOCK"] = options.pop("BLOCK")
    made = []
    for label, dtype in (("bf16", tl.bfloat16), ("fp16", tl.float16), ("fp32", tl.float32)):
        for kind, name in enumerate(("forward KL", "reverse KL", "JSD")):
            rows = {"v_ptr": dtype, "w_ptr": dtype, "KIND": kind}
            made.append(Build(f"{name}, {label}", divergence_kernel, common | rows, options))
    return made


BUILDS = _builds()
