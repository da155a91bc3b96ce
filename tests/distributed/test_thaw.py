"""Weights that begin to train in mid-run: two DDP processes agree with one, resume exactly, and FSDP2 refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed.killed_runs import LAUNCHERS, Runs, compare, logged, resume

pytestmark = pytest.mark.slow
FREEZE = (
    "--trainer.callbacks+=lit_peft.callbacks.AdapterFreeze",
    "--trainer.callbacks.thaw_epoch=1",
    r"--trainer.callbacks.thaw_modules=layers\.1\.(mlp\.|input_layernorm)",
    "--trainer.callbacks.thaw_lr=1e-3",
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("thawed"))


def test_two_processes_agree_with_one(runs: Runs) -> None:
    """DDP knows only what trained when it was set up; the thawed weights' gradients are averaged all the same."""
    sure = (*FREEZE, "--model.lora.dropout=0")
    one = runs.whole("one", "sure", *sure, "--data.batch_size=4")
    two = runs.whole("ddp", "sure", *sure)
    expected, found = logged(one), logged(two)
    assert found.keys() == expected.keys()
    for kind, step in expected:
        key = f"{kind}_loss"
        value = float(expected[kind, step][key])
        assert float(found[kind, step][key]) == pytest.approx(value, rel=1e-5)
    weights, others = (torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for run in (one, two))
    assert weights.keys() == others.keys()
    assert sum(key.endswith((".base.weight", "input_layernorm.weight")) for key in weights) == 4
    for key, tensor in weights.items():
        torch.testing.assert_close(others[key], tensor, atol=1e-4, rtol=0)


@pytest.mark.parametrize("place", ["on_train_epoch_start:6", "on_train_batch_start:9"])
def test_killed_after_the_thaw(place: str, runs: Runs) -> None:
    whole, run = runs.whole("ddp", "thawed", *FREEZE), runs.home / f"ddp-{place.partition(':')[0]}"
    runs.killed("ddp", runs.flags("ddp", run, *FREEZE), hold=place)
    resume(runs, "ddp", run)
    compare(run, whole)


def test_fsdp2_refuses_in_one_line(runs: Runs) -> None:
    run = Path("refused")
    process = runs.start(LAUNCHERS["fsdp2"][0], runs.flags("fsdp2", run, *FREEZE))
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 2, output
    assert "Traceback" not in output
    assert output.count("Thawing is not possible under FSDP2") == 1
    assert not (runs.home / run).exists()
