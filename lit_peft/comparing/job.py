"""What a comparison is asked to do, and the runs it is made of: plain data, nothing heavy is imported."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from lit_peft.catalogue import FACTS, TASKS

NOTE = "compare.json"  # in a comparison's folder: what was asked and planned
ROWS = 200  # measured, where the job does not say
MEASURES = "lit_peft.callbacks.Measures"
UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
BASE = next(iter(FACTS))  # before training, it is the base


@dataclass(frozen=True)
class Run:
    """One training or measurement, in a folder of its own.

    Attributes:
        name: the method, or what the baseline is called.
        seed: number of the repetition; 0 for a baseline.
        verb: `fit` or `test`.
        config: what its `job.yaml` holds.
        folder: where it goes.
    """

    name: str
    seed: int
    verb: str
    config: dict[str, Any] = field(repr=False)
    folder: Path

    @property
    def title(self) -> str:
        """What the progress line calls it."""
        return f"{self.name}, seed {self.seed}" if self.seed else self.name

    def measures(self) -> dict[str, Any] | None:
        """Return what the finished run measured; None if it has not finished, or was another run."""
        try:
            found: dict[str, Any] = json.loads((self.folder / "measures.json").read_text(encoding="utf-8"))
            same = yaml.safe_load((self.folder / "job.yaml").read_text(encoding="utf-8")) == self.config
        except (OSError, ValueError, yaml.YAMLError):
            return None
        return found if same and "test" in found else None

    def command(self) -> list[str]:
        """Make the folder ready and return the command: to begin, or to go on from the last checkpoint."""
        last = self.folder / "checkpoints" / "last.ckpt"
        job = self.folder / "job.yaml"
        started = job.is_file() and yaml.safe_load(job.read_text(encoding="utf-8")) == self.config
        if self.verb == "fit" and started and last.is_file() and not (self.folder / "measures.json").exists():
            return ["fit", "--ckpt_path", str(last)]
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        job.write_text(yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True), encoding="utf-8")
        return [self.verb, "-c", str(job)]

    def failure(self) -> str:
        """Return the line that says why the run failed."""
        try:
            lines = (self.folder / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return "did not start"
        told = [line for line in lines if line.startswith("lit-peft: error: ")]
        last = next((line for line in reversed(lines) if line.strip()), "no message")
        return told[-1].removeprefix("lit-peft: error: ") if told else last.strip()


def chosen(text: str) -> list[str]:
    """Return the methods that `--methods` names: all, or a list of names and stacks.

    Raises:
        ValueError: if it is empty, or a name is unknown or doubled.

    Example:
        >>> chosen("lora, lora+bitfit")
        ['lora', 'lora+bitfit']
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise ValueError("--methods is empty. Write all, or some of: " + ", ".join(FACTS) + ".")
    if names == ["all"]:
        return [name for name in FACTS if not FACTS[name].needs]  # what builds on trained adapters stands apart
    for name in names:
        for part in name.split("+"):
            if part not in FACTS:
                near = get_close_matches(part, FACTS, n=1)
                hint = f" Did you mean {near[0]}?" if near else ""
                raise ValueError(f"There is no method {part!r}.{hint} Known: all, {', '.join(FACTS)}.")
        if names.count(name) > 1:
            raise ValueError(f"--methods names {name} twice.")
    return names


def number(text: str | None) -> int | None:
    """Return a budget of weights: 200k is 200,000, 1.5m is 1,500,000.

    Raises:
        ValueError: if it is no such number.

    Example:
        >>> number("200k")
        200000
    """
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:[._]\d+)*)\s*([kmb]?)", text.strip().lower())
    count = round(float(found[1].replace("_", "")) * UNITS[found[2]]) if found and found[1].count(".") < 2 else 0
    if count < 1:
        raise ValueError(f"--budget is {text!r}; write a number of trained weights, such as 200k or 10m.")
    return count


def rates(text: str | None, methods: Sequence[str]) -> dict[str, float]:
    """Return learning rates by method: of `1e-3` for all, of `lora=1e-3,full=1e-4` for some.

    Raises:
        ValueError: for what is no number, or no compared method.

    Example:
        >>> rates("lora=1e-3", ["lora", "full"])
        {'lora': 0.001}
    """
    found: dict[str, float] = {}
    for part in (text or "").split(","):
        if part.strip():
            name, named, value = part.strip().rpartition("=")
            if named and name not in methods:
                raise ValueError(f"--lr names {name!r}, which is not compared. Compared: {', '.join(methods)}.")
            try:
                found |= dict.fromkeys([name] if named else methods, float(value))
            except ValueError:
                raise ValueError(
                    f"--lr is {part.strip()!r}; write a number, or METHOD=NUMBER and commas between."
                ) from None
    return found


def split(arguments: Sequence[str]) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """Return a job's arguments without the settings of single methods, and those settings by keyword.

    A run takes only the settings of its own method; a comparison sorts them out: `--model.prefix.num_virtual_tokens 10`
    is for the methods that have a prefix.

    Example:
        >>> split(["-c", "job.yaml", "--model.prefix.dropout", "0.1"])
        (['-c', 'job.yaml'], {'prefix': {'dropout': 0.1}})
    """
    keywords = {facts.keyword for facts in FACTS.values()} - {""}
    rest: list[str] = []
    found: dict[str, dict[str, Any]] = {}
    words = iter(arguments)
    for word in words:
        name, has_value, value = word.partition("=")
        path = name.removeprefix("--").split(".")
        if name.startswith("--model.") and len(path) == 3 and path[1] in keywords:
            found.setdefault(path[1], {})[path[2]] = yaml.safe_load(value if has_value else next(words, ""))
        else:
            rest.append(word)
    return rest, found


def settle(resolved: Mapping[str, Any], settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return a job as `lit-peft fit` resolved it, without what each run decides for itself.

    Args:
        resolved: the job.
        settings: those of single methods, by keyword.

    Raises:
        ValueError: if the job is a single run that cannot be compared: a model of its own class, or from a checkpoint.
    """
    model, data = resolved.get("model", {}), resolved.get("data", {})
    path = model.get("class_path", "lit_peft.zoo.")
    if not path.startswith("lit_peft.zoo."):
        raise ValueError(f"The job's model is {path}, but compare puts method and task together. Leave --model out.")
    # `task` itself is left out of what was resolved, where it is the command's default
    task = next((task for task, home in TASKS.items() if path.endswith(home.rpartition(".")[2])), "sft")
    if resolved.get("ckpt_path") or model.get("init_args", {}).get("adapter"):
        raise ValueError("A comparison starts every run from the base. Leave ckpt_path and model.adapter out.")
    options, rows = dict(model.get("init_args", {})), resolved.get("evaluate", 0) or ROWS
    for keyword, values in settings.items():
        options[keyword] = {**options.get(keyword, {}), **values}
    if "backbone" not in options:
        raise ValueError("--model.backbone is missing; give it as a flag or in a configuration file.")
    if "class_path" not in data or "path" not in data.get("init_args", {"path": ""}):
        raise ValueError("--data.path is missing; give it as a flag or in a configuration file.")
    return {
        "task": task,
        "evaluate": rows,
        "model": options,
        "data": {"class_path": data["class_path"], "init_args": dict(data.get("init_args", {}))},
        "trainer": dict(resolved.get("trainer", {})),
        "seed_everything": resolved.get("seed_everything", 42),
    }


def runs(job: Mapping[str, Any], note: Mapping[str, Any], home: Path) -> list[Run]:
    """Return all runs of a comparison in their order: baselines, then all methods with the first seed, the second ...

    Args:
        job: what `settle` returned.
        note: the request and its plan.
        home: the comparison's folder.
    """
    found = [_baseline("base", 0, job, home)]
    told_apart = job["data"]["class_path"] in ("lit_peft.Instructions", "lit_peft.data.instructions.Instructions")
    if note["shots"] and job["task"] == "sft" and told_apart and not note["plan"]["encoder_decoder"]:
        found.append(_baseline(f"{note['shots']}-shot", note["shots"], job, home))
    return found + [
        _training(method, seed, job, note, home) for seed in range(1, note["seeds"] + 1) for method in note["methods"]
    ]


def _baseline(name: str, shots: int, job: Mapping[str, Any], home: Path) -> Run:
    folder = home / "runs" / name
    data = dict(job["data"]["init_args"])
    data |= {"limit_test": job["evaluate"], "batch_size": max(32, int(data.get("batch_size", 0)))}
    config = {
        "method": BASE,
        "task": job["task"],
        "seed_everything": job["seed_everything"],
        "run_dir": str(folder),
        "model": _model(BASE, job["model"]),
        "data": {"class_path": job["data"]["class_path"], "init_args": {**data, **({"shots": shots} if shots else {})}},
        "trainer": _trainer(job["trainer"]),
    }
    return Run(name, 0, "test", config, folder)


def _training(method: str, seed: int, job: Mapping[str, Any], note: Mapping[str, Any], home: Path) -> Run:
    folder = home / "runs" / method / f"seed-{seed}"
    data = dict(job["data"]["init_args"])
    if seed > 1:  # another start and another order of the same rows
        data["shuffle_seed"] = int(data.get("seed", 0)) + seed - 1
    model = _model(method, job["model"], note["plan"]["methods"][method]["settings"])
    if method in note["lr"]:
        model["lr"] = note["lr"][method]
    config = {
        "method": method,
        "task": job["task"],
        "seed_everything": job["seed_everything"] + seed - 1,
        "evaluate": job["evaluate"],
        "evaluate_base": False,
        "run_dir": str(folder),
        "model": model,
        "data": {"class_path": job["data"]["class_path"], "init_args": data},
        "trainer": _trainer(job["trainer"]),
    }
    return Run(method, seed, "fit", config, folder)


def _model(method: str, given: Mapping[str, Any], sizes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the model's arguments for one method: settings of other methods are left out, sizes put in."""
    everyones = {facts.keyword for facts in FACTS.values()} - {""}
    mine = {FACTS[part].keyword for part in method.split("+")} | set(sizes or {})
    found = {key: value for key, value in given.items() if key not in everyones or key in mine}
    for key, chosen_sizes in (sizes or {}).items():
        found[key] = {**found.get(key, {}), **chosen_sizes}
    return found


def _trainer(given: Mapping[str, Any]) -> dict[str, Any]:
    quiet = {"enable_progress_bar": False, "logger": False}
    return {**quiet, **given, "callbacks": [*(given.get("callbacks") or []), {"class_path": MEASURES}]}


def winner(run: Run, method: str) -> dict[str, Any]:
    """Return the configuration that does a compared run again, as an ordinary one."""
    config = {key: value for key, value in run.config.items() if key not in ("run_dir", "evaluate_base")}
    trainer = dict(config["trainer"])
    trainer["callbacks"] = [c for c in trainer["callbacks"] if c.get("class_path") != MEASURES]
    for key in ("enable_progress_bar", "logger"):
        if trainer.get(key) is False:
            del trainer[key]
    if not trainer["callbacks"]:
        del trainer["callbacks"]
    return {**config, "method": method, "trainer": trainer}
