"""What a comparison leaves: table, picture and the winner's configuration, on the disk and on the screen."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from lit_peft.comparing import picture, results, table
from lit_peft.comparing.job import Run, winner


def report(
    todo: Sequence[Run],
    note: Mapping[str, Any],
    job: Mapping[str, Any],
    failures: Mapping[Path, str],
    home: Path,
    console: Console,
) -> None:
    """Write table, picture and winner from what is there, and show them."""
    rows = results.gather(todo, note, failures)
    score = results.choose(rows, job["task"], note["score"])
    title = f"{str(job['model'].get('backbone', '')).removeprefix('package:')}: {results.SCORES[score].name}"
    drawn = picture.draw(home / table.PICTURE, f"{title}, against trained weights", rows, score)
    best = next((row for row in results.ranked(rows, score) if not row.baseline and row.mean(score) is not None), None)
    if best is not None:
        first = next(one for one in todo if one.name == best.name and one.measures())
        text = yaml.safe_dump(winner(first, best.name), sort_keys=False, allow_unicode=True)
        head = f"# {best.name}, the winner of {home.name}: {results.SCORES[score].write(best.mean(score))} "
        (home / "winner.yaml").write_text(f"{head}{results.SCORES[score].name}.\n{text}", encoding="utf-8")
    (home / "results.json").write_text(results.as_json(rows, score, note, job), encoding="utf-8")
    (home / "README.md").write_text(table.markdown(rows, score, note, job, home), encoding="utf-8")
    console.print()
    table.show(rows, score, console)
    console.print(f"\ntable    {home / 'README.md'}, {home / 'results.json'}", soft_wrap=True)
    if drawn:
        console.print(f"picture  {drawn}", soft_wrap=True)
    if best is not None:
        console.print(f"winner   {best.name}: lit-peft fit -c {shlex.quote(str(home / 'winner.yaml'))}", soft_wrap=True)
