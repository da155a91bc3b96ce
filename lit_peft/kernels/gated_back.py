"""Back through silu(e) g with the low-rank updates around it, and what those get, in one read of d, e0 and g0.

    t = d + P_d^T A_d,   e = e0 + s_e H_e^T B_e^T,   g = g0 + s_g H_g^T B_g^T                      in registers only
    de = t g s(e) (1 + e (1 - s(e))),   dg = t silu(e)                                  written beside each other
    P = [s_e (de B_e)^T ; s_g (dg B_g)^T] (r, rows),   dB_e = s_e de^T H_e^T (f, r),   dB_g = s_g dg^T H_g^T

A program has 128 columns and 512 rows, in blocks of 32, so that its share of dB stays in registers until it has seen
them all. P is a sum over all columns: the programs add to it in float32, block by block, and the last one of those that
have the same rows rounds it, so that no further launch does. An entry of P is added to f / 128 times and one of dB rows
/ 512 times: 37 million additions for f = 14336, 8192 rows and ranks of 16, where programs that have all columns of 64
rows, and P in registers, would need 59 million, and there would be no more than 128 of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from lit_peft.kernels.build import Build
from lit_peft.kernels.shrink import padded, turned

if TYPE_CHECKING:
    from torch import Tensor


@triton.jit
def _tile(y_ptr, row, column, rows, width, stride):
    """One tile of y^T in float32, columns first: y (rows, width), whose rows are `stride` apart."""
    inside = (column < width)[:, None] & (row < rows)[None, :]
    return tl.load(y_ptr + row[None, :] * stride + column[:, None], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _narrow(h_ptr, row, rows, R: tl.constexpr, PAD: tl.constexpr, TURNED: tl.constexpr):
    """Some columns of H (R, rows), of which H or, where TURNED, H^T lies in memory, padded to (PAD, BLOCK_M)."""
    at = tl.arange(0, PAD)[:, None]
    inside = (at < R) & (row < rows)[None, :]
    if TURNED:
        place = row[None, :] * R + at
    else:
        place = at.to(tl.int64) * rows + row[None, :]
    return tl.load(h_ptr + place, mask=inside, other=0.0)


@triton.jit
def _factor(b_ptr, column, width, outer, inner, R: tl.constexpr, PAD: tl.constexpr):
    """Some rows of B (width, R) of any strides, padded with zeros to (BLOCK_N, PAD)."""
    at = tl.arange(0, PAD)[None, :]
    inside = (column < width)[:, None] & (at < R)
    return tl.load(b_ptr + column[:, None] * outer + at.to(tl.int64) * inner, mask=inside, other=0.0)


@triton.jit
def _shrunk(
    change, b, sum_ptr, row, rows, scale,
    R: tl.constexpr, RANKS: tl.constexpr, PAD: tl.constexpr, ATOMIC: tl.constexpr,
):  # fmt: skip
    """Add s B^T change (R, BLOCK_M) to the sums (R, rows), or store it in this program's part of them."""
    # B to the right: as the left factor its whole length would be kept in registers from block to block
    p = tl.trans(scale * tl.dot(tl.trans(change), b, input_precision="ieee"))
    at = tl.arange(0, PAD)[:, None]
    place, inside = sum_ptr + at.to(tl.int64) * rows + row[None, :], (at < R) & (row < rows)[None, :]
    if ATOMIC:
        tl.atomic_add(place, p, mask=inside, sem="relaxed")
    else:
        tl.store(place + tl.program_id(0).to(tl.int64) * rows * RANKS, p, mask=inside)


@triton.jit
def _added(db_ptr, db, column, width, R: tl.constexpr, PAD: tl.constexpr):
    """Add some rows of dB (width, R)."""
    at = tl.arange(0, PAD)[None, :]
    tl.atomic_add(db_ptr + column[:, None] * R + at, db, mask=(column < width)[:, None] & (at < R), sem="relaxed")


@triton.jit
def _rounded(sum_ptr, p_ptr, row, rows, R: tl.constexpr, PAD: tl.constexpr):
    """Some columns of P (R, rows), of the sums."""
    at = tl.arange(0, PAD)[:, None]
    inside = (at < R) & (row < rows)[None, :]
    place = at.to(tl.int64) * rows + row[None, :]
    # past the first cache: what other programs added is in the second
    p = tl.load(sum_ptr + place, mask=inside, other=0.0, cache_modifier=".cg")
    tl.store(p_ptr + place, p.to(p_ptr.dtype.element_ty), mask=inside)


@triton.jit
def gated_back_kernel(
    d_ptr, pd_ptr, ad_ptr, e_ptr, g_ptr, he_ptr, be_ptr, hg_ptr, bg_ptr, both_ptr, out_ptr, p_ptr, db_ptr,
    sum_ptr, count_ptr, rows, width, steps, d_stride, e_stride, g_stride, e_scale, g_scale,
    R_D: tl.constexpr, R_E: tl.constexpr, R_G: tl.constexpr,
    PAD_D: tl.constexpr, PAD_E: tl.constexpr, PAD_G: tl.constexpr, PAD: tl.constexpr,
    TURNED: tl.constexpr, AGAIN: tl.constexpr, ATOMIC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A block of columns of [de | dg] (rows, 2 width), of h (rows, width) where AGAIN, and of dB (width, R) of both.

    Axis 1 has `steps` blocks of rows each. The sums are P (R, rows) in float32 where ATOMIC, with zeros in them and in
    the counts (axis 1), and else parts of P, one for each program of axis 0. Tiles have their columns first: of these
    there are 128, and the tensor cores of Hopper take no fewer than 64 in the first place.
    """
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * steps
    here = min(steps, tl.cdiv(rows, BLOCK_M) - first)
    if R_D > 0:
        ad = _factor(ad_ptr, column, width, 1, width, R_D, PAD_D).to(d_ptr.dtype.element_ty)
    if R_E > 0:
        be = _factor(be_ptr, column, width, R_E, 1, R_E, PAD_E).to(e_ptr.dtype.element_ty)
        db_e = tl.zeros((BLOCK_N, PAD_E), tl.float32)
    if R_G > 0:
        bg = _factor(bg_ptr, column, width, R_G, 1, R_G, PAD_G).to(e_ptr.dtype.element_ty)
        db_g = tl.zeros((BLOCK_N, PAD_G), tl.float32)
    for i in tl.range(here, num_stages=STAGES):  # 2: the next block of d, e0 and g0 is fetched meanwhile
        # programs beside each other begin at different rows, not to add to the same entries of P all at a time
        block = first + (i + tl.program_id(0)) % here
        row = block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = (column < width)[:, None] & (row < rows)[None, :]
        e = _tile(e_ptr, row, column, rows, width, e_stride)
        if R_E > 0:
            he = _narrow(he_ptr, row, rows, R_E, PAD_E, False)
            e += e_scale * tl.dot(be, he, input_precision="ieee")
        share = tl.sigmoid(e)
        silu = e * share
        slope = share + silu * (1 - share)
        t = _tile(d_ptr, row, column, rows, width, d_stride)
        if R_D > 0:
            t += tl.dot(ad, _narrow(pd_ptr, row, rows, R_D, PAD_D, TURNED), input_precision="ieee")
        place = both_ptr + row[None, :] * (2 * width) + column[:, None]
        dg = (t * silu).to(both_ptr.dtype.element_ty)
        tl.store(place + width, dg, mask=inside)
        g = _tile(g_ptr, row, column, rows, width, g_stride)
        if R_G > 0:
            hg = _narrow(hg_ptr, row, rows, R_G, PAD_G, False)
            g += g_scale * tl.dot(bg, hg, input_precision="ieee")
            _shrunk(dg, bg, sum_ptr + R_E * rows, row, rows, g_scale, R_G, R_E + R_G, PAD_G, ATOMIC)
            db_g += tl.dot(dg, tl.trans(hg), input_precision="ieee")
        if AGAIN:
            out = (silu * g).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + row[None, :] * width + column[:, None], out, mask=inside)
        de = (t * g * slope).to(both_ptr.dtype.element_ty)
        tl.store(place, de, mask=inside)
        if R_E > 0:
            _shrunk(de, be, sum_ptr, row, rows, e_scale, R_E, R_E + R_G, PAD_E, ATOMIC)
            he = _narrow(he_ptr, row, rows, R_E, PAD_E, False)  # again: held since e, it would take registers
            db_e += tl.dot(de, tl.trans(he), input_precision="ieee")
    if R_E > 0:
        _added(db_ptr, e_scale * db_e, column, width, R_E, PAD_E)
    if R_G > 0:
        _added(db_ptr + width * R_E, g_scale * db_g, column, width, R_G, PAD_G)
    if ATOMIC and R_E + R_G > 0:
        tl.debug_barrier()  # all threads of this program have added before one of them says so
        if tl.atomic_add(count_ptr + tl.program_id(1), 1.0, sem="acq_rel") == tl.num_programs(0) - 1:
            for i in range(here):
                at = (first + i).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
                _rounded(sum_ptr, p_ptr, at, rows, R_E + R_G, PAD)


ROWS = 512  # of a program


def _options(r_d: int, r_e: int, r_g: int, itemsize: int) -> dict[str, int]:
    if itemsize > 2:  # products of float32 hold their factors in registers
        return {"BLOCK_M": 16, "BLOCK_N": 64 if max(r_d, r_e, r_g) <= 16 else 32, "STAGES": 1, "num_warps": 8}
    small = max(r_e, r_g) <= 32
    return {"BLOCK_M": 32 if small else 16, "BLOCK_N": 128, "STAGES": 2 if small else 1, "num_warps": 8}


def gated_back(
    d: Tensor, p_d: Tensor | None, a_d: Tensor | None, e: Tensor, g: Tensor, *low: Any, strip: int = ROWS
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return [de | dg] (rows, 2 f), h (rows, f) or nothing, P (r, rows), and dB_e and then dB_g (r f,) in float32.

    Sums are made by atomics, in an order that changes; where torch is to be deterministic, a program has all rows, and
    the parts of P are added up in a second stage.

    Args:
        d: (rows, f), with unit stride in a row, like e and g.
        p_d: P_d (r, rows), itself contiguous or turned over, or None.
        a_d: A_d (r, f), or None.
        e: e0.
        g: g0.
        *low: H_e (r, rows), B_e (f, r), s_e, then the same of g, with None for an H and a B that are not there; and
            whether h is made again.
        strip: how many rows a program has, a multiple of 32.
    """
    import torch

    h_e, b_e, s_e, h_g, b_g, s_g, again = low
    (rows, width), (r_d, r_e, r_g) = e.shape, (0 if h is None else len(h) for h in (p_d, h_e, h_g))
    r, atomic = r_e + r_g, not torch.are_deterministic_algorithms_enabled()
    options = _options(r_d, r_e, r_g, e.element_size())
    groups, blocks = triton.cdiv(width, options["BLOCK_N"]), triton.cdiv(rows, options["BLOCK_M"])
    steps = strip // options["BLOCK_M"] if atomic else blocks
    strips = triton.cdiv(blocks, steps)
    both, out, p = (
        torch.empty(shape, dtype=e.dtype, device=e.device)
        for shape in ((rows, 2 * width), (rows, width) if again else (0,), (r, rows))
    )
    # one memory for all that begins with zeros, as each by itself is a launch
    numbers = torch.zeros(r * width + (r * rows + strips if atomic else 0), dtype=torch.float32, device=e.device)
    db, sums, counts = numbers[: r * width], numbers[r * width :], numbers[r * (width + rows) :]
    if not atomic:
        sums = torch.empty((groups, r, rows), dtype=torch.float32, device=e.device)
    parts = [e if part is None else part.contiguous() for part in (a_d, h_e, b_e, h_g, b_g)]
    parts.insert(0, e if p_d is None else p_d)
    gated_back_kernel[(groups, strips)](
        d, *parts[:2], e, g, *parts[2:], both, out, p, db, sums, counts, rows, width, steps,
        d.stride(0), e.stride(0), g.stride(0), s_e, s_g, R_D=r_d, R_E=r_e, R_G=r_g, PAD_D=padded(r_d),
        PAD_E=padded(r_e), PAD_G=padded(r_g), PAD=padded(r), TURNED=turned(p_d), AGAIN=again, ATOMIC=atomic, **options,
    )  # fmt: skip
    return both, out, p if atomic else sums.sum(0).to(e.dtype), db


def _builds() -> list[Build]:
    made = []
    for label, dtype, size, ranks, atomic in (
        ("bf16, r 16", tl.bfloat16, 2, (16, 16, 16), True),
        ("bf16, r 64, 32 and 32", tl.bfloat16, 2, (64, 32, 32), True),
        ("bf16, r 64, 32 and 32, two stages", tl.bfloat16, 2, (64, 32, 32), False),
        ("bf16, r 64, 48 and 16", tl.bfloat16, 2, (64, 48, 16), True),
        ("bf16, no updates", tl.bfloat16, 2, (0, 0, 0), True),
        ("fp16, r 16", tl.float16, 2, (16, 16, 16), True),
        ("fp32, r 16", tl.float32, 4, (16, 16, 16), True),
        ("fp32, r 64, 32 and 32", tl.float32, 4, (64, 32, 32), True),
    ):
        names = "d_ptr", "pd_ptr", "e_ptr", "g_ptr", "he_ptr", "hg_ptr", "both_ptr", "out_ptr", "p_ptr"
        exact = "ad_ptr", "be_ptr", "bg_ptr", "db_ptr", "sum_ptr", "count_ptr"
        blocks, (r_d, r_e, r_g) = _options(*ranks, size), ranks
        options = {"num_warps": blocks.pop("num_warps")}
        arguments: dict[str, Any] = {
            **dict.fromkeys(names, dtype), **dict.fromkeys(exact, tl.float32), "rows": 8192, "width": 14336,
            "steps": ROWS // blocks["BLOCK_M"], "d_stride": 14336, "e_stride": 28672, "g_stride": 28672,
            "e_scale": 2.0, "g_scale": 2.0, "R_D": r_d, "R_E": r_e, "R_G": r_g, "PAD_D": padded(r_d),
            "PAD_E": padded(r_e), "PAD_G": padded(r_g), "PAD": padded(r_e + r_g), "ATOMIC": atomic,
            "TURNED": True, "AGAIN": True,
        }  # fmt: skip
        products = sum(ranks) > 0 and size == 2
        made.append(Build(label, gated_back_kernel, arguments | blocks, options, products))
    return made


BUILDS = _builds()
