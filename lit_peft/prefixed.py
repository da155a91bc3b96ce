"""Attention over a prefix: extra keys and values in front of a layer's own, handed in as a keyword argument.

transformers' models pass unknown keyword arguments down to the function that computes attention, and let that function
be chosen by name. So a prefix is one more argument of the call: nothing is remembered by a module, nothing pretends to
be a cache, and gradient checkpointing, padding, grouped heads and generation work as they are.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lit_peft.ops.prefix_attention import merges, prefix_attention
from lit_peft.ops.stock_attention import additive

INDEX = "prefix_index"  # in an attention module's __dict__: which of the prefix's keys and values are its own
KEYWORD = "attention_prefix"
GATE = "attention_prefix_gate"
NAMES = {"sdpa": "lit_prefix_sdpa", "eager": "lit_prefix_eager"}


@dataclass(eq=False)
class Prefix:
    """Keys and values in front of the text, for every attention module.

    Attributes:
        keys: one (batch or 1, kv_heads, p, head_dim) for each attention module.
        values: the same.
        visible: (batch, p), False where a row has no such prefix token; None: all are seen.
        used: numbers of the modules that have attended to it in this call.
        masks: what a mask became, as the layers of a call share theirs; with the mask itself, so that its id is taken.
            By the mask's id, lengths, and whether it is over the text alone.
    """

    keys: list[Tensor]
    values: list[Tensor]
    visible: Tensor | None = None
    used: set[int] = field(default_factory=set)
    masks: dict[tuple[Any, ...], tuple[Tensor | None, Tensor | None]] = field(default_factory=dict)


class Recorder:
    """Stands in a prefix's place to note the keys and values of the text itself.

    Attributes:
        found: (batch, kv_heads, length, head_dim) of keys and of values, by number of the attention module.
    """

    def __init__(self) -> None:
        self.found: dict[int, tuple[Tensor, Tensor]] = {}


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    inner: Callable[..., Any],
    *,
    merging: bool = False,
    **kwargs: Any,
) -> Any:
    """Compute attention of the query over [prefix; key], by the function `inner` that the model would have used.

    query is (batch, heads, length, head_dim), key and value (batch, kv_heads, key length, head_dim). Every token sees
    the whole prefix; among the others it sees what the mask says. With `merging` prefix and text are attended to apart
    where `merges` says so, and not put together for `inner`.
    """
    prefix: Prefix | Recorder | None = kwargs.pop(KEYWORD, None)
    gate: Tensor | None = kwargs.pop(GATE, None)
    number = module.__dict__.get(INDEX)
    if isinstance(prefix, Recorder) and number is not None:
        prefix.found[number] = key.detach(), value.detach()
        prefix = None
    if not isinstance(prefix, Prefix) or number is None:
        return inner(module, query, key, value, attention_mask, **kwargs)
    prefix.used.add(number)
    rows, length, own = query.shape[0], query.shape[2], key.shape[2]
    k, v = prefix.keys[number].to(key.dtype), prefix.values[number].to(value.dtype)
    p = k.shape[2]
    causal = kwargs.pop("is_causal", None)
    causal = getattr(module, "is_causal", True) if causal is None else causal
    pooled = gate is None or gate.shape[1] == 1
    if gate is not None:
        gate = gate.to(query.dtype)
        if pooled:
            k, v = k * gate[..., None], v * gate[..., None]  # (batch, 1, p, 1): the same for all heads
    apart = merging and pooled and prefix.visible is None and not _told(kwargs)
    if apart and merges(query, key, value, k, attention_mask, dropout=kwargs.get("dropout", 0.0)):
        mask = _of_text(prefix, attention_mask, causal, query, own)
        triangle = attention_mask is None and causal and length == own > 1
        out = prefix_attention(query, key, value, k, v, mask=mask, is_causal=triangle, scale=kwargs.get("scaling"))
        return out.transpose(1, 2).contiguous(), None
    same = (id(attention_mask), length, own, causal, key.device)
    if torch.compiler.is_compiling():
        attention_mask = _masked(attention_mask, prefix.visible, causal, length, own, k)
    else:
        if same not in prefix.masks:
            prefix.masks[same] = attention_mask, _masked(attention_mask, prefix.visible, causal, length, own, k)
        attention_mask = prefix.masks[same][1]
    bias = kwargs.pop("position_bias", None)
    if bias is not None:  # T5: relative positions count between text tokens only
        kwargs["position_bias"] = F.pad(bias, (p, 0))
    if gate is not None and not pooled:
        return _gated(query, key, value, k, v, gate, attention_mask, **kwargs)
    key = torch.cat([k.expand(rows, -1, -1, -1), key], 2)
    value = torch.cat([v.expand(rows, -1, -1, -1), value], 2)
    return inner(module, query, key, value, attention_mask, is_causal=False, **kwargs)


def _gated(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention where each query scales the prefix's keys and values by a gate of its own (batch, length, p).

    No fused kernel takes a scale for each pair of query and key, so the scores are computed openly.
    """
    groups, p = query.shape[1] // key.shape[1], k.shape[2]
    key, value, k, v = (part.repeat_interleave(groups, 1) for part in (key, value, k, v))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    gate = gate[:, None]  # the same for all heads
    scores = torch.cat([query @ k.transpose(2, 3) * gate, query @ key.transpose(2, 3)], -1) * scale
    if s_aux is not None:
        raise TypeError("Gates on a prefix do not go with attention sinks. Set gate: false on the prefix.")
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if position_bias is not None:
        scores = scores + position_bias
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    weights = F.dropout(scores.float().softmax(-1).to(query.dtype), dropout)
    out = (weights[..., :p] * gate) @ v + weights[..., p:] @ value
    return out.transpose(1, 2).contiguous(), None


def _told(named: dict[str, Any]) -> bool:
    """Return whether a model asks for what two merged parts do not have."""
    asked = (named.get(name) for name in ("softcap", "s_aux", "position_bias", "cache", "output_attentions"))
    return any(value is not None and value is not False for value in asked)


def _of_text(prefix: Prefix, mask: Tensor | None, causal: bool, query: Tensor, own: int) -> Tensor | None:
    """Return the mask over the text alone, additive, made once for all layers; None: all, or a triangle is seen."""
    length = query.shape[2]
    if mask is None and (not causal or length in (1, own)):
        return None
    same = ("text", id(mask), length, own, query.dtype, query.device)
    if same not in prefix.masks:
        seen = _triangle(length, own, query.device) if mask is None else mask
        prefix.masks[same] = mask, additive(seen, query.dtype)
    return prefix.masks[same][1]


def _masked(
    mask: Tensor | None, visible: Tensor | None, causal: bool, length: int, own: int, prefix: Tensor
) -> Tensor | None:
    """Return the mask over [prefix; text], from that over the text; None where all is seen."""
    if mask is None and causal and length > 1:
        mask = _triangle(length, own, prefix.device)
    if mask is None and visible is not None:
        mask = torch.ones(1, 1, length, own, dtype=torch.bool, device=prefix.device)
    return None if mask is None else _extended(mask, visible, prefix.shape[2])


def _triangle(length: int, own: int, device: torch.device) -> Tensor:
    """Return what each token sees of the text; aligned at the end: the queries are the last of the keys."""
    return torch.ones(length, own, dtype=torch.bool, device=device).tril(own - length)[None, None]


def _extended(mask: Tensor, visible: Tensor | None, p: int) -> Tensor:
    """Put columns for the prefix in front of a mask (batch or 1, 1 or heads, length, keys), boolean or additive."""
    boolean = mask.dtype == torch.bool
    shape = (*mask.shape[:-1], p)
    if visible is None:
        front = torch.full(shape, True if boolean else 0.0, dtype=mask.dtype, device=mask.device)
    else:
        seen = visible[:, None, None, :].expand(visible.shape[0], *shape[1:])
        mask = mask.expand(visible.shape[0], *mask.shape[1:])
        front = (
            seen
            if boolean
            else torch.zeros_like(seen, dtype=mask.dtype).masked_fill(~seen, torch.finfo(mask.dtype).min)
        )
    return torch.cat([front, mask], -1)


def prepare(model: nn.Module, modules: list[nn.Module]) -> None:
    """Let attention modules of a model attend to prefixes, numbered in this order.

    Raises:
        TypeError: if a module does not go through transformers' attention interface, or uses another function than
            `sdpa` or `eager`.
    """
    names: list[str] = []
    for module in modules:
        config: Any = getattr(module, "config", None)
        own = module.__dict__.get("plain", module)  # a lean block stands for the model's own
        source = sys.modules.get(type(own).__module__)
        if config is None or not hasattr(source, "ALL_ATTENTION_FUNCTIONS"):
            raise TypeError(
                f"{type(module).__name__} does not use transformers' attention interface, so prefixes cannot enter. "
                "Use another method, such as lora."
            )
        chosen = config._attn_implementation
        if chosen not in NAMES and chosen not in NAMES.values():
            raise TypeError(f"Prefixes need sdpa or eager attention, not {chosen!r}. Set attn_implementation: sdpa.")
        names.append(NAMES.get(chosen, chosen))
    for number, (module, name) in enumerate(zip(modules, names, strict=True)):  # only now is anything changed
        config = module.config
        config._attn_implementation = name
        module.__dict__[INDEX] = number


def _by_sdpa(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
    return attend(module, query, key, value, mask, ALL_ATTENTION_FUNCTIONS["sdpa"], merging=True, **kwargs)


def _by_eager(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
    # every model file has an eager function of its own (T5 adds its bias there, Gemma caps its scores)
    inner = sys.modules[type(module).__module__].eager_attention_forward

    def call(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **named: Any) -> Any:
        named.pop("is_causal", None)
        if mask is not None and mask.dtype == torch.bool:  # eager functions add their mask to the scores
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
        return inner(module, query, key, value, mask, **named)

    return attend(module, query, key, value, mask, call, **kwargs)


ALL_ATTENTION_FUNCTIONS.register(NAMES["sdpa"], _by_sdpa)
ALL_ATTENTION_FUNCTIONS.register(NAMES["eager"], _by_eager)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAMES["sdpa"], ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
ALL_MASK_ATTENTION_FUNCTIONS.register(NAMES["eager"], ALL_MASK_ATTENTION_FUNCTIONS["eager"])
