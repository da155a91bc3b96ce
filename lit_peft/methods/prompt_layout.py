"""Where virtual tokens stand among the tokens of a text: in front of its first token, or behind it.

    [F ; x_1 ; B ; x_2 ...]

A row may be padded on the left, and may pack several texts: then each of them has virtual tokens of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Block:
    """Virtual tokens of a batch.

    Attributes:
        length: how many columns they take.
        seen: (batch, length), False where a row has fewer of them, at its beginning; None: every row has all.
    """

    length: int = 0
    seen: Tensor | None = None

    def count(self) -> int | Tensor:
        """Return how many a row has: one number, or (batch, 1)."""
        return self.length if self.seen is None else self.seen.sum(1, keepdim=True)

    def visible(self, batch: int, device: torch.device) -> Tensor:
        """Return (batch, length): 1 where a row has the token."""
        if self.seen is None:
            return torch.ones(batch, self.length, dtype=torch.long, device=device)
        return self.seen.long()

    def order(self, batch: int, device: torch.device) -> Tensor:
        """Return (batch, length): the number of each token in its row, from 0."""
        return (self.visible(batch, device).cumsum(1) - 1).clamp(min=0)


def block(lengths: Sequence[tuple[int, Tensor | None]], batch: int, device: torch.device) -> Block:
    """Return the block that sets of virtual tokens make, each given as its length and the rows that have it.

    Rows with fewer tokens have theirs at the end, next to the text, as they would have alone.
    """
    if all(rows is None for _, rows in lengths):
        return Block(sum(length for length, _ in lengths))
    total = torch.zeros(batch, dtype=torch.long, device=device)
    for length, rows in lengths:
        total[slice(None) if rows is None else rows] += length
    p = int(total.max())
    return Block(p, torch.arange(p, device=device) >= p - total[:, None])


def rows_of(sets: Sequence[tuple[Tensor, Tensor | None]], place: Block, batch: int) -> Tensor | None:
    """Return the embeddings (batch, length, d) of a block made of sets (p, d) and the rows that have them."""
    if not sets:
        return None
    if place.seen is None:
        return torch.cat([own for own, _ in sets]).expand(batch, -1, -1)
    device = place.seen.device
    start = (~place.seen).sum(1)
    made = sets[0][0].new_zeros(batch, place.length, sets[0][0].shape[-1])
    for own, chosen in sets:
        rows = torch.arange(batch, device=device) if chosen is None else chosen
        columns = start[rows, None] + torch.arange(len(own), device=device)
        made = made.index_put((rows[:, None], columns), own.expand(len(rows), -1, -1))
        start = start.index_add(0, rows, torch.full_like(rows, len(own)))
    return made


class Layout:
    """The columns of a text with its virtual tokens.

    Args:
        batch: number of rows.
        length: number of text tokens n in a row.
        front: virtual tokens in front of the first token.
        behind: virtual tokens behind it.
        starts: (batch, n), True at the first token of every text; None: each row is one text from its first column on.
    """

    def __init__(self, batch: int, length: int, front: Block, behind: Block, starts: Tensor | None) -> None:
        self.batch, self.length, self.front, self.behind = batch, length, front, behind
        self.starts = starts
        p, q = front.length, behind.length
        if starts is None:
            self.total = length + p + q
            return
        device = starts.device
        texts = starts.long().cumsum(1)
        every = torch.arange(length, device=device)[None]
        self.columns = every + p * texts + q * (texts - starts.long())
        self.rows, self.first = starts.nonzero(as_tuple=True)
        self.total = length + (p + q) * int(texts[:, -1].max())
        at = self.columns[self.rows, self.first][:, None]
        self.fronts = at - p + torch.arange(p, device=device)
        self.behinds = at + 1 + torch.arange(q, device=device)
        # which of [text ; front ; behind] stands where; a row with fewer texts ends with columns that nothing reads
        source = torch.full((batch, self.total), -1, device=device)
        source.scatter_(1, self.columns, every.expand(batch, -1))
        source[self.rows[:, None], self.fronts] = length + torch.arange(p, device=device).expand(len(self.rows), -1)
        source[self.rows[:, None], self.behinds] = (
            length + p + torch.arange(q, device=device).expand(len(self.rows), -1)
        )
        self.source = source

    def embeds(self, own: Tensor, front: Tensor | None, behind: Tensor | None) -> Tensor:
        """Return the embeddings of the whole, (batch, total, d)."""
        if self.starts is None:
            if behind is None:
                return own if front is None else torch.cat([front, own], 1)
            parts = [front, own[:, :1], behind, own[:, 1:]]
            return torch.cat([part for part in parts if part is not None], 1)
        whole = torch.cat([part for part in (own, front, behind) if part is not None], 1)
        return _taken(whole, self.source.clamp(min=0))

    def numbers(self, own: Tensor, front: Tensor, behind: Tensor) -> Tensor:
        """Return numbers (batch, total) of the text's (batch, n) and those of its virtual tokens.

        Args:
            own: one for each token.
            front: (texts, p): as many rows as texts, in their order.
            behind: (texts, q).
        """
        if self.starts is None:
            return (
                torch.cat([front, own[:, :1], behind, own[:, 1:]], 1) if behind.shape[1] else torch.cat([front, own], 1)
            )
        made = own.new_zeros(self.batch, self.total).scatter_(1, self.columns, own)
        made[self.rows[:, None], self.fronts] = front.to(own.dtype)
        made[self.rows[:, None], self.behinds] = behind.to(own.dtype)
        return made

    def per_text(self, own: Tensor) -> Tensor:
        """Return numbers (batch, p) of the rows for each text, (texts, p)."""
        return own if self.starts is None else own[self.rows]

    def mask(self, own: Tensor) -> Tensor:
        """Return a padding mask (batch, n) with the virtual tokens that each row has."""
        blocks = (part.visible(self.batch, own.device).to(own.dtype) for part in (self.front, self.behind))
        return self.numbers(own, *(self.per_text(part) for part in blocks))

    def positions(self, given: Tensor) -> Tensor:
        """Return positions that count the virtual tokens too, from those of the text (batch, n)."""
        batch, device = self.batch, given.device
        p, q = self.front.count(), self.behind.count()
        front, behind = (part.order(batch, device) for part in (self.front, self.behind))
        if self.starts is None:
            base = given[:, :1]
            later = torch.arange(self.length, device=device)[None] > 0
            return self.numbers(given + p + q * later, base + front, base + p + 1 + behind)
        texts = self.starts.long().cumsum(1)
        moved = torch.where(texts > 0, given + p + q * (~self.starts), given)
        base = given[self.rows, self.first][:, None]
        gone = p if isinstance(p, int) else p[self.rows]
        return self.numbers(moved, base + front[self.rows], base + gone + 1 + behind[self.rows])

    def text(self, whole: Tensor) -> Tensor:
        """Return what stands at the text's own columns of (batch, total, ...)."""
        if self.starts is not None:
            return _taken(whole, self.columns)
        p, q = self.front.length, self.behind.length
        return torch.cat([whole[:, p : p + 1], whole[:, p + 1 + q :]], 1) if q else whole[:, p:]


def _taken(whole: Tensor, columns: Tensor) -> Tensor:
    """Return (batch, k, d) of (batch, n, d) at columns (batch, k), with a backward pass that is one addition."""
    batch, n = whole.shape[:2]
    flat = (columns + n * torch.arange(batch, device=columns.device)[:, None]).flatten()
    return whole.flatten(0, 1).index_select(0, flat).view(batch, columns.shape[1], *whole.shape[2:])


def text_starts(positions: Tensor) -> Tensor:
    """Return (batch, n), True where positions (batch, n) begin again: at the first token of every packed text."""
    new = positions[:, 1:] != positions[:, :-1] + 1
    return torch.cat([torch.ones_like(new[:, :1]), new], 1)


def padded_starts(mask: Tensor) -> Tensor | None:
    """Return (batch, n), True at the first token behind padding on the left; None where no row has such padding."""
    if bool(mask[:, 0].all()):
        return None
    first = (mask.cumsum(1) == 0).sum(1, keepdim=True).clamp(max=mask.shape[1] - 1)
    return torch.arange(mask.shape[1], device=mask.device)[None] == first
