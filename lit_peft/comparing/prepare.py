"""Before the first run of a comparison: the job is read by `lit-peft fit` itself, and sizes are chosen."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lit_peft.comparing.job import settle, split
from lit_peft.comparing.warm import Warm


def settled(warm: Warm, arguments: Sequence[str], scratch: Path) -> dict[str, Any]:
    """Let `lit-peft fit` read the job, so that its rules are the same."""
    log = scratch / "job.txt"
    arguments, settings = split(arguments)
    _must(warm("lit_peft.__main__:main", ["fit", *arguments, "--print_config=skip_default"], log=log), log)
    text = log.read_text(encoding="utf-8").partition("# lightning.pytorch==")[2].partition("\n")[2]
    return settle(yaml.safe_load(text) or {}, settings)


def planned(
    warm: Warm, job: Mapping[str, Any], note: Mapping[str, Any], earlier: Mapping[str, Any] | None, scratch: Path
) -> dict[str, Any]:
    """Return the plan: of each method the settings that meet the budget; as it was, where nothing has changed."""
    if earlier and earlier["job"] == job and earlier["budget"] == note["budget"]:
        old: dict[str, Any] = earlier["plan"]
        if set(note["methods"]) <= set(old["methods"]):
            return old
    question, answer, log = scratch / "question.json", scratch / "answer.json", scratch / "plan.txt"
    asked = {
        **{key: job[key] for key in ("task", "model", "data")},
        **{k: note[k] for k in ("methods", "budget", "lr")},
    }
    question.write_text(json.dumps(asked), encoding="utf-8")
    _must(warm("lit_peft.comparing.sizes:plan", str(question), str(answer), log=log), log)
    plan: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    return plan


def _must(code: int, log: Path) -> None:
    """Pass on what a preparation complained about."""
    if code == 0:
        return
    said = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    told = [line.partition(": error: ")[2] for line in said if line.startswith("lit-peft: error: ")]
    line = told[-1] if told else said[-1] if said else f"the preparation ended with code {code}"
    raise ValueError(line) if code == 2 else RuntimeError(line)
