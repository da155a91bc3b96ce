"""The low-rank updates of queries, keys and values, and the rotation of the first two: one launch either way.

forward:   Y_i += s_i H_i^T B_i^T, then every head (u, v) of Y_0, Y_1 becomes (u cos - v sin, v cos' + u sin'), in place
backward:  every head of G_0, G_1 turned back, the G_i beside each other, P_i = s_i B_i^T G_i^T, dB_i = s_i G_i^T H_i^T
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from lit_peft.kernels.build import Build
from lit_peft.kernels.gated import _expanded
from lit_peft.kernels.rotary import angles, turned
from lit_peft.kernels.shrink import parts

if TYPE_CHECKING:
    from torch import Tensor


@triton.jit
def _place(row, length, half, angles_batch):
    """Where the angles of some rows are, in cosines and sines of (batch or 1, length, 2 half)."""
    return (row // length) * angles_batch + (row % length) * (2 * half)


@triton.jit
def _expand_head(
    y_ptr, h_ptr, b_ptr, cos_ptr, sin_ptr, row, block, rows, length, angles_batch, half, n, total, scale,
    R: tl.constexpr, PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Some rows of a block of both halves of a head, updated and turned, in place."""
    across = tl.cdiv(half, BLOCK_N)
    at = (block % across) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = (block // across) * (2 * half) + at
    u = _expanded(y_ptr, h_ptr, b_ptr, row, column, rows, n, total, scale, R, PAD, BLOCK_M, BLOCK_N)
    v = _expanded(y_ptr, h_ptr, b_ptr, row, column + half, rows, n, total, scale, R, PAD, BLOCK_M, BLOCK_N)
    # the last block of a half may reach into what is not its own, which is read, and not written
    inside = (row < rows)[:, None] & (at < half)[None, :]
    place = _place(row, length, half, angles_batch)[:, None] + at[None, :]
    low, high, low_sin, high_sin = angles(cos_ptr, sin_ptr, place, inside, half)
    first, second = turned(u, v, low, high, low_sin, high_sin, False)
    target = y_ptr + row[:, None] * total + column[None, :]
    tl.store(target, first.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(target + half, second.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def expand_turn_kernel(
    y_ptr, h_ptr, b0_ptr, b1_ptr, b2_ptr, cos_ptr, sin_ptr, rows, length, angles_batch, half, n0, n1, n2,
    s0, s1, s2, R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, PAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Some rows of a block of one head of queries or keys (rows, n0 + n1 + n2), or of values, in place."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    block, total, across = tl.program_id(1), n0 + n1 + n2, tl.cdiv(half, BLOCK_N)
    first, second = n0 // (2 * half) * across, n1 // (2 * half) * across
    if block < first:
        _expand_head(
            y_ptr, h_ptr, b0_ptr, cos_ptr, sin_ptr, row, block, rows, length, angles_batch, half, n0, total, s0,
            R0, PAD, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    elif block < first + second:
        _expand_head(
            y_ptr + n0, h_ptr + R0 * rows, b1_ptr, cos_ptr, sin_ptr, row, block - first, rows, length, angles_batch,
            half, n1, total, s1, R1, PAD, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    else:
        column = (block - first - second) * (2 * BLOCK_N) + tl.arange(0, 2 * BLOCK_N)
        y2, h2 = y_ptr + n0 + n1, h_ptr + (R0 + R1) * rows
        v = _expanded(y2, h2, b2_ptr, row, column, rows, n2, total, s2, R2, PAD, BLOCK_M, 2 * BLOCK_N)
        inside = (row < rows)[:, None] & (column < n2)[None, :]
        tl.store(y2 + row[:, None] * total + column[None, :], v.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _summed(db_ptr, h, g, column, inside, scale, R: tl.constexpr, PAD: tl.constexpr, ATOMIC: tl.constexpr):
    """Adds s (H G)^T of some columns of G to dB (n, R), or stores it as one part of that sum."""
    r = tl.arange(0, PAD)
    db = scale * tl.dot(h, g, input_precision="ieee")
    target, there = db_ptr + column[None, :] * R + r[:, None], inside[None, :] & (r < R)[:, None]
    if ATOMIC:
        tl.atomic_add(target, db, mask=there, sem="relaxed")
    else:
        tl.store(target, db, mask=there)


@triton.jit
def _spread_heads(
    g_ptr, b_ptr, h_ptr, p_ptr, all_ptr, db_ptr, cos_ptr, sin_ptr, row, rows, length, angles_batch, half, n, total,
    g_batch, g_head, g_token, scale, R: tl.constexpr, PAD: tl.constexpr, TURN: tl.constexpr, DB: tl.constexpr,
    ATOMIC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """P (R, rows) of some rows of some heads of G, which are turned back and put into `all`; and their share of dB."""
    r, across = tl.arange(0, PAD), tl.cdiv(half, BLOCK_N)
    narrow, inner = r[:, None].to(tl.int64) * rows + row[None, :], (row < rows)[None, :] & (r < R)[:, None]
    place = _place(row, length, half, angles_batch)[:, None]
    source = g_ptr + ((row // length) * g_batch + (row % length) * g_token)[:, None]
    p = tl.zeros((PAD, BLOCK_M), tl.float32)
    if R > 0 and DB:
        h = tl.load(h_ptr + narrow, mask=inner, other=0.0)
    heads = n // (2 * half)
    each = tl.cdiv(heads, tl.num_programs(2))
    first_head = tl.program_id(2) * each
    for block in range(first_head * across, tl.minimum(first_head + each, heads) * across):
        head, at = block // across, (block % across) * BLOCK_N + tl.arange(0, BLOCK_N)
        mine, column = at < half, head * (2 * half) + at
        inside = (row < rows)[:, None] & mine[None, :]
        here = source + tl.cast(head, tl.int64) * g_head + at[None, :]
        u = tl.load(here, mask=inside, other=0.0)
        v = tl.load(here + half, mask=inside, other=0.0)
        if TURN:
            # loaded again for every head: they stay in the cache, and would not all fit into registers
            low, high, low_sin, high_sin = angles(cos_ptr, sin_ptr, place + at[None, :], inside, half)
            first, second = turned(u.to(tl.float32), v.to(tl.float32), low, high, low_sin, high_sin, True)
            u, v = first.to(u.dtype), second.to(v.dtype)
        target = all_ptr + row[:, None] * total + column[None, :]
        tl.store(target, u, mask=inside)
        tl.store(target + half, v, mask=inside)
        if R > 0:
            # a column of u, one of v, and so on
            g = tl.reshape(tl.join(u, v), (BLOCK_M, 2 * BLOCK_N))
            pair = tl.arange(0, 2 * BLOCK_N)
            of_half = (block % across) * BLOCK_N + pair // 2
            column, mine = head * (2 * half) + (pair % 2) * half + of_half, of_half < half
            corner = b_ptr + column[None, :] * R + r[:, None]
            b = tl.load(corner, mask=mine[None, :] & (r < R)[:, None], other=0.0)
            p = tl.dot(b.to(g.dtype), tl.trans(g), p, input_precision="ieee")
            if DB:
                _summed(db_ptr, h, g, column, mine, scale, R, PAD, ATOMIC)
    if R > 0:
        tl.store(p_ptr + narrow, (scale * p).to(p_ptr.dtype.element_ty), mask=inner)


@triton.jit
def turn_spread_kernel(
    g0_ptr, g1_ptr, g2_ptr, b0_ptr, b1_ptr, b2_ptr, h0_ptr, h1_ptr, h2_ptr, p_ptr, all_ptr, db_ptr, cos_ptr, sin_ptr,
    rows, length, angles_batch, half, n0, n1, n2, batch0, head0, token0, batch1, head1, token1, batch2, head2, token2,
    s0, s1, s2, R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, PAD: tl.constexpr, DB: tl.constexpr,
    ATOMIC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """All that is made of some rows of one G_i, or of a share of its heads: P needs all of them, none of the others."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    which, total = tl.program_id(1), n0 + n1 + n2
    p_ptr += tl.program_id(2).to(tl.int64) * (R0 + R1 + R2) * rows
    if not ATOMIC:
        db_ptr += tl.program_id(0).to(tl.int64) * (n0 * R0 + n1 * R1 + n2 * R2)
    if which == 0:
        _spread_heads(
            g0_ptr, b0_ptr, h0_ptr, p_ptr, all_ptr, db_ptr, cos_ptr, sin_ptr, row, rows, length, angles_batch, half,
            n0, total, batch0, head0, token0, s0, R0, PAD, True, DB, ATOMIC, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    elif which == 1:
        _spread_heads(
            g1_ptr, b1_ptr, h1_ptr, p_ptr + R0 * rows, all_ptr + n0, db_ptr + n0 * R0, cos_ptr, sin_ptr, row, rows,
            length, angles_batch, half, n1, total, batch1, head1, token1, s1,
            R1, PAD, True, DB, ATOMIC, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    else:
        _spread_heads(
            g2_ptr, b2_ptr, h2_ptr, p_ptr + (R0 + R1) * rows, all_ptr + n0 + n1, db_ptr + n0 * R0 + n1 * R1,
            cos_ptr, sin_ptr, row, rows, length, angles_batch, half, n2, total, batch2, head2, token2, s2,
            R2, PAD, False, DB, ATOMIC, BLOCK_M, BLOCK_N,
        )  # fmt: skip


def _options(ranks: Sequence[int], width: int, itemsize: int, backward: bool) -> dict[str, int]:
    half, pad = (max(16, triton.next_power_of_2(size)) for size in (width // 2, max(ranks)))
    wide = min(64 if backward and itemsize == 2 else 32, half)
    options = {"PAD": pad, "BLOCK_M": 32 if itemsize > 2 else 64, "BLOCK_N": wide, "num_warps": 4}
    many = itemsize > 2 or pad * wide > 512
    return options | ({"num_warps": 8 if many else 4, "num_stages": 2} if backward else {})


def expand_turn(
    y: Tensor,
    h: Tensor,
    bs: Sequence[Tensor],
    scales: Sequence[float],
    cos: Tensor,
    sin: Tensor,
    length: int,
    width: int,
) -> None:
    """Add the updates in y (rows, sum of n_i), contiguous, and turn queries and keys, in place.

    Args:
        y: the three layers' outputs beside each other.
        h: H (sum of r_i, rows), contiguous.
        bs: B_i (n_i, r_i), with r_i = 0 where there is no update.
        scales: s_i.
        cos: (batch or 1, length, width), contiguous.
        sin: as cos.
        length: of a sequence; row i is of the place i % length.
        width: of a head; n_i are multiples of it.
    """
    rows, ranks, sizes = len(y), [b.shape[1] for b in bs], [len(b) for b in bs]
    options = _options(ranks, width, y.element_size(), False)
    turns = (sizes[0] + sizes[1]) // width * triton.cdiv(width // 2, options["BLOCK_N"])
    grid = triton.cdiv(rows, options["BLOCK_M"]), turns + triton.cdiv(sizes[2], 2 * options["BLOCK_N"])
    r0, r1, r2 = ranks
    expand_turn_kernel[grid](
        y, h, *(b.contiguous() for b in bs), cos, sin, rows, length, _apart(cos), width // 2, *sizes, *scales,
        R0=r0, R1=r1, R2=r2, **options,
    )  # fmt: skip


def turn_spread(
    gs: Sequence[Tensor],
    bs: Sequence[Tensor],
    hs: Sequence[Tensor],
    scales: Sequence[float],
    cos: Tensor,
    sin: Tensor,
    length: int,
    width: int,
    split: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return P (sum of r_i, rows), all G_i beside each other (rows, sum of n_i), and all dB_i behind each other.

    Args:
        gs: G_0, G_1, to be turned back, and G_2, each (batch, heads, length, width) with unit stride in a head.
        bs: B_i (n_i, r_i), with r_i = 0 where there is no update.
        hs: H_i (r_i, rows); none: no dB.
        scales: s_i.
        cos: (batch or 1, length, width), contiguous.
        sin: as cos.
        length: of a sequence.
        width: of a head.
        split: among how many programs the heads of some rows are shared out; 0: as it fits the GPU.
    """
    import torch

    g, rows, ranks, sizes = gs[0], gs[0].shape[0] * length, [b.shape[1] for b in bs], [len(b) for b in bs]
    whole = torch.empty((rows, sum(sizes)), dtype=g.dtype, device=g.device)
    options = _options(ranks, width, g.element_size(), True)
    groups = triton.cdiv(rows, options["BLOCK_M"])
    split = split or parts(rows, max(sizes), g.device, {"BM": options["BLOCK_M"], "BK": 2 * options["BLOCK_N"]})
    p = torch.empty((split, sum(ranks), rows), dtype=g.dtype if split == 1 else torch.float32, device=g.device)
    atomic = not torch.are_deterministic_algorithms_enabled() and groups > 1
    entries = sum(b.numel() for b in bs) if hs else 0
    make = torch.zeros if atomic else torch.empty
    dbs = make((1 if atomic else groups, entries), dtype=torch.float32, device=g.device)
    r0, r1, r2 = ranks
    turn_spread_kernel[(groups, 3, split)](
        *gs, *(b.contiguous() for b in bs), *([h.contiguous() for h in hs] or [p, p, p]), p, whole, dbs, cos, sin,
        rows, length, _apart(cos), width // 2, *sizes, *(x.stride(i) for x in gs for i in range(3)), *scales,
        R0=r0, R1=r1, R2=r2, DB=bool(hs), ATOMIC=atomic, **options,
    )  # fmt: skip
    p = p[0] if split == 1 else p.sum(0).to(g.dtype)
    return p, whole, dbs.view(-1) if atomic or groups == 1 else dbs.sum(0)


def _apart(cos: Tensor) -> int:
    """Return how far the angles of one sequence are from the next's: 0 where all have the same."""
    return 0 if len(cos) == 1 else cos.stride(0)


def _builds() -> list[Build]:
    made = []

    def build(name: str, kernel: Any, r: int, size: int, arguments: dict[str, Any], head: int = 128) -> None:
        """With three updates of rank 16, or one of rank 64, of the sizes of a Llama 8B or, with heads of 64, 1B."""
        common: dict[str, Any] = {
            **dict.fromkeys(("b0_ptr", "b1_ptr", "b2_ptr"), tl.float32), "rows": 8192, "length": 2048,
            "angles_batch": 0, "half": head // 2, "n0": 32 * head, "n1": 8 * head, "n2": 8 * head,
            "s0": 2.0, "s1": 2.0, "s2": 2.0,
            "R0": r, "R1": r % 64, "R2": r % 64, **_options((r,), head, size, kernel is turn_spread_kernel),
        }  # fmt: skip
        if kernel is turn_spread_kernel:
            for i, heads in enumerate((32, 8, 8)):
                common |= {f"batch{i}": 2048 * heads * head, f"head{i}": head, f"token{i}": heads * head}
        options: dict[str, int] = {key: common.pop(key) for key in ("num_warps", "num_stages") if key in common}
        made.append(Build(name, kernel, arguments | common, options, products=size == 2))

    for label, dtype, size, r in (
        ("bf16", tl.bfloat16, 2, 16),
        ("bf16", tl.bfloat16, 2, 64),
        ("fp32", tl.float32, 4, 16),
    ):
        ends: dict[str, Any] = dict.fromkeys(("y_ptr", "h_ptr", "cos_ptr", "sin_ptr"), dtype)
        build(f"expand and turn, {label}, r {r}", expand_turn_kernel, r, size, ends)
        names = ("g0_ptr", "g1_ptr", "g2_ptr", "h0_ptr", "h1_ptr", "h2_ptr", "p_ptr", "all_ptr", "cos_ptr", "sin_ptr")
        arguments: dict[str, Any] = {**dict.fromkeys(names, dtype), "db_ptr": tl.float32, "DB": True, "ATOMIC": True}
        build(f"turn and spread, {label}, r {r}", turn_spread_kernel, r, size, arguments)
        if (r, size) == (16, 2):
            build(f"turn and spread, {label}, r {r}, heads of 64", turn_spread_kernel, r, size, arguments, 64)
            staged = arguments | {"ATOMIC": False}
            build(f"turn and spread, {label}, r {r}, two stages", turn_spread_kernel, r, size, staged)
    return made


BUILDS = _builds()
