"""`lit-peft export`: what it writes loads elsewhere, and what cannot be written says why."""

from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_peft.verbs import export
from lit_peft.zoo import compose
from tests.models import save_tiny
from tests.test_restore import IDS, built, checkpoint, logits


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("bases") / "llama")


def test_peft_loads_it(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = built(compose("rslora", "sft"), base, lora={"r": 24})
    export.run(str(checkpoint(module, tmp_path / "a.ckpt")), str(tmp_path / "out"))
    shown = capsys.readouterr().out
    assert f"PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained('{base}'), '{tmp_path / 'out'}')" in shown
    assert "--max-lora-rank 24" in shown
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out").eval()
    with torch.no_grad():
        assert (theirs(IDS).logits - logits(module)).abs().max() < 1e-5
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == module.tokenizer.chat_template


def test_classifier_is_not_for_vllm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = built(compose("lora", "classification"), save_tiny("bert", tmp_path / "bert", "base"))
    module.save_adapter(tmp_path / "a")
    export.run(str(tmp_path / "a"), str(tmp_path / "out"))
    shown = capsys.readouterr().out
    assert "AutoModelForSequenceClassification" in shown
    assert "num_labels=3" in shown
    assert "vLLM" not in shown


@pytest.mark.parametrize("method", ["bitfit", "freeze", "full", "lora+bitfit"])
def test_what_peft_has_not(tmp_path: Path, base: Path, method: str) -> None:
    settings = {"freeze": {"last_layers": 1}} if method == "freeze" else {}
    built(compose(method, "sft"), base, **settings).save_adapter(tmp_path / "a")
    with pytest.raises(ValueError, match=f"HF PEFT has no {method.split('+')[-1]}.*--to hf"):
        export.run(str(tmp_path / "a"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_mistakes(tmp_path: Path, base: Path) -> None:
    with pytest.raises(ValueError, match="is a whole model"):
        export.run(str(base), str(tmp_path / "out"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    with pytest.raises(FileExistsError, match="is not empty"):
        export.run(str(base), str(tmp_path / "full"))
