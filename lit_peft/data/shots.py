"""Few-shot prompting: solved examples in front of a question, as earlier turns of the same conversation."""

from __future__ import annotations

from typing import Any

import datasets
import torch

from lit_peft.data.collate import IGNORED
from lit_peft.data.render import Renderer

LOOKED_AT = 2000  # rows among which examples are chosen


def pick(table: datasets.Dataset, number: int, seed: int) -> list[list[int]]:
    """Return the token ids of examples from a training table: different answers first, then in drawn order.

    Args:
        table: encoded training rows.
        number: how many.
        seed: seed of the draw.

    Raises:
        ValueError: if there are fewer rows.
    """
    if number > len(table):
        raise ValueError(f"shots is {number}, but there are {len(table)} training rows. Ask for fewer.")
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(seed))[:LOOKED_AT].tolist()
    rows: list[dict[str, Any]] = [table[i] for i in order]
    seen: dict[tuple[int, ...], int] = {}
    ranked = []
    for place, row in enumerate(rows):
        answer = tuple(label for label in row["labels"] if label != IGNORED)
        seen[answer] = seen.get(answer, 0) + 1
        ranked.append((seen[answer], place))  # the first of each answer, the second of each, ...
    return [list(rows[place]["input_ids"]) for _, place in sorted(ranked)[:number]]


def in_front(table: datasets.Dataset, examples: list[list[int]], renderer: Renderer) -> datasets.Dataset:
    """Return a table whose rows begin with the examples, as earlier turns of one conversation that are not learned.

    Args:
        table: encoded rows.
        examples: token ids of whole conversations.
        renderer: knows what the template puts before the first turn and between two turns.
    """
    head, between = _joints(renderer)
    turns = [token for ids in examples for token in [*_without(ids, head), *between]]

    def extend(row: dict[str, Any]) -> dict[str, Any]:
        front = [*head, *turns]
        rest = _without(row["input_ids"], head)
        learned = row["labels"][len(row["labels"]) - len(rest) :]
        return {**row, "input_ids": [*front, *rest], "labels": [*[IGNORED] * len(front), *learned]}

    return table.map(extend, features=table.features, load_from_cache_file=False)


def _without(ids: list[int], head: list[int]) -> list[int]:
    return list(ids[len(head) :]) if list(ids[: len(head)]) == head else list(ids)


def _joints(renderer: Renderer) -> tuple[list[int], list[int]]:
    """Return what the template writes once at the start, and between an answer and the next turn.

    Found by rendering one question, and the same question again behind its answer: what both end with is a turn.
    """
    question, answer = {"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}
    once = renderer.ids([question], cue=True)
    ids, learned = renderer([question, answer])
    twice = renderer.ids([question, answer, question], cue=True)
    said = len(ids) if twice[: len(ids)] == ids else len(once) + sum(learned)
    after = twice[said:]
    same = 0
    while same < min(len(once), len(after)) and once[-1 - same] == after[-1 - same]:
        same += 1
    return once[: len(once) - same], after[: len(after) - same]
