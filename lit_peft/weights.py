"""The weight of a linear layer as a matrix (out, in), whatever layer holds it; and folding a change into it.

`nn.Linear` stores W as (out, in), GPT-2's `Conv1D` as (in, out); a quantised layer stores neither, and says so by a
method `dequantised()` that returns W, and by an attribute `unmergeable`: why nothing is folded into it. Methods that
need W itself (DoRA, PiSSA, merging) come here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

FOLDS = (nn.Linear, Conv1D, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def dense(layer: nn.Module) -> Tensor:
    """Return the weight of a linear layer as (out, in), detached, in its own dtype, gathered where it is sharded.

    Raises:
        TypeError: if the layer has no such weight.
    """
    dequantised = getattr(layer, "dequantised", None)
    if dequantised is not None:
        weight: Tensor = dequantised()
        return weight.detach()
    stored: Any = layer.get_parameter("weight").detach()
    if not isinstance(layer, (nn.Linear, Conv1D)) or not stored.is_floating_point():
        raise TypeError(f"A {type(layer).__name__} layer has no weight matrix that could be read.")
    full = whole(stored)
    return full.t() if isinstance(layer, Conv1D) else full


def whole(tensor: Tensor) -> Tensor:
    """Gather a tensor where it is sharded; every process must come here together."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def put(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into one that may be sharded, in place; every process must come here with the same value."""
    with torch.no_grad():
        if hasattr(target, "full_tensor"):
            from torch.distributed.tensor import distribute_tensor

            sharded: Any = target
            value = distribute_tensor(value.to(target.device), sharded.device_mesh, sharded.placements)
        target.copy_(value)


def fold(layer: nn.Module, delta: Tensor) -> None:
    """Add delta to the weight of a linear layer (out, in), table or kernel: in float32, rounded once to its dtype.

    The weight becomes a new parameter, so that what was tied to the old one (an output embedding) keeps its values.

    Raises:
        TypeError: if the layer is quantised, or of another kind.
    """
    reason = getattr(type(layer), "unmergeable", "")
    if reason:
        raise TypeError(reason)
    weight = layer.get_parameter("weight")
    if not isinstance(layer, FOLDS) or not weight.is_floating_point():
        kind = type(layer).__name__
        raise TypeError(f"Cannot merge into a {kind} layer. Load the base unquantised to merge.")
    change = delta.t() if isinstance(layer, Conv1D) else delta
    with torch.no_grad():
        new = (weight.float() + change.to(weight.device).float()).to(weight.dtype)
    layer.weight = nn.Parameter(new, requires_grad=weight.requires_grad)


def count(model: nn.Module, trained: bool = False) -> int:
    """Return how many numbers a model's parameters stand for: a quantised weight counts as the matrix that it holds.

    Args:
        model: any module.
        trained: only those with `requires_grad`.
    """
    found = {id(p): p.numel() for p in model.parameters() if p.requires_grad or not trained}
    for layer in model.modules():
        if hasattr(type(layer), "dequantised"):
            for parameter in layer.parameters(recurse=False):
                if id(parameter) in found and not parameter.is_floating_point():
                    found[id(parameter)] = layer.in_features * layer.out_features  # type: ignore[operator, assignment]
    return sum(found.values())
