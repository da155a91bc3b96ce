"""PyTorch's own fused attention with its log-sum-exp, and its backward pass for any output and log-sum-exp.

    o = softmax(s) v,   lse = log sum exp(s),   s = scale q k^T + mask

The backward kernels compute P = exp(s - lse) and D = rowsum(g o) from the lse and o that they are handed. Handed those
of a softmax over more keys than k, they return the exact gradients of q, k and v in that larger softmax.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

aten = torch.ops.aten


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask to be added to scores in a dtype, from one that is boolean (True: seen) or additive.

    What is hidden gets a large finite number: where -inf is added, the fused kernels tell a log-sum-exp of 0, or an
    infinity of either sign, of a row without anything to see. A mask that comes from here is returned as it is.

    Example:
        >>> additive(torch.tensor([True, False]), torch.float16).tolist()
        [0.0, -32752.0]
    """
    if getattr(mask, "_finite", False) and mask.dtype == dtype:
        return mask
    low = torch.finfo(dtype).min / 2
    if mask.dtype == torch.bool:
        made = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, low)
    else:
        made = mask.to(dtype).clamp_(min=low) if mask.dtype != dtype else mask.clamp(min=low)
    made._finite = True  # type: ignore[attr-defined]  # the layers of a model share one, and keep one
    return made


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    """Return o (batch, heads, n, width), lse (batch, heads, n or more) in float32, and what the backward pass needs.

    q is (batch, heads, n, width), k, v (batch, kv_heads, m, width); the mask is additive, in q's dtype, and finite. Of
    float64 the lse is in float64.
    """
    if q.device.type == "cpu":
        o, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal, attn_mask=mask, scale=scale)
        return o, lse, ()
    if _flash(q, mask):
        o, lse, *told = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, False, scale=scale)
        return o, lse, tuple(told[:6])  # cum_seq_q, cum_seq_k, max_q, max_k, seed, offset
    k, v = (_repeated(part, q) for part in (k, v))
    o, lse, *told = aten._scaled_dot_product_efficient_attention(
        q, k, v, _aligned(mask, q, k), True, 0.0, is_causal, scale=scale
    )
    return o, lse, tuple(told)  # seed, offset


def attention_backward(
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    told: tuple[Any, ...],
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v, for the gradient g of o; o and lse may be those of more keys than k."""
    if q.device.type == "cpu":
        dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            g, q, k, v, o, lse, 0.0, is_causal, attn_mask=mask, scale=scale
        )
        return dq, dk, dv
    if _flash(q, mask):
        cum_q, cum_k, max_q, max_k, seed, offset = told
        dq, dk, dv = aten._scaled_dot_product_flash_attention_backward(
            g, q, k, v, o, lse, cum_q, cum_k, max_q, max_k, 0.0, is_causal, seed, offset, scale=scale
        )
        return dq, dk, dv
    wide = [_repeated(part, q) for part in (k, v)]
    dq, *dkv, _ = aten._scaled_dot_product_efficient_attention_backward(
        g, q, *wide, _aligned(mask, q, k), o, lse, *told, 0.0, [True, True, True, False], is_causal, scale=scale
    )
    dk, dv = (part.unflatten(1, (k.shape[1], -1)).sum(2) for part in dkv)
    return dq, dk, dv


def _flash(q: Tensor, mask: Tensor | None) -> bool:
    """Whether CUDA's flash kernels take it; the memory-efficient ones take the rest."""
    return mask is None and q.dtype in (torch.float16, torch.bfloat16)


def _repeated(part: Tensor, q: Tensor) -> Tensor:
    """Return keys or values once for each of q's heads: the memory-efficient kernels know no groups."""
    return part if part.shape[1] == q.shape[1] else part.repeat_interleave(q.shape[1] // part.shape[1], 1)


def _aligned(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """Return the mask for every head, its rows 16 bytes apart at least, as the memory-efficient kernels read them."""
    if mask is None:
        return None
    m = k.shape[2]
    return F.pad(mask.expand(*mask.shape[:-1], m), (0, -m % 16)).narrow(-1, 0, m).expand(*q.shape[:3], m)
