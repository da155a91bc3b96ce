"""From encoded rows to padded tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IGNORED = -100
Encoded = Mapping[str, Any]
Batch = dict[str, Tensor]


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], dtype=torch.long)


@dataclass
class Collate:
    """Pad instruction rows on the right.

    Labels are padded by position: where the pad token is also the end of turn, the end of turn stays learned.

    Args:
        pad: Id written into padding.

    Example:
        >>> rows = [{"input_ids": [5, 6], "labels": [-100, 6]}, {"input_ids": [7], "labels": [-100]}]
        >>> Collate(pad=0)(rows)["attention_mask"].tolist()
        [[1, 1], [1, 0]]
    """

    pad: int

    def __call__(self, rows: Sequence[Encoded]) -> Batch:
        """Return `input_ids`, `attention_mask` and `labels`, each (batch, length)."""
        return {
            "input_ids": _padded([row["input_ids"] for row in rows], self.pad),
            "attention_mask": _padded([[1] * len(row["input_ids"]) for row in rows], 0),
            "labels": _padded([row["labels"] for row in rows], IGNORED),
        }


@dataclass
class CollatePacked:
    """Put each bin of rows end to end, with position ids that start again at every row.

    There is no attention mask on purpose: transformers keeps packed rows apart by their position ids only where no
    mask is given (and no cache: call the model with `use_cache=False`). Padding is one more row, not learned.

    Args:
        pad: Id written into padding.
        flat: Make the whole batch one long row, as flash attention needs it.
    """

    pad: int
    flat: bool = False

    def __call__(self, bins: Sequence[Sequence[Encoded]]) -> Batch:
        """Return `input_ids`, `labels` and `position_ids`, each (bins, length)."""
        if self.flat:
            bins = [[row for rows in bins for row in rows]]
        width = max(sum(len(row["input_ids"]) for row in rows) for rows in bins)
        ids, labels, positions = [], [], []
        for rows in bins:
            fill = width - sum(len(row["input_ids"]) for row in rows)
            ids.append([token for row in rows for token in row["input_ids"]] + [self.pad] * fill)
            # The first token of a row would be predicted from the end of the row before it.
            labels.append([t for row in rows for t in (IGNORED, *row["labels"][1:])] + [IGNORED] * fill)
            positions.append([i for row in rows for i in range(len(row["input_ids"]))] + list(range(fill)))
        return {
            "input_ids": torch.tensor(ids),
            "labels": torch.tensor(labels),
            "position_ids": torch.tensor(positions),
        }


@dataclass
class CollateLabelled:
    """Pad rows that carry one class each.

    Args:
        pad: Id written into padding.
    """

    pad: int

    def __call__(self, rows: Sequence[Encoded]) -> Batch:
        """Return `input_ids`, `attention_mask` (batch, length), `labels` (batch,), and token types where made."""
        batch = {
            "input_ids": _padded([row["input_ids"] for row in rows], self.pad),
            "attention_mask": _padded([[1] * len(row["input_ids"]) for row in rows], 0),
            "labels": torch.tensor([row["label"] for row in rows], dtype=torch.long),
        }
        if "token_type_ids" in rows[0]:
            batch["token_type_ids"] = _padded([row["token_type_ids"] for row in rows], 0)
        return batch
