"""Put several short rows into one, so that a batch is not mostly padding."""

from __future__ import annotations

import sys
from bisect import bisect_left, insort
from collections.abc import Sequence
from inspect import signature
from typing import Any


def best_fit(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Pack items into bins of `size`: longest first, each into the fullest bin that still has room.

    Args:
        lengths: Length of each item, none above `size`.
        size: Room in a bin.

    Returns:
        The bins, each a list of indices into `lengths`.

    Example:
        >>> best_fit([3, 5, 2, 6], 8)
        [[3, 2], [1, 0]]
    """
    bins: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # room left -> bins with exactly that room
    rooms: list[int] = []  # its keys, sorted
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = bisect_left(rooms, lengths[item])
        if place == len(rooms):
            bins.append([])
            room, chosen = size, len(bins) - 1
        else:
            room = rooms[place]
            chosen = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[place]
        bins[chosen].append(item)
        left = room - lengths[item]
        if left not in by_room:
            by_room[left] = []
            insort(rooms, left)
        by_room[left].append(chosen)
    return bins


def cannot_pack(model: Any) -> str | None:
    """Say why a model would let packed rows see each other, None if it keeps them apart.

    Packed rows are told apart by position ids that start again at 0; transformers reads them where it builds its
    causal mask.
    """
    name = type(model).__name__
    if "position_ids" not in signature(model.forward).parameters:
        return f"{name}.forward takes no position_ids"
    homes = [sys.modules.get(kind.__module__) for kind in type(model).__mro__]
    if not any(hasattr(home, "create_causal_mask") for home in homes):
        return f"{name} does not build its attention mask from position_ids"
    whole = [type(module).__name__ for module in model.modules() if getattr(type(module), "packs", True) is False]
    if whole:
        return f"the {whole[0]} around it looks for the beginning of each text"
    return None


def wants_flat(model: Any) -> bool:
    """Say whether packed batches must be one long row: flash attention tells rows apart only at batch size 1."""
    return str(getattr(getattr(model, "config", None), "_attn_implementation", "")).startswith("flash")
