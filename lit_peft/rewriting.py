"""Base weights that a restart changes: found, folded into, written back, and noted for checkpoints.

A restart folds an adapter's update into the weight of the layer below, in place. From then on that weight differs from
the one on disk, so it belongs to what a checkpoint and an adapter folder hold; before, it does not, and files stay
small. How often each adapter was restarted is noted beside it (`Adapter.restarts`).
"""

from __future__ import annotations

from collections.abc import Mapping
from zlib import crc32

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lit_peft.adapter import Adapter, named_adapters, remember, scope_of
from lit_peft.weights import dense, put

SHARDED = (
    "A restart has folded updates into weights that are sharded, and no copy of the base was kept. Load the backbone "
    "anew to ask the base model."
)


def restartable(model: nn.Module) -> list[tuple[str, Adapter]]:
    """Return the adapters that can be restarted, with their paths.

    Raises:
        TypeError: if there are none, or one of them sits on a layer that cannot be folded into.
    """
    found = [(path, a) for path, a in named_adapters(model) if type(a).restart is not Adapter.restart]
    if not found:
        kinds = sorted({type(adapter).__name__ for _, adapter in named_adapters(model)}) or ["no adapter"]
        raise TypeError(f"Nothing here can be restarted ({', '.join(kinds)}). Use --method relora or remora.")
    owners: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    for path, adapter in found:
        base = adapter.base
        if isinstance(base, Adapter):
            raise TypeError(
                f"{path} has a {type(base).__name__} below the adapter that is restarted. Name the restarted method "
                "last in the stack."
            )
        if hasattr(base, "dequantised") or not isinstance(base, (nn.Linear, Conv1D)):
            raise TypeError(f"A restart cannot fold into {path}, a {type(base).__name__}. Load the base unquantised.")
        weight = base.get_parameter("weight")
        if not weight.is_floating_point():
            raise TypeError(f"A restart cannot fold into {path}, which is quantised. Load the base unquantised.")
        if owners.get(id(weight), 1) > 1:
            raise TypeError(f"A restart would change what is tied to {path} too. Leave it out of target_modules.")
        others = {name for _, other in named_adapters(model) for name in other.configs} - set(adapter.configs)
        if others:
            raise TypeError(
                f"A restart would change the base below the adapter {sorted(others)[0]!r} too. Train one set alone."
            )
        if len(adapter.configs) > 1:
            raise TypeError(
                f"A restart would change the base below all of {sorted(adapter.configs)}. Train one set alone."
            )
    return found


def fold_in(adapter: Adapter, delta: Tensor) -> None:
    """Add delta (out, in) to the weight below an adapter, in place: in float32, rounded once to the weight's dtype."""
    weight = adapter.base.get_parameter("weight")
    change = delta if not hasattr(delta, "full_tensor") else delta.full_tensor()
    new = (dense(adapter.base).float() + change.float()).to(weight.dtype)
    put(weight, new.t() if isinstance(adapter.base, Conv1D) else new)


def seed_of(path: str, count: int, seed: int) -> int:
    """Return the seed for one adapter's restart: the same on every process and in every repetition of the run."""
    return crc32(f"{seed} {count} {path}".encode())


def rewritten(model: nn.Module) -> dict[str, int]:
    """Return `{path of an adapter: its restarts}` where the base weight differs from the one on disk."""
    return {path: adapter.restarts for path, adapter in named_adapters(model) if adapter.restarts}


def note(model: nn.Module, counts: Mapping[str, int]) -> None:
    """Make the model's adapters have been restarted so often, before the weights of that state are loaded.

    Base weights that are about to be rewritten for the first time are remembered, so that `disabled` still gives the
    base; those that are not rewritten in the new state are put back.

    Raises:
        ValueError: if a weight has to be put back and no copy was kept.
    """
    originals = scope_of(model).originals
    for path, adapter in named_adapters(model):
        count, before = counts.get(path, 0), adapter.restarts
        if count and not before:
            keep_base(model, path, adapter)
        elif before and not count:
            key = f"{path}.base.weight"
            if key not in originals:
                raise ValueError(f"{SHARDED} (The state to load is from before the first restart.)")
            with torch.no_grad():
                adapter.base.get_parameter("weight").copy_(originals.pop(key)[1])
        adapter.restarts = count


def keep_base(model: nn.Module, path: str, adapter: Adapter) -> None:
    """Keep a copy of the weight below an adapter, which is about to be rewritten for the first time."""
    weight = adapter.base.get_parameter("weight")
    if hasattr(weight, "full_tensor"):
        scope_of(model).irreversible = SHARDED
    else:
        remember(model, [(f"{path}.base.weight", weight)])
