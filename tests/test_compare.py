"""Many methods on one job: every row, equal sizes, runs that fail, kills, the picture and the winner."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lit_peft.__main__ import main
from lit_peft.catalogue import FACTS
from tests.models import save_tiny

ROOT = Path(__file__).parents[1]
JOB = shlex.split(
    "--model.backbone base --model.max_new_tokens 2 --data.path data.jsonl --data.max_length 64 --data.batch_size 4 "
    "--data.val_fraction 0.2 --data.choices '[good, bad]' --evaluate 6 --trainer.max_steps 4 --trainer.accelerator cpu "
    "--trainer.precision 32-true --model.bitfit.target_modules attention --model.reft.layers_to_transform '[7]'"
)
METHODS_HERE = "lora,bitfit,loreft,freeze,lora+bitfit"
BUDGET = 2000
COMPARE = ["compare", *JOB, "--methods", METHODS_HERE, "--budget", "2k", "--shots", "2", "--lr", "lora=1e-3"]


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a model, data, and a comparison that was interrupted after its first method."""
    folder = tmp_path_factory.mktemp("room")
    before = Path.cwd()
    os.chdir(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIT_PEFT_CACHE", str(folder / "cache"))
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")
        save_tiny("llama", "base")
        rows = [{"prompt": f"say {i}", "completion": "good" if i % 3 else "bad"} for i in range(40)]
        Path("data.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
        yield folder
    os.chdir(before)


@pytest.fixture(scope="module")
def interrupted(room: Path) -> tuple[int, str, str, bytes]:
    """What Ctrl-C after the first method left: exit code, screen, table, and the first run's measurements."""
    first = room / "cmp/runs/lora/seed-1/measures.json"
    code, shown = stop(room, [*COMPARE, "--out", "cmp"], lambda: "test" in text(first), signal.SIGINT)
    return code, shown, text(room / "cmp/README.md"), first.read_bytes()


@pytest.fixture(scope="module")
def compared(interrupted: Any, room: Path) -> dict[str, Any]:
    """The table after the same comparison went on."""
    assert main(["compare", "--out", "cmp"]) == 0
    return table()


def text(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


def stop(room: Path, command: list[str], ready: Callable[[], bool], number: int) -> tuple[int, str]:
    """Start a comparison and send it a signal when it is ready for that; returns its exit code and what it showed."""
    start = [sys.executable, "-m", "lit_peft", *command]
    process = subprocess.Popen(start, cwd=room, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        for _ in range(6000):
            if process.poll() is not None or ready():
                break
            time.sleep(0.02)
        process.send_signal(number)
        shown, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert ready(), shown
    return process.returncode, shown


def table(home: str = "cmp") -> dict[str, Any]:
    found = json.loads((Path(home) / "results.json").read_text())
    return {**found, "rows": {row["name"]: row for row in found["rows"]}}


def test_an_interrupted_comparison_can_be_read(interrupted: tuple[int, str, str, bytes]) -> None:
    code, shown, page, _ = interrupted
    assert code == 130, shown
    assert "Traceback" not in shown
    assert "Go on: lit-peft compare --out cmp" in shown
    assert "| lora | " in page.replace("*", "")
    assert "| freeze | not run yet |" in page


def test_finished_runs_are_not_repeated(interrupted: Any, compared: Any) -> None:
    assert Path("cmp/runs/lora/seed-1/measures.json").read_bytes() == interrupted[3]
    again = {path: path.stat().st_mtime_ns for path in Path("cmp/runs").rglob("measures.json")}
    assert main([*COMPARE, "--out", "cmp"]) == 0  # only the run that had failed is tried again
    assert {path: path.stat().st_mtime_ns for path in Path("cmp/runs").rglob("measures.json")} == again


def test_every_method_and_baseline_has_its_row(compared: dict[str, Any]) -> None:
    rows = compared["rows"]
    assert list(rows) == ["base", "2-shot", *METHODS_HERE.split(",")]
    assert compared["score"] == "choice_accuracy"
    for name in ("lora", "bitfit", "freeze", "lora+bitfit"):
        row = rows[name]
        assert len(row["scores"]["choice_accuracy"]) == 1
        assert 0 <= row["mean"] <= 1
        assert row["step_seconds"] > 0
        assert row["peak_memory"] > 1e6
        assert row["merges"]
        assert "any (merged)" in row["servers"]
    assert rows["lora"]["stored"] == rows["lora"]["trained"]
    assert rows["lora"]["bytes"] > 4 * rows["lora"]["stored"]
    assert "vLLM" in rows["lora"]["servers"]
    assert "vLLM" not in rows["lora+bitfit"]["servers"]
    assert rows["base"]["scores"]["perplexity"] != rows["2-shot"]["scores"]["perplexity"]


def test_a_run_that_fails_is_a_row(compared: dict[str, Any]) -> None:
    row = compared["rows"]["loreft"]
    assert row["errors"] == ["reft.layers_to_transform names layer 7; layers are 0 to 1."]
    assert row["mean"] is None
    assert "| loreft | failed |" in Path("cmp/README.md").read_text()


def test_the_budget_is_kept(compared: dict[str, Any]) -> None:
    rows = compared["rows"]
    for name in ("lora", "bitfit", "lora+bitfit"):
        assert 0 < rows[name]["trained"] <= BUDGET
    assert rows["lora"]["settings"] == {"lora": {"r": 1, "alpha": 2.0}}
    assert rows["freeze"]["trained"] > BUDGET
    assert rows["freeze"]["note"] == "its smallest size, above the budget"
    # the settings of one method reached it, and only it
    models = {
        name: yaml.safe_load(Path(f"cmp/runs/{name}/seed-1/job.yaml").read_text())["model"]
        for name in rows
        if name in FACTS
    }
    assert models["bitfit"]["bitfit"] == {"target_modules": "attention"}
    assert {"bitfit", "reft"}.isdisjoint(models["lora"])
    assert models["lora"]["lr"] == 1e-3


def test_the_picture_is_there(compared: dict[str, Any]) -> None:
    picture = Path("cmp/pareto.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000
    assert "](pareto.png)" in Path("cmp/README.md").read_text()
    assert any(row["on_front"] for row in compared["rows"].values())


def test_the_winner_can_be_trained_again(compared: dict[str, Any]) -> None:
    best = max(row["mean"] for row in compared["rows"].values() if row["mean"] is not None and not row["baseline"])
    config = yaml.safe_load(Path("cmp/winner.yaml").read_text())
    assert compared["rows"][config["method"]]["mean"] == best
    assert main(["fit", "-c", "cmp/winner.yaml", "--run_dir", "again", "--evaluate", "0"]) == 0
    assert Path("again/checkpoints/last.ckpt").is_file()


@pytest.mark.slow
def test_a_killed_comparison_goes_on_from_the_checkpoint(room: Path) -> None:
    long = [*JOB, "--trainer.max_steps", "150", "--trainer.max_epochs", "-1", "--save_every", "1"]
    command = ["compare", *long, "--methods", "lora,bitfit", "--shots", "0", "--out", "killed"]
    first = room / "killed/runs/lora/seed-1/measures.json"
    begun = room / "killed/runs/bitfit/seed-1"
    last = begun / "checkpoints/last.ckpt"
    stop(room, command, last.is_file, signal.SIGKILL)
    assert not (room / "killed/README.md").exists()
    for _ in range(100):  # the run itself sees that the comparison is gone: it saves, and ends
        if "stopped at step" in text(begun / "log.txt"):
            break
        time.sleep(0.1)
    at = torch.load(last, weights_only=True)["global_step"]
    assert 0 < at < 150
    assert not (begun / "measures.json").exists()
    before = first.read_bytes()
    assert main(["compare", "--out", "killed"]) == 0
    assert first.read_bytes() == before
    steps = [line for line in text(begun / "log.txt").splitlines() if "stopped at step" in line]
    assert len(steps) == 1  # still the log of the first part: the run went on, it did not start again
    assert json.loads((begun / "measures.json").read_text())["steps"] == 150
    assert set(table("killed")["rows"]) == {"base", "lora", "bitfit"}


Mistake = Callable[..., str]


@pytest.fixture
def mistake(room: Path, capfd: pytest.CaptureFixture[str]) -> Mistake:
    """Run a command that must be refused; returns its one line."""

    def run(*arguments: str) -> str:
        before = sorted(path for path in room.iterdir() if path.name != "cache")
        capfd.readouterr()
        assert main(list(arguments)) == 2
        lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("lit-peft: error: ")]
        assert len(lines) == 1
        assert sorted(path for path in room.iterdir() if path.name != "cache") == before
        return lines[0].removeprefix("lit-peft: error: ")

    return run


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--methods", ""], "--methods is empty. Write all, or some of: lora,"),
        (["--methods", " , "], "--methods is empty."),
        (["--methods="], "--methods is empty."),
        (["--methods", "lroa"], "There is no method 'lroa'. Did you mean lora? Known: all, lora,"),
        (["--methods", "lora,bitfit+prefx"], "There is no method 'prefx'. Did you mean prefix?"),
        (["--methods", "lora,lora"], "--methods names lora twice."),
        (["--method", "lora"], "--method is for one run; compare takes --methods"),
        (["--budget", "lots"], "--budget is 'lots'; write a number of trained weights, such as 200k or 10m."),
        (["--budget", "0"], "--budget is '0';"),
        (["--seeds", "0"], "--seeds is 0"),
        (["--seeds", "many"], "seeds is 'many'; it must be int."),
        (["--lr", "lora=fast"], "--lr is 'lora=fast'; write a number"),
        (["--methods", "lora", "--lr", "full=1"], "--lr names 'full', which is not compared. Compared: lora."),
        (["--score", "beauty"], "score is 'beauty'; it must be one of choice_accuracy,"),
        (["--out", "."], ". holds something else than a comparison. Choose a new --out."),
        (["--out", "data.jsonl"], "data.jsonl holds something else than a comparison."),
    ],
)
def test_mistakes_are_seen_at_once(mistake: Mistake, arguments: list[str], expected: str) -> None:
    assert expected in mistake("compare", *JOB, *arguments)


def test_a_job_is_missing(mistake: Mistake) -> None:
    assert mistake("compare", "--methods", "lora").startswith("There is no job. Give one as for lit-peft fit")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model.lrr", "3"], "there is no option --model.lrr. Did you mean --model.lr?"),
        (["--data.path", "absent.jsonl"], "absent.jsonl"),
        (["--model.lora.rr", "3"], "lora has no setting 'rr'; it takes r, alpha,"),
        (["--lr", "bitfit=1e3"], "lr is 1000.0; it must be above 0 and at most 10."),
    ],
)
def test_mistakes_that_the_job_shows(mistake: Mistake, arguments: list[str], expected: str) -> None:
    assert expected in mistake("compare", *JOB, "--methods", "lora,bitfit", *arguments)


def test_a_budget_nobody_can_meet(mistake: Mistake) -> None:
    said = mistake("compare", *JOB, "--methods", "lora,bitfit", "--budget", "10")
    assert said.startswith("--budget is 10, and no method is that small here. The smallest is bitfit with 192 trained")


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--help"]) == 0
    shown = capsys.readouterr().out
    for option in ("--methods", "--budget", "--seeds", "--out", "--shots", "--lr", "--score"):
        assert option in shown


def test_the_verb_is_light() -> None:
    code = "import lit_peft.verbs.compare, sys; print(*{'torch', 'lightning', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr
