"""`lit-peft merge` and `export --to hf`: plain transformers gives the same answers."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_peft.verbs import export, inspect, merge
from lit_peft.zoo import compose
from tests.models import save_tiny
from tests.test_restore import IDS, built, checkpoint, logits


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("bases") / "llama")


@pytest.mark.parametrize("method", ["lora", "lora+bitfit", "freeze"])
def test_transformers_loads_it(tmp_path: Path, base: Path, method: str, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"freeze": {"last_layers": 1}} if method == "freeze" else {}
    module = built(compose(method, "sft"), base, **settings)
    merge.run(str(checkpoint(module, tmp_path / "a.ckpt")), str(tmp_path / "out"))
    shown = capsys.readouterr().out
    assert shown.count("\n") == 1
    assert "logits differ by" in shown
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert (plain(IDS).logits - logits(module)).abs().max() < 1e-4
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    inspect.run(str(tmp_path / "out"))
    screen = capsys.readouterr().out
    assert "whole model" in screen
    assert "logits differ by" in screen


def test_export_to_hf_and_dtype(tmp_path: Path, base: Path) -> None:
    built(compose("lora", "sft"), base).save_adapter(tmp_path / "a")
    export.run(str(tmp_path / "a"), str(tmp_path / "hf"), to="hf")
    assert (tmp_path / "hf" / "model.safetensors").is_file()
    merge.run(str(tmp_path / "a"), str(tmp_path / "half"), dtype="bfloat16")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"


def test_mistakes(tmp_path: Path, base: Path) -> None:
    built(compose("lora", "sft"), base).save_adapter(tmp_path / "a")
    adapter, out = str(tmp_path / "a"), tmp_path / "out"
    with pytest.raises(ValueError, match="nothing to merge"):
        merge.run(str(base), str(out))
    with pytest.raises(ValueError, match="atol is 0"):
        merge.run(adapter, str(out), atol=0)
    with pytest.raises(ValueError, match="nothing was written"):
        merge.run(adapter, str(out), atol=1e-12)
    assert not out.exists()
    out.mkdir()
    (out / "mine.txt").touch()
    with pytest.raises(FileExistsError, match=r"mine\.txt"):
        merge.run(adapter, str(out))
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
