"""Texts with pseudo tokens: where the trained rows of a prompt stand inside of what a model reads.

A template says what is around a text: `[P][P]{text} It was [P]`. Each `[P]` is one pseudo token, `{prompt:3}` is three
of them, and `{prompt}` all that the others leave over; `{text}` is the text, `{text2}` the second one of a pair. In
token ids a pseudo token is the number `SLOT`, which no vocabulary reaches: decoding leaves it out.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

SLOT = 1 << 30
MARK = "<|lit_peft:pseudo|>"  # how a pseudo token is written while a text goes through a tokenizer
_SLOTS = re.compile(r"\[P\]|\{prompt(?::(\d+))?\}")
_PIECES = re.compile(r"(\[P\]|\{text2?\})")
_MARKED: WeakKeyDictionary[Any, tuple[Any, int]] = WeakKeyDictionary()


def resolved(template: str, tokens: int) -> str:
    """Return a template whose pseudo tokens are written out as `[P]`.

    Args:
        template: as the user wrote it; an empty one stays empty.
        tokens: how many pseudo tokens there are.

    Raises:
        ValueError: if it has no `{text}`, or another number of pseudo tokens.

    Example:
        >>> resolved("{prompt:2}{text} It was{prompt}", 3)
        '[P][P]{text} It was[P]'
    """
    if not template:
        return ""
    if template.count("{text}") != 1:
        raise ValueError(f"prompt.template {template!r} needs {{text}} once: that is where the text goes.")
    found = list(_SLOTS.finditer(template))
    rests = [match for match in found if match[0] == "{prompt}"]
    fixed = sum(int(match[1] or 1) for match in found if match[0] != "{prompt}")
    rest = tokens - fixed
    if not found:
        raise ValueError(
            f"prompt.template {template!r} has no pseudo tokens. Write [P] where one goes, or {{prompt:{tokens}}}."
        )
    if len(rests) > 1 or (rests and rest < 1) or (not rests and rest):
        raise ValueError(
            f"prompt.template {template!r} has {fixed} pseudo tokens{' and one {prompt}' * bool(rests)}, and "
            f"prompt.num_virtual_tokens is {tokens}. Make them equal; one {{prompt}} stands for all that are left."
        )
    return _SLOTS.sub(lambda match: "[P]" * (rest if match[0] == "{prompt}" else int(match[1] or 1)), template)


def filled(template: str, text: str, second: str | None = None) -> str:
    """Return the text inside a resolved template, with `MARK` for each pseudo token.

    Raises:
        ValueError: if there are two texts and no `{text2}`, or the other way round.
    """
    if (second is None) != ("{text2}" not in template):
        what = "no second text for {text2}" if second is None else "no {text2} for the second text"
        raise ValueError(f"prompt.template {template!r} meets {what}")
    places = {"[P]": MARK, "{text}": text.replace(MARK, ""), "{text2}": (second or "").replace(MARK, "")}
    return "".join(places.get(piece, piece) for piece in _PIECES.split(template))


def around(template: str) -> tuple[str, str]:
    """Return what a resolved template puts in front of the text and behind it, with `MARK` for each pseudo token."""
    front, _, behind = template.replace("[P]", MARK).partition("{text}")
    return front, behind


def marked(tokenizer: Any) -> tuple[Any, int]:
    """Return a copy of a tokenizer that reads `MARK` as one token, and that token's number."""
    if tokenizer not in _MARKED:
        from tokenizers import AddedToken

        twin = copy.deepcopy(tokenizer)
        twin.add_tokens([AddedToken(MARK, special=True, normalized=False)], special_tokens=True)
        _MARKED[tokenizer] = twin, int(twin.convert_tokens_to_ids(MARK))
    return _MARKED[tokenizer]


def slotted(ids: Sequence[int], mark: int) -> list[int]:
    """Return token ids with `SLOT` in place of the mark's number."""
    return [SLOT if token == mark else token for token in ids]


def without_slots(ids: Sequence[int]) -> list[int]:
    """Return token ids without pseudo tokens: what the base reads."""
    return [token for token in ids if token != SLOT]


def shown(tokenizer: Any, ids: Sequence[int]) -> str:
    """Return token ids as text, with `[P]` for each pseudo token."""
    pieces: list[list[int]] = [[]]
    for token in ids:
        if token == SLOT:
            pieces.append([])
        else:
            pieces[-1].append(token)
    return "[P]".join(str(tokenizer.decode(piece)) if piece else "" for piece in pieces)
