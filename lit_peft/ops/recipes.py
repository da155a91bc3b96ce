"""Activations that are computed again instead of kept.

An adapter's gradient needs the adapter's input x. Two such inputs are cheap functions of tensors that the backward pass
keeps anyway: the product act(e) g in front of a gated MLP's last layer, and the output of a normalisation. Their makers
attach a `Recipe` to them; an op that would save x saves what the recipe names instead, and has x made again.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Recipe:
    """How to make a tensor again: `make(*parts)`, without gradients. `parts` are kept by the graph in any case."""

    parts: tuple[Tensor, ...]
    make: Callable[..., Tensor]


def note(x: Tensor, *parts: Tensor, make: Callable[..., Tensor]) -> Tensor:
    """Attach to x how it is made of some parts, and return x."""
    x._recipe = x._version, Recipe(tuple(part.detach() for part in parts), make)  # type: ignore[attr-defined]
    return x


def recipe_of(x: Tensor) -> Recipe:
    """Return how to make x; a tensor without a recipe, or changed in place since, is its own part."""
    version, recipe = getattr(x, "_recipe", (None, None))
    return recipe if recipe is not None and version == x._version else Recipe((x,), _itself)


def _itself(x: Tensor) -> Tensor:
    return x


def eager() -> bool:
    """Return whether the ops are to be used: not by a compiler, which chooses by itself what it keeps and fuses.

    The environment variable LIT_PEFT_KERNELS=0 forces the plain operations, to see whether a result hangs on the ops.
    """
    return not torch.compiler.is_compiling() and os.environ.get("LIT_PEFT_KERNELS") != "0"


def fusing() -> bool:
    """Return whether the ops are to be used and gradients are recorded here."""
    return eager() and torch.is_grad_enabled()
