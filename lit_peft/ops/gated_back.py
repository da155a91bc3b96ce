"""Back through the gated product of Llama's MLP and the three low-rank updates around it, in one launch; no autograd.

    h = silu(e) g,   e = e0 + s_e H_e^T B_e^T,   g = g0 + s_g H_g^T B_g^T
    t = d + P_d^T A_d,   de = t g s(e) (1 + e (1 - s(e))),   dg = t silu(e)
    P = [s_e (de B_e)^T ; s_g (dg B_g)^T],   dB_e = s_e de^T H_e^T,   dB_g = s_g dg^T H_g^T

with s the logistic function, and t the gradient at h, where the layer behind has d and an update. All work on rows: d,
e0 and g0 (rows, f), H, P and P_d (r, rows), A_d (r, f), B (f, r). de and dg are rounded once, and P and dB are made of
the rounded ones; e, g and t are in registers only.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_peft.ops.choice import takes_kernel
from lit_peft.ops.packed import DTYPES, MOST
from lit_peft.ops.shrink import either

Found = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def fits(d: Tensor, r_d: int, r_e: int, r_g: int) -> bool:
    """Return whether the kernel takes d (rows, f) and updates of these ranks, 0 where there is none.

    Example:
        >>> import torch
        >>> fits(torch.ones(2, 4), 64, 32, 32), fits(torch.ones(2, 4), 64, 64, 1)
        (True, False)
    """
    return d.dtype in DTYPES and d.dim() == 2 and r_d <= MOST and r_e + r_g <= MOST


def gated_back(
    d: Tensor,
    p_d: Tensor | None,
    a_d: Tensor | None,
    e: Tensor,
    g: Tensor,
    h_e: Tensor | None,
    b_e: Tensor | None,
    s_e: float,
    h_g: Tensor | None,
    b_g: Tensor | None,
    s_g: float,
    again: bool,
    *,
    kernels: bool | None = None,
) -> Found:
    """Return de and dg beside each other, h made again, P, dB_e and dB_g.

    Args:
        d: the gradient at h (rows, f), but for what the update of the layer behind adds to it.
        p_d: P_d (r, rows) of that layer, in d's dtype, or None.
        a_d: A_d (r, f) of that layer, in any floating dtype, or None.
        e: e0 (rows, f), in d's dtype.
        g: g0, as e.
        h_e: H_e (r, rows) in d's dtype, or None.
        b_e: B_e (f, r) in any floating dtype, or None.
        s_e: s_e.
        h_g: H_g, as H_e.
        b_g: B_g, as B_e.
        s_g: s_g.
        again: whether h is wanted.
        kernels: whether to launch the kernel; None: as measured.

    Returns:
        [de | dg] (rows, 2 f); h (rows, f), or nothing; P (r_e + r_g, rows), all in d's dtype; dB_e and dB_g (f, r) in
        float32, or float64 where d is, empty where there is no update.

    Example:
        >>> import torch
        >>> d, e, g = torch.tensor([[2.0]]), torch.tensor([[0.0]]), torch.tensor([[3.0]])
        >>> one = torch.ones(1, 1)
        >>> both, out, p, db_e, db_g = gated_back(d, one, one, e, g, one, 0 * one, 0.5, None, None, 1.0, True)
        >>> both.tolist(), out.tolist(), p.tolist(), db_e.tolist(), db_g.tolist()
        ([[4.5, 0.0]], [[0.0]], [[0.0]], [[2.25]], [])
    """
    low = h_e, b_e, s_e, h_g, b_g, s_g
    r_d, r_e, r_g = (0 if h is None else len(h) for h in (p_d, h_e, h_g))
    launch = fits(d, r_d, r_e, r_g) and takes_kernel("layer", d, kernels, rows=len(d), width=d.shape[1])
    if not launch:
        return gated_back_reference(d, p_d, a_d, e, g, *low, again)
    both, out, p, sums = _gated_back(d, p_d, a_d, e, g, *low, again)
    of_e, of_g = sums.split((e.shape[1] * r_e, e.shape[1] * r_g))
    db_e, db_g = (of.view(-1, r) if r else of for of, r in ((of_e, r_e), (of_g, r_g)))
    return both, out, p, db_e, db_g


def gated_back_reference(
    d: Tensor,
    p_d: Tensor | None,
    a_d: Tensor | None,
    e: Tensor,
    g: Tensor,
    h_e: Tensor | None,
    b_e: Tensor | None,
    s_e: float,
    h_g: Tensor | None,
    b_g: Tensor | None,
    s_g: float,
    again: bool,
) -> Found:
    """Return what `gated_back` returns, with plain operations."""
    t = _expanded(d, p_d, None if a_d is None else a_d.t(), 1.0)
    e, g = _expanded(e, h_e, b_e, s_e), _expanded(g, h_g, b_g, s_g)
    both = torch.cat((torch.ops.aten.silu_backward(t * g, e), F.silu(e).mul_(t)), 1)
    out = F.silu(e).mul_(g) if again else e.new_empty(0)
    ps, dbs = [], []
    for change, h, b, scale in zip(both.chunk(2, 1), (h_e, h_g), (b_e, b_g), (s_e, s_g), strict=True):
        if h is None or b is None:
            dbs.append(e.new_empty(0))
            continue
        ps.append(scale * (b.to(e.dtype).t() @ change.t()))
        dbs.append((scale * (h @ change)).t().contiguous())
    p = torch.cat(ps) if ps else e.new_empty(0, len(e))
    exact = torch.promote_types(e.dtype, torch.float32)
    return both, out, p, dbs[0].to(exact), dbs[1].to(exact)


def _expanded(y: Tensor, h: Tensor | None, b: Tensor | None, scale: float) -> Tensor:
    """Return y + s H^T B^T (rows, width): H (r, rows), B (width, r) in any dtype."""
    return y if h is None or b is None else torch.addmm(y, h.t(), b.t().to(y.dtype), alpha=scale)


# As a registered operation the launch has shapes without data: fake tensors, the memory count and compilers see it.
@torch.library.custom_op("lit_peft::gated_back", mutates_args=())
def _gated_back(
    d: Tensor,
    p_d: Tensor | None,
    a_d: Tensor | None,
    e: Tensor,
    g: Tensor,
    h_e: Tensor | None,
    b_e: Tensor | None,
    s_e: float,
    h_g: Tensor | None,
    b_g: Tensor | None,
    s_g: float,
    again: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from lit_peft.kernels.gated_back import gated_back

    d, e, g = (x if x.stride(1) == 1 else x.contiguous() for x in (d, e, g))
    return gated_back(d, either(p_d), a_d, e, g, h_e, b_e, s_e, h_g, b_g, s_g, again)


@_gated_back.register_fake
def _(
    d: Tensor,
    p_d: Tensor | None,
    a_d: Tensor | None,
    e: Tensor,
    g: Tensor,
    h_e: Tensor | None,
    b_e: Tensor | None,
    s_e: float,
    h_g: Tensor | None,
    b_g: Tensor | None,
    s_g: float,
    again: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (rows, f), r = e.shape, sum(0 if h is None else len(h) for h in (h_e, h_g))
    out = e.new_empty((rows, f) if again else (0,))
    return e.new_empty(rows, 2 * f), out, e.new_empty(r, rows), e.new_empty(f * r, dtype=torch.float32)
