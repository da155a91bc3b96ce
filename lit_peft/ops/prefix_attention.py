"""Attention over [prefix; text] as two parts, merged by their log-sum-exps: keys and values are not put together.

    o_1, l_1 over the p rows of the prefix, which all tokens see;    o_2, l_2 over the text, causal or masked
    lse = log(e^l_1 + e^l_2),    o = e^(l_1 - lse) o_1 + e^(l_2 - lse) o_2

A fused kernel's backward pass knows the softmax only by o and lse. Given the merged ones it returns the exact gradients
of its own part, those of q being sums over the parts:

    P_i = exp(scale q K_i^T - lse),   dV_i = P_i^T g,   dS_i = P_i (g V_i^T - rowsum(g o)),   dK_i = scale dS_i^T q

Kept: q, k, v, o and lse. The text's part stays a stock causal kernel, which skips half of the scores; groups of heads
share keys without copies; a first layer, whose q, k and v need no gradient, differentiates and keeps the prefix's part.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_peft.ops.choice import takes_kernel
from lit_peft.ops.recipes import as_written, autocasting, eager
from lit_peft.ops.stock_attention import additive, attention, attention_backward


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Return attention of q over [prefix; text] with plain operations; shapes as in `prefix_attention`."""
    n, p, groups = q.shape[2], prefix_k.shape[2], q.shape[1] // k.shape[1]
    if is_causal:
        mask = torch.ones(n, n, dtype=torch.bool, device=q.device).tril()[None, None]
    keys, values = (
        torch.cat([front.expand(len(part), -1, -1, -1), part], 2).repeat_interleave(groups, 1)
        for front, part in ((prefix_k, k), (prefix_v, v))
    )
    if mask is not None:
        mask = F.pad(mask, (p, 0), value=mask.dtype == torch.bool)
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale)


def merges(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    mask: Tensor | None = None,
    *,
    dropout: float = 0.0,
    kernels: bool | None = None,
) -> bool:
    """Return whether `prefix_attention` merges two parts here; it concatenates elsewhere.

    On a CPU it does. On CUDA it does where that has been measured to be faster, or is asked for.
    """
    if dropout or not eager() or 0 in (q.numel(), k.numel(), prefix_k.numel()):
        return False
    if k.shape != v.shape or q.shape[3] != k.shape[3] or q.shape[1] % k.shape[1] or len(q) != len(k):
        return False
    if mask is not None and (mask.requires_grad or mask.ndim != 4):
        return False
    if not autocasting(q) and len({part.dtype for part in (q, k, v, prefix_k)}) > 1:
        return False
    if q.device.type == "cpu":
        return True
    # the stock kernels read 16 bytes at once, and begin at Ampere
    fits = q.device.type == "cuda" and q.shape[3] % 8 == 0 and q.shape[3] <= 256
    modern = fits and torch.cuda.is_available() and torch.cuda.get_device_capability(q.device) >= (8, 0)
    return modern and _launches(q, prefix_k, kernels)


def _launches(q: Tensor, prefix_k: Tensor, kernels: bool | None) -> bool:
    if q.dtype == torch.float64 or q.shape[3] > 256:
        return False
    return takes_kernel("prefix", q, kernels, rows=len(q) * q.shape[2], width=q.shape[3], p=prefix_k.shape[2])


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    kernels: bool | None = None,
) -> Tensor:
    """Return softmax(scale q [P_K ; K]^T + [0 ; mask]) [P_V ; V].

    Args:
        q: (batch, heads, n, width).
        k: K (batch, kv_heads, m, width), where kv_heads divides heads.
        v: V, like k.
        prefix_k: P_K (batch or 1, kv_heads, p, width).
        prefix_v: P_V, like prefix_k.
        mask: over the text, (batch or 1, heads or 1, n or 1, m): boolean, True where a token is seen, or additive.
        is_causal: whether token i sees the text up to i; n is m then, and there is no mask.
        scale: None: 1 / sqrt(width).
        kernels: whether to launch the Triton kernels of the prefix's part; None: as measured.

    Returns:
        (batch, heads, n, width). A second derivative is not there: asking for one raises.

    Raises:
        ValueError: if a text is to be causal that is not as long as its queries, or has a mask as well.

    Example:
        >>> import torch
        >>> q, k, v = (torch.zeros(1, 2, 3, 4) for _ in range(3))
        >>> ones = torch.ones(1, 2, 1, 4)
        >>> prefix_attention(q, k, v, ones, ones, is_causal=True)[0, 0, :, 0].tolist()
        [0.5, 0.3333333432674408, 0.25]
    """
    if is_causal and (mask is not None or q.shape[2] != k.shape[2]):
        said = "there is a mask" if mask is not None else f"{q.shape[2]} queries meet {k.shape[2]} keys"
        raise ValueError(f"is_causal is True and {said}. Hand in what is seen as the mask alone.")
    if not merges(q, k, v, prefix_k, mask, kernels=kernels):
        return reference(q, k, v, prefix_k, prefix_v, mask, is_causal, scale)
    if autocasting(q) and q.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v, prefix_k, prefix_v = (part.to(dtype) for part in (q, k, v, prefix_k, prefix_v))
    # the stock kernels take neighbours in the last dimension for granted
    parts = [part if part.stride(-1) == 1 else part.contiguous() for part in (q, k, v, prefix_k, prefix_v)]
    mask = None if mask is None else additive(mask, q.dtype)
    settings = is_causal, q.shape[3] ** -0.5 if scale is None else scale, _launches(q, prefix_k, kernels)
    out: Tensor = _Merged.apply(*parts, mask, *settings)  # type: ignore[no-untyped-call]
    return out


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        prefix_k: Tensor,
        prefix_v: Tensor,
        mask: Tensor | None,
        is_causal: bool,
        scale: float,
        launch: bool,
    ) -> Tensor:
        with as_written(q):
            o, lse, told = attention(q, k, v, mask, is_causal, scale)
            within = lse[..., : q.shape[2]]  # some kernels round its length up
            if launch:
                _prefix(q, prefix_k, prefix_v, o, within, scale)
            else:
                o, lse = _both(o, within, *_front(q, prefix_k, prefix_v, scale))
        text = any(ctx.needs_input_grad[:3])
        tensors = [part if text and isinstance(part, Tensor) else None for part in told]
        ctx.told = [None if isinstance(part, Tensor) else part for part in told]
        ctx.save_for_backward(q, *((k, v, mask) if text else (None,) * 3), prefix_k, prefix_v, o, lse, *tensors)
        ctx.settings = is_causal, scale, launch, text
        return o

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask, prefix_k, prefix_v, o, lse, *tensors = ctx.saved_tensors
        is_causal, scale, launch, text = ctx.settings
        g = gradient if gradient.stride(-1) == 1 else gradient.contiguous()
        dq = dk = dv = None
        with as_written(q):
            if text:
                told = tuple(b if a is None else a for a, b in zip(tensors, ctx.told, strict=True))
                dq, dk, dv = attention_backward(g, q, k, v, o, lse, told, mask, is_causal, scale)
            within = lse[..., : q.shape[2]]
            if launch:
                dpk, dpv = _prefix_backward(g, q, prefix_k, prefix_v, o, within, scale, dq)
            else:
                more, dpk, dpv = _front_backward(g, q, prefix_k, prefix_v, o, within, scale)
                dq = more if dq is None else dq.add_(more)
        return dq, dk, dv, dpk, dpv, None, None, None, None


def _front(q: Tensor, prefix_k: Tensor, prefix_v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return attention to the prefix alone and its log-sum-exp, by the stock kernel."""
    k, v = (part.expand(len(q), -1, -1, -1) for part in (prefix_k, prefix_v))
    o, lse, _ = attention(q, k, v, None, False, scale)
    return o, lse


def _both(o: Tensor, lse: Tensor, front: Tensor, front_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Return the merged output and log-sum-exp."""
    weight = torch.sigmoid(front_lse - lse)[..., None]
    merged = torch.lerp(o.to(weight.dtype), front.to(weight.dtype), weight).to(o.dtype)
    return merged, torch.logaddexp(front_lse, lse)


def _front_backward(
    g: Tensor, q: Tensor, prefix_k: Tensor, prefix_v: Tensor, o: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the prefix's part of q's gradient, and the gradients of its keys and values."""
    k, v = (part.expand(len(q), -1, -1, -1) for part in (prefix_k, prefix_v))
    dq, dk, dv = attention_backward(g, q, k, v, o, lse, (), None, False, scale)
    return dq, dk.sum_to_size(prefix_k.shape), dv.sum_to_size(prefix_v.shape)


# As registered operations the launches have shapes without data: fake tensors, the memory count and compilers see them.
@torch.library.custom_op("lit_peft::prefix", mutates_args=("o", "lse"))
def _prefix(q: Tensor, prefix_k: Tensor, prefix_v: Tensor, o: Tensor, lse: Tensor, scale: float) -> None:
    from lit_peft.kernels.prefix import merge

    merge(q, prefix_k, prefix_v, o, lse, scale)


@_prefix.register_fake
def _(q: Tensor, prefix_k: Tensor, prefix_v: Tensor, o: Tensor, lse: Tensor, scale: float) -> None:
    return None


@torch.library.custom_op("lit_peft::prefix_backward", mutates_args=("dq",))
def _prefix_backward(
    g: Tensor, q: Tensor, prefix_k: Tensor, prefix_v: Tensor, o: Tensor, lse: Tensor, scale: float, dq: Tensor | None
) -> tuple[Tensor, Tensor]:
    from lit_peft.kernels.prefix import merge_backward

    return merge_backward(g, q, prefix_k, prefix_v, o, lse, scale, dq)


@_prefix_backward.register_fake
def _(
    g: Tensor, q: Tensor, prefix_k: Tensor, prefix_v: Tensor, o: Tensor, lse: Tensor, scale: float, dq: Tensor | None
) -> tuple[Tensor, Tensor]:
    return prefix_k.new_empty(prefix_k.shape), prefix_v.new_empty(prefix_v.shape)
