"""What the runs of a comparison came to: one row a method, its score over the seeds, what it costs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from lit_peft.catalogue import FACTS
from lit_peft.comparing.job import Run

ANY = "any (merged)"
IN_VLLM = 64  # its own default lies at 16; --max-lora-rank raises it, as far as is usual


@dataclass(frozen=True)
class Score:
    """A number that a test logs.

    Attributes:
        key: its logged name.
        name: what a reader sees.
        rises: whether more is better.
        percent: whether it is a share.
    """

    key: str
    name: str
    rises: bool = True
    percent: bool = True

    def write(self, value: float | None) -> str:
        """Return a value as text."""
        if value is None:
            return "-"
        return f"{100 * value:.1f}" if self.percent else f"{value:.3g}"


SCORES = {
    "choice_accuracy": Score("test_choice_accuracy", "right choices, %"),
    "exact_match": Score("test_exact_match", "exact match, %"),
    "perplexity": Score("test_perplexity", "perplexity of the answers", rises=False, percent=False),
    "accuracy": Score("test_accuracy", "accuracy, %"),
    "f1": Score("test_f1", "F1 (macro)", percent=False),
    "mcc": Score("test_mcc", "Matthews correlation", percent=False),
}
BY_TASK = {"sft": ("choice_accuracy", "perplexity", "exact_match"), "classification": ("accuracy", "f1", "mcc")}


@dataclass
class Row:
    """One line of the table.

    Attributes:
        name: the method or baseline.
        baseline: whether nothing was trained.
        scores: score name -> its value for each seed.
        trained: weights that were trained.
        stored: parameters in the adapter folder.
        bytes: bytes in the adapter folder.
        step_seconds: median time of an optimizer step.
        peak_memory: bytes.
        memory_of: what they are the peak of.
        merges: whether it folds into plain weights; None for a baseline.
        servers: what serves it.
        errors: why runs failed, one a seed.
        runs: how many runs of it there are to be.
        note: about its size.
        settings: sizes that were chosen.
        winner: the run with the best score.
    """

    name: str
    baseline: bool = False
    scores: dict[str, list[float]] = field(default_factory=dict)
    trained: int | None = None
    stored: int | None = None
    bytes: int | None = None
    step_seconds: float | None = None
    peak_memory: int | None = None
    memory_of: str = ""
    merges: bool | None = None
    servers: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    runs: int = 1
    note: str = ""
    settings: dict[str, Any] = field(default_factory=dict)

    def mean(self, score: str) -> float | None:
        """Return the mean of a score over the seeds."""
        values = self.scores.get(score, [])
        return fmean(values) if values else None

    def spread(self, score: str) -> float | None:
        """Return the standard deviation of a score over the seeds."""
        values = self.scores.get(score, [])
        return stdev(values) if len(values) > 1 else None

    @property
    def done(self) -> int:
        """How many runs have finished."""
        return max(map(len, self.scores.values()), default=0)


def gather(runs: Sequence[Run], note: Mapping[str, Any], failures: Mapping[Path, str]) -> list[Row]:
    """Return the rows of all runs that finished or failed so far, baselines first.

    Args:
        runs: all runs of the comparison.
        note: the request and its plan.
        failures: folder -> why its run failed.
    """
    rows: dict[str, Row] = {}
    task = str(runs[0].config["task"])
    measured: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        row = rows.setdefault(run.name, Row(run.name, baseline=run.verb == "test", runs=0))
        row.runs += 1
        if (found := run.measures()) is not None:
            measured.setdefault(run.name, []).append(found)
            if not row.baseline and not row.servers:
                row.servers = servers(run.folder / "adapter", row.name)
        elif run.folder in failures:
            row.errors.append(failures[run.folder])
    for name, row in rows.items():
        found_all = measured.get(name, [])
        for score in BY_TASK[task]:
            what = SCORES[score]
            values = [found["test"][what.key] for found in found_all if what.key in found["test"]]
            if values:
                row.scores[score] = values
        if row.baseline:
            row.trained = 0
            continue
        planned = note["plan"]["methods"][name]
        row.note, row.settings, row.trained = planned["note"], planned["settings"], planned["trained"]
        row.merges = all(FACTS[part].merges for part in name.split("+"))
        if found_all:
            row.trained = found_all[0].get("trained", row.trained)
            kept = found_all[0].get("stored") or {}
            row.stored, row.bytes = kept.get("parameters"), kept.get("bytes")
            row.memory_of = found_all[0].get("memory_of", "")
            row.step_seconds = _middle([found.get("step_seconds") for found in found_all])
            row.peak_memory = max((found.get("peak_memory") or 0 for found in found_all), default=0) or None
    return list(rows.values())


def servers(folder: Path, method: str) -> list[str]:
    """Return what serves a trained method: anything once it is merged, else what reads its adapter folder."""
    found = [ANY] if all(FACTS[part].merges for part in method.split("+")) else []
    configs = []
    for path in sorted(folder.rglob("adapter_config.json")):
        configs.append(json.loads(path.read_text(encoding="utf-8")))
    kinds = {str(config.get("peft_type")) for config in configs}
    if len(configs) == 1 and not any(kind.startswith("LIT_") for kind in kinds):
        config = configs[0]
        plain = config["peft_type"] == "LORA" and not config.get("use_dora") and not config.get("modules_to_save")
        if config.get("task_type") == "CAUSAL_LM" and plain and config.get("r", 0) <= IN_VLLM:
            found.append("vLLM")
        found.append("HF PEFT")
    return [*found, "lit_peft"]


def choose(rows: Sequence[Row], task: str, asked: str | None) -> str:
    """Return the score to rank by: the one asked for, where it was measured, else the task's first."""
    present = {score for row in rows for score in row.scores}
    if asked in present:
        return str(asked)
    return next((score for score in BY_TASK[task] if score in present), BY_TASK[task][0])


def ranked(rows: Sequence[Row], score: str) -> list[Row]:
    """Return baselines first, then methods from best to worst (of equals the smaller one first), failed ones last."""
    rises = SCORES[score].rises

    def order(row: Row) -> tuple[bool, bool, float, int]:
        mean = row.mean(score)
        return not row.baseline, mean is None, 0.0 if mean is None else -mean if rises else mean, row.trained or 0

    return sorted(rows, key=order)


def front(rows: Sequence[Row], score: str) -> list[Row]:
    """Return the methods that none beats with as few or fewer trained weights, from small to large."""
    rises = SCORES[score].rises
    best: float | None = None
    found = []

    def size(row: Row) -> tuple[int, float]:
        mean = row.mean(score) or 0.0
        return row.trained or 0, -mean if rises else mean

    for row in sorted((row for row in rows if not row.baseline and row.mean(score) is not None), key=size):
        mean = row.mean(score)
        assert mean is not None
        if best is None or (mean > best if rises else mean < best):
            found.append(row)
            best = mean
    return found


def as_json(rows: Sequence[Row], score: str, note: Mapping[str, Any], job: Mapping[str, Any]) -> str:
    """Return everything as JSON."""
    best = {row.name for row in front(rows, score)}
    listed = [
        {**asdict(row), "mean": row.mean(score), "std": row.spread(score), "on_front": row.name in best} for row in rows
    ]
    asked = {key: note[key] for key in ("methods", "budget", "seeds", "shots", "lr", "command")}
    return json.dumps({"score": score, **asked, "job": job, "rows": listed}, indent=1)


def _middle(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None
