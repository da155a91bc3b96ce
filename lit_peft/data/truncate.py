"""Shorten a row to fit, without ever cutting away what there is to learn from it."""

from __future__ import annotations

from typing import Literal

from lit_peft.template import SLOT

Side = Literal["left", "right"]
CUE = 8  # tokens kept before an answer: the template's "assistant turn begins here"


def truncate(ids: list[int], mask: list[bool], max_length: int, side: Side = "right") -> tuple[list[int], list[bool]]:
    """Shorten a row to `max_length` tokens, keeping an answer and the cue just before it.

    `right` drops what comes last (later turns, then the end of the prompt), `left` what comes first (earlier turns,
    then the start of the prompt). Only an answer that is too long by itself is cut, on its right. Pseudo tokens stay.

    Args:
        ids: Token ids.
        mask: Whether each token is learned.
        max_length: Longest row allowed.
        side: Which side of the row to drop.

    Example:
        >>> truncate(list(range(30)), [False] * 28 + [True] * 2, 12)[0]
        [0, 1, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29]
    """
    if SLOT in ids and len(ids) > max_length:
        slots = [i for i, token in enumerate(ids) if token == SLOT]
        others = [i for i, token in enumerate(ids) if token != SLOT]
        places, _ = truncate(others, [mask[i] for i in others], max_length - len(slots), side)
        places = sorted([*places, *slots])
        return [ids[i] for i in places], [mask[i] for i in places]
    if len(ids) <= max_length or True not in mask:
        return ids[:max_length], mask[:max_length]
    if side == "left":
        end = len(mask) - mask[::-1].index(True)
        start = end - 1
        while start and mask[start - 1]:
            start -= 1
    else:
        start = mask.index(True)
        end = start
        while end < len(mask) and mask[end]:
            end += 1
    if end <= max_length:
        return ids[:max_length], mask[:max_length]
    cue = min(CUE, start, max_length // 2)
    answer = min(end - start, max_length - cue)
    kept = list(range(start - cue, start + answer))
    spare = max_length - len(kept)
    kept = [*(range(spare) if side == "right" else range(start - cue - spare, start - cue)), *kept]
    return [ids[i] for i in kept], [mask[i] for i in kept]


def windows(ids: list[int], max_length: int) -> list[list[int]]:
    """Cut a long text into consecutive pieces of at most `max_length`, no token lost or doubled."""
    return [ids[i : i + max_length] for i in range(0, len(ids), max_length)]


def shortened(ids: list[int], max_length: int, side: Side = "right") -> list[int]:
    """Return at most `max_length` tokens of a text that is not learned; pseudo tokens of a prompt stay."""
    room = max_length - ids.count(SLOT)
    places = [i for i, token in enumerate(ids) if token != SLOT]
    keep = {*(places[:room] if side == "right" else places[max(len(places) - room, 0) :])}
    return [token for i, token in enumerate(ids) if token == SLOT or i in keep]
