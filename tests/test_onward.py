"""The commands that a finished run prints, and those in its README: each works for what was trained."""

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_peft.__main__ import main
from tests.models import save_tiny

FIT = shlex.split(
    "fit --model.backbone base --data.path data.jsonl --run_dir run --data.max_length 64 --data.batch_size 2 "
    "--trainer.accelerator cpu --trainer.precision 32-true --trainer.enable_progress_bar false --trainer.max_steps 1"
)


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lit-peft", *FIT])
    return save_tiny("llama", "base")


@pytest.mark.parametrize(
    ("arguments", "verbs"),
    [
        ("--method lora", ["chat", "merge", "export"]),
        ("--method full", ["chat", "merge", "export"]),
        ("--method prompt", ["chat", "export"]),
        ("--method prompt --model.prompt.template [P]{text}{prompt}", ["chat", "export"]),
        ("--method p_tuning --model.prompt.tune_base true", ["chat", "export"]),
        ("--method loreft", ["chat", "export"]),
        ("--method unipelt --task classification", ["inspect", "export"]),
    ],
)
def test_every_command_of_a_run_works(
    arguments: str, verbs: list[str], work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"label": "ab"} if "classification" in arguments else {"completion": "it is so"}
    key = "text" if "classification" in arguments else "prompt"
    rows = [{key: f"say the number {i} in many words", **row} for i in range(8)]
    for i, one in enumerate(rows):
        if "label" in one:
            one["label"] = "ab"[i % 2]
    Path("data.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    assert main([*FIT, *arguments.split()]) == 0
    printed = [line.strip() for line in capsys.readouterr().out.partition("next:")[2].splitlines() if line.strip()]
    assert [line.split()[1] for line in printed] == verbs
    card = re.findall(r"^(lit-peft .*?) +# (?!this run)", Path("run/README.md").read_text(), re.MULTILINE)
    assert [line.split()[1] for line in card] == ["fit", *verbs[:-1]]
    talk = ["--prompt", "hello", "--max_new_tokens", "2"]
    for line in [*printed, *card[:1]]:
        _, verb, *rest = shlex.split(line)
        more = talk if verb == "chat" else ["--run_dir", "again", "--trainer.max_steps", "2"] if verb == "fit" else []
        assert main([verb, *rest, *more]) == 0, (line, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "to", "said"),
    [
        ("--method prompt", "vllm", "reads LoRA only, and this is PROMPT_TUNING. For lit_peft: --to lit_peft."),
        ("--method prompt --model.prompt.after_bos true", "peft", "HF PEFT has no word for some settings of this"),
        ("--method loreft", "peft", "HF PEFT has no loreft, so it cannot load this. For lit_peft: --to lit_peft."),
        ("--method ia3", "sglang", "and this is IA3. Write the merged model: --to hf."),
    ],
)
def test_export_names_no_way_that_is_closed(
    arguments: str, to: str, said: str, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("data.jsonl").write_text('{"prompt": "say the number in many words", "completion": "it is so"}\n' * 8)
    assert main([*FIT, *arguments.split()]) == 0
    capsys.readouterr()
    assert main(["export", "run", "--out", "out", "--to", to]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert ("--to hf" in error) == ("ia3" in arguments)
    if "after_bos" not in arguments and "prompt" in arguments:
        assert main(["export", "run", "--out", "out"]) == 0
        assert "--to hf" not in capsys.readouterr().out


@pytest.mark.parametrize("fused", [{"a": "news/adapter", "b": "law/adapter"}, ["news/adapter", "law/adapter"], None])
def test_a_run_goes_on_without_the_folders_of_its_adapters(
    fused: Any, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("data.jsonl").write_text('{"prompt": "say the number in many words", "completion": "it is so"}\n' * 8)
    for name in ("news", "law"):
        assert main([*FIT, "--method", "houlsby", "--run_dir", f"run_{name}"]) == 0
        assert main(["export", f"run_{name}", "--out", f"{name}/adapter", "--to", "lit_peft"]) == 0
    first = ["--method", "fusion", "--model.fusion.adapters", json.dumps(fused)]
    if fused is None:
        houlsby = {"adapter": "news/adapter", "methods": ["lit_peft.methods.houlsby.Houlsby"], "train": False}
        first = ["--model.named", json.dumps({"a": houlsby}), "--model.active", '[{"average": ["a", "default"]}]']
        first = ["--method", "houlsby", *first]
    assert main([*FIT, *first]) == 0
    for name in ("news", "law"):
        shutil.rmtree(name)
    assert main(["chat", "run", "--prompt", "hello", "--max_new_tokens", "2"]) == 0
    assert main(["validate", "--ckpt_path", "run", "--run_dir", "out"]) == 0, capsys.readouterr().err
    assert main(["fit", "--ckpt_path", "run", "--run_dir", "run", "--trainer.max_steps", "2"]) == 0
    stored = torch.load("run/checkpoints/last.ckpt", weights_only=True)
    assert stored["global_step"] == 2
    assert (fused is None) == (stored["lit_peft"]["adapters"]["active"] != ["default"])
