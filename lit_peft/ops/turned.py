"""The low-rank updates of queries, keys and values together with the rotation of the first two, without gradients.

    expand_turn:   Y_i += s_i H_i^T B_i^T;   every head of Y_0 and Y_1 turned by the angles of its place
    turn_spread:   G_0 and G_1 turned back, the G_i beside each other, P_i = s_i B_i^T G_i^T, dB_i = s_i G_i^T H_i^T

with H_i (r_i, rows), B_i (n_i, r_i), Y_i and G_i (rows, n_i), P_i (r_i, rows), rows = batch * length. A head (u, v) of
`width`, in two halves, is turned and turned back as in `rotary`:

    (u, v) -> (u cos - v sin, v cos' + u sin')         (u, v) -> (u cos + v sin', v cos' - u sin)

What `packed` and `rotary` do in two launches either way is one here, and dB is had from the same reading of the
gradients: queries and keys are neither written nor read between.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from lit_peft.ops.choice import takes_kernel
from lit_peft.ops.packed import DTYPES, MOST
from lit_peft.ops.rotary import rotate_half

WIDEST = 256  # the widest head of which both halves fit into registers


def fits(dtype: torch.dtype, sizes: Sequence[int], ranks: Sequence[int], width: int) -> bool:
    """Return whether the kernels take three layers of n_i outputs and ranks r_i, with heads of a width.

    Example:
        >>> fits(torch.bfloat16, (64, 16, 16), (8, 0, 8), width=16)
        True
    """
    heads = width % 2 == 0 and 0 < width <= WIDEST and all(size % width == 0 for size in sizes)
    return heads and dtype in DTYPES and len(sizes) == 3 and 0 < sum(ranks) <= MOST


def _launches(x: Tensor, bs: Sequence[Tensor], width: int, kernels: bool | None, rows: int) -> bool:
    sizes, ranks = [len(b) for b in bs], [b.shape[1] for b in bs]
    return fits(x.dtype, sizes, ranks, width) and takes_kernel("layer", x, kernels, rows=rows, width=sizes[0])


def expand_turn_reference(
    y: Tensor,
    h: Tensor,
    bs: Sequence[Tensor],
    scales: Sequence[float],
    cos: Tensor,
    sin: Tensor,
    length: int,
    width: int,
) -> None:
    """Change y as `expand_turn` does, with plain operations."""
    y0, y1, y2 = torch.split(y, [len(b) for b in bs], 1)
    hs = torch.split(h, [b.shape[1] for b in bs])
    for part, b, h_i, scale in zip((y0, y1, y2), bs, hs, scales, strict=True):
        if b.shape[1]:
            part.addmm_(h_i.t(), b.to(y.dtype).t(), alpha=scale)
    for part in (y0, y1):
        heads = part.view(len(y) // max(1, length), length, part.shape[1] // width, width)
        heads.copy_(heads * cos[:, :, None] + rotate_half(heads) * sin[:, :, None])


def expand_turn(
    y: Tensor,
    h: Tensor,
    bs: Sequence[Tensor],
    scales: Sequence[float],
    cos: Tensor,
    sin: Tensor,
    length: int,
    width: int,
    *,
    kernels: bool | None = None,
) -> None:
    """Add the updates of queries, keys and values, and turn the first two, in place.

    Args:
        y: (batch * length, n_0 + n_1 + n_2), contiguous.
        h: H (sum of r_i, batch * length), in y's dtype.
        bs: B_i (n_i, r_i), in any floating dtype; r_i is 0 where there is no update.
        scales: s_i.
        cos: cosines of the angles (batch or 1, length, width).
        sin: their sines.
        length: places in a sequence.
        width: of a head, even.
        kernels: whether to launch the kernel, where it `fits`; None: as measured.

    Example:
        >>> y, b = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]]), torch.ones(2, 1)
        >>> zero, one = torch.zeros(1, 1, 2), torch.ones(1, 1, 2)  # by a right angle
        >>> expand_turn(y, torch.ones(3, 1), [b, b, b], [1.0, 1.0, 2.0], zero, one, 1, 2)
        >>> y.tolist()
        [[-3.0, 2.0, -5.0, 4.0, 7.0, 8.0]]
    """
    if _launches(y, bs, width, kernels, len(y)):
        _expand_turn(y, h, bs, scales, cos, sin, length, width)
    else:
        expand_turn_reference(y, h, bs, scales, cos, sin, length, width)


def turn_spread_reference(
    gs: Sequence[Tensor],
    bs: Sequence[Tensor],
    hs: Sequence[Tensor] | None,
    scales: Sequence[float],
    cos: Tensor,
    sin: Tensor,
    length: int,
    width: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return what `turn_spread` does, with plain operations."""
    dtype, rows = gs[0].dtype, gs[0].shape[0] * length
    back = [(g * cos[:, None] - rotate_half(g * sin[:, None])).to(dtype) for g in gs[:2]]
    pieces = [g.transpose(1, 2).reshape(rows, len(b)) for g, b in zip((*back, gs[2]), bs, strict=True)]
    ps, dbs = [], []
    for i, (g, b, scale) in enumerate(zip(pieces, bs, scales, strict=True)):
        ps.append(scale * (b.to(dtype).t() @ g.t()))
        made = scale * (g.t() @ hs[i].t()) if hs is not None else g.new_empty(0)
        dbs.append(made if dtype == torch.float64 else made.float())
    return torch.cat(ps), torch.cat(pieces, 1), dbs[0], dbs[1], dbs[2]


def turn_spread(
    gs: Sequence[Tensor],
    bs: Sequence[Tensor],
    hs: Sequence[Tensor] | None,
    scales: Sequence[float],
    cos: Tensor,
    sin: Tensor,
    length: int,
    width: int,
    *,
    kernels: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return P, the G_i beside each other, and dB_0, dB_1, dB_2, the gradients of queries and keys turned back.

    Args:
        gs: the gradients of turned queries, of turned keys, and of values: (batch, heads, length, width), n_i of them
            heads * width.
        bs: B_i (n_i, r_i), in any floating dtype; r_i is 0 where there is no update.
        hs: H_i (r_i, batch * length), in the gradients' dtype; None: no dB is asked for.
        scales: s_i.
        cos: cosines of the angles (batch or 1, length, width).
        sin: their sines.
        length: places in a sequence.
        width: of a head, even.
        kernels: whether to launch the kernel, where it `fits`; None: as measured.

    Returns:
        P (sum of r_i, batch * length) and (batch * length, sum of n_i) in the gradients' dtype, and dB_i (n_i, r_i) in
        float32, empty where there is no update or no H.

    Example:
        >>> g, b, h = torch.tensor([[[[1.0, 2.0]]]]), torch.ones(2, 1), torch.ones(1, 1)
        >>> zero, one = torch.zeros(1, 1, 2), torch.ones(1, 1, 2)  # back by a right angle
        >>> p, whole, *dbs = turn_spread([g, g, g], [b, b, b], [h, h, h], [1.0, 1.0, 2.0], zero, one, 1, 2)
        >>> p.tolist(), whole.tolist(), dbs[0].tolist()
        ([[1.0], [1.0], [6.0]], [[2.0, -1.0, 2.0, -1.0, 1.0, 2.0]], [[2.0], [-1.0]])
    """
    if not _launches(gs[0], bs, width, kernels, gs[0].shape[0] * length):
        return turn_spread_reference(gs, bs, hs, scales, cos, sin, length, width)
    p, whole, dbs = _turn_spread(gs, bs, hs or (), scales, cos, sin, length, width)
    if hs is None:
        return p, whole, dbs, dbs[:0], dbs[:0]
    ends = [0, *accumulate(b.numel() for b in bs)]
    db0, db1, db2 = (dbs[ends[i] : ends[i + 1]].view(b.shape) for i, b in enumerate(bs))
    return p, whole, db0, db1, db2


# As registered operations the launches have shapes without data: fake tensors, the memory count and compilers see them.
@torch.library.custom_op("lit_peft::expand_turn", mutates_args=("y",))
def _expand_turn(
    y: Tensor,
    h: Tensor,
    bs: Sequence[Tensor],
    scales: Sequence[float],
    cos: Tensor,
    sin: Tensor,
    length: int,
    width: int,
) -> None:
    from lit_peft.kernels.turned import expand_turn as launch

    launch(y, h.contiguous(), bs, scales, cos.contiguous(), sin.contiguous(), length, width)


@torch.library.custom_op("lit_peft::turn_spread", mutates_args=())
def _turn_spread(
    gs: Sequence[Tensor],
    bs: Sequence[Tensor],
    hs: Sequence[Tensor],
    scales: Sequence[float],
    cos: Tensor,
    sin: Tensor,
    length: int,
    width: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """All dB_i are one tensor: what is added to has to be 0 before, and this way one launch makes it so."""
    from lit_peft.kernels.turned import turn_spread as launch

    even = [g if g.stride(-1) == 1 else g.contiguous() for g in gs]
    return launch(even, bs, hs, scales, cos.contiguous(), sin.contiguous(), length, width)


@_turn_spread.register_fake
def _(
    gs: Sequence[Tensor],
    bs: Sequence[Tensor],
    hs: Sequence[Tensor],
    scales: Sequence[float],
    cos: Tensor,
    sin: Tensor,
    length: int,
    width: int,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = gs[0].shape[0] * length
    dbs = gs[0].new_empty(sum(b.numel() for b in bs) if hs else 0, dtype=torch.float32)
    return gs[0].new_empty((sum(b.shape[1] for b in bs), rows)), gs[0].new_empty((rows, sum(map(len, bs)))), dbs
