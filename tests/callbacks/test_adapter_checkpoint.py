import errno
import json
import os
import random
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader

from lit_peft.callbacks import AdapterCheckpoint, random_states
from lit_peft.callbacks.checkpoint_io import AtomicCheckpointIO, BroadcastCheckpointIO
from tests.callbacks.tiny_runs import Killed, Losses, make_loader, make_module, make_rows, make_trainer
from tests.models import save_tiny


class Noise(Callback):
    """Uses Python's and NumPy's generators in every batch, as random augmentation would."""

    def __init__(self) -> None:
        self.drawn: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
        self.drawn.append(random.random() + float(np.random.rand()) + float(torch.rand(())))


def run(
    base: Path,
    folder: Path,
    die_at: tuple[int, int] | None = None,
    resume: bool = False,
    loaders: Any = None,
    validate: bool = True,
    every: int | None = None,
    module: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[dict[tuple[int, int], float], dict[str, torch.Tensor], list[float]]:
    losses, noise = Losses(die_at), Noise()
    model = make_module(base, **(module or {}))
    trainer = make_trainer(folder, AdapterCheckpoint(folder, every_n_steps=every), losses, noise, **options)
    train, validation = loaders() if loaders else (make_loader(), make_loader(4, shuffle=False))
    try:
        trainer.fit(
            model, train, validation if validate else None, ckpt_path=str(folder / "last.ckpt") if resume else None
        )
    except Killed:
        assert die_at is not None
    return losses.seen, {k: v.clone() for k, v in model.state_dict().items() if "lora" in k}, noise.drawn


def plain_loaders() -> tuple[DataLoader[Any], DataLoader[Any]]:
    return DataLoader(make_rows(), batch_size=2, shuffle=True), DataLoader(make_rows(4), batch_size=2)  # type: ignore[arg-type]


CASES = {
    "after a step in mid-epoch": {"die_at": (1, 5), "every": 2},
    "in the first epoch": {"die_at": (0, 4), "every": 3},
    "after validation, at the start of the next epoch": {"die_at": (1, 3)},
    "without validation": {"die_at": (1, 3), "validate": False},
    "without validation, mid-epoch": {"die_at": (1, 3), "validate": False, "every": 4},
    "validation inside the epoch": {"die_at": (1, 5), "val_check_interval": 3},
    "accumulation": {"die_at": (1, 5), "every": 1, "accumulate_grad_batches": 2},
    "validation inside an accumulated batch": {"die_at": (1, 5), "val_check_interval": 3, "accumulate_grad_batches": 2},
    "a plain shuffling DataLoader at an epoch's start": {"die_at": (1, 2), "loaders": plain_loaders},
    "the last step of an epoch": {"die_at": (2, 0), "every": 6, "max_epochs": 3},
    "counted in steps, from an epoch's end": {"die_at": (1, 2), "validate": False, "max_epochs": -1, "max_steps": 15},
    "counted in steps, after validation": {"die_at": (1, 0), "max_epochs": -1, "max_steps": 15},
    "validation in every second epoch": {"die_at": (1, 2), "check_val_every_n_epoch": 2},
}


@pytest.mark.parametrize("case", CASES)
def test_resumed_equals_uninterrupted(case: str, base: Path, tmp_path: Path) -> None:
    settings = CASES[case]
    seed_everything(5)
    whole, weights, drawn = run(base, tmp_path / "a", **{**settings, "die_at": None})  # type: ignore[arg-type]
    seed_everything(5)
    first, _, _ = run(base, tmp_path / "b", **settings)  # type: ignore[arg-type]
    seed_everything(99)  # a fresh process has other random states
    second, resumed, redrawn = run(base, tmp_path / "b", resume=True, **{**settings, "die_at": None})  # type: ignore[arg-type]
    assert first
    assert set(first) | set(second) == set(whole)
    assert len(second) < len(whole)
    assert {key: whole[key] for key in second} == second
    assert all(torch.equal(weights[key], resumed[key]) for key in weights)
    assert drawn[-len(redrawn) :] == redrawn


def test_a_run_ended_by_max_steps_goes_on_in_mid_epoch(base: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"validate": False, "max_epochs": -1, "module": {"scheduler": "constant", "warmup": 0.0}}
    seed_everything(5)
    whole, weights, _ = run(base, tmp_path / "a", max_steps=10, **options)
    seed_everything(5)
    first, _, _ = run(base, tmp_path / "b", max_steps=4, **options)
    seed_everything(99)
    second, resumed, _ = run(base, tmp_path / "b", resume=True, max_steps=10, **options)
    assert len(first) == 4
    assert first | second == whole
    assert all(torch.equal(weights[key], resumed[key]) for key in weights)


def test_best_and_last(base: Path, tmp_path: Path) -> None:
    checkpoint = AdapterCheckpoint(tmp_path, mode="max")  # the first epoch's loss is the highest, so it stays the best
    trainer = make_trainer(tmp_path, checkpoint, max_epochs=3)
    module = make_module(base, lr=1e-2)
    trainer.fit(module, make_loader(), make_loader(4, shuffle=False))
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["best.ckpt", "last.ckpt"]
    best, last = (torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("best", "last"))
    assert (best["global_step"], last["global_step"]) == (6, 18)
    assert set(last["state_dict"]) == module.trained_keys()
    assert not list(tmp_path.glob(".*.partial"))
    assert checkpoint.best_model_path == str(tmp_path / "best.ckpt")


def test_without_validation_there_is_a_last_and_no_complaint(base: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*could not find the monitored key.*")
        make_trainer(tmp_path, AdapterCheckpoint(tmp_path), max_epochs=1).fit(make_module(base), make_loader())
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["last.ckpt"]


def test_checkpoint_says_what_it_stands_on(base: Path, tmp_path: Path) -> None:
    make_trainer(tmp_path, AdapterCheckpoint(tmp_path), max_epochs=1).fit(make_module(base), make_loader())
    meta = torch.load(tmp_path / "last.ckpt", weights_only=True)["lit_peft"]
    assert meta["base"]["name"] == str(base)
    assert meta["base"]["sha"].startswith("sha256:")
    assert len(meta["template_hash"]) == 64
    assert meta["world_size"] == 1
    assert set(meta["versions"]) == {"lit_peft", "torch", "lightning", "transformers"}


def test_another_base_is_refused(base: Path, tmp_path: Path) -> None:
    make_trainer(tmp_path, AdapterCheckpoint(tmp_path), max_epochs=1).fit(make_module(base), make_loader())
    other = save_tiny("llama", tmp_path / "other", seed=1)
    trainer = make_trainer(tmp_path, AdapterCheckpoint(tmp_path))
    with pytest.raises(ValueError, match=r"was made on .*tiny-llama.* Load that base"):
        trainer.fit(make_module(other), make_loader(), ckpt_path=str(tmp_path / "last.ckpt"))


def test_another_template_is_a_warning_and_other_processes_are_allowed(base: Path, tmp_path: Path) -> None:
    make_trainer(tmp_path, AdapterCheckpoint(tmp_path), max_epochs=1).fit(make_module(base), make_loader())
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)
    stored["lit_peft"].update(template_hash="0" * 64, world_size=4)
    AtomicCheckpointIO().save_checkpoint(stored, tmp_path / "last.ckpt")
    checkpoint = AdapterCheckpoint(tmp_path)
    with pytest.warns(UserWarning, match="chat template is not the one"):
        make_trainer(tmp_path, checkpoint).fit(make_module(base), make_loader(), ckpt_path=str(tmp_path / "last.ckpt"))
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 12


def test_every_n_steps_is_checked() -> None:
    with pytest.raises(ValueError, match="every_n_steps is 0"):
        AdapterCheckpoint(every_n_steps=0)


def test_random_states_come_back() -> None:
    states = random_states.capture()
    np.random.standard_normal()  # leaves a second normal number behind, a part of the state
    middle = random_states.capture()
    drawn = random.random(), np.random.standard_normal(), torch.rand(3).tolist()
    random_states.restore(middle)
    assert (random.random(), np.random.standard_normal(), torch.rand(3).tolist()) == drawn
    random_states.restore(states)
    assert (random.random(), torch.rand(3).tolist()) == (drawn[0], drawn[2])


def test_full_disk_leaves_the_old_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    io, path = BroadcastCheckpointIO(), tmp_path / "last.ckpt"
    io.save_checkpoint({"value": torch.ones(3)}, path)

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(
        OSError, match=r"Could not write .*last\.ckpt: No space left on device.*untouched.*Free some"
    ) as e:
        io.save_checkpoint({"value": torch.zeros(3)}, path)
    assert e.value.errno == errno.ENOSPC
    assert "\n" not in str(e.value)
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]
    assert io.load_checkpoint(path)["value"].tolist() == [1, 1, 1]


def test_full_disk_while_torch_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lit_peft.callbacks import checkpoint_io

    def full(self: Any, data: bytes) -> int:
        self.error = OSError(errno.ENOSPC, "No space left on device")
        raise self.error

    monkeypatch.setattr(checkpoint_io._Sink, "write", full)
    with pytest.raises(OSError, match="No space left on device"):
        AtomicCheckpointIO().save_checkpoint({"value": torch.ones(3)}, tmp_path / "last.ckpt")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("keep", [0, 0.1, 0.5, 0.99])
def test_half_written_checkpoint(keep: float, base: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, AdapterCheckpoint(tmp_path), max_epochs=1)
    trainer.fit(make_module(base), make_loader(), make_loader(4, shuffle=False))
    data = (tmp_path / "last.ckpt").read_bytes()
    (tmp_path / "last.ckpt").write_bytes(data[: int(len(data) * keep)])
    resumed = make_trainer(tmp_path, AdapterCheckpoint(tmp_path))
    with pytest.raises(
        ValueError, match=r"last\.ckpt is damaged or half-written\. Use the other checkpoint, .*best\.ckpt"
    ):
        resumed.fit(make_module(base), make_loader(), ckpt_path=str(tmp_path / "last.ckpt"))


def test_a_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    torch.save({"value": Path("/")}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="could run code, so it is not read"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "last.ckpt", weights_only=False)


def test_a_missing_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="There is no other checkpoint"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "last.ckpt")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_resume_without_a_shared_disk(strategy: str, tmp_path: Path) -> None:
    """Two processes, each in a folder of its own: only the first one's has the checkpoint."""
    save_tiny("llama", tmp_path / "base")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": str(rank), "LOCAL_RANK": "0"}
        command = [sys.executable, "-m", "tests.callbacks.private_disks", strategy, str(tmp_path), str(rank)]
        home = Path(__file__).parents[2]
        processes.append(
            subprocess.Popen(
                command, cwd=home, env={**os.environ, **env}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
        )
    outputs = [process.communicate(timeout=180)[0].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    first, second = (tmp_path / f"{rank}/run/last.ckpt" for rank in range(2))
    # what the first process had when the second run began was shipped; what it wrote since was not
    assert first.is_file()
    assert second.is_file()
    report = json.loads((tmp_path / "0/run-merged/merge_report.json").read_text())
    assert report["differences"]["float32"] < 1e-4
    assert not (tmp_path / "1/run-merged").exists()
