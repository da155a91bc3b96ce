"""What stops a run says so in one line, keeps the last good checkpoint, and prints the command that goes on."""

import errno
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lit_peft.__main__ import main
from lit_peft.data.instructions import Instructions
from lit_peft.tasks.task import Task
from lit_peft.zoo import compose
from tests.models import IM_END, save_tiny, tiny_tokenizer

FIT = shlex.split(
    "fit --model.backbone base --data.path data.jsonl --run_dir run --data.max_length 64 --data.batch_size 2 "
    "--trainer.accelerator cpu --trainer.precision 32-true --trainer.enable_progress_bar false --trainer.max_steps 6 "
    "--trainer.val_check_interval 2"
)
LAST = Path("run/checkpoints/last.ckpt")


@pytest.fixture(autouse=True)
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIT_PEFT_CACHE", str(tmp_path / "cache"))
    save_tiny("llama", "base")
    rows = [{"prompt": f"say {i}", "completion": f"it is {i}"} for i in range(24)]
    Path("data.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return tmp_path


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[Tensor], Tensor | None]], None]:
    """Let something happen, once, to the loss of one optimizer step."""

    def arrange(step: int, act: Callable[[Tensor], Tensor | None]) -> None:
        summed, happened = Task.summed, [False]

        def changed(self: Any, loss: Tensor, count: Tensor) -> Tensor:
            if self.trainer.global_step == step and not happened[0]:
                happened[0] = True
                other = act(loss)
                loss = loss if other is None else other
            return summed(self, loss, count)

        monkeypatch.setattr(Task, "summed", changed)

    return arrange


def said(capfd: pytest.CaptureFixture[str]) -> str:
    """The one line of ours on stderr."""
    shown = capfd.readouterr().err
    assert "Traceback" not in shown
    lines = [line for line in shown.splitlines() if line.startswith("lit-peft: ")]
    assert len(lines) == 1, shown
    return lines[0]


def go_on(line: str, *more: str) -> None:
    """Run the command that a line prints."""
    command = shlex.split(line.split("Resume: ")[1])
    assert command[0] == "lit-peft"
    assert main([*command[1:], *more]) == 0


def step_of(path: Path) -> int:
    return int(torch.load(path, weights_only=True)["global_step"])


def assert_equal_runs(one: Path, other: Path) -> None:
    a, b = (torch.load(path / "checkpoints/last.ckpt", weights_only=True) for path in (one, other))
    assert a["global_step"] == b["global_step"] == 6
    assert a["state_dict"].keys() == b["state_dict"].keys()
    assert all(torch.equal(a["state_dict"][key], b["state_dict"][key]) for key in a["state_dict"])


def send(number: int) -> Callable[[Tensor], None]:
    return lambda loss: os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [2, 3])  # the step after it is followed by nothing, and by a validation
def test_signals(number: signal.Signals, step: int, at_step: Any, capfd: pytest.CaptureFixture[str]) -> None:
    at_step(step, send(number))
    before = signal.getsignal(number)
    assert main(FIT) == 128 + number
    assert signal.getsignal(number) is before
    line = said(capfd)
    assert f"stopped at step {step + 1}, saved run/checkpoints/last.ckpt. Resume: lit-peft fit --ckpt_path" in line
    assert step_of(LAST) == step + 1
    go_on(line)
    assert main([*FIT, "--run_dir", "whole"]) == 0
    assert_equal_runs(Path("run"), Path("whole"))


def test_a_signal_in_the_last_step(at_step: Any, capfd: pytest.CaptureFixture[str]) -> None:
    rest = ["--trainer.max_steps", "-1", "--trainer.max_epochs", "1", "--trainer.val_check_interval", "1.0"]
    at_step(11, send(signal.SIGTERM))
    assert main([*FIT, *rest]) == 143
    line = said(capfd)
    assert "stopped after the last step, 12. Resume: " in line
    assert step_of(LAST) == 12
    go_on(line)


def test_a_second_signal_stops_at_once(at_step: Any, capfd: pytest.CaptureFixture[str]) -> None:
    at_step(3, lambda loss: [send(signal.SIGINT)(loss) for _ in range(2)] and None)
    assert main(FIT) == 130
    line = said(capfd)
    assert line.startswith("lit-peft: stopped at once. Resume: lit-peft fit --ckpt_path run/checkpoints/last.ckpt")
    assert step_of(LAST) == 2  # the validation before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_training(
    number: signal.Signals, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Instructions, "prepare_data", lambda self: os.kill(os.getpid(), number))
    assert main(FIT) == 128 + number
    assert said(capfd) == "lit-peft: stopped before training began; nothing was written."
    assert not Path("run").exists()


def test_a_signal_before_anything(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lit_peft.cli.app.read", interrupted)
    assert main(FIT) == 130
    assert said(capfd) == "lit-peft: interrupted; nothing was written."


def test_the_process_really_ends_so(room: Path) -> None:
    program = "import sys, torch; torch.set_num_threads(1); from lit_peft.__main__ import main; sys.exit(main())"
    forever = ["--trainer.max_steps", "-1", "--trainer.max_epochs", "-1", "--trainer.val_check_interval", "12"]
    repository = str(Path(__file__).parents[1])
    process = subprocess.Popen(
        [sys.executable, "-c", program, *FIT, *forever],
        env={**os.environ, "PYTHONPATH": repository, "HF_HUB_OFFLINE": "1"},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    try:
        started = time.monotonic()
        while not LAST.is_file() and process.poll() is None and time.monotonic() - started < 120:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, shown = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 143, shown
    assert "Traceback" not in shown
    line = shown.splitlines()[-1]
    assert "Resume: lit-peft fit --ckpt_path run/checkpoints/last.ckpt" in line
    assert f"stopped at step {step_of(LAST)}, saved" in line


def test_a_loss_that_is_not_finite(at_step: Any, capfd: pytest.CaptureFixture[str]) -> None:
    at_step(3, lambda loss: loss * float("nan"))
    assert main(FIT) == 1
    line = said(capfd)
    assert line.startswith("lit-peft: error: The loss is nan at step 3; nothing was updated. Lower lr, raise warmup,")
    stored = torch.load(LAST, weights_only=True)
    assert stored["global_step"] == 2
    assert all(tensor.isfinite().all() for tensor in stored["state_dict"].values())
    go_on(line)
    assert step_of(LAST) == 6


def test_a_full_disk(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    sync, calls = os.fsync, []

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) > 4:  # two files, each with its folder, are the first validation's
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert main(FIT) == 1
    line = said(capfd)
    assert "lit-peft: error: Could not write " in line
    assert "No space left on device" in line
    assert "that was there is untouched. Free some space, or choose another folder" in line
    assert step_of(LAST) == 2
    assert sorted(path.name for path in LAST.parent.iterdir()) == ["best.ckpt", "last.ckpt"]
    go_on(line)
    assert step_of(LAST) == 6


def test_padding_that_is_the_end_of_turn(room: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained("base")
    rows = [{"prompt": "a" * (1 + i % 5), "completion": "ok"} for i in range(24)]
    Path("data.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    module = compose("lora", "sft")("base", lr=2e-2, warmup=0.0)
    data = Instructions("data.jsonl", batch_size=6, max_length=64, val_fraction=0)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    Trainer(max_steps=40, max_epochs=-1, enable_model_summary=False, **quiet).fit(module, datamodule=data)
    batch = next(iter(data.train_dataloader()))
    padded = batch["attention_mask"] == 0
    assert padded.any()
    assert (batch["input_ids"][padded] == IM_END).all()
    ends = [row[row != -100][-1].item() for row in batch["labels"]]
    assert ends == [IM_END] * 6  # learned, though padding, the same token, is not
    assert (batch["labels"][padded] == -100).all()
    assert module.eval().reply([{"role": "user", "content": "aaa"}], max_new_tokens=16) == "ok"  # and then it stops


def test_padding_masked_by_its_id(room: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained("base")
    ids = torch.tensor([[5, 6, 7, IM_END, IM_END], [5, 6, 7, 8, IM_END]])
    seen = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}

    def fit(labels: Tensor) -> None:
        columns = zip(ids, labels, seen, strict=True)
        rows = [dict(zip(("input_ids", "labels", "attention_mask"), row, strict=True)) for row in columns]
        trainer = Trainer(max_steps=1, enable_model_summary=False, accelerator="cpu", **quiet)
        trainer.fit(compose("lora", "sft")("base"), DataLoader(rows, batch_size=2))

    with pytest.raises(ValueError, match=r"is masked after every answer, so the model would never stop"):
        fit(ids.masked_fill(ids == IM_END, -100))
    fit(ids.masked_fill(seen == 0, -100))
