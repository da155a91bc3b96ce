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
from lit_peft.catalogue import FACTS, LARGEST, METHODS, SIZES
from lit_peft.comparing.job import chosen, number, rates
from lit_peft.comparing.results import Row, front, ranked
from lit_peft.comparing.sizes import size, trained
from lit_peft.data.instructions import Instructions
from lit_peft.module import init_parameters
from lit_peft.zoo import compose
from tests.models import save_tiny, tiny, tiny_tokenizer

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
    return stop(room, [*COMPARE, "--out", "cmp"], "lora", signal.SIGINT)


@pytest.fixture(scope="module")
def compared(interrupted: Any, room: Path) -> dict[str, Any]:
    """The table after the same comparison went on."""
    assert main(["compare", "--out", "cmp"]) == 0
    return table()


def stop(room: Path, command: list[str], after: str, number: int) -> tuple[int, str, str, bytes]:
    """Start a comparison and stop it with a signal when a method has finished."""
    start = [sys.executable, "-m", "lit_peft", *command]
    process = subprocess.Popen(start, cwd=room, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    home = room / command[command.index("--out") + 1]
    measures = home / "runs" / after / "seed-1" / "measures.json"
    try:
        for _ in range(2400):
            if process.poll() is not None or (measures.is_file() and "test" in measures.read_text()):
                break
            time.sleep(0.1)
        process.send_signal(number)
        shown, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert measures.is_file(), shown
    page = home / "README.md"
    return process.returncode, shown, page.read_text() if page.is_file() else "", measures.read_bytes()


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
def test_a_killed_comparison_goes_on_from_the_checkpoint(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = [*JOB, "--trainer.max_steps", "40", "--trainer.max_epochs", "-1", "--save_every", "1"]
    command = ["compare", *long, "--methods", "lora,bitfit", "--shots", "0", "--out", "killed"]
    stop(room, command, "lora", signal.SIGKILL)
    assert not (room / "killed/README.md").exists()
    begun = room / "killed/runs/bitfit/seed-1"
    for _ in range(300):  # the run itself sees that the comparison is gone, and ends
        before = [path.stat().st_mtime_ns for path in begun.rglob("*")]
        time.sleep(0.5)
        if before == [path.stat().st_mtime_ns for path in begun.rglob("*")]:
            break
    first = (room / "killed/runs/lora/seed-1/measures.json").read_bytes()
    unfinished = (begun / "checkpoints/last.ckpt").is_file() and not (begun / "measures.json").is_file()
    at = torch.load(begun / "checkpoints/last.ckpt", weights_only=True)["global_step"] if unfinished else 0
    assert main(["compare", "--out", "killed"]) == 0
    assert (room / "killed/runs/lora/seed-1/measures.json").read_bytes() == first
    measured = json.loads((begun / "measures.json").read_text())
    assert measured["steps"] == 40
    assert at == 0 or at < 40
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


# Parts ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_every_method_finds_its_size(method: str) -> None:
    """Within the budget where one more step would not be, or at its smallest or largest."""
    from lit_peft.comparing.sizes import _sizable

    model = tiny("llama").to("meta")
    cls: Any = compose(method, "sft")
    seen: dict[str, int] = {}

    def count(settings: Any) -> int:
        seen[json.dumps(settings)] = found = trained(cls, {"backbone": "base"}, settings, model)
        return found

    budget = 3000
    chosen_size = size(count, _sizable(cls, {}), budget)
    assert chosen_size["trained"] is not None, chosen_size["note"]
    fits = [number for number in seen.values() if number <= budget]
    assert chosen_size["trained"] == (max(fits) if fits else min(seen.values()))
    if chosen_size["trained"] > budget:
        assert "above the budget" in chosen_size["note"]
    elif chosen_size["settings"] and not chosen_size["note"]:
        assert len(seen) > len(fits)  # something larger was tried, and was too large


def test_sizes_name_fields_that_exist() -> None:
    known: dict[str, set[str]] = {}
    for method in METHODS:
        for key, parameter in init_parameters(compose(method, "sft")).items():
            known.setdefault(key, set()).update(getattr(parameter.default, "__dataclass_fields__", ()))
    keywords = {facts.keyword for facts in FACTS.values()}
    for keyword, choices in SIZES.items():
        if keyword in keywords:
            for fields, needed in choices.items():
                assert {*fields, *needed} <= known[keyword], keyword
    assert set(LARGEST) <= {name for fields in known.values() for name in fields}


def test_sizes_grow_in_proportion() -> None:
    knobs = {"prefix": {"encoder_hidden_size": 100}, "bottleneck": {"bottleneck_size": 10}}

    def count(settings: Any) -> int:
        return 7 * settings["prefix"]["encoder_hidden_size"] ** 2 + 50 * settings["bottleneck"]["bottleneck_size"]

    found = size(count, knobs, 4000)
    assert found["settings"] == {"prefix": {"encoder_hidden_size": 23}, "bottleneck": {"bottleneck_size": 2}}
    assert found["trained"] == 7 * 23**2 + 100 <= 4000 < 7 * 24**2 + 100
    assert size(count, knobs, 1)["note"] == "its smallest size, above the budget"


def test_few_shot_rows_are_earlier_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_PEFT_CACHE", str(tmp_path / "cache"))
    tokenizer = tiny_tokenizer()
    system = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nHelp.<|im_end|>\n{% endif %}"
    rows = [{"prompt": f"q{i}", "completion": ["yes", "no"][i % 2]} for i in range(20)]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    for template in (tokenizer.chat_template, system + str(tokenizer.chat_template), None):
        tokenizer.chat_template = template
        plain = Instructions(str(path), max_length=64, val_fraction=0.2).attach(tokenizer)
        shown = Instructions(str(path), max_length=64, val_fraction=0.2, shots=2).attach(tokenizer)  # type: ignore[arg-type]
        before, after = plain.rows("test").table[0], shown.rows("test").table[0]
        text, alone = tokenizer.decode(after["input_ids"]), tokenizer.decode(before["input_ids"])
        head = alone.partition("q")[0]
        assert text.endswith(alone.removeprefix(head))
        assert text.count("Help.") == alone.count("Help.")
        assert sum(word in text for word in ("yes", "no")) == 2  # one example of each answer
        assert text.count("q") == 3
        learned = [[t for t in row["labels"] if t != -100] for row in (before, after)]
        assert learned[0] == learned[1]
        assert len(after["labels"]) == len(after["input_ids"])
        assert [len(r["input_ids"]) for r in plain.rows("train").table] == [
            len(r["input_ids"]) for r in shown.rows("train").table
        ]


def test_another_order_of_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_PEFT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"q{i}", "completion": "a"}) for i in range(20)) + "\n")
    orders = []
    for seed in (None, 0, 1):
        data: Any = Instructions(str(path), max_length=64, batch_size=1, shuffle_seed=seed).attach(tiny_tokenizer())
        orders.append([tuple(batch["input_ids"][0].tolist()) for batch in data.train_dataloader()])
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2])


def rows_of(**scores: tuple[int, float | None]) -> list[Row]:
    return [
        Row(name, trained=count, scores={} if mean is None else {"choice_accuracy": [mean], "perplexity": [mean]})
        for name, (count, mean) in scores.items()
    ]


def test_front_and_ranks() -> None:
    rows = [*rows_of(a=(10, 0.5), b=(20, 0.4), c=(30, 0.9), d=(30, 0.8), e=(40, 0.9), f=(5, None)), Row("base", True)]
    assert [row.name for row in front(rows, "choice_accuracy")] == ["a", "c"]
    assert [row.name for row in front(rows, "perplexity")] == ["a", "b"]
    assert [row.name for row in ranked(rows, "choice_accuracy")] == ["base", "c", "e", "d", "a", "b", "f"]
    assert [row.name for row in ranked(rows, "perplexity")] == ["base", "b", "a", "d", "c", "e", "f"]
    several = Row("g", scores={"f1": [1.0, 2.0, 3.0]})
    assert (several.mean("f1"), several.spread("f1")) == (2.0, 1.0)


def test_numbers_and_names() -> None:
    assert [number(text) for text in ("200k", "10m", "1.5M", "20_000", "7")] == [200_000, 10**7, 1_500_000, 20_000, 7]
    assert number(None) is None
    assert chosen("all") == list(FACTS)
    assert rates("1e-3,full=2e-5", ["lora", "full"]) == {"lora": 1e-3, "full": 2e-5}
    assert rates(None, ["lora"]) == {}
