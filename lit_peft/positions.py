"""Positions of a text's tokens: what a model gives them by itself, and how many it has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lit_peft.structure import stacks_of, walk, within

WORDS = ("pos", "wpe")  # in the name of a table of positions


def position_table(model: nn.Module) -> nn.Embedding | None:
    """The table of learned positions; None where positions are rotations, or count between tokens only (T5)."""
    layers = [layer for stack in stacks_of(model) for layer in stack]
    for site in walk(model):
        leaf = site.name.rpartition(".")[2].lower()
        outside = not any(within(site, layer) for layer in layers)
        if isinstance(site.base, nn.Embedding) and outside and any(word in leaf for word in WORDS):
            return site.base
    return None


def first_position(table: nn.Embedding | None) -> int:
    """The number of a text's first position: RoBERTa's table begins behind the row for padding, others at 0."""
    return 0 if table is None or table.padding_idx is None else table.padding_idx + 1


def own_positions(table: nn.Embedding | None, text: Tensor, past: int) -> Tensor:
    """Return the positions (batch or 1, length) that a model gives a text whose first `past` tokens are cached.

    Args:
        table: of `position_table`.
        text: ids (batch, length), or embeddings (batch, length, d).
        past: number of tokens in the cache.
    """
    first = first_position(table)
    if not first or text.ndim > 2:
        return torch.arange(text.shape[1], device=text.device)[None] + past + first
    # RoBERTa and its kin: padding keeps the padding's position and counts for none
    there = (text != first - 1).long()
    return (there.cumsum(1) + past) * there + first - 1


def positions_of(model: nn.Module, table: nn.Embedding | None) -> int:
    """How many tokens a model has positions for; 0 where there is no limit."""
    if table is not None:
        return table.num_embeddings - max(first_position(table), int(getattr(table, "offset", 0)))
    config: Any = getattr(model, "config", None)
    most = getattr(config, "max_position_embeddings", None)
    return most if isinstance(most, int) else 0


def check_room(model: nn.Module, number: int, setting: str) -> None:
    """See that a text still finds positions behind that many virtual tokens.

    Raises:
        ValueError: if not.
    """
    most = positions_of(model, position_table(model))
    if most and number >= most:
        raise ValueError(
            f"{setting} is {number}, and {type(model).__name__} has {most} positions: none is left for a text. "
            "Choose fewer."
        )
