import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, AutoTokenizer

from lit_peft.adapter import Adapter, named_adapters
from lit_peft.merging import fit_biases, write_merged
from lit_peft.zoo import compose
from tests.models import save_tiny, tiny


def trained(method: str, kind: str, folder: Path, task: str = "sft", **options: Any) -> Any:
    base = save_tiny(kind, folder / "base", "classification" if task == "classification" else "lm")
    module = compose(method, task)(backbone=str(base), **options)
    module.configure_model()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, adapter in named_adapters(module.model):
            for _, parameter in adapter.own_parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
        for parameter in module.declared().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.01)
    module.model.eval()
    return module


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    extra = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **extra).logits


CASES = [
    ("lora", "llama", "sft", AutoModelForCausalLM),
    ("lora", "gpt2", "sft", AutoModelForCausalLM),
    ("lora", "qwen2", "sft", AutoModelForCausalLM),
    ("lora", "t5", "sft", AutoModelForSeq2SeqLM),
    ("lora", "bert", "classification", AutoModelForSequenceClassification),
    ("bitfit", "llama", "sft", AutoModelForCausalLM),
    ("bitfit", "gpt2", "sft", AutoModelForCausalLM),
    ("freeze", "llama", "sft", AutoModelForCausalLM),
    ("full", "llama", "sft", AutoModelForCausalLM),
    ("lora+bitfit", "llama", "sft", AutoModelForCausalLM),
]


@pytest.mark.parametrize(("method", "kind", "task", "auto"), CASES)
def test_merged_folder_answers_as_the_adapter(method: str, kind: str, task: str, auto: Any, tmp_path: Path) -> None:
    options = {"freeze": {"freeze": {"last_layers": 1}}, "lora": {}}.get(method, {})
    options |= {"labels": ["a", "b", "c"]} if task == "classification" else {}
    module = trained(method, kind, tmp_path, task, **options)
    ids = torch.randint(5, 128, (2, 9), generator=torch.Generator().manual_seed(0))
    before, keys = logits(module.model, ids), set(dict(module.model.named_parameters()))
    report = write_merged(module, tmp_path / "merged")
    assert torch.equal(logits(module.model, ids), before)  # the module was left alone
    assert set(dict(module.model.named_parameters())) == keys
    loaded = auto.from_pretrained(tmp_path / "merged").eval()
    assert (logits(loaded, ids) - before).abs().max() < 1e-4
    base = auto.from_pretrained(tmp_path / "base").eval()
    assert (logits(base, ids) - before).abs().max() > 1e-2
    assert json.loads((tmp_path / "merged/merge_report.json").read_text()) == report
    assert set(report["differences"]) == {"float32", "bfloat16"}
    assert report["differences"]["float32"] <= report["differences"]["bfloat16"] < 1
    assert report["reloaded"] == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == module.tokenizer.chat_template
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "merged"]


UNTIED: list[tuple[str, dict[str, Any], Any]] = [
    ("qwen2", {"target_modules": ["embed_tokens", "q_proj"]}, AutoModelForCausalLM),
    ("qwen2", {"target_modules": ["lm_head"]}, AutoModelForCausalLM),
    ("gemma", {"target_modules": ["embed_tokens"]}, AutoModelForCausalLM),
    ("gpt2", {"modules_to_save": ["lm_head"]}, AutoModelForCausalLM),
    ("gpt2", {"bias": "all", "enable_lora": [True, False, True]}, AutoModelForCausalLM),
    ("t5", {"target_modules": ["lm_head"]}, AutoModelForSeq2SeqLM),
    ("t5", {"target_modules": ["decoder.embed_tokens"]}, AutoModelForSeq2SeqLM),
]


@pytest.mark.parametrize(("kind", "settings", "auto"), UNTIED)
def test_merged_folder_says_what_is_tied(kind: str, settings: dict[str, Any], auto: Any, tmp_path: Path) -> None:
    module = trained("lora", kind, tmp_path, lora=settings)
    ids = torch.randint(5, 128, (2, 9), generator=torch.Generator().manual_seed(0))
    before = logits(module.model, ids)
    report = write_merged(module, tmp_path / "merged")
    assert torch.equal(logits(module.model, ids), before)
    loaded = auto.from_pretrained(tmp_path / "merged").eval()
    assert (logits(loaded, ids) - before).abs().max() < 1e-4
    apart = "bias" not in settings
    assert report["untied"] is apart
    # T5's configuration always says tied; its weights differ in the file, so that transformers does not tie them
    assert loaded.config.tie_word_embeddings is (not apart or kind == "t5")
    assert module.model.config.tie_word_embeddings is True


def test_bf16_base_is_merged_in_float32_and_rounded_once(tmp_path: Path) -> None:
    module = trained("lora", "llama", tmp_path, dtype="bfloat16")
    report = write_merged(module, tmp_path / "merged")
    assert report["dtype"] == "bfloat16"
    assert report["reloaded"] == 0  # buffers, such as rotary frequencies, stay in float32
    assert report["differences"]["float32"] < 1e-4
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == torch.bfloat16
    assert write_merged(module, tmp_path / "merged", dtype="float32")["dtype"] == "float32"  # replaces its own kind
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == torch.float32


def test_created_biases_on_some_layers_get_company(tmp_path: Path) -> None:
    module = trained("bitfit", "llama", tmp_path, bitfit={"target_modules": ["q_proj", "down_proj"]})
    report = write_merged(module, tmp_path / "merged")
    assert report["zero_biases_added"] == 2 * 5  # k, v, o; gate, up; in two layers
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").config
    assert config.attention_bias
    assert config.mlp_bias


def test_a_bias_without_a_place_is_refused() -> None:
    model = tiny("t5")
    layer = next(module for module in model.modules() if isinstance(module, torch.nn.Linear))
    layer.bias = torch.nn.Parameter(torch.ones(layer.out_features))
    with pytest.raises(TypeError, match=r"has no place for .*\.bias.* Export the adapter"):
        fit_biases(model)


def test_a_wrong_merge_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lit_peft.methods.lora import LoRALinear

    module = trained("lora", "llama", tmp_path)
    right = LoRALinear.delta
    monkeypatch.setattr(LoRALinear, "delta", lambda self, name: 1.1 * right(self, name))
    with pytest.raises(ValueError, match=r"differs from the adapted one by .* nothing was written"):
        write_merged(module, tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    module = trained("lora", "llama", tmp_path)
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged/notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"already holds 'notes\.txt'"):
        write_merged(module, tmp_path / "merged")
    assert (tmp_path / "merged/notes.txt").read_text() == "mine"


def test_an_adapter_that_cannot_merge_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lit_peft.methods.lora import LoRALinear

    module = trained("lora", "llama", tmp_path)
    monkeypatch.setattr(LoRALinear, "merge", Adapter.merge)
    with pytest.raises(TypeError, match="LoRALinear cannot be merged"):
        write_merged(module, tmp_path / "merged")
