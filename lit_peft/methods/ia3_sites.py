"""Where (IA)3's factors go: by the paper, found by looking at the model; or by HF PEFT's table of names."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from lit_peft.adapter import innermost
from lit_peft.sites import attention, feed_forward, geometry, layers, linears, widths

KEYS_AND_VALUES = ("k", "v", "key", "value", "k_proj", "v_proj", "key_proj", "value_proj", "k_lin", "v_lin", "wk", "wv")
# Fused layers: model_type -> (name, head by head). Their outputs are all queries, all keys, all values; or, head by
# head, these three of the first head, then those of the second.
FUSED = {
    "gpt2": ("c_attn", False),
    "phi3": ("qkv_proj", False),
    "modernbert": ("Wqkv", False),
    "gpt_neox": ("query_key_value", True),
    "bloom": ("query_key_value", True),
}

_QV = (("q_proj", "v_proj", "down_proj"), ("down_proj",))
_KV = (("k_proj", "v_proj", "down_proj"), ("down_proj",))
_BERT = (("key", "value", "output.dense"), ("output.dense",))
_FALCON = (("query_key_value", "dense_4h_to_h"), ("dense_4h_to_h",))
_GPT2 = (("c_attn", "mlp.c_proj"), ("mlp.c_proj",))
_FC2 = (("q_proj", "v_proj", "fc2"), ("fc2",))
# model_type -> (target_modules, feedforward_modules) of HF PEFT 0.21
PEFT_TARGETS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    **dict.fromkeys(("llama", "mistral"), _KV),
    **dict.fromkeys(("llama4", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"), _QV),
    **dict.fromkeys(("bert", "roberta"), _BERT),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), _GPT2),
    **dict.fromkeys(("gpt_neox", "falcon"), _FALCON),
    **dict.fromkeys(("bart", "phi"), _FC2),
    "opt": (("q_proj", "k_proj", "fc2"), ("fc2",)),
    "t5": (("k", "v", "wo"), ("wo",)),
    "mt5": (("k", "v", "wi_1"), ()),
    "bloom": (("query_key_value", "mlp.dense_4h_to_h"), ("mlp.dense_4h_to_h",)),
    "mixtral": (("k_proj", "v_proj", "w2"), ("w2",)),
    "deberta-v2": (("key_proj", "value_proj", "output.dense"), ("output.dense",)),
    "gptj": (("q_proj", "v_proj", "fc_out"), ("fc_out",)),
    "gpt_neo": (("q_proj", "v_proj", "c_proj"), ("c_proj",)),
}


@dataclass(frozen=True, kw_only=True)
class Scaled:
    """Which side and part of one linear layer is scaled.

    Args:
        feedforward: the input is scaled; otherwise the output.
        scaled: how many outputs of a fused layer are scaled; 0: all.
        groups: into how many equal groups its outputs fall, in each of which the last ones are scaled.
    """

    feedforward: bool = False
    scaled: int = 0
    groups: int = 1

    default_lr: ClassVar[float] = 3e-3


def t_few(model: nn.Module) -> dict[str, Scaled]:
    """Return the layers of the paper's placement: keys, values, and the feed-forward's last linear layer.

    Raises:
        ValueError: if the model's keys, values or feed-forward layers cannot be told.
    """
    found = linears(model)
    order = list(found)
    sites: dict[str, Scaled] = {}
    for path in _inside(attention(model), order):
        scaled = _keys_and_values(model, path, found[path])
        if scaled is not None:
            sites[path] = scaled
    if not sites:
        inside = _inside(attention(model), order) or order
        names = sorted({path.rpartition(".")[2] for path in inside})
        raise ValueError(
            f"Cannot tell keys and values among the linear layers {names} of {type(model).__name__}. Set "
            "ia3.target_modules and ia3.feedforward_modules."
        )
    hidden = geometry(model).hidden
    by_layer: dict[str, list[str]] = {}
    blocks = layers(model)
    for path in _inside(feed_forward(model), order):
        if path not in sites:
            layer = next(block for block in blocks if path.startswith(f"{block}."))
            by_layer.setdefault(layer, []).append(path)
    for paths in by_layer.values():
        back = [path for path in paths if widths(innermost(found[path]))[1] == hidden] or paths
        # every expert of a mixture has one such layer
        kind = _starred(back[-1])
        sites |= {path: Scaled(feedforward=True) for path in paths if _starred(path) == kind}
    return {path: sites[path] for path in order if path in sites}


def _inside(blocks: list[str], paths: list[str]) -> list[str]:
    """Return those paths that are one of the blocks, or lie in one."""
    return [path for path in paths if any(path == block or path.startswith(f"{block}.") for block in blocks)]


def _starred(path: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", path)


def _keys_and_values(model: nn.Module, path: str, linear: nn.Module) -> Scaled | None:
    """Return what is scaled of a linear layer in an attention block; None where it makes no keys or values."""
    leaf = path.rpartition(".")[2]
    if leaf in KEYS_AND_VALUES:
        return Scaled()
    fused, by_head = FUSED.get(getattr(getattr(model, "config", None), "model_type", ""), ("", False))
    if leaf != fused:
        return None
    shape = geometry(model)
    outputs, keys_and_values = widths(innermost(linear))[1], 2 * shape.kv_heads * shape.head_dim
    if outputs == keys_and_values:  # GPT-2's cross-attention has its queries elsewhere
        return Scaled()
    if outputs != keys_and_values + shape.heads * shape.head_dim:
        raise ValueError(f"Cannot tell keys and values in {path}. Set ia3.target_modules and ia3.feedforward_modules.")
    return Scaled(scaled=keys_and_values, groups=shape.heads if by_head else 1)
