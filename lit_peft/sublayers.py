"""Where in a layer a block adapter sits, for models that normalise before a sub-layer (Llama) or behind it (BERT).

| | pre-LN: `x + F(LN(x))` | post-LN: `LN(x + F(x))` |
|---|---|---|
| after F, before the sum | around F | around F's last linear layer |
| on the sum | around the whole layer | around the LN |
| beside F | around F | around the module that adds and normalises: x is its second argument |

Where no module holds the whole of F (OPT, BART), F is its linear layers, and what stands beside it is around the last.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from inspect import signature
from itertools import takewhile

from torch import nn

from lit_peft.structure import Site, blocks_of, is_linear, stacks_of, walk, widths, within

# model types that normalise behind the sum in a layer that holds linear layers and norms side by side
POST_LN = frozenset({"bart", "marian", "blenderbot-small", "plbart", "fsmt", "led", "distilbert"})


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises: LayerNorm, RMSNorm and what models call so."""
    return "norm" in type(module).__name__.lower() and not list(module.children())


def after(model: nn.Module) -> tuple[dict[str, int], dict[str, int]]:
    """Return the paths (with layer numbers) of what yields the outputs of attention and of feed-forward blocks.

    Raises:
        ValueError: if the model has no such blocks.
    """
    attentions: dict[str, int] = {}
    forwards: dict[str, int] = {}
    sites = list(walk(model))
    for number, _, attention, forward in _sublayers(model):
        for found, blocks in ((attentions, attention), (forwards, forward[-1:])):
            for block in blocks:
                inside = [site for site in sites if within(site, block)]
                post = any(is_norm(site.base) for site in inside)
                linear = [site for site in inside if is_linear(site.base)]
                found[linear[-1].path if post else block.path] = number
    return attentions, forwards


def on_sum(model: nn.Module) -> dict[str, int]:
    """Return the paths (with layer numbers) of what yields the sum behind the feed-forward: a layer, or its last norm.

    Raises:
        ValueError: if the model has no such layers.
    """
    found = {}
    sites = list(walk(model))
    post = _normalises_behind(model)
    for number, layer, _, forward in _sublayers(model):
        blocks = [layer] if post else forward[-1:]
        last = [site for block in blocks for site in sites if within(site, block) and is_norm(site.base)]
        found[last[-1].path if last else layer.path] = number
    return found


def _normalises_behind(model: nn.Module) -> bool:
    """Whether layers whose modules do not tell end with a norm: OPT says so, others are known to."""
    config = getattr(model, "config", None)
    return getattr(config, "do_layer_norm_before", True) is False or getattr(config, "model_type", "") in POST_LN


def beside(model: nn.Module) -> dict[str, int]:
    """Return the paths (with layer numbers) of the feed-forward blocks, or of what adds their input and normalises.

    Raises:
        ValueError: if the model has no such blocks.
    """
    across(model)  # refuses what has no beginning
    return {forward[-1].path: number for number, _, _, forward in _sublayers(model)}


def across(model: nn.Module) -> dict[str, str]:
    """Return, for feed-forwards that no module holds as a whole, the path of the last linear layer and of the first.

    Raises:
        ValueError: if what the first one reads is not as wide as what the last one writes.
    """
    found = {}
    for _, layer, _, forward in _sublayers(model):
        if is_linear(forward[-1].base):
            first = next(block for block in forward if is_linear(block.base))
            wide, tall = widths(first.base)[0], widths(forward[-1].base)[1]
            if wide != tall or first is forward[-1]:
                raise ValueError(
                    f"Found no whole feed-forward in {layer.name} of {type(model).__name__}: {first.name} reads {wide} "
                    f"numbers and {forward[-1].name} writes {tall}. Use houlsby or pfeiffer, which need its end only."
                )
            found[forward[-1].path] = first.path
    return found


def norms(model: nn.Module, leave_out: Collection[int] = ()) -> dict[str, int]:
    """Return the paths of the norms that have weights, with the numbers of their layers.

    One of the embeddings counts to the first layer, another outside of the layers to the last.

    Args:
        model: the model.
        leave_out: numbers of layers whose norms are left out.
    """
    layers = [(number, layer) for number, layer, _, _ in _sublayers(model)]
    found = {}
    for site in walk(model):
        if not is_norm(site.base) or not list(site.base.parameters(recurse=False)):
            continue
        number = next((number for number, layer in layers if within(site, layer)), None)
        if number is None:
            near = max(_shared(site.name, layer.name) for _, layer in layers)
            stack = [number for number, layer in layers if _shared(site.name, layer.name) == near]
            number = stack[0] if "emb" in site.name.lower() else stack[-1]
        if number not in leave_out:
            found[site.path] = number
    return found


def norms_before(model: nn.Module) -> dict[str, str]:
    """Return the norm in front of each feed-forward block, `{the block's path: the norm's}`.

    Raises:
        ValueError: if a layer does not have just two norms, of which the second is the feed-forward's.
    """
    sites = list(walk(model))
    names = {site.path: site.name for site in sites}
    found = {}
    for path in beside(model):
        layer = names[path].rpartition(".")[0]
        norms = [site.path for site in sites if site.name.rpartition(".")[0] == layer and is_norm(site.base)]
        if len(norms) != 2:
            raise ValueError(
                f"bottleneck.reads_stream needs layers with two norms, and {layer} of {type(model).__name__} has "
                f"{len(norms)}. Set it to false."
            )
        found[path] = norms[1]
    return found


def _shared(one: str, other: str) -> int:
    """Return how many segments two paths begin with in common."""
    pairs = zip(one.split("."), other.split("."), strict=False)
    return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))


def _sublayers(model: nn.Module) -> Iterator[tuple[int, Site, list[Site], list[Site]]]:
    """Yield number, layer, attention blocks and feed-forward blocks of every layer, the encoder's first."""
    attentions, forwards = blocks_of(model)
    number = -1
    for number, layer in enumerate(layer for stack in stacks_of(model) for layer in stack):
        forward = [block for block in forwards if within(block, layer)]
        if not forward:
            raise ValueError(f"Found no feed-forward block in {layer.name} of {type(model).__name__}.")
        yield number, layer, [block for block in attentions if within(block, layer)], forward
    if number < 0:
        raise ValueError(f"Found no transformer layers in {type(model).__name__}: bottleneck adapters need them.")


def hosts(model: nn.Module) -> list[str]:
    """The paths of what embeds tokens and runs a stack of layers: `model` of a Llama, a T5's encoder and decoder.

    Raises:
        ValueError: The model has no layers, or is itself such a part: nothing can be put around it.
    """
    found: dict[str, None] = {}
    for stack in stacks_of(model):
        path = stack[0].path
        while path and "input_ids" not in signature(_base_of(model, path).forward).parameters:
            path = path.rpartition(".")[0]
        if not path:
            raise ValueError(f"{type(model).__name__} is the bare stack of layers: use the model with its head.")
        while path.endswith(".base") and getattr(type(model.get_submodule(path[:-5])), "is_adapter", False):
            path = path[:-5]  # the outermost adapter: a further set joins the one that stands there
        found[path] = None
    if not found:
        raise ValueError(f"Found no transformer layers in {type(model).__name__}.")
    return list(found)


def _base_of(model: nn.Module, path: str) -> nn.Module:
    module = model.get_submodule(path)
    while getattr(type(module), "is_adapter", False):
        module = module.get_submodule("base")
    return module


def is_causal(model: nn.Module, path: str) -> bool:
    """Whether what lies at a path belongs to a stack whose tokens see only those before them."""
    cores = attention_cores(model)
    stack = next(
        (
            stack
            for stack in stacks_of(model)
            if any(_inside(path, layer.path) or _inside(layer.path, path) for layer in stack)
        ),
        None,
    )
    own = [core for core in cores if stack is None or any(_inside(core, layer.path) for layer in stack)]
    # without such a flag a model is taken for a decoder: then no gate or pooling looks ahead
    return any(getattr(_base_of(model, core), "is_causal", True) for core in own) if own else True


def _inside(path: str, block: str) -> bool:
    return path == block or path.startswith(block + ".")


def attention_cores(model: nn.Module) -> list[str]:
    """The paths of the modules that compute attention themselves: in BERT they are one level inside the block."""
    found = []
    sites = list(walk(model))
    for block in blocks_of(model)[0]:
        inside = (site for site in sites if within(site, block))
        holders = (s for s in inside if hasattr(s.base, "config") and any(is_linear(c) for c in _plain(s.base)))
        found += [site.path for site in holders][:1]
    return found


def _plain(module: nn.Module) -> list[nn.Module]:
    """The children of a module without the adapters around them."""
    return [site.base for child in module.children() for site in list(walk(child))[:1]]
