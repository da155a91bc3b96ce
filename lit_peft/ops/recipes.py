"""Activations that are computed again instead of kept.

An adapter's gradient needs the adapter's input x. Two such inputs are cheap functions of tensors that the backward pass
keeps anyway: the product act(e) g in front of a gated MLP's last layer, and the output of a normalisation. Their makers
attach a `Recipe` to them; an op that would save x saves what the recipe names instead, and has x made again.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(eq=False)
class Again:
    """A tensor that is made again, for several that need it: made for the first of them, let go with the last."""

    users: int = 0
    made: Tensor | None = None

    def take(self, make: Callable[..., Tensor], parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Return `make(*parts)` in a dtype; each of the users comes once."""
        x = self.made
        if x is None or x.dtype != dtype:
            x = make(*parts).to(dtype)
        self.users -= 1
        self.made = x if self.users > 0 else None
        return x


@dataclass(frozen=True)
class Recipe:
    """How to make a tensor again: `make(*parts)`, without gradients. `parts` are kept by the graph in any case."""

    parts: tuple[Tensor, ...]
    make: Callable[..., Tensor]
    versions: tuple[int, ...] = ()  # of the tensor itself and of the parts
    again: Again = field(default_factory=Again)
    by: Any = None  # who made it, for those who read it

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave it out of files and copies of its tensor: `torch.load` would refuse it."""
        return OrderedDict, ()


@dataclass(frozen=True)
class _Copy:
    tensor: Tensor
    version: int  # of what it is a copy of

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, ()  # as above


def note(x: Tensor, *parts: Tensor, make: Callable[..., Tensor]) -> Tensor:
    """Attach to x how it is made of some parts, and return x."""
    versions = tuple(tensor._version for tensor in (x, *parts))
    x._recipe = Recipe(tuple(part.detach() for part in parts), make, versions)  # type: ignore[attr-defined]
    return x


def signed(x: Tensor, by: Any) -> Tensor:
    """Add to the recipe that x has who made it, and return x."""
    x._recipe = replace(recipe_of(x), by=by)  # type: ignore[attr-defined]
    return x


def recipe_of(x: Tensor) -> Recipe:
    """Return how to make x; a tensor without a recipe, or changed in place since, or its parts, is its own part."""
    return noted(x) or Recipe((x,), _itself)


def noted(x: Tensor) -> Recipe | None:
    """Return the recipe that x came with, if neither x nor its parts were changed in place since."""
    recipe = getattr(x, "_recipe", None)
    if isinstance(recipe, Recipe) and recipe.versions == tuple(tensor._version for tensor in (x, *recipe.parts)):
        return recipe
    return None


def as_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x in another dtype, without gradients: the same copy to all that ask while x is what it was."""
    if x.dtype == dtype:
        return x.detach()
    kept = getattr(x, "_copy", None)
    if not isinstance(kept, _Copy) or kept.version != x._version or kept.tensor.dtype != dtype:
        # queries, keys and values are made of one x: one copy serves, and is kept once
        kept = x._copy = _Copy(x.detach().to(dtype), x._version)  # type: ignore[attr-defined]
    return kept.tensor


def _itself(x: Tensor) -> Tensor:
    return x


def eager() -> bool:
    """Return whether the ops are to be used: not by a compiler or a tracer, which choose by themselves what they keep.

    The environment variable LIT_PEFT_KERNELS=0 forces the plain operations, to see whether a result hangs on the ops.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
        return False
    return os.environ.get("LIT_PEFT_KERNELS") != "0"


def recording() -> bool:
    """Return whether the ops are to be used and gradients are recorded here."""
    return eager() and torch.is_grad_enabled()


def whole(parameter: Any) -> bool:
    """Return whether a parameter is a tensor as any other: not a shard of one, nor quantised."""
    return type(parameter) is nn.Parameter


def watched(module: nn.Module) -> bool:
    """Return whether somebody has to see that a module is called: it has hooks, or a forward of its own.

    Hooks on all modules of a process are not asked about: such counters come and go between a forward pass and the
    moment when a checkpoint computes it again, which has to be the same.
    """
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or "forward" in module.__dict__


def as_written(x: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which x's device computes in the dtypes that stand there, without autocast."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def autocasting(x: Tensor) -> bool:
    """Return whether autocast chooses the dtype of products on x's device."""
    kind = x.device.type
    return (kind in ("cuda", "cpu") or torch.amp.is_autocast_available(kind)) and torch.is_autocast_enabled(kind)
