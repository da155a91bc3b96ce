"""`lit-peft export`: what it writes loads elsewhere, and what cannot be written says why."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_peft import adapters, load
from lit_peft.targets import KEYS
from lit_peft.verbs import export
from lit_peft.verbs.readers import READERS, Exported
from lit_peft.zoo import compose
from tests.models import save_tiny
from tests.test_restore import IDS, built, checkpoint, logits
from tests.tiny_adapted import shake


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("bases") / "llama")


def test_peft_loads_it(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = built(compose("rslora", "sft"), base, lora={"r": 24})
    export.run(str(checkpoint(module, tmp_path / "a.ckpt")), str(tmp_path / "out"))
    shown = capsys.readouterr().out
    assert f"PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained('{base}'), '{tmp_path / 'out'}')" in shown
    assert "--max-lora-rank 32" in shown  # the next that vLLM takes
    assert "SGLang: it scales by alpha / r" in shown
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
    assert "vLLM, for architectures that it adapts: it adapts causal language models, and this is for SEQ_CLS" in shown


@pytest.mark.parametrize("method", ["bitfit", "freeze", "full", "lora+bitfit"])
def test_what_peft_has_not(tmp_path: Path, base: Path, method: str) -> None:
    settings = {"freeze": {"last_layers": 1}} if method == "freeze" else {}
    built(compose(method, "sft"), base, **settings).save_adapter(tmp_path / "a")
    with pytest.raises(ValueError, match=f"HF PEFT has no {method.split('+')[-1]}.*--to hf"):
        export.run(str(tmp_path / "a"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_what_peft_has_not_is_written_for_lit_peft(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = built(compose("pfeiffer", "sft"), base, bottleneck={"bottleneck_size": 4})
    module.save_adapter(tmp_path / "a")
    export.run(str(tmp_path / "a"), str(tmp_path / "out"), to="lit_peft")
    shown = capsys.readouterr().out
    assert "lit_peft: load(" in shown
    assert "PEFT:" not in shown
    again = load(tmp_path / "out", device="cpu")
    mine = dict(module.named_parameters())
    assert all(torch.equal(p, mine[n]) for n, p in again.named_parameters() if p.requires_grad)


def test_ia3_and_a_named_adapter(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = built(compose("ia3+lora", "sft"), base)
    with pytest.raises(ValueError, match=r"this is LORA \+ IA3"):
        export.run(str(checkpoint(module, tmp_path / "a.ckpt")), str(tmp_path / "out"))
    module.add_adapter("scaled", ia3={})
    module.add_adapter("small", lora={"r": 2})
    shake(module)
    saved = str(checkpoint(module, tmp_path / "b.ckpt"))
    export.run(saved, str(tmp_path / "small"), to="vllm", name="small")
    shown = capsys.readouterr().out
    assert f"vLLM, for architectures that it adapts: --enable-lora --lora-modules NAME={tmp_path / 'small'}" in shown
    assert "llama.cpp: convert_lora_to_gguf.py" in shown
    assert "Not in" not in shown
    export.run(saved, str(tmp_path / "scaled"), name="scaled")
    assert "SGLang: it reads LoRA only, and this is IA3" in capsys.readouterr().out
    for name in ("small", "scaled"):
        theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / name).eval()
        with torch.no_grad(), adapters(module, name):
            assert (theirs(IDS).logits - logits(module)).abs().max() < 1e-4
    with pytest.raises(ValueError, match=r"SGLang cannot load this: it reads LoRA only, .* --to hf"):
        export.run(saved, str(tmp_path / "no"), to="sglang", name="scaled")
    with pytest.raises(ValueError, match="No adapter is named 'nobody'"):
        export.run(saved, str(tmp_path / "no"), name="nobody")
    assert not (tmp_path / "no").exists()
    assert not [entry for entry in tmp_path.iterdir() if entry.name.startswith(".")]


PLAIN = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "bias": "none", KEYS: ["a.lora_A.weight"]}
OBSTACLES: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "plain": ({}, {}),
    "head": ({"modules_to_save": ["lm_head"]}, dict.fromkeys(("vllm", "sglang", "llama.cpp"), "modules_to_save")),
    "dora": ({"use_dora": True}, dict.fromkeys(("vllm", "sglang", "llama.cpp"), "no DoRA")),
    "bias": ({"bias": "all"}, dict.fromkeys(("vllm", "sglang", "llama.cpp"), "biases")),
    "pattern": ({"rank_pattern": {"q": 2}}, dict.fromkeys(("vllm", "sglang", "llama.cpp"), "one scale")),
    "table": ({KEYS: ["e.lora_embedding_A"]}, dict.fromkeys(("vllm", "sglang", "llama.cpp"), "embedding")),
    "rslora": ({"use_rslora": True}, dict.fromkeys(("sglang", "llama.cpp"), "alpha / sqrt")),
    "rank": ({"r": 600}, {"vllm": "largest rank is 512, and this has 600"}),
    "adalora": ({"peft_type": "ADALORA"}, dict.fromkeys(("vllm", "sglang", "llama.cpp"), "this is ADALORA")),
    "t5": ({"task_type": "SEQ_2_SEQ_LM"}, dict.fromkeys(("vllm", "sglang", "llama.cpp"), "causal")),
    "no task": ({"task_type": None}, dict.fromkeys(("peft", "vllm", "sglang", "llama.cpp"), "")),
}


@pytest.mark.parametrize(("changes", "expected"), OBSTACLES.values(), ids=OBSTACLES)
def test_who_cannot_read_what(changes: dict[str, Any], expected: dict[str, str]) -> None:
    adapter = Exported({**PLAIN, **changes}, "folder", "base")
    found = {name: reason for name, reader in READERS.items() if (reason := reader.obstacle(adapter))}
    assert found.keys() == expected.keys()
    assert all(expected[name] in reason for name, reason in found.items())


def test_mistakes(tmp_path: Path, base: Path) -> None:
    with pytest.raises(ValueError, match="is a whole model"):
        export.run(str(base), str(tmp_path / "out"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    with pytest.raises(FileExistsError, match="is not empty"):
        export.run(str(base), str(tmp_path / "full"))
