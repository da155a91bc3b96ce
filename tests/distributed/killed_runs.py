"""Runs of the command line over a tiny model that are killed and resumed, and how to compare them bit for bit."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.models import save_tiny

ROOT = Path(__file__).parents[2]
EPOCHS, EVERY, ROWS = 3, 4, 46
PLAIN = [sys.executable, "-m", "lit_peft"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29677"]
LAUNCHERS: dict[str, tuple[list[str], list[str], int]] = {  # command, its flags, optimizer steps in an epoch
    "one": (PLAIN, [], 11),
    "ddp": (PLAIN, ["--trainer.strategy", "ddp", "--trainer.devices", "2"], 6),
    "fsdp2": (PLAIN, ["--trainer.strategy", "fsdp2", "--trainer.devices", "2"], 6),
    "torchrun": ([*TORCHRUN, "-m", "lit_peft"], ["--trainer.strategy", "ddp", "--trainer.devices", "2"], 6),
}


class Runs:
    """A tiny model, its rows, and the runs over them; each launcher's uninterrupted run is made once."""

    def __init__(self, home: Path) -> None:
        self.home = home
        save_tiny("llama", home / "base")
        draw = random.Random(0)
        with (home / "rows.jsonl").open("w") as file:
            for _ in range(ROWS):
                question = "".join(draw.choices("abcdefgh ", k=draw.randint(3, 20)))
                answer = "".join(draw.choices("xyz", k=draw.randint(1, 12)))
                file.write(json.dumps({"prompt": f"q{question}?", "completion": answer}) + "\n")

    def flags(self, launcher: str, run: Path, *more: str) -> list[str]:
        settings = {
            "model.backbone": "base",  # relative, as are all paths: the same on two machines
            "model.lr": "1e-2",
            "model.lora.r": 4,
            "model.lora.dropout": 0.2,
            "data.path": "rows.jsonl",
            "data.val_fraction": 0.1,  # 41 rows are left to train on: fillers, and an odd last window
            "data.batch_size": 2,
            "trainer.accelerator": "cpu",
            "trainer.precision": "32-true",
            "trainer.log_every_n_steps": 1,
            "trainer.max_epochs": EPOCHS,
            "trainer.accumulate_grad_batches": 2,
            "trainer.val_check_interval": 5,  # in mid-epoch, and in the middle of an accumulated batch
            "trainer.enable_progress_bar": "false",
            "trainer.callbacks+": "tests.distributed.watched.Watched",
            "save_every": EVERY,
            "run_dir": run.name,
        }
        return [f"--{key}={value}" for key, value in settings.items()] + LAUNCHERS[launcher][1] + list(more)

    def start(self, command: list[str], arguments: list[str], **environment: str) -> subprocess.Popen[str]:
        inherited = {k: v for k, v in os.environ.items() if k != "LIT_PEFT_RUN_DIR"}
        known = {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "HF_HUB_OFFLINE": "1",
            "LIT_PEFT_CACHE": str(self.home / "cache"),
        }
        return subprocess.Popen(
            [*command, "fit", *arguments],
            cwd=self.home,
            env={**inherited, **known, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def finish(self, launcher: str, arguments: list[str]) -> str:
        process = self.start(LAUNCHERS[launcher][0], arguments)
        output = process.communicate(timeout=300)[0]
        assert process.returncode == 0, output
        return output

    def whole(self, launcher: str, name: str = "whole", *more: str) -> Path:
        run = self.home / f"{launcher}-{name}"
        if not run.exists():
            self.finish(launcher, self.flags(launcher, run, *more))
        return run

    def killed(self, launcher: str, arguments: list[str], *, hold: str = "", step: int = 0) -> int:
        """Start a run, kill all of its processes at a place or at some moment after a step, and return that step."""
        watch = Path(tempfile.mkdtemp(dir=self.home))
        pause = {} if hold else {"WATCH_PAUSE": "0.03"}
        process = self.start(LAUNCHERS[launcher][0], arguments, WATCH=str(watch), WATCH_HOLD=hold, **pause)
        wait(watch / ("held-0" if hold else f"step-{step}"), process)
        time.sleep(0.0 if hold else random.uniform(0, 0.06))
        kill([process], watch)
        return max(int(path.name.removeprefix("step-")) for path in watch.glob("step-*"))


def wait(sign: Path, process: subprocess.Popen[str]) -> None:
    """Wait until a run has come to a place."""
    end = time.monotonic() + 200
    while not sign.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.002)


def kill(launchers: list[subprocess.Popen[str]], watch: Path) -> None:
    """SIGKILL launchers and all that they started."""
    for process in launchers:
        os.killpg(process.pid, signal.SIGKILL)
    for path in watch.glob("pid-*"):  # torchrun gives each process a group of its own
        with suppress(ProcessLookupError):
            os.kill(int(path.name.removeprefix("pid-")), signal.SIGKILL)
    for process in launchers:
        output = process.communicate(timeout=60)[0]
        assert process.returncode == -signal.SIGKILL, output
        assert list(watch.glob("step-*")), output


def logged(run: Path) -> dict[tuple[str, int], Mapping[str, str]]:
    """Every logged row by its kind and step; a later session's rows take the place of an earlier one's."""
    found = {}
    for file in sorted((run / "logs").glob("session_*/metrics.csv")):
        with file.open() as lines:
            for row in csv.DictReader(lines):
                filled = {key: value for key, value in row.items() if value}
                found["val" if "val_loss" in filled else "train", int(filled["step"])] = filled
    return found


def same(found: Any, expected: Any, where: str = "") -> None:
    """Compare checkpoints, tensors bit for bit."""
    if isinstance(expected, Tensor):
        assert torch.equal(found, expected), where
    elif isinstance(expected, Mapping):
        assert found.keys() == expected.keys(), where
        for key in expected:
            same(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for i, (one, other) in enumerate(zip(found, expected, strict=True)):
            same(one, other, f"{where}[{i}]")
    else:
        assert found == expected, where


def compare(run: Path, whole: Path, kept: tuple[str, ...] = ("best", "last")) -> None:
    """The resumed run's losses, its best and its last checkpoint are those of the uninterrupted run."""
    last = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    rows, expected = logged(run), logged(whole)
    assert sum(kind == "train" for kind, _ in expected) == last["global_step"]
    # a kill between a step's checkpoint and its row in the log costs that row
    missing = expected.keys() - rows.keys()
    assert len(missing) <= 1, missing
    for key in rows:
        assert rows[key] == expected[key]
    for name in kept:
        one, other = (torch.load(folder / f"checkpoints/{name}.ckpt", weights_only=True) for folder in (run, whole))
        for part in ("epoch", "global_step", "state_dict", "optimizer_states", "lr_schedulers", "loops"):
            same(one[part], other[part], part)
        same(one["lit_peft"]["random"], other["lit_peft"]["random"])
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [f"{name}.ckpt" for name in kept]


def resume(runs: Runs, launcher: str, run: Path, number: int = 1) -> None:
    stood = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"]
    runs.finish(launcher, ["--ckpt_path", str(run / "checkpoints/last.ckpt")])
    session = run / f"logs/session_{number}/metrics.csv"
    with session.open() as lines:
        steps = [int(row["step"]) for row in csv.DictReader(lines) if row["train_loss"]]
    assert steps[0] == stood, "it did not go on where it was"
