"""Two machines without a shared disk, through the command line: only the first has the checkpoint, and both go on."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from tests.distributed.killed_runs import Runs, compare, kill, wait

pytestmark = pytest.mark.slow
LAST = "run/checkpoints/last.ckpt"


class Machines:
    """Two folders with the same relative paths, and one torchrun agent in each."""

    def __init__(self, home: Path) -> None:
        self.homes = [Runs(home / name) for name in ("first", "second")]

    def start(self, *arguments: list[str], **environment: str) -> list[subprocess.Popen[str]]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
        launch += ["--master-addr", "127.0.0.1", "--master-port", port]
        return [
            home.start([*launch, "--node-rank", str(rank), "-m", "lit_peft"], own, **environment)
            for rank, (home, own) in enumerate(zip(self.homes, arguments, strict=True))
        ]

    def flags(self, strategy: str, run: str, *more: str) -> list[str]:
        two = (f"--trainer.strategy={strategy}", "--trainer.num_nodes=2", "--trainer.devices=1")
        return self.homes[0].flags("one", Path(run), *two, *more)

    def finish(self, *arguments: list[str]) -> None:
        processes = self.start(*arguments)
        outputs = [process.communicate(timeout=300)[0] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)

    def killed(self, arguments: list[str], hold: str) -> None:
        watch = Path(tempfile.mkdtemp(dir=self.homes[0].home))
        processes = self.start(arguments, arguments, WATCH=str(watch), WATCH_HOLD=hold)
        for rank, process in enumerate(processes):
            wait(watch / f"held-{rank}", process)
        kill(processes, watch)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_killed_and_resumed_without_a_shared_disk(strategy: str, tmp_path: Path) -> None:
    machines = Machines(tmp_path)
    first, second = (runs.home for runs in machines.homes)
    flags = machines.flags(strategy, "whole")
    machines.finish(flags, flags)
    machines.killed(machines.flags(strategy, "run"), "on_train_batch_start:9")
    assert (first / LAST).is_file()
    # the second machine knows the run, but not its weights
    assert [path.name for path in (second / "run").iterdir()] == ["config.yaml"]
    shutil.copytree(first / "run", first / "again")
    stood = torch.load(first / LAST, weights_only=True)["global_step"]

    machines.finish(["--ckpt_path", LAST], ["--ckpt_path", LAST])
    compare(first / "run", first / "whole")

    # a machine that is new to the run: it is told by a configuration file
    shutil.rmtree(second / "run")
    shutil.copy(first / "again/config.yaml", second / "copied.yaml")
    again = "again/checkpoints/last.ckpt"
    machines.finish(["--ckpt_path", again], ["--ckpt_path", again, "-c", "copied.yaml"])
    compare(first / "again", first / "whole")
    assert torch.load(second / again, weights_only=True)["global_step"] == stood


def test_a_machine_that_knows_nothing_says_what_to_give(tmp_path: Path) -> None:
    machines = Machines(tmp_path)
    processes = machines.start(["--ckpt_path", LAST], ["--ckpt_path", LAST])
    for process in processes:
        output = process.communicate(timeout=100)[0]
        assert process.returncode != 0
        lines = [line for line in output.splitlines() if line.startswith("lit-peft: error")]
        assert len(lines) == 1, output
        assert f"There is no checkpoint {LAST}" in lines[0]
        assert "Traceback (most recent call last)" not in output.partition("torch/distributed")[0]
    assert "-c config.yaml" in lines[0]


def test_machines_that_are_told_different_things(tmp_path: Path) -> None:
    machines = Machines(tmp_path)
    flags = [machines.flags("ddp", "run", f"--model.lora.r={r}") for r in (4, 8)]
    outputs = [process.communicate(timeout=100)[0] for process in machines.start(*flags)]
    assert "error: model.lora.r is 4 on the first process and 8 on process 1." in outputs[0], outputs
    assert not (machines.homes[0].home / LAST).exists()
