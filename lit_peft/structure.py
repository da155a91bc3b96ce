"""The shape of a model, found by looking at its modules: layers, attention and feed-forward blocks, embeddings, sizes.

A site is looked at through the adapters already placed. They are told by the class attribute `is_adapter = True` and
hold the wrapped module as `base`. `Site.path` is where the outermost of them really sits, which is what `get_submodule`
takes; `Site.name` is the path without the `base` segments, as the model had it before any adapter.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

# model_type -> attributes of a layer that hold (attention blocks, feed-forward blocks); BERT has no module for its
# whole feed-forward, so both halves are named
_LLAMA = (("self_attn",), ("mlp",))
_BERT = (("attention", "crossattention"), ("intermediate", "output"))
ARCHITECTURES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    **dict.fromkeys(("llama", "mistral", "phi3", "smollm3", "olmo2"), _LLAMA),
    **dict.fromkeys(("qwen2", "qwen3"), _LLAMA),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), _LLAMA),
    "gpt2": (("attn", "crossattention"), ("mlp",)),
    "gpt_neox": (("attention",), ("mlp",)),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra"), _BERT),
    **dict.fromkeys(("t5", "mt5", "umt5"), (("SelfAttention", "EncDecAttention"), ("DenseReluDense",))),
}
# anything else: an attention block says so in its own or its attribute's name; what else holds linears is feed-forward
_ATTENTION = re.compile(r"att(n|ention)|\batt\b", re.IGNORECASE)
HEADS = ("score", "classifier", "classification_head", "qa_outputs", "v_head")
_TEXT_TOWERS = ("language_model", "text_model")


@dataclass(frozen=True)
class Site:
    """One place in a model: real `path`, `name` without adapters, outermost `module`, innermost `base`."""

    path: str
    name: str
    module: nn.Module
    base: nn.Module


def walk(model: nn.Module) -> Iterator[Site]:
    """Every module of the model in order, each once; adapters and what they wrap are one site, their insides none."""
    seen: set[int] = set()

    def visit(module: nn.Module, path: str, name: str) -> Iterator[Site]:
        if id(module) in seen:
            return
        base, inside = module, path
        while getattr(type(base), "is_adapter", False):
            seen.add(id(base))
            base, inside = base.get_submodule("base"), _join(inside, "base")
        seen.add(id(base))
        yield Site(path, name, module, base)
        for key, child in base.named_children():
            yield from visit(child, _join(inside, key), _join(name, key))

    yield from visit(model, "", "")


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a matrix an adapter can stand beside: `nn.Linear`, its quantised children, or GPT-2's Conv1D.

    Not the output projection inside `nn.MultiheadAttention`: its `forward` is never called.
    """
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return False
    # by name, because transformers need not be there for a user's own nn.Module
    return isinstance(module, nn.Linear) or (type(module).__name__ == "Conv1D" and hasattr(module, "nf"))


def widths(linear: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a linear layer, also of a Conv1D, which stores its weight the other way round."""
    if isinstance(linear, nn.Linear):
        return linear.in_features, linear.out_features
    return int(linear.get_parameter("weight").shape[0]), int(linear.get_parameter("weight").shape[1])


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """The sizes of a model; a number that neither its config nor its modules tell is 0.

    `layers` counts both stacks of an encoder-decoder, `kv_heads` differs from `heads` under grouped-query attention.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    feed_forward: int
    vocabulary: int


def geometry(model: nn.Module) -> Geometry:
    """The sizes of a model, read from its config where it has one, else from its modules."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    attentions, blocks = blocks_of(model)

    def read(*names: str) -> int:
        for holder in (config, *(site.base for site in attentions[:1])):
            for name in names:
                if isinstance(value := getattr(holder, name, None), int):
                    return value
        return 0

    embedding = input_table(model)
    rows, width = _table_size(embedding)
    inner = [site for site in walk(model) if is_linear(site.base) and any(within(site, block) for block in blocks[:2])]
    first = [widths(site.base)[0] for site in inner[:1]]
    hidden = read("hidden_size", "n_embd", "d_model", "embed_dim") or width or sum(first)
    heads = read("num_attention_heads", "n_head", "n_heads", "num_heads")
    return Geometry(
        hidden=hidden,
        layers=sum(len(stack) for stack in stacks_of(model)) or read("num_hidden_layers", "n_layer", "num_layers"),
        heads=heads,
        kv_heads=read("num_key_value_heads", "n_kv_heads", "num_kv_heads", "n_kv_head") or heads,
        head_dim=read("head_dim", "d_kv") or (hidden // heads if heads else 0),
        feed_forward=read("intermediate_size", "n_inner", "d_ff", "ffn_dim")
        or max((out for site in inner for out in widths(site.base)), default=0),
        vocabulary=read("vocab_size") or rows,
    )


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _table_size(site: Site | None) -> tuple[int, int]:
    if site and isinstance(site.base, nn.Embedding):
        return site.base.num_embeddings, site.base.embedding_dim
    return 0, 0


def within(site: Site, block: Site) -> bool:
    """Whether a site is a block or inside it."""
    return site.name == block.name or site.name.startswith(block.name + ".")


def stacks_of(model: nn.Module) -> list[list[Site]]:
    """The transformer layers, a list for each stack: the longest list of blocks of one class that hold linears."""
    sites = list(walk(model))
    children: dict[str, list[Site]] = {}
    for site in sites:
        children.setdefault(site.name.rpartition(".")[0], []).append(site)
    lists: dict[str, list[Site]] = {}
    for site in sites:
        if not isinstance(site.base, nn.ModuleList | nn.Sequential):
            continue
        blocks = [child for child in children.get(site.name, []) if child is not site]
        holds = all(_holds_linears(block) for block in blocks)
        same = len({type(block.base) for block in blocks}) == 1
        # layers of several classes (hybrid models) are in a ModuleList; a Sequential of such may be anything
        if blocks and holds and (same or isinstance(site.base, nn.ModuleList)):
            lists[site.name] = blocks
    if text := [name for name in lists if any(tower in name.split(".") for tower in _TEXT_TOWERS)]:
        lists = {name: lists[name] for name in text}
    outer = {name: b for name, b in lists.items() if not any(name.startswith(other + ".") for other in lists)}
    if not outer:
        return []
    weight = {name: sum(p.numel() for b in blocks for p in b.base.parameters()) for name, blocks in outer.items()}
    longest = max(outer, key=lambda name: (len(outer[name]), weight[name]))
    # an encoder and its decoder carry the same name but for that word
    return [blocks for name, blocks in outer.items() if _side(name) == _side(longest)]


def _side(name: str) -> str:
    return re.sub(r"(en|de)c(oder)?", "*", name)


def blocks_of(model: nn.Module) -> tuple[list[Site], list[Site]]:
    """(attention blocks, feed-forward blocks) in all layers."""
    known = ARCHITECTURES.get(getattr(getattr(model, "config", None), "model_type", ""))
    sites = list(walk(model))
    attentions: list[Site] = []
    others: list[Site] = []
    for layer in (layer for stack in stacks_of(model) for layer in stack):
        inside = [site for site in sites if within(site, layer) and site.name != layer.name]
        taken: list[Site] = []
        for site in inside:
            key = site.name.rpartition(".")[2]
            if any(within(site, block) for block in taken):
                continue
            if known:
                is_attention, is_other = key in known[0], key in known[1]
            else:
                is_attention = _is_attention(site)
                # the largest modules that hold linear layers, or experts, and no attention
                mixed = any(_is_attention(below) for below in inside if within(below, site))
                is_other = not mixed and (is_linear(site.base) or _holds_linears(site) or _holds_experts(site))
            if is_attention or is_other:
                taken.append(site)
                (attentions if is_attention else others).append(site)
    return attentions, others


def _holds_linears(site: Site) -> bool:
    # nn.Linear beside is_linear: an nn.MultiheadAttention holds one, though none that can be adapted
    inside = site.base.modules()
    return not is_linear(site.base) and any(isinstance(module, nn.Linear) or is_linear(module) for module in inside)


def _holds_experts(site: Site) -> bool:
    # transformers stacks the matrices of all experts in one parameter: then there are no linear layers inside
    found = [
        module for key, module in site.base.named_modules() if "expert" in f"{key} {type(module).__name__}".lower()
    ]
    return any(weight.ndim == 3 for module in found for weight in module.parameters(recurse=False))


def _is_attention(site: Site) -> bool:
    if not _holds_linears(site):
        return False
    return bool(_ATTENTION.search(type(site.base).__name__) or _ATTENTION.search(site.name.rpartition(".")[2]))


def _of(sites: list[Site], module: object) -> Site | None:
    return next((site for site in sites if module is site.module or module is site.base), None)


def _ask(model: nn.Module, getter: str) -> Any:
    try:
        return getattr(model, getter)()
    except (AttributeError, NotImplementedError):  # transformers raises the second where a model has none
        return None


def input_table(model: nn.Module) -> Site | None:
    """The token embedding: what the model says it is, else the first table."""
    sites = list(walk(model))
    tables = (site for site in sites if isinstance(site.base, nn.Embedding))
    return _of(sites, _ask(model, "get_input_embeddings")) or next(tables, None)


def output_head(model: nn.Module) -> Site | None:
    """The linear layer that yields logits: what the model says, else one outside the layers as wide as the table."""
    sites = list(walk(model))
    if hasattr(model, "get_output_embeddings"):
        return _of(sites, _ask(model, "get_output_embeddings"))
    rows, _ = _table_size(input_table(model))
    inside = [layer for stack in stacks_of(model) for layer in stack]
    heads = [s for s in sites if is_linear(s.base) and widths(s.base)[1] == rows]
    return next((site for site in reversed(heads) if not any(within(site, layer) for layer in inside)), None)
