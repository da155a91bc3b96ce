"""`lit-peft methods`: which methods there are. Reads a table and imports no model code, so it answers at once."""

from __future__ import annotations

import json as json_format
from difflib import get_close_matches
from typing import TYPE_CHECKING

from lit_peft.catalogue import FACTS, METHODS

if TYPE_CHECKING:
    from rich.console import Console

# What a method may support: the field of its facts, the head of a column, and what that means.
SUPPORT: dict[str, tuple[str, str]] = {
    "merges": ("merge", "folds into plain weights"),
    "peft": ("PEFT", "its folder loads in HF PEFT, and PEFT's here"),
    "four_bit": ("4-bit", "works on a base held in 4 bits"),
    "ddp": ("DDP", "two DDP processes give one process's losses"),
    "fsdp2": ("FSDP2", "two FSDP2 processes do"),
    "sets": ("sets", "several named sets of weights on one base"),
    "rows": ("rows", "rows of one batch routed to different sets"),
}
WIDE = 100  # columns from which the table also shows the paper and what each method does


def run(name: str | None = None, json: bool = False) -> None:
    """Show the methods that `--method` takes, and what each of them supports.

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
        rows = {
            key: {"class": f"lit_peft.{METHODS[key]}", **FACTS[key]._asdict(), "peft": FACTS[key].peft} for key in names
        }
        print(json_format.dumps(rows))
        return
    from rich.console import Console

    console = Console(highlight=False)
    if name is None:
        _table(console)
    else:
        _one(console, name)


def shorthand(arguments: list[str]) -> list[str]:
    """Let a name stand alone, and `--json` need no value: `lit-peft methods lora --json`."""
    spelled = ["--json=true" if argument == "--json" else argument for argument in arguments]
    named = spelled[:1] if spelled and not spelled[0].startswith("-") else []
    return [f"--name={named[0]}", *spelled[1:]] if named else spelled


def _table(console: Console) -> None:
    from rich.table import Table

    wide = console.width >= WIDE
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("--method", no_wrap=True, style="cyan")
    if wide:
        table.add_column("what", ratio=1)
        table.add_column("arXiv", no_wrap=True)
    table.add_column("weights a layer", ratio=None if wide else 1)
    for head, _ in SUPPORT.values():
        table.add_column(head, no_wrap=True)
    for name, facts in FACTS.items():
        about = (facts.title, facts.paper.rpartition("/")[2] or "-") if wide else ()
        marks = ("[green]yes" if getattr(facts, key) else "[dim]-" for key in SUPPORT)
        table.add_row(name, *about, facts.trained, *marks)
    console.print(table)
    console.print()
    for head, meaning in SUPPORT.values():
        console.print(f"{head:<6} {meaning}", style="dim")
    console.print("Stack them: --method lora+bitfit. More on one: lit-peft methods NAME", style="dim")


def _one(console: Console, name: str) -> None:
    from rich.table import Table

    facts = FACTS[name]
    table = Table(box=None, show_header=False, pad_edge=False)
    rows = {
        "what": facts.title,
        "class": f"from lit_peft import {METHODS[name].rpartition('.')[2]}",
        "settings": f"--model.{facts.keyword}.*  ({facts.config.rpartition('.')[2]})" if facts.keyword else "none",
        "around": facts.place,
        "weights": facts.trained if not facts.adapter else f"{facts.trained}, a layer",
        "file type": facts.peft_type,
        "reads": ", ".join(["its own", *facts.reads]),
        "paper": facts.paper or "none",
    }
    for key, value in rows.items():
        table.add_row(f"[bold]{key}", value)
    console.print(table)
    console.print()
    support = Table(box=None, show_header=False, pad_edge=False)
    for key, (head, meaning) in SUPPORT.items():
        itself = " (its weights are the model's own)" if key == "merges" and not facts.adapter else ""
        support.add_row(f"[bold]{head}", "[green]yes" if getattr(facts, key) else "[red]no", f"[dim]{meaning}{itself}")
    console.print(support)
    needs = f" --model.{facts.needs} ..." if facts.needs else ""
    console.print(
        f"\nlit-peft fit --method {name} --task sft --model.backbone MODEL --data.path FILE{needs}", style="dim"
    )
