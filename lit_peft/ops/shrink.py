"""The narrow products of a low-rank update, each in one read of what is wide: the registered launches of the kernels.

    shrink:   H = D(x) A^T (rows, r),                       and, if asked for, [x | s H L]     see `kernels/shrink.py`
    dyb_db:   P = s g B (rows, r),  dB = s g^T H L (out, r), and, if asked for, [g | P L]       see `kernels/spread.py`
    spread:   dx += D(P A)                                  in place
    taken:    D(x)^T P (in, r), which is dA transposed

D drops entries by a seed, and the same seed drops the same entries in all of them; they are other entries than
`low_rank.dropped` drops. `lora_linear` and `low_rank_update` hold what is made of these, and the plain path.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_peft.ops.choice import takes_kernel

MOST = 128  # the largest rank that the kernels hold in registers


def takes(op: str, x: Tensor, tall: int, r: int, p: float, kernels: bool | None = None) -> bool:
    """Return whether to launch the kernels of an op, `shrink` or `spread`, for x (..., in) and an update (..., out).

    Args:
        op: which.
        x: in the dtype that is multiplied.
        tall: out.
        r: the rank; beyond `MOST`, and in float64, there are no kernels.
        p: the share of entries that are dropped.
        kernels: the caller's own choice; None: as measured.
    """
    if not 0 < r <= MOST or p >= 1 or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    return takes_kernel(op, x, kernels, **sizes(x, tall, r))


def sizes(x: Tensor, tall: int, r: int) -> dict[str, int]:
    """Return what the crossovers of a layer's ops are told in."""
    width = x.shape[-1]
    return {"rows": x.numel() // max(width, 1), "width": width, "tall": tall, "r": r}


def _even(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def either(h: Tensor | None) -> Tensor | None:
    """Return H (r, rows) so that it or H^T lies in memory row by row: narrow products come in both ways."""
    return h if h is None or h.t().is_contiguous() else h.contiguous()


@torch.library.custom_op("lit_peft::shrink", mutates_args=())
def shrink(
    x: Tensor, a: Tensor, gain: Tensor | None, scale: float, p: float, seed: int, pad: int
) -> tuple[Tensor, Tensor]:
    """Return H (rows, r) and [x | s H diag(gain) | 0] (rows, in + pad), which is empty where pad is 0."""
    from lit_peft.kernels.shrink import shrink as launch

    return launch(_even(x), _even(a), gain, scale, p, seed, pad)


@shrink.register_fake
def _(x: Tensor, a: Tensor, gain: Tensor | None, scale: float, p: float, seed: int, pad: int) -> tuple[Tensor, Tensor]:
    rows, width = x.shape
    return x.new_empty((rows, a.shape[0])), x.new_empty((rows, width + pad) if pad else (0,))


@torch.library.custom_op("lit_peft::dyb_db", mutates_args=())
def dyb_db(
    g: Tensor, b: Tensor, h: Tensor | None, gain: Tensor | None, scale: float, pad: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return P (rows, r), dB (out, r) in float32, empty without h, and [g | P diag(gain) | 0], empty where pad is 0.

    Here P = s g B and dB = s g^T H diag(gain).
    """
    from lit_peft.kernels.spread import dyb_db as launch

    return launch(_even(g), b.contiguous(), None if h is None else h.contiguous(), gain, scale, 0.0, 0, pad)


@dyb_db.register_fake
def _(
    g: Tensor, b: Tensor, h: Tensor | None, gain: Tensor | None, scale: float, pad: int
) -> tuple[Tensor, Tensor, Tensor]:
    (rows, width), r = g.shape, b.shape[1]
    db = g.new_empty((0,) if h is None else (width, r), dtype=torch.float32)
    return g.new_empty((rows, r)), db, g.new_empty((rows, width + pad) if pad else (0,))


@torch.library.custom_op("lit_peft::taken", mutates_args=())
def taken(x: Tensor, inner: Tensor, p: float, seed: int) -> Tensor:
    """Return D(x)^T P (in, r) in float32, from x (rows, in) and P (rows, r)."""
    from lit_peft.kernels.spread import dyb_db as launch

    return launch(_even(x), None, inner.contiguous(), None, 1.0, p, seed, 0)[1]


@taken.register_fake
def _(x: Tensor, inner: Tensor, p: float, seed: int) -> Tensor:
    return x.new_empty((x.shape[1], inner.shape[1]), dtype=torch.float32)


@torch.library.custom_op("lit_peft::spread", mutates_args=("dx",))
def spread(dx: Tensor, inner: Tensor, a: Tensor, p: float, seed: int) -> None:
    """Add D(P A) to a contiguous dx (rows, in) in place, with P (rows, r) and A (r, in)."""
    from lit_peft.kernels.spread import spread as launch

    launch(dx, inner.to(dx.dtype).contiguous(), a.contiguous(), p, seed)
