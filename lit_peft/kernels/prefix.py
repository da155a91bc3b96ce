"""Attention to a prefix, merged into attention to the text; and its gradients.

The text's part (o, lse) is where the online softmax over the prefix begins: its maximum is lse, its sum 1, its
accumulator o. What comes out is o and lse of both, in the same memory.

Backward, with P = exp(scale q K^T - lse) and D = rowsum(g o), both of the merged o and lse:

    dV = P^T g,    dS = P (g V^T - D),    dK = scale dS^T q,    dq = dq of the text + scale dS K

One program reads q, g and o once and makes all three. Sums over rows, heads of a group and texts are of float32 parts
that are added up by one more operation: the same result at every run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from lit_peft.kernels.build import Build

if TYPE_CHECKING:
    from torch import Tensor

EACH = 16  # tiles of rows that one program adds up: what it writes is then a small part of what it reads


@triton.jit
def prefix_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, scale, n, p, heads, groups,
    qb, qh, qn, kb, kh, kp, vb, vh, vp, ob, oh, on, lb, lh, ln,
    WIDTH: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Merge in place into o (batch, heads, n, WIDTH) and lse (batch, heads, n); ROWS rows of one head a program."""
    tiles = tl.cdiv(n, ROWS)
    pid = tl.program_id(0).to(tl.int64)
    head, row, start = pid // tiles % heads, pid // tiles // heads, pid % tiles * ROWS
    # wide numbers only for where a tile begins: inside it, 32 bits do, and take half the registers
    rows, at, cols = tl.arange(0, ROWS), tl.arange(0, WIDE), tl.arange(0, COLS)
    inside, wide = rows < n - start, (at < WIDTH)[None, :]
    both = inside[:, None] & wide
    q_at = q_ptr + (row * qb + head * qh + start * qn)
    o_at = o_ptr + (row * ob + head * oh + start * on)
    lse_at = lse_ptr + (row * lb + head * lh + start * ln)
    k_at = k_ptr + (row * kb + head // groups * kh)
    v_at = v_ptr + (row * vb + head // groups * vh)
    q = tl.load(q_at + rows[:, None] * qn + at[None, :], mask=both, other=0.0)
    peak = tl.load(lse_at + rows * ln, mask=inside, other=0.0)
    # a row that sees no text: kernels differ in which infinity they say it with, and o may be anything
    peak = tl.where(peak == float("inf"), float("-inf"), peak)
    sees = peak > float("-inf")
    total = tl.where(sees, 1.0, 0.0)
    acc = tl.load(o_at + rows[:, None] * on + at[None, :], mask=both, other=0.0).to(tl.float32)
    acc = tl.where(sees[:, None], acc, 0.0)
    for done in range(0, p, COLS):
        seen = cols < p - done
        block = seen[:, None] & wide
        k = tl.load(k_at + cols[:, None] * kp + at[None, :], mask=block, other=0.0)
        v = tl.load(v_at + cols[:, None] * vp + at[None, :], mask=block, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        s = tl.where(seen[None, :], s, float("-inf"))
        higher = tl.maximum(peak, tl.max(s, 1))
        weight, old = tl.exp(s - higher[:, None]), tl.exp(peak - higher)
        total = total * old + tl.sum(weight, 1)
        acc = tl.dot(weight.to(v.dtype), v, acc * old[:, None], input_precision="ieee")
        peak = higher
        k_at += COLS * kp
        v_at += COLS * vp
    out = (acc / total[:, None]).to(o_ptr.dtype.element_ty)
    tl.store(o_at + rows[:, None] * on + at[None, :], out, mask=both)
    tl.store(lse_at + rows * ln, peak + tl.log(total), mask=inside)


@triton.jit
def prefix_backward_kernel(
    g_ptr, q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, dq_ptr, dk_ptr, dv_ptr, scale, n, p, first, items, splits,
    kv_heads, groups, gb, gh, gn, qb, qh, qn, kb, kh, kp, vb, vh, vp, ob, oh, on, lb, lh, ln, db, dh, dn,
    WIDTH: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    EACH: tl.constexpr, TEXT: tl.constexpr,
):  # fmt: skip
    """Parts (splits, prefixes, kv_heads, p, WIDTH) of dk and dv, for COLS rows of the prefix; dq is added to in place.

    `items` are the tiles of ROWS rows that attend to one head of one prefix: those of its group's heads, and of all
    texts where these share the prefix. A program takes EACH of them.
    """
    pid = tl.program_id(0).to(tl.int64)
    split, which = pid % splits, pid // splits
    kv, prefix = which % kv_heads, which // kv_heads
    tiles = tl.cdiv(n, ROWS)
    rows, at, cols = tl.arange(0, ROWS), tl.arange(0, WIDE), tl.arange(0, COLS)
    seen, wide = cols < p - first, (at < WIDTH)[None, :]
    block = seen[:, None] & wide
    k_at = k_ptr + (prefix * kb + kv * kh + first.to(tl.int64) * kp)
    v_at = v_ptr + (prefix * vb + kv * vh + first.to(tl.int64) * vp)
    k = tl.load(k_at + cols[:, None] * kp + at[None, :], mask=block, other=0.0)
    v = tl.load(v_at + cols[:, None] * vp + at[None, :], mask=block, other=0.0)
    dk = tl.zeros([COLS, WIDE], dtype=tl.float32)
    dv = tl.zeros([COLS, WIDE], dtype=tl.float32)
    for item in range(split * EACH, tl.minimum(split * EACH + EACH, items)):
        head, row = kv * groups + item // tiles % groups, prefix + item // tiles // groups
        start = item % tiles * ROWS
        inside = rows < n - start
        both = inside[:, None] & wide
        q_at = q_ptr + (row * qb + head * qh + start * qn)
        g_at = g_ptr + (row * gb + head * gh + start * gn)
        o_at = o_ptr + (row * ob + head * oh + start * on)
        lse_at = lse_ptr + (row * lb + head * lh + start * ln)
        g = tl.load(g_at + rows[:, None] * gn + at[None, :], mask=both, other=0.0)
        o = tl.load(o_at + rows[:, None] * on + at[None, :], mask=both, other=0.0)
        delta = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
        q = tl.load(q_at + rows[:, None] * qn + at[None, :], mask=both, other=0.0)
        lse = tl.load(lse_at + rows * ln, mask=inside, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        weight = tl.where(inside[:, None] & seen[None, :], tl.exp(s - lse[:, None]), 0.0)
        dv = tl.dot(tl.trans(weight.to(g.dtype)), g, dv, input_precision="ieee")
        slope = weight * (tl.dot(g, tl.trans(v), input_precision="ieee") - delta[:, None])
        dk = tl.dot(tl.trans(slope.to(q.dtype)), q, dk, input_precision="ieee")
        if TEXT:
            dq_at = dq_ptr + (row * db + head * dh + start * dn)
            dq = tl.dot(slope.to(k.dtype), k, input_precision="ieee") * scale
            dq += tl.load(dq_at + rows[:, None] * dn + at[None, :], mask=both, other=0.0).to(tl.float32)
            tl.store(dq_at + rows[:, None] * dn + at[None, :], dq.to(dq_ptr.dtype.element_ty), mask=both)
    # all parts of one prefix lie `splits` apart from the next ones: (splits, prefixes, kv_heads, p, WIDTH)
    prefixes = tl.num_programs(0) // (splits * kv_heads)
    part = (((split * prefixes + prefix) * kv_heads + kv) * p + first) * WIDTH
    tl.store(dk_ptr + part + cols[:, None] * WIDTH + at[None, :], dk * scale, mask=block)
    tl.store(dv_ptr + part + cols[:, None] * WIDTH + at[None, :], dv, mask=block)


def _sizes(width: int, p: int, itemsize: int, backward: bool) -> dict[str, int]:
    """Return the blocks: COLS as few as hold the prefix, ROWS as many as fit into registers beside them."""
    wide = max(16, triton.next_power_of_2(width))
    cols = min(64 if wide <= 128 and itemsize == 2 else 32, max(16, triton.next_power_of_2(p)))
    if backward:
        tight = cols * wide * itemsize > (8192 if itemsize == 2 else 4096)
    else:
        tight = wide > 128 or itemsize > 2
    return {"WIDTH": width, "WIDE": wide, "ROWS": 16 if tight else 32, "COLS": cols}


def _options(width: int, backward: bool) -> dict[str, int]:
    return {"num_warps": 8 if backward or width > 128 else 4, "num_stages": 1 if backward else 2}


def merge(q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float) -> None:
    """Merge attention to k, v into o and lse in place.

    q, o are (batch, heads, n, width), k, v (batch or 1, kv_heads, p, width), all with neighbours in the last dimension;
    lse is (batch, heads, n) in float32.
    """
    batch, heads, n, width = q.shape
    sizes = _sizes(width, k.shape[2], q.element_size(), backward=False)
    prefix_kernel[(triton.cdiv(n, sizes["ROWS"]) * batch * heads,)](
        q, k, v, o, lse, scale, n, k.shape[2], heads, heads // k.shape[1],
        *_strides(q), *_strides(k), *_strides(v), *_strides(o), *lse.stride(),
        **sizes, **_options(width, backward=False),
    )  # fmt: skip


def merge_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float, dq: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return dk and dv like k and v, and add to dq in place; shapes as in `merge`, o and lse those of both parts."""
    import torch

    batch, heads, n, width = q.shape
    prefixes, kv_heads, p, _ = k.shape
    sizes = _sizes(width, p, q.element_size(), backward=True)
    items = triton.cdiv(n, sizes["ROWS"]) * (heads // kv_heads) * (batch if prefixes == 1 else 1)
    splits = triton.cdiv(items, EACH)
    dk, dv = torch.empty(2, splits, prefixes, kv_heads, p, width, device=q.device, dtype=torch.float32).unbind()
    into = q if dq is None else dq  # where there is none, nothing is read or written
    for first in range(0, p, sizes["COLS"]):  # one launch for most prefixes; others follow one another
        prefix_backward_kernel[(splits * prefixes * kv_heads,)](
            g, q, k, v, o, lse, into, dk, dv, scale, n, p, first, items, splits, kv_heads, heads // kv_heads,
            *_strides(g), *_strides(q), *_strides(k), *_strides(v), *_strides(o), *lse.stride(), *_strides(into),
            **sizes, EACH=EACH, TEXT=dq is not None, **_options(width, backward=True),
        )  # fmt: skip
    return dk.sum(0).to(k.dtype), dv.sum(0).to(v.dtype)


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """Return the strides of the first three dimensions; the first is 0 where all rows share the only one."""
    first, *others = tensor.stride()[:3]
    return (0 if len(tensor) == 1 else first, *others)


def _builds() -> list[Build]:
    made = []
    # a Llama 3.2 1B, and an 8B, at prefixes of 30 and 128
    for label, dtype, itemsize, heads, kv_heads, width, p in (
        ("bf16", tl.bfloat16, 2, 32, 8, 64, 30),
        ("bf16", tl.bfloat16, 2, 32, 8, 128, 128),
        ("bf16", tl.bfloat16, 2, 16, 8, 256, 30),
        ("fp16", tl.float16, 2, 32, 8, 128, 30),
        ("fp32", tl.float32, 4, 32, 8, 64, 30),
    ):
        n = 2048
        text = (n * heads * width, width, heads * width)
        strides: dict[str, int] = {}
        for name, three in (
            ("q", text), ("o", text), ("g", text), ("d", text), ("l", (n * heads, n, 1)),
            ("k", (0, width, 32 * kv_heads * width)), ("v", (0, width, 32 * kv_heads * width)),
        ):  # fmt: skip
            strides |= {f"{name}{axis}": stride for axis, stride in zip(
                ("b", "h", "p" if name in "kv" else "n"), three, strict=True
            )}  # fmt: skip
        common: dict[str, Any] = {f"{name}_ptr": dtype for name in ("q", "k", "v", "o")} | {"lse_ptr": tl.float32}
        common |= {"scale": width**-0.5, "n": n, "p": p, "groups": heads // kv_heads}
        name, products = f"{label}, width {width}, p {p}", itemsize == 2
        forward = common | _sizes(width, p, itemsize, backward=False) | {"heads": heads}
        forward |= {key: stride for key, stride in strides.items() if key[0] not in "gd"}
        made.append(Build(f"merge, {name}", prefix_kernel, forward, _options(width, backward=False), products))
        blocks = _sizes(width, p, itemsize, backward=True)
        items = n // blocks["ROWS"] * (heads // kv_heads)
        backward = common | blocks | strides | {"g_ptr": dtype, "dq_ptr": dtype, "dk_ptr": tl.float32}
        backward |= {"dv_ptr": tl.float32, "first": 0, "items": items, "splits": items // EACH}
        backward |= {"kv_heads": kv_heads, "EACH": EACH, "TEXT": True}
        options = _options(width, backward=True)
        made.append(Build(f"backward, {name}", prefix_backward_kernel, backward, options, products))
    return made


BUILDS = _builds()
