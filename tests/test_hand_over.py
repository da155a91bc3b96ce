"""What a run leaves behind, through the command line: measured again, and loaded by other libraries, it is the same."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_peft import load
from lit_peft.__main__ import main
from lit_peft.callbacks import AdapterCheckpoint
from lit_peft.cli import runs
from lit_peft.cli.app import LitPEFTCLI
from tests.models import save_tiny

METHODS = ["lora", "bitfit", "freeze", "full", "lora+bitfit"]
QUESTIONS = ["qabc?", "q g hh?", "qdeadbeef?"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("hand_over")
    save_tiny("llama", home / "base")
    draw = random.Random(0)
    with (home / "rows.jsonl").open("w") as file:
        for _ in range(24):
            question = "".join(draw.choices("abcdefgh ", k=draw.randint(3, 12)))
            file.write(json.dumps({"prompt": f"q{question}?", "completion": "yes" if "a" in question else "no"}) + "\n")
    return home


def fit(home: Path, folder: Path, method: str, *more: str) -> int:
    settings = {
        "method": method,
        "model.backbone": home / "base",
        "model.lr": "3e-2",
        "data.path": home / "rows.jsonl",
        "data.val_fraction": 0.2,
        "data.batch_size": 3,
        "data.cache_dir": home / "cache",
        "trainer.max_epochs": 2,
        "trainer.limit_val_batches": 1,  # of two
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": "false",
        "run_dir": folder,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIT_PEFT_RUN_DIR", "")
        return main(["fit", *(f"--{key}={value}" for key, value in settings.items()), *more])


@pytest.fixture(scope="module", params=METHODS)
def run(request: pytest.FixtureRequest, home: Path) -> Path:
    folder = home / str(request.param)
    assert fit(home, folder, request.param) == 0
    return folder


def test_save_every(home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`--save_every` keeps the place between validations; a checkpoint callback of the user's own goes to the run."""
    saved: list[int] = []
    stock = AdapterCheckpoint._save_last_checkpoint

    def save(self: AdapterCheckpoint, trainer: Trainer, candidates: dict[str, Tensor]) -> None:
        saved.append(trainer.global_step)
        stock(self, trainer, candidates)

    monkeypatch.setattr(AdapterCheckpoint, "_save_last_checkpoint", save)
    steps = ("--trainer.max_steps=5", "--trainer.limit_val_batches=0")
    assert fit(home, home / "every", "lora", *steps, "--save_every=2") == 0
    assert saved == [2, 4, 5]
    stored = torch.load(home / "every/checkpoints/last.ckpt", weights_only=True)
    assert stored["lit_peft"]["config"]["save_every"] == 2
    own = "--trainer.callbacks+=lit_peft.callbacks.AdapterCheckpoint"
    assert fit(home, home / "own", "lora", *steps, own, "--trainer.callbacks.every_n_steps=3") == 0
    assert [path.name for path in (home / "own").rglob("*.ckpt")] == ["last.ckpt"]
    assert (home / "own/checkpoints/last.ckpt").is_file()
    capsys.readouterr()
    assert fit(home, home / "never", "lora", "--save_every=0") == 2
    assert "save_every is 0; it must be 1 or more" in capsys.readouterr().err


def test_a_run_folder_is_resumed_from_its_last_and_measured_by_its_best(home: Path) -> None:
    folder = home / "folder"
    assert fit(home, folder, "lora") == 0
    assert runs.find_checkpoint(str(folder), "lora", "sft", resume=True).name == "last.ckpt"
    assert runs.find_checkpoint(str(folder), "lora", "sft").name == "best.ckpt"


def test_validation_gives_the_last_logged_loss_again(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, Tensor] = {}
    monkeypatch.setattr(LitPEFTCLI, "after_validate", lambda cli: found.update(cli.trainer.callback_metrics))
    monkeypatch.setenv("LIT_PEFT_RUN_DIR", "")
    assert main(["validate", "--ckpt_path", str(run / "checkpoints/last.ckpt")]) == 0
    with (run / "logs/session_0/metrics.csv").open() as lines:
        logged = [row for row in csv.DictReader(lines) if row["val_loss"]]
    assert len(logged) == 2
    assert logged[0]["val_loss"] != logged[1]["val_loss"]
    for key in ("val_loss", "val_perplexity", "val_accuracy"):
        assert float(found[key]) == float(logged[-1][key])


@torch.no_grad()
def same(model: Any, tokenizer: Any, module: Any) -> None:
    """Another library's model gives the logits of ours, and the same answers."""
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        ours: Tensor = module.model(**inputs).logits
        assert ours.dtype == torch.float32
        torch.testing.assert_close(model(**inputs).logits, ours, atol=1e-4, rtol=1e-4)
        answer = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert tokenizer.decode(answer, skip_special_tokens=True) == module.reply(messages, max_new_tokens=8)


def test_merged_folder_in_plain_transformers(run: Path) -> None:
    assert main(["merge", str(run), "--out", str(run / "merged")]) == 0
    model = AutoModelForCausalLM.from_pretrained(run / "merged").eval()
    assert not hasattr(model, "peft_config")
    same(model, AutoTokenizer.from_pretrained(run / "merged"), load(run))


def test_exported_folder_in_peft(run: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["export", str(run), "--out", str(run / "adapter")])
    if run.name != "lora":
        assert code == 2
        assert "to hf" in capsys.readouterr().err
        assert not (run / "adapter").exists()
        return
    assert code == 0
    base = AutoModelForCausalLM.from_pretrained(home / "base")
    model = peft.PeftModel.from_pretrained(base, run / "adapter").eval()
    same(model, AutoTokenizer.from_pretrained(run / "adapter"), load(run))


def test_training_taught_something(home: Path, run: Path) -> None:
    """Otherwise the comparisons above would hold for the base as well."""
    base = AutoModelForCausalLM.from_pretrained(home / "base").eval()
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        assert (base(ids).logits - load(run).model(ids).logits).abs().max() > 0.05
