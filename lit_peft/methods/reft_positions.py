"""Which tokens ReFT edits: the first f and the last l of the prompt of every text, however a batch holds the texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

EDIT = "reft_edit"  # keyword on the way from the stack to its layers: which positions are edited
# (batch, length), True in the prompt; None: every token that is there. Read once, when the stack is called: what the
# layers see are arguments, so that a replay sees the same.
_PROMPT: ContextVar[Tensor | None] = ContextVar("lit_peft_prompt", default=None)


@contextmanager
def prompt_is(mask: Tensor | None) -> Iterator[None]:
    """Say which tokens (batch, length) of the next calls are the prompt; None: all of them.

    `generate` needs it only with `use_cache=False`, where every call is handed the whole text again.
    """
    token = _PROMPT.set(mask)
    try:
        yield
    finally:
        _PROMPT.reset(token)


@dataclass(eq=False)
class Edit:
    """Which positions are edited in one call.

    Attributes:
        marks: for each named set (batch, length), as `edited` returns them.
        used: whether a layer has read them.
        found: the numbers of the edited rows, by what was asked: the layers of a call all ask the same.
    """

    marks: dict[str, Tensor]
    used: bool = False
    found: dict[tuple[str, int, torch.device], Tensor] = field(default_factory=dict)

    def rows(self, name: str, place: int, device: torch.device, chosen: Tensor | None = None) -> Tensor:
        """Return the numbers (n,) of the tokens to edit, of all tokens of the batch in a row.

        Args:
            name: the named set.
            place: 1 for the first, 2 for the last tokens of prompts, 0 for both.
            device: where the numbers are wanted.
            chosen: only these rows of the batch; None: all.
        """
        key = name, place, device
        if chosen is None and key in self.found:
            return self.found[key]
        marks = self.marks[name]
        here = marks == place if place else marks > 0
        if chosen is not None:
            here = here & torch.zeros(len(marks), 1, dtype=torch.bool, device=marks.device).index_fill_(0, chosen, True)
        rows = here.reshape(-1).nonzero().squeeze(1).to(device)
        if chosen is None:
            self.found[key] = rows
        return rows


def edited(prompt: Tensor, first: int, last: int, texts: Tensor | None = None) -> Tensor:
    """Return 1 at the first, 2 at the last tokens of each text's prompt and 0 elsewhere, (batch, length).

    A prompt shorter than first + last is shared out: no more than half of it counts as first, the rest as last.

    Args:
        prompt: (batch, length), true where there is a token of a prompt.
        first: how many tokens at the beginning of each prompt.
        last: how many at its end.
        texts: (batch, length), the number of the text in its row, where rows hold several.

    Example:
        >>> import torch
        >>> edited(torch.tensor([[0, 1, 1, 1, 1, 0]]), 1, 2).tolist()
        [[0, 1, 0, 2, 2, 0]]
    """
    there = prompt.bool()
    number = there.long().cumsum(1)  # from 1
    length = number[:, -1:]
    if texts is not None:
        lengths = number.new_zeros(len(texts), int(texts.max()) + 1).scatter_add(1, texts, there.long())
        number = number - (lengths.cumsum(1) - lengths).gather(1, texts)
        length = lengths.gather(1, texts)
    short = length < first + last
    f = torch.where(short, torch.minimum(length // 2 if last else length, torch.full_like(length, first)), first)
    marks = torch.where(
        number <= f, 1, torch.where(number > length - torch.minimum(length - f, torch.full_like(length, last)), 2, 0)
    )
    return marks * there


def texts_of(positions: Tensor | None) -> Tensor | None:
    """Return the number of the text (batch, length) that each token of packed rows belongs to; None if none is packed.

    A text begins where a position is not the one behind the last, which is how transformers tells them apart, too.

    Example:
        >>> import torch
        >>> texts_of(torch.tensor([[0, 1, 2, 0, 1]])).tolist()
        [[0, 0, 0, 1, 1]]
    """
    if positions is None or positions.ndim != 2:
        return None
    starts = F.pad(positions[:, 1:] - positions[:, :-1] != 1, (1, 0))
    return starts.long().cumsum(1) if bool(starts.any()) else None


def prompt_of(batch: Any) -> Tensor | None:
    """Return which tokens (batch, length) come before the first label of their text; None without such labels."""
    if not isinstance(batch, Mapping) or "labels" not in batch or "input_ids" not in batch:
        return None
    labels: Tensor = batch["labels"]
    ids: Tensor = batch["input_ids"]
    if labels.shape != ids.shape:
        return None
    answered = (labels != -100).long()
    seen = answered.cumsum(1)
    texts = texts_of(batch.get("position_ids")) if batch.get("attention_mask") is None else None
    if texts is not None:
        each = seen.new_zeros(len(texts), int(texts.max()) + 1).scatter_add(1, texts, answered)
        seen = seen - (each.cumsum(1) - each).gather(1, texts)
    return seen == 0


def prompts_now(text: Tensor, mask: Tensor | None) -> Tensor:
    """Return which tokens of the call that is running are of a prompt, (batch, length).

    Args:
        text: ids (batch, length) or embeddings (batch, length, d).
        mask: what the model takes as attention mask; None: every token is there.
    """
    if mask is not None and mask.ndim == 4:  # a static cache's: what the last token sees of this text
        seen = mask[:, 0, -1, : text.shape[1]]
        mask = (seen if seen.dtype == torch.bool else seen > torch.finfo(seen.dtype).min / 2).long()
    there = text.new_ones(text.shape[:2], dtype=torch.long) if mask is None else mask
    prompt = _PROMPT.get()
    if prompt is None:
        return there
    if prompt.shape[0] != text.shape[0]:  # a generator's beams repeat each row
        prompt = prompt.repeat_interleave(text.shape[0] // prompt.shape[0], 0)
    # tokens that were generated behind it are none of it
    return there * F.pad(prompt.to(there), (0, text.shape[1] - prompt.shape[1]))
