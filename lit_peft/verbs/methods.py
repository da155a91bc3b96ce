"""`lit-peft methods`: which methods there are. Reads a table and imports no model code, so it answers at once."""

from __future__ import annotations

import json as json_format
from difflib import get_close_matches

from lit_peft.catalogue import FACTS, METHODS


def run(name: str | None = None, json: bool = False) -> None:
    """Show the methods that `--method` takes.

    Args:
        name: only this one, with all that is known of it.
        json: print JSON instead of a table.

    Raises:
        ValueError: for an unknown name.

    Example:
        >>> run("lora", json=True)  # doctest: +ELLIPSIS
        {"lora": {"class": "lit_peft.methods.lora.LoRA", ...}}
    """
    if name is not None and name not in FACTS:
        near = get_close_matches(name, FACTS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ValueError(f"There is no method {name!r}.{hint} Known: {', '.join(FACTS)}.")
    names = list(FACTS) if name is None else [name]
    if json:
        rows = {key: {"class": f"lit_peft.{METHODS[key]}", **FACTS[key]._asdict()} for key in names}
        print(json_format.dumps(rows))
        return
    if name is None:
        _table()
    else:
        _one(name)


def shorthand(arguments: list[str]) -> list[str]:
    """Let a name stand alone, and `--json` need no value: `lit-peft methods lora --json`."""
    spelled = ["--json=true" if argument == "--json" else argument for argument in arguments]
    named = spelled[:1] if spelled and not spelled[0].startswith("-") else []
    return [f"--name={named[0]}", *spelled[1:]] if named else spelled


def _merges(name: str) -> str:
    if not FACTS[name].adapter:
        return "in place"
    return "yes" if FACTS[name].merges else "no"


def _reads(name: str) -> str:
    return "no" if FACTS[name].peft_type.startswith("LIT_") else "yes"


def _table() -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for head in ("--method", "class", "settings", "around", "weights", "merges", "arXiv"):
        table.add_column(head, no_wrap=True)
    for name, facts in FACTS.items():
        table.add_row(
            name,
            METHODS[name].rpartition(".")[2],
            facts.keyword or "-",
            facts.place,
            facts.trained,
            _merges(name),
            facts.paper.rpartition("/")[2] or "-",
        )
    console = Console()
    console.print(table)
    console.print("\nStack them: --method lora+bitfit. More on one: lit-peft methods NAME", style="dim")


def _one(name: str) -> None:
    from rich.console import Console
    from rich.table import Table

    facts = FACTS[name]
    table = Table(box=None, show_header=False, pad_edge=False)
    rows = {
        "what": facts.title,
        "class": f"from lit_peft import {METHODS[name].rpartition('.')[2]}",
        "settings": f"--model.{facts.keyword}.*  ({facts.config.rpartition('.')[2]})" if facts.keyword else "none",
        "around": facts.place,
        "weights": facts.trained,
        "merges": _merges(name),
        "HF PEFT reads it": _reads(name),
        "paper": facts.paper or "none",
    }
    for key, value in rows.items():
        table.add_row(f"[bold]{key}", value)
    console = Console()
    console.print(table)
    console.print(f"\nlit-peft fit --method {name} --task sft --model.backbone MODEL --data.path FILE", style="dim")
