"""Writes the tables of methods into README.md and docs/methods.md, from the catalogue: `python docs/tables.py`.

A test fails while a page and the catalogue differ.
"""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import Any

from lit_peft.catalogue import FACTS, METHODS, Facts
from lit_peft.verbs.methods import SUPPORT

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/methods.md")


def imported(path: str) -> Any:
    """Return a class of the package by its path in the catalogue."""
    module, _, name = path.rpartition(".")
    return getattr(import_module(f"lit_peft.{module}"), name)


def learning_rate(name: str) -> float:
    """Return the learning rate that a method takes where the user names none."""
    cls = imported(METHODS[name])
    return float(cls.default_lr if hasattr(cls, "default_lr") else imported(FACTS[name].config).default_lr)


def merging(facts: Facts) -> str:
    """Say whether a method merges; what is trained in place has nothing to merge."""
    return ("yes" if facts.merges else "no") if facts.adapter else "in place"


def others(facts: Facts) -> str:
    """Say whose folders a method reads beside its own."""
    return ", ".join(facts.reads) or "-"


def table(heads: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return (
        "".join(f"| {' | '.join(cells)} |\n" for cells in lines).replace("| --- ", "|---").replace("---|\n", "---|\n")
    )


def mark(supported: bool) -> str:
    """Return how a table says yes or no."""
    return "yes" if supported else "-"


def short() -> str:
    """Return README's table: what each method does and what it supports."""
    heads = [
        "`--method`",
        "what is trained",
        "merges",
        *(head for key, (head, _) in SUPPORT.items() if key != "merges"),
    ]
    rows = []
    for name, facts in FACTS.items():
        marks = [mark(getattr(facts, key)) for key in SUPPORT if key != "merges"]
        rows.append([f"`{name}`", facts.title, merging(facts), *marks])
    return table(heads, rows)


def details() -> str:
    """Return the table of what each method is: paper, place, count, settings, learning rate, file."""
    heads = [
        "`--method`",
        "paper",
        "around",
        "trained weights of a layer",
        "settings",
        "learning rate",
        "writes",
        "reads, too",
    ]
    rows = []
    for name, facts in FACTS.items():
        paper = f"[{facts.paper.rpartition('/')[2]}]({facts.paper})" if facts.paper else "-"
        settings = f"`{facts.keyword}`: `{facts.config.rpartition('.')[2]}`" if facts.keyword else "-"
        rate = f"{learning_rate(name):g}"
        rows.append(
            [f"`{name}`", paper, facts.place, facts.trained, settings, rate, f"`{facts.peft_type}`", others(facts)]
        )
    return table(heads, rows)


def support() -> str:
    """Return the table of what each method supports."""
    rows = [
        [f"`{name}`", merging(facts), *(mark(getattr(facts, key)) for key in SUPPORT if key != "merges")]
        for name, facts in FACTS.items()
    ]
    return table(["`--method`", *(head for head, _ in SUPPORT.values())], rows)


TABLES = {"short": short, "details": details, "support": support}


def renewed(text: str) -> str:
    """Return a page with every `<!-- methods: NAME -->` table made anew."""

    def fill(found: re.Match[str]) -> str:
        return f"{found[1]}\n{TABLES[found[2]]()}{found[3]}"

    return re.sub(r"(<!-- methods: (\w+) -->)\n.*?(<!-- /methods -->)", fill, text, flags=re.S)


if __name__ == "__main__":
    for page in PAGES:
        path = ROOT / page
        path.write_text(renewed(path.read_text()))
        print(f"wrote {page}")
