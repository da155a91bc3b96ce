"""The benchmark of methods runs, and its numbers mean what they say. Times are never checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import adapter_drop, arms, cpu, methods
from benchmarks.arms import imported
from benchmarks.bytes_held import Saved, bytes_of, peak_of
from lit_peft.catalogue import FACTS, METHODS
from tests.models import save_tiny

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    save_tiny("llama", folder / "model")
    rows = [{"prompt": f"What is {i} and {i}?", "completion": str(2 * i)} for i in range(30)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(autouse=True)
def cache(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_PEFT_CACHE", str(place / "cache"))


def bench(place: Path, *more: str) -> dict[str, Any]:
    shape = ["--rows", "2", "--tokens", "16", "--steps", "3"]
    where = ["--backbone", str(place / "model"), "--data", str(place / "rows.jsonl"), "--out", str(place)]
    return methods.main([*shape, *where, *more])


def test_two_methods_are_measured(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = bench(place, "--methods", "lora,bitfit")
    assert json.loads((place / "methods.json").read_text()) == json.loads(json.dumps(report))
    lora, bitfit = report["rows_of_table"]
    assert "error" not in lora
    assert "error" not in bitfit
    assert (lora["method"], lora["beside"], bitfit["beside"]) == ("lora", "LoRA", arms.FLOOR)
    assert lora["trained"]["ours"] == lora["trained"]["theirs"] == 8192
    assert bitfit["trained"]["theirs"] == 0
    for row in (lora, bitfit):
        low, high = row["ratio"]["quartiles"]
        assert 0 < low <= row["ratio"]["median"] <= high
        assert row["ratio"]["pairs"] == 3
        for side in ("ours", "theirs"):
            size = row["bytes"][side]
            assert 0 < size["saved"] < size["peak"]
    # A and B with two moments of AdamW, and its count of steps for each of 2 x 14 matrices
    assert lora["bytes"]["ours"]["held"] == lora["bytes"]["theirs"]["held"] == 3 * 8192 * 4 + 28 * 4
    assert bitfit["bytes"]["theirs"]["held"] == 0
    page = (place / "methods.md").read_text()
    assert "| lora | LoRA | 8,192 |" in page
    assert f"torch {torch.__version__}" in page
    assert "--methods lora,bitfit" in page
    assert "lora" in capsys.readouterr().out


def test_memory_is_the_same_in_every_run(place: Path) -> None:
    found = []
    for _ in range(2):
        (row,) = bench(place, "--methods", "lora")["rows_of_table"]
        found.append(row["bytes"])
    assert found[0] == found[1]


def test_a_failing_arm_is_a_row(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(method: str, setting: Any) -> Any:
        raise RuntimeError("no such thing\nat all")

    monkeypatch.setattr(methods, "theirs", broken)
    (row,) = bench(place, "--methods", "lora")["rows_of_table"]
    assert row["error"] == "RuntimeError: no such thing"
    assert "RuntimeError: no such thing" in (place / "methods.md").read_text()
    with pytest.raises(SystemExit, match="'lorra'"):
        bench(place, "--methods", "lorra")


@pytest.mark.parametrize("method", sorted(arms.PEERS.keys() & METHODS.keys()))
def test_both_arms_train_and_are_alike(method: str, place: Path) -> None:
    setting = arms.Setting(str(place / "model"), "float32", CPU, total=6)
    torch.manual_seed(0)
    mine, (name, other) = arms.ours(method, setting), arms.theirs(method, setting)
    assert name == arms.PEERS[method][0]
    trained = [sum(p.numel() for p in arm.parameters) for arm in (mine, other)]
    if method == "prefix":
        # under grouped heads PEFT's network reads rows as wide as a key (16), ours as wide as the model (32)
        config = imported(FACTS[method].config)()
        trained[0] -= (32 - 16) * (config.num_virtual_tokens + config.encoder_hidden_size)
    assert trained[0] == trained[1]
    ids = torch.randint(8, 100, (2, 12))
    for arm in (mine, other):
        before = [parameter.detach().clone() for parameter in arm.parameters]
        for _ in range(3):
            arm.step(ids)
        moved = sum(not torch.equal(a, b) for a, b in zip(before, arm.parameters, strict=True))
        assert moved > 0.4 * len(before)


BESIDE_THE_FLOOR = ("houlsby", "pfeiffer", "parallel", "compacter", "mam", "unipelt", "loreft", "direft")


@pytest.mark.parametrize("method", BESIDE_THE_FLOOR)
def test_what_stands_beside_the_floor_trains(method: str, place: Path) -> None:
    setting = arms.Setting(str(place / "model"), "float32", CPU, total=6)
    torch.manual_seed(0)
    mine, (name, other) = arms.ours(method, setting), arms.theirs(method, setting)
    assert name == arms.FLOOR
    assert not other.parameters
    ids = torch.randint(8, 100, (2, 12))
    before = [parameter.detach().clone() for parameter in mine.parameters]
    for _ in range(3):
        mine.step(ids)
    moved = sum(not torch.equal(a, b) for a, b in zip(before, mine.parameters, strict=True))
    assert moved == len(before)


def test_peak_and_saved_bytes_of_known_steps() -> None:
    def step() -> None:
        first = torch.empty(1000, 1000)
        second = torch.empty(500, 1000)
        del first, second
        torch.empty(1200, 1000)

    assert peak_of(step, CPU) == 1500 * 1000 * 4
    kept = [torch.empty(1000, 1000)]

    def replace() -> None:
        kept[:] = [torch.empty(1000, 1000)]  # the old one goes when the new one is there

    assert peak_of(replace, CPU) == 1000 * 1000 * 4
    linear, x = nn.Linear(256, 512), torch.randn(64, 256)
    saved = Saved(linear.parameters())
    with saved.recorded():
        linear(x).relu().sum()
    assert saved.bytes == 64 * (256 + 512) * 4  # the input, and what relu returned
    assert bytes_of([x, x[:3], x.t()]) == 64 * 256 * 4


def test_cpu_cases_are_measured() -> None:
    """All arms train; the lean one keeps less than HF PEFT."""
    ids = torch.arange(24).view(2, 12)
    found = cpu.measured(lambda: cpu.single(32, 64, 4, 2), lambda: ids, rounds=2)
    assert set(found["seconds"]) == {arms.FLOOR, cpu.PEFT, cpu.PEFT_SAME, cpu.NOT_LEAN, cpu.OURS}
    assert found["bytes"][cpu.OURS]["saved"] < found["bytes"][cpu.PEFT]["saved"]
    report = {
        "about": methods.surroundings(CPU, "python -m benchmarks.cpu"),
        "rows": 2,
        "tokens": 12,
        "cases": {"one": found},
    }
    assert cpu.markdown(report).count("| lit_peft") == 2


def test_what_adapter_drop_saves(place: Path) -> None:
    shape = ["--rows", "2", "--tokens", "16", "--steps", "2", "--drop", "1,random"]
    where = ["--backbone", str(place / "model"), "--data", str(place / "rows.jsonl"), "--out", str(place)]
    report = adapter_drop.main([*shape, *where])
    assert json.loads((place / "adapter_drop.json").read_text()) == json.loads(json.dumps(report))
    rows = report["rows_of_table"]
    assert [(row["checkpointing"], row["left_out"]) for row in rows] == [
        (checkpointing, drop) for checkpointing in (False, True) for drop in ("1", "random")
    ]
    for one, mean in (rows[:2], rows[2:]):
        work = one["operations"]
        assert work["dropped"] < 0.8 * work["all"]
        assert mean["operations"]["dropped"] == round((work["all"] + work["dropped"]) / 2)  # of 0 and 1 layer
        assert one["peak"]["dropped"] < one["peak"]["all"]
        assert set(one["ratio"]) == {"forward", "backward", "inference"}
    assert rows[2]["operations"]["all"] > 1.3 * rows[0]["operations"]["all"]  # layers are computed again
    page = (place / "adapter_drop.md").read_text()
    assert "`houlsby` on" in page
    assert page.count("| yes | ") == page.count("| no | ") == 2
    for wrong, message in (("2", "leaves no adapter"), ("many", "give numbers")):
        with pytest.raises(SystemExit, match=message):
            adapter_drop.main([*shape, "--drop", wrong, *where])
