"""Where in a layer a block adapter sits, for models that normalise before a sub-layer (Llama) or behind it (BERT).

| | pre-LN: `x + F(LN(x))` | post-LN: `LN(x + F(x))` |
|---|---|---|
| after F, before the sum | around F | around F's last linear layer |
| on the sum | around the whole layer | around the LN |
| beside F | around F | around the module that adds and normalises: x is its second argument |
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from lit_peft.structure import Site, blocks_of, is_linear, stacks_of, walk, within


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
    for number, layer, _, forward in _sublayers(model):
        norms = [site for block in forward[-1:] for site in sites if within(site, block) and is_norm(site.base)]
        found[norms[-1].path if norms else layer.path] = number
    return found


def beside(model: nn.Module) -> dict[str, int]:
    """Return the paths (with layer numbers) of the feed-forward blocks, or of what adds their input and normalises.

    Raises:
        ValueError: if the model has no such blocks.
    """
    return {forward[-1].path: number for number, _, _, forward in _sublayers(model)}


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
