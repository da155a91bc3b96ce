"""Rows of one batch under different low-rank sets of a layer, in one function (`lit_peft.ops.routed`)."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from lit_peft.blocks import Block
from lit_peft.ops.lora_linear import joins
from lit_peft.ops.recipes import eager
from lit_peft.ops.routed import routed_linear, routed_update
from lit_peft.ops.routing import Routing
from lit_peft.selection import Rows


class Paired(Protocol):
    """A layer whose sets add s B A x to its output, as `LoRALinear`."""

    base: nn.Module
    configs: dict[str, Any]
    training: bool

    @property
    def together(self) -> bool:
        """Whether sets without rows take part."""

    def pair(self, name: str) -> tuple[Tensor, Tensor]:
        """Return A (rank, in) and B (out, rank)."""


def change_rows(layer: Paired, choice: Rows, x: Tensor, y: Tensor | None) -> Tensor | None:
    """Return the layer's output for x (rows, ..., in), each row with s B A x of its own sets added.

    Args:
        layer: the adapter.
        choice: what acts on each row.
        x: its input.
        y: its base's output (rows, ..., out); None: it is to be computed in the same function.

    Returns:
        (rows, ..., out); or None where the sets do more than that, or the base cannot be part of it.
    """
    if not eager() or not x.numel() or not x.is_floating_point():
        return None
    names = tuple(name for name in layer.configs if layer.together or name in choice.names)
    if not names or (y is None and not joins(layer.base, x)):
        return None
    for entry in choice.entries:
        if isinstance(entry, Block) and any(name in layer.configs for name in entry.names):
            return None
    if layer.training and any(layer.configs[name].dropout for name in names):
        return None  # each set has masks of its own
    pairs = [layer.pair(name) for name in names]
    if any(hasattr(part, "full_tensor") for pair in pairs for part in pair):
        return None  # shards
    rows = _routing(choice, names, x, x.ndim if y is None else y.ndim)
    a, b = zip(*pairs, strict=True)
    scales = [layer.configs[name].scale for name in names]
    if y is None:
        assert isinstance(layer.base, nn.Linear)
        return routed_linear(x, layer.base, a, b, scales, rows)
    return routed_update(y, x, a, b, scales, rows)


def _routing(choice: Rows, names: tuple[str, ...], x: Tensor, dimensions: int) -> Routing:
    """Return which of the named sets act on which rows of x; made once for all layers that have them."""
    beams = choice.beams(x, dimensions)
    key = names, beams
    if key not in choice.derived:
        number: dict[Any, int] = {name: i for i, name in enumerate(names)}
        each = [[number[entry] for entry in group if entry in number] for group in choice.each]
        choice.derived[key] = Routing([sets for sets in each for _ in range(beams)])
    found: Routing = choice.derived[key]
    return found
