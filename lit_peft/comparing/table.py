"""The table of a comparison: on the terminal, and as Markdown with the picture and the commands."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lit_peft.comparing.results import ANY, SCORES, Row, front, ranked

PICTURE = "pareto.png"
SCORE, KILOBYTES, MERGES, SERVERS = 1, 4, 7, 8  # columns
SHORT = {ANY: "any", "vLLM": "vLLM", "HF PEFT": "PEFT", "lit_peft": "lit_peft"}


def columns(rows: Sequence[Row], score: str) -> list[str]:
    """Return the heads of the table."""
    seeds = max((row.runs for row in rows), default=1)
    head = SCORES[score].name + (f", mean ± std of {seeds}" if seeds > 1 else "")
    return ["method", head, "trained", "stored", "kB", "step, ms", "peak, MB", "merges", "served by"]


def cells(row: Row, score: str) -> list[str]:
    """Return one line of the table."""
    what, mean, spread = SCORES[score], row.mean(score), row.spread(score)
    value = what.write(mean) + (f" ± {what.write(spread)}" if spread is not None else "")
    if mean is None:
        value = "failed" if row.errors else "not run yet"
    elif row.done < row.runs:
        value += f" ({row.done} of {row.runs})"
    return [
        row.name,
        value,
        _count(row.trained) + ("" if "above the budget" not in row.note else " (!)"),
        _count(row.stored),
        "-" if row.bytes is None else f"{row.bytes / 1e3:,.0f}",
        "-" if row.step_seconds is None else f"{1000 * row.step_seconds:.0f}",
        "-" if row.peak_memory is None else f"{row.peak_memory / 1e6:,.0f}",
        "-" if row.merges is None else "yes" if row.merges else "no",
        ", ".join(row.servers) or "-",
    ]


def show(rows: Sequence[Row], score: str, console: Console) -> None:
    """Print the table: baselines, then methods from best to worst; failed ones with their reason."""
    best = {row.name for row in front(rows, score)}
    heads = columns(rows, score)
    console.print(f"score: {heads[SCORE]}")
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for i, head in enumerate(heads):
        if i != KILOBYTES:
            words = "score" if i == SCORE else head
            table.add_column(words, justify="left" if i in (0, MERGES, SERVERS) else "right", no_wrap=i < MERGES)
    for row in ranked(rows, score):
        line = cells(row, score)
        line[SERVERS] = " ".join(SHORT[name] for name in row.servers if name != "lit_peft" or len(row.servers) == 1)
        del line[KILOBYTES]
        style = "dim" if row.baseline else "bold" if row.name in best else "red" if row.mean(score) is None else ""
        table.add_row(*map(escape, line), style=style)
    console.print(table)
    large = " (!): above the budget." if any("above the budget" in row.note for row in rows) else ""
    told = f"bold: no smaller method is better (the Pareto front).{large} any: once merged."
    console.print(told, style="dim")
    for row in rows:
        for error in dict.fromkeys(row.errors):
            console.print(f"{escape(row.name)} failed: {escape(error)}", style="red", soft_wrap=True)


def markdown(rows: Sequence[Row], score: str, note: Mapping[str, Any], job: Mapping[str, Any], home: Path) -> str:
    """Return the page of a comparison."""
    best = {row.name for row in front(rows, score)}
    lines = [columns(rows, score), ["---"] * len(columns(rows, score))]
    for row in ranked(rows, score):
        first, *others = cells(row, score)
        lines.append([f"**{first}**" if row.name in best else first, *others])
    data = job["data"]["init_args"]
    budget = note["budget"]
    parts = [
        f"# {len(note['methods'])} methods on {job['model'].get('backbone', 'one model')}\n",
        _listed(lines),
        f"![score against trained weights]({PICTURE})\n" if (home / PICTURE).is_file() else "",
        "Bold: the Pareto front, methods that none beats with as few trained weights. (!): above the budget. "
        + _how(rows)
        + "\n",
        "## What was the same for all\n",
        _listed(
            [
                ["", ""],
                ["---", "---"],
                ["data", f"`{data.get('path')}`, {job['evaluate']} test rows measured"],
                [
                    "budget of trained weights",
                    "none: each method as large as its defaults" if not budget else f"{budget:,}",
                ],
                ["seeds", str(note["seeds"])],
                ["learning rate", _rates(note, job)],
                ["machine", f"{platform.machine()}, {platform.system()}"],
                ["versions", ", ".join(f"{name} {version(name)}" for name in ("torch", "lightning", "transformers"))],
                ["date", f"{datetime.now():%Y-%m-%d}"],
            ]
        ),
        _other(rows, score),
    ]
    failed = [[row.name, error] for row in rows for error in dict.fromkeys(row.errors)]
    if failed:
        parts.append("## Runs that failed\n\n" + _listed([["method", "reason"], ["---", "---"], *failed]))
    parts.append(f"## Command\n\n```sh\n{note['command']}\n```\n")
    if (home / "winner.yaml").is_file():
        parts.append(f"Train the winner: `lit-peft fit -c {shlex.quote(str(home / 'winner.yaml'))}`\n")
    return "\n".join(part for part in parts if part)


def _other(rows: Sequence[Row], score: str) -> str:
    """Return all scores and the sizes that were chosen."""
    present = [name for name in SCORES if any(name in row.scores for row in rows)]
    head = ["method", *(SCORES[name].name for name in present), "size"]
    lines = [head, ["---"] * len(head)]
    for row in ranked(rows, score):
        chosen = ", ".join(f"{k} {v:g}" for values in row.settings.values() for k, v in values.items())
        size = "; ".join(part for part in (chosen, row.note) if part) or ("" if row.baseline else "its default")
        lines.append([row.name, *(SCORES[name].write(row.mean(name)) for name in present), size])
    return "## All scores, and sizes\n\n" + _listed(lines)


def _how(rows: Sequence[Row]) -> str:
    memory = next((row.memory_of for row in rows if row.memory_of), "")
    return "Step: median of an optimizer step. " + (f"Memory: peak in training ({memory})." if memory else "")


def _rates(note: Mapping[str, Any], job: Mapping[str, Any]) -> str:
    everyone = job["model"].get("lr")
    rest = f"{everyone:g}" if everyone is not None else "each method's default"
    named = ", ".join(f"{method} {rate:g}" for method, rate in note["lr"].items())
    return f"{rest}; {named}" if named else rest


def _count(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"


def _listed(lines: Sequence[Sequence[str]]) -> str:
    def cell(text: str) -> str:
        return " ".join(text.replace("|", r"\|").replace("<", "&lt;").split())

    return "\n".join("| " + " | ".join(map(cell, line)) + " |" for line in lines) + "\n"
