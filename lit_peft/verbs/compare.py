"""`lit-peft compare`: many methods on one job, with the same data and the same budget; one table, one picture."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date
from inspect import signature
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import wrap
from typing import Any, Literal, get_args, get_type_hints

import docstring_parser
import yaml
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from lit_peft.comparing import prepare, results
from lit_peft.comparing.job import NOTE, Run, chosen, number, rates, runs
from lit_peft.comparing.warm import Warm
from lit_peft.faults import stopping

IMPORTED = (  # by every run; loaded once
    "lit_peft.cli.app",
    "lit_peft.comparing.sizes",
    "lit_peft.data.instructions",
    "lit_peft.data.labelled",
    "lit_peft.tasks.sft",
    "lit_peft.tasks.classification",
    "transformers.models.llama.modeling_llama",
    "matplotlib.backends.backend_agg",
)
OWN = ("methods", "budget", "seeds", "out", "shots", "lr", "score")
EXAMPLE = "lit-peft compare -c recipe/compare_trec --methods lora,bitfit,prefix --budget 1m --seeds 3"
USAGE = "usage: lit-peft compare -c JOB.yaml [--methods all|a,b,c] [--budget 200k|10m] [--seeds N] [--out FOLDER] ..."


def run(
    methods: str | None = None,
    budget: str | None = None,
    seeds: int = 1,
    out: str | None = None,
    shots: int = 6,
    lr: str | None = None,
    score: Literal["choice_accuracy", "exact_match", "perplexity", "accuracy", "f1", "mcc"] | None = None,
    job: list[str] | None = None,
) -> int:
    """Train one job with many methods, the same data and budget for all, and say which is best at which size.

    The job is given like that of `lit-peft fit`: -c FILE, and any of its options (--data.path FILE ...).
    After a kill, the same command, or just `lit-peft compare --out FOLDER`, goes on: finished runs are kept.

    Args:
        methods: all, or names and stacks with commas between: lora,bitfit,lora+prefix.
        budget: the most weights that a method may train, such as 200k or 10m: ranks, widths and lengths are chosen to
            come as near as they can. Without it all have their default size.
        seeds: how often each method is run, each time with another start and another order of the rows.
        out: folder of the comparison; by default runs/DATE-compare-TASK.
        shots: examples in front of each question in the baseline of few-shot prompting; 0: no such baseline.
        lr: learning rates that differ from the methods' own: 1e-3 for all, or prefix=1e-2,full=1e-4.
        score: what to rank by; by default choosing among the labels, else perplexity; accuracy in classification.
        job: set by the options that belong to `lit-peft fit`.

    Returns:
        The exit code: 1 if not one method finished.

    Raises:
        ValueError: for unknown methods, a budget nobody can meet, a job that cannot be compared; before any run.
        FileExistsError: if the folder holds something else.
    """
    arguments = job or []
    earlier = _opened(out)
    names = chosen(methods) if methods is not None else earlier["methods"] if earlier else chosen("all")
    if methods is None and earlier and not arguments:
        budget = budget or (str(earlier["budget"]) if earlier["budget"] else None)
        seeds, shots = max(seeds, earlier["seeds"]), earlier["shots"]
    if seeds < 1 or shots < 0:
        raise ValueError(f"--seeds is {seeds} and --shots {shots}; seeds must be 1 or more, shots 0 or more.")
    known = earlier["lr"] if earlier else {}
    note: dict[str, Any] = {
        "methods": names,
        "budget": number(budget),
        "seeds": seeds,
        "shots": shots,
        "lr": {**{k: v for k, v in known.items() if k in names}, **rates(lr, names)},
        "score": score or (earlier["score"] if earlier else None),
    }
    if not arguments and not earlier:
        raise ValueError("There is no job. Give one as for lit-peft fit: -c recipe/quickstart, or --model.backbone ...")
    # what is piped or kept, as in a notebook that asks for colours, is no place for a moving bar
    console = Console(highlight=False, force_terminal=None if sys.stdout.isatty() else False)
    failures: dict[Path, str] = {}
    todo: list[Run] = []
    home = Path(out or "runs")
    settled: dict[str, Any] = {}

    def advice() -> str:
        if not todo:
            return "stopped before the first run; nothing was written."
        done = sum(one.measures() is not None for one in todo)
        return f"stopped with {done} of {len(todo)} runs done. Go on: lit-peft compare --out {shlex.quote(str(home))}"

    with stopping(advice):
        try:
            with Warm(IMPORTED) as warm, TemporaryDirectory(prefix="lit-peft-") as scratch:
                with console.status("reading the job, counting weights ..."):
                    settled = prepare.settled(warm, arguments, Path(scratch)) if arguments else earlier["job"]  # type: ignore[index]
                    if note["score"] and note["score"] not in (known_scores := results.BY_TASK[settled["task"]]):
                        raise ValueError(
                            f"--score is {note['score']}; a {settled['task']} job has {', '.join(known_scores)}."
                        )
                    if out is None:
                        home = _new_home(settled["task"])
                    note["command"] = _command(arguments, note, home) if arguments else earlier["command"]  # type: ignore[index]
                    note["plan"] = prepare.planned(warm, settled, note, earlier, Path(scratch))
                _affordable(note)
                todo = runs(settled, note, home)
                _unspoilt(todo)
                home.mkdir(parents=True, exist_ok=True)
                (home / NOTE).write_text(json.dumps({**note, "job": settled}, indent=1), encoding="utf-8")
                _work(warm, todo, failures, console)
        finally:
            if any(one.measures() for one in todo) or failures:
                from lit_peft.comparing.report import report  # draws, which takes a second to load

                report(todo, note, settled, failures, home, console)
    return 0 if any(one.verb == "fit" and one.measures() for one in todo) else 1


def shorthand(arguments: list[str]) -> list[str]:
    """Tell the options of `compare` from those of `fit`, which become the job."""
    if {"-h", "--help"} & set(arguments):
        print(help_text())
        raise SystemExit(0)
    mine: list[str] = []
    others: list[str] = []
    at = 0
    while at < len(arguments):
        name, has_value, _ = arguments[at].partition("=")
        long = name.startswith("--")
        takes = not has_value and at + 1 < len(arguments) and not arguments[at + 1].startswith("--")
        pair = arguments[at : at + 1 + takes]
        if long and name[2:] in (*OWN, "print_config"):
            # written as one word, so that an empty value stays one
            mine += [f"{name}={pair[1]}"] if takes else pair
        elif name == "--method":
            raise ValueError("--method is for one run; compare takes --methods, with commas between.")
        else:
            others += pair
        at += len(pair)
    return [*mine, f"--job={json.dumps(others)}"] if others else mine


def help_text() -> str:
    """Return the help of this verb: the job's options are those of another one, so no parser can write it."""
    found = docstring_parser.parse(run.__doc__ or "")
    told = {argument.arg_name: " ".join((argument.description or "").split()) for argument in found.params}
    lines = [USAGE, "", found.short_description or "", "", found.long_description or "", "", "options:"]
    for name, parameter in signature(run).parameters.items():
        if name in OWN:
            default = "" if parameter.default is None else f" (default: {parameter.default})"
            kinds = get_args(get_args(get_type_hints(run)[name])[0]) if name == "score" else ()
            text = told[name] + (f" One of {', '.join(kinds)}." if kinds else "") + default
            lines += wrap(text, 96, initial_indent=f"  --{name:<10}", subsequent_indent=" " * 14)
    lines += wrap("all others: see lit-peft fit --help; they hold for every run", 96, initial_indent="  ")
    return "\n".join([*lines, "", "example:", f"  {EXAMPLE}"])


# Before the first run -------------------------------------------------------------------------------------------------


def _opened(out: str | None) -> dict[str, Any] | None:
    """Return what a folder's earlier comparison was; None for a new or empty folder."""
    if out is None or not Path(out).exists():
        return None
    folder = Path(out)
    if folder.is_dir() and (folder / NOTE).is_file():
        try:
            found: dict[str, Any] = json.loads((folder / NOTE).read_text(encoding="utf-8"))
        except ValueError:
            raise ValueError(f"{folder / NOTE} is damaged. Remove it, or choose another --out.") from None
        return found
    if not folder.is_dir() or any(folder.iterdir()):
        raise FileExistsError(f"{out} holds something else than a comparison. Choose a new --out.")
    return None


def _new_home(task: str) -> Path:
    stem, count = f"{date.today().isoformat()}-compare-{task}", 2
    home = Path("runs") / stem
    while home.exists():
        home, count = Path("runs") / f"{stem}-{count}", count + 1
    return home


def _affordable(note: Mapping[str, Any]) -> None:
    counts = {
        name: planned["trained"] for name, planned in note["plan"]["methods"].items() if planned["trained"] is not None
    }
    compared = {name: count for name, count in counts.items() if name in note["methods"]}
    if note["budget"] and compared and min(compared.values()) > note["budget"]:
        least = min(compared, key=lambda name: compared[name])
        raise ValueError(
            f"--budget is {note['budget']:,}, and no method is that small here. The smallest is {least} with "
            f"{compared[least]:,} trained weights; allow at least that."
        )


def _unspoilt(todo: Sequence[Run]) -> None:
    for one in todo:
        job = one.folder / "job.yaml"
        finished = (one.folder / "measures.json").is_file() and job.is_file()
        if finished and yaml.safe_load(job.read_text(encoding="utf-8")) != one.config:
            raise FileExistsError(
                f"{one.folder} holds a finished run with other settings. Choose another --out, or remove that folder."
            )


def _command(arguments: Sequence[str], note: Mapping[str, Any], home: Path) -> str:
    words = ["lit-peft", "compare", *arguments, "--methods", ",".join(note["methods"])]
    if note["budget"]:
        words += ["--budget", str(note["budget"])]
    if note["lr"]:
        words += ["--lr", ",".join(f"{method}={rate:g}" for method, rate in note["lr"].items())]
    return shlex.join([*words, "--seeds", str(note["seeds"]), "--shots", str(note["shots"]), "--out", str(home)])


# The runs -------------------------------------------------------------------------------------------------------------


def _work(warm: Warm, todo: Sequence[Run], failures: dict[Path, str], console: Console) -> None:
    """Do what has not been done."""
    open_runs = [one for one in todo if one.measures() is None]
    if len(open_runs) < len(todo):
        console.print(f"{len(todo) - len(open_runs)} of {len(todo)} runs are done already")
    took: list[float] = []
    with _bar(console, len(todo), len(todo) - len(open_runs)) as tell:
        for position, one in enumerate(open_runs):
            place = len(todo) - len(open_runs) + position + 1
            left = sum(took) / len(took) * (len(open_runs) - position) if took else None
            tell(f"{place} of {len(todo)}: {one.title}" + (f", {_time(left)} left" if left else ""), 0)
            begun = time.monotonic()
            command = one.command()
            code = warm("lit_peft.__main__:main", command, log=one.folder / "log.txt")
            took.append(time.monotonic() - begun)
            found = one.measures()
            if found is None:
                failures[one.folder] = one.failure() if code > 0 else _killed(code)
                outcome = f"failed: {failures[one.folder]}"
            else:
                outcome = _outcome(found, one)
            tell("", 1)
            console.print(f"{place} of {len(todo)}  {escape(one.title)}: {escape(outcome)} ({_time(took[-1])})")


def _outcome(found: Mapping[str, Any], one: Run) -> str:
    for name in results.BY_TASK[str(one.config["task"])]:
        what = results.SCORES[name]
        if what.key in found["test"]:
            return f"{what.write(found['test'][what.key])} {what.name}"
    return "done"


def _killed(code: int) -> str:
    if code == 0:
        return "ended without a measurement"
    return f"killed by signal {-code}" + (": the machine may be out of memory" if code == -9 else "")


@contextmanager
def _bar(console: Console, total: int, done: int) -> Iterator[Any]:
    """Show how far the comparison is; yields a function of what is going on and how many runs more are done."""
    parts = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*parts, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=total, completed=done)

        def tell(what: str, more: int) -> None:
            progress.update(bar, advance=more, **({"description": escape(what)} if what else {}))  # type: ignore[arg-type]

        yield tell


def _time(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 90
        else f"{seconds / 60:.0f} min"
        if seconds < 5400
        else f"{seconds / 3600:.1f} h"
    )
