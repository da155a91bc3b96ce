"""Show what the loss sees: a few training rows with the learned tokens in colour."""

from __future__ import annotations

from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from lit_peft.data.collate import IGNORED
from lit_peft.data.rows import Rows
from lit_peft.template import shown

_BLOCKS = "▁▂▃▄▅▆▇█"
_LEARNED = "bold green"


def preview(data: Rows, rows: int = 3, console: Console | None = None) -> int:
    """Print the first training rows as the loss sees them, with token counts and the spread of lengths.

    Args:
        data: A data module that knows its tokenizer (in training, or after `attach`).
        rows: How many rows to show.
        console: Where to print.

    Returns:
        The number of tokens (for classification: of rows) in those rows that are learned; 0 means that training would
        learn nothing.

    Example:
        >>> preview(Instructions("chats.jsonl").attach(tokenizer))  # doctest: +SKIP
    """
    console = console or Console()
    data.setup()
    table = data.rows("train").table
    # Where colours do not show, as in a file, brackets say the same.
    marks = ("", "") if console.is_terminal and not console.no_color else ("«", "»")
    console.print(Text("legend: ").append("learned".join(marks), _LEARNED).append(" · ").append("only read", "dim"))
    learned = 0
    for number in range(min(rows, len(table))):
        row = table[number]
        count = _learned(row)
        learned += count
        console.rule(f"row {row['id']}: {len(row['input_ids'])} tokens, {count} learned", align="left")
        console.print(_coloured(data, row, marks), soft_wrap=True)
    if data.tables["train"].num_rows:
        lengths = np.array([len(ids) for ids in table["input_ids"]])
        console.rule(f"{len(table)} training rows", align="left")
        console.print(
            f"length in tokens: {lengths.min()} {histogram(lengths)} {lengths.max()}  "
            f"(median {int(np.median(lengths))}, limit {data.max_length})"
        )
    if not learned:
        console.print("Nothing is learned from these rows: every label is masked.", style="bold red")
    return learned


def histogram(values: np.ndarray[Any, Any], bins: int = 24) -> str:
    """Return a one-line histogram; anything present shows at least the lowest block.

    Example:
        >>> histogram(np.array([1, 1, 1, 1, 9]), bins=3)
        '█ ▂'
    """
    counts, _ = np.histogram(values, bins=bins)
    top = max(int(counts.max()), 1)
    return "".join(_BLOCKS[max(0, -(-int(c) * 8 // top) - 1)] if c else " " for c in counts)


def _learned(row: dict[str, Any]) -> int:
    labels = row.get("labels")
    return sum(label != IGNORED for label in labels) if isinstance(labels, list) else int(row.get("label") != IGNORED)


def _coloured(data: Rows, row: dict[str, Any], marks: tuple[str, str]) -> Text:
    def decode(ids: list[int]) -> str:
        return shown(data.tokenizer, ids)

    text = Text()
    if "label" in row:
        names = getattr(data, "labels", None)
        label = row["label"]
        text.append(decode(row["input_ids"]), "dim").append("  ->  ")
        return text.append(str(names[label] if names else label).join(marks), _LEARNED)
    if data.encoder_decoder:
        text.append(decode(row["input_ids"]), "dim").append("\n")
        return text.append(decode(row["labels"]).join(marks), _LEARNED)
    # Runs of tokens are decoded together: a character may be made of several.
    learned = [label != IGNORED for label in row["labels"]]
    start = 0
    for at in range(1, len(learned) + 1):
        if at == len(learned) or learned[at] != learned[start]:
            words = decode(row["input_ids"][start:at])
            text.append(*((words.join(marks), _LEARNED) if learned[start] else (words, "dim")))
            start = at
    return text
