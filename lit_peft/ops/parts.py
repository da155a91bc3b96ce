"""Which layers of a block are computed as one: frozen linear layers that read one input, each with a low-rank update.

A block asks its children: a plain `nn.Linear` is taken as it is; an adapter's class says by `low_rank() -> (A, B, s)`
that it adds s x A^T B^T to its base's output and nothing else. Whatever else a child does (dropout, several sets of
weights, rows of their own, hooks, a quantised base), the block calls its children one by one.

For one product the weights have to lie behind each other in memory. They are brought there at the first call on the
device they are trained on: one buffer, of which every layer's parameter becomes a slice. Parameters stay the same
objects, with the same names and values; moved or loaded anew they are simply apart again.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from lit_peft.ops.choice import measured
from lit_peft.ops.lora_linear import joins
from lit_peft.ops.packed import Pair, Parts
from lit_peft.ops.recipes import watched


def pays(op: str, x: Tensor, width: int) -> bool:
    """Return whether layers are computed as one: where that was measured to be faster, or LIT_PEFT_KERNELS=1 is set.

    Args:
        op: its name in `crossovers.json`, which names the CPU "cpu".
        x: the layers' input (..., in).
        width: how wide their outputs are together.
    """
    if os.environ.get("LIT_PEFT_KERNELS") == "1":
        return True
    device = torch.cuda.get_device_name(x.device) if x.is_cuda else x.device.type
    least = measured().get(device, {}).get(op)
    sizes = {"rows": x.numel() // max(1, x.shape[-1]), "width": width}
    return least is not None and all(sizes[key] >= bound for key, bound in least.items())


def parts_of(children: Sequence[Any], x: Tensor) -> Parts | None:
    """Return the layers as one, or None where they are to be called one by one.

    Args:
        children: what a block calls on x, one after the other.
        x: their input (..., in).
    """
    found = [layer_of(child, x) for child in children]
    layers = [layer for layer, _ in found if layer is not None]
    if len(layers) < len(found):
        return None
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers if layer.bias is not None]
    if len(biases) not in (0, len(layers)) or not _together(weights) or (biases and not _together(biases)):
        return None
    bias = _whole(biases) if biases else None
    return Parts(_whole(weights), bias, tuple(map(len, weights)), tuple(pair for _, pair in found))


def layer_of(child: Any, x: Tensor) -> tuple[nn.Linear | None, Pair | None]:
    """Return the frozen linear layer that a block calls on x, and its update; None: none, or not known."""
    # asked of the class: an adapter hands what it lacks to its base, which would answer for itself alone
    ask = getattr(type(child), "low_rank", None)
    if ask is None:
        return (child, None) if joins(child, x) else (None, None)
    pair = None if watched(child) else ask(child)
    return (child.base, pair) if pair is not None and joins(child.base, x) else (None, None)


def allow(children: Sequence[Any]) -> None:
    """Let the weights of some layers be put behind each other.

    Only of these very parameters, as they are now: what a wrapper that shards a model puts in their place later is its
    own to arrange.
    """
    for child in children:
        base = getattr(child, "base", child) if getattr(type(child), "low_rank", None) else child
        if type(base) is nn.Linear:
            for parameter in base.parameters(recurse=False):
                parameter.may_move = True  # type: ignore[attr-defined]


def _together(tensors: Sequence[Tensor]) -> bool:
    """Return whether tensors lie behind each other, after having put them there if they may be moved."""
    if all(_adjoin(one, other) for one, other in pairwise(tensors)):
        return True
    alike = {(tensor.dtype, tensor.device, tensor.shape[1:]) for tensor in tensors}
    if len(alike) > 1 or len({id(tensor) for tensor in tensors}) < len(tensors) or not all(map(_movable, tensors)):
        return False
    with torch.no_grad():
        whole = torch.cat([tensor.detach() for tensor in tensors])
        for tensor, piece in zip(tensors, torch.split(whole, [len(tensor) for tensor in tensors]), strict=True):
            tensor.data = piece
    return True


def _movable(tensor: Tensor) -> bool:
    # one that lies in the memory of others (a flat buffer of FSDP, a mapped file) is arranged by somebody else
    owns = tensor.untyped_storage().nbytes() == tensor.nbytes
    return owns and getattr(tensor, "may_move", False) and tensor.is_contiguous() and not tensor.is_inference()


def _adjoin(one: Tensor, other: Tensor) -> bool:
    return (
        one.is_contiguous()
        and other.is_contiguous()
        and one.dtype == other.dtype
        and one.shape[1:] == other.shape[1:]
        and one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
        and one.data_ptr() + one.nbytes == other.data_ptr()
    )


def _whole(tensors: Sequence[Tensor]) -> Tensor:
    first = tensors[0].detach()
    return first.as_strided((sum(map(len, tensors)), *first.shape[1:]), first.stride())
