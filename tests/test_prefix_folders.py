"""Prefix tuning's folders, both ways with HF PEFT; the network that PEFT drops lies beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from lit_peft import load
from lit_peft.methods.prefix_layers import NETWORK, PrefixBackbone
from lit_peft.named import adapters
from lit_peft.verbs import export, inspect
from lit_peft.virtual_tokens import ENCODER
from lit_peft.zoo import compose
from tests.models import PAD, VOCAB, _auto, save_tiny
from tests.test_methods import batch, outputs, shake

METHODS = ("prefix", "p_tuning_v2")
KINDS = ("llama", "qwen2", "gemma", "gpt2", "gpt_neox")
SHORT = {"num_virtual_tokens": 3, "encoder_hidden_size": 8}


def ours(folder: Path, method: str = "prefix", task: str = "sft", **settings: Any) -> Any:
    torch.manual_seed(3)
    extra = {"labels": ["a", "b", "c"]} if task == "classification" else {}
    module: Any = compose(method, task)(str(folder), **extra, **settings)
    module.configure_model()
    return module.eval()


def theirs(kind: str, folder: Path, task: str = "lm", adapter: Path | None = None, **settings: Any) -> Any:
    base = _auto(kind, task).from_pretrained(folder)  # type: ignore[arg-type]
    if adapter is not None:
        return peft.PeftModel.from_pretrained(base, adapter, **settings)
    kinds = {"lm": "CAUSAL_LM", "classification": "SEQ_CLS"}
    torch.manual_seed(5)
    return peft.get_peft_model(base, peft.PrefixTuningConfig(task_type=kinds[task], **settings))  # type: ignore[arg-type]


def text() -> Tensor:
    return torch.randint(8, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-6 * max(1.0, float(b.abs().max())))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_peft_reads_ours(method: str, kind: str, tmp_path: Path) -> None:
    folder = save_tiny(kind, tmp_path / kind)
    module = ours(folder, method, prefix=SHORT)
    shake(module)
    module.save_adapter(tmp_path / "adapter")
    assert (tmp_path / "adapter" / ENCODER).is_file() == (method == "prefix")
    other = theirs(kind, folder, adapter=tmp_path / "adapter")
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    one, two = (model(input_ids=text(), attention_mask=mask).logits for model in (module.model, other))
    assert close(one[0], two[0])
    assert close(one[1, :6], two[1, :6])


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_ours_reads_pefts(kind: str, projection: bool, tmp_path: Path) -> None:
    folder = save_tiny(kind, tmp_path / kind)
    other = theirs(kind, folder, num_virtual_tokens=4, prefix_projection=projection, encoder_hidden_size=8)
    other.save_pretrained(tmp_path / "adapter")
    expected = other(input_ids=text()).logits
    module = ours(folder, "prefix", adapter=str(tmp_path / "adapter"))
    assert module.prefix.num_virtual_tokens == 4
    assert not module.prefix.prefix_projection, "PEFT keeps rows only"
    assert close(module.model(input_ids=text()).logits, expected)
    if kind == "llama":
        assert close(load(tmp_path / "adapter", backbone=str(folder)).model(input_ids=text()).logits, expected)
        again = ours(folder, "p_tuning_v2", adapter=str(tmp_path / "adapter"))
        assert close(again.model(input_ids=text()).logits, expected)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "roberta"])
@torch.no_grad()
def test_a_classifier_goes_both_ways(kind: str, tmp_path: Path) -> None:
    folder = save_tiny(kind, tmp_path / kind, task="classification")
    module = ours(folder, "prefix", "classification", prefix=SHORT)
    shake(module)
    module.save_adapter(tmp_path / "ours")
    rows = {key: value for key, value in batch("classification").items() if key != "labels"}
    expected = module.model(**rows).logits
    other = theirs(kind, folder, "classification", adapter=tmp_path / "ours").eval()
    assert close(other(**rows).logits, expected)
    other.save_pretrained(tmp_path / "theirs")
    again = load(tmp_path / "theirs", backbone=str(folder))
    assert close(again.model(**rows).logits, expected)


@pytest.mark.parametrize(("kind", "projection"), [("llama", False), ("gpt2", False), ("gpt2", True)])
def test_gradients_are_pefts(kind: str, projection: bool, tmp_path: Path) -> None:
    """Under GQA PEFT's network is as wide as a key and ours as the model, so there only rows can be compared."""
    folder = save_tiny(kind, tmp_path / kind)
    other = theirs(kind, folder, num_virtual_tokens=4, prefix_projection=projection, encoder_hidden_size=8)
    module = ours(folder, "prefix", prefix={**SHORT, "num_virtual_tokens": 4, "prefix_projection": projection})
    (backbone,) = (m for m in module.modules() if isinstance(m, PrefixBackbone))
    encoder = other.prompt_encoder.default
    pairs: dict[str, Tensor] = {"table": encoder.embedding.weight}
    if projection:
        first, _, last = encoder.transform
        weights = (encoder.embedding.weight, first.weight, first.bias, last.weight, last.bias)
        pairs = dict(zip(NETWORK, weights, strict=True))
    for part, parameter in pairs.items():
        with torch.no_grad():
            getattr(backbone, f"prefix_{part}")["default"].copy_(parameter)
    losses = [model(input_ids=text(), labels=text()).loss for model in (module.model, other)]
    assert torch.allclose(*losses, atol=1e-6)
    for loss in losses:
        loss.backward()
    for part, parameter in pairs.items():
        found = getattr(backbone, f"prefix_{part}")["default"].grad
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 1e-4
        assert (found - parameter.grad).abs().max() <= 1e-5 * parameter.grad.abs().max(), part


@torch.no_grad()
def test_generation_is_pefts(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "llama")
    module = ours(folder, "p_tuning_v2", prefix={"num_virtual_tokens": 4})
    module.save_adapter(tmp_path / "adapter")
    settings: dict[str, Any] = {"attention_mask": torch.ones(2, 9, dtype=torch.long), "max_new_tokens": 6}
    settings |= {"do_sample": False, "pad_token_id": PAD}
    other = theirs("llama", folder, adapter=tmp_path / "adapter")
    one, two = (model.generate(input_ids=text(), **settings) for model in (module.model, other))
    assert torch.equal(one, two)


def test_training_goes_on_from_a_folder(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "llama")
    module = ours(folder, "prefix", prefix={**SHORT, "dropout": 0.25})
    shake(module)
    module.save_adapter(tmp_path / "adapter")
    again = load(tmp_path / "adapter", backbone=str(folder))
    assert (again.method, again.prefix) == ("prefix", module.prefix)
    state = module.state_dict()
    assert sum("prefix_" in key for key in state) == 5
    for key, tensor in again.state_dict().items():
        assert torch.equal(tensor, state[key]), key
    flat = ours(folder, "p_tuning_v2", prefix={"num_virtual_tokens": 4})
    flat.save_adapter(tmp_path / "flat")
    assert load(tmp_path / "flat", backbone=str(folder)).method == "p_tuning_v2"


def test_without_the_network_a_network_cannot_be_filled(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "llama")
    theirs("llama", folder, num_virtual_tokens=3).save_pretrained(tmp_path / "adapter")
    module = ours(folder, "prefix", prefix=SHORT)
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    with pytest.raises(ValueError, match="prefix_projection: false"):
        module.load_adapter(tmp_path / "adapter")
    assert all(torch.equal(tensor, before[key]) for key, tensor in module.state_dict().items())


@torch.no_grad()
def test_a_folder_with_network_fills_plain_rows(tmp_path: Path) -> None:
    folder = save_tiny("gpt2", tmp_path / "gpt2")
    module = ours(folder, "prefix", prefix=SHORT)
    module.save_adapter(tmp_path / "adapter")
    flat = ours(folder, "p_tuning_v2", prefix={"num_virtual_tokens": 3})
    flat.load_adapter(tmp_path / "adapter")
    assert close(flat.model(input_ids=text()).logits, module.model(input_ids=text()).logits)


@pytest.mark.parametrize("name", ["default", "b"])
@torch.no_grad()
def test_folding_in_memory(name: str, tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "llama")
    module = ours(folder, "prefix", prefix=SHORT)
    module.add_adapter("b")
    shake(module)
    module.save_adapter(tmp_path / "adapter", name)
    assert (tmp_path / "adapter" / ENCODER).is_file()
    with adapters(module, name):
        expected = module.model(input_ids=text()).logits
        module.fold_prefix(name)
        assert close(module.model(input_ids=text()).logits, expected)
    (table,) = (p for key, p in module.named_parameters() if key.endswith(f"prefix_table.{name}"))
    assert table.requires_grad
    assert not any("prefix_hidden" in key and key.endswith(f".{name}") for key, _ in module.named_parameters())
    module.fold_prefix(name)  # a second time changes nothing
    module.save_adapter(tmp_path / "adapter", name)
    assert not (tmp_path / "adapter" / ENCODER).exists()
    rebuilt = type(module)(**module.hparams)  # what a checkpoint notes
    rebuilt.configure_model()
    assert rebuilt.state_dict().keys() == module.state_dict().keys()
    with pytest.raises(ValueError, match="No prefix is named 'c'"):
        module.fold_prefix("c")


@torch.no_grad()
def test_an_encoder_decoder_has_a_layout_of_its_own(tmp_path: Path) -> None:
    folder = save_tiny("t5", tmp_path / "t5")
    module = ours(folder, "prefix", prefix=SHORT)
    shake(module)
    module.save_adapter(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["encoder_hidden_size"], config["lit_peft_format"]) == ("LIT_PREFIX", 8, 1)
    again = load(tmp_path / "adapter", backbone=str(folder))
    assert torch.equal(outputs(again, batch("sft")), outputs(module, batch("sft")))
    base = _auto("t5", "lm").from_pretrained(folder)
    settings: Any = peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3)  # type: ignore[arg-type]
    peft.get_peft_model(base, settings).save_pretrained(tmp_path / "theirs")
    with pytest.raises(ValueError, match="decoder alone"):
        load(tmp_path / "theirs", backbone=str(folder))


@torch.no_grad()
def test_a_stack_holds_a_prefix_that_peft_reads_alone(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "llama")
    module = ours(folder, "mam", prefix=SHORT, bottleneck={"bottleneck_size": 4})
    shake(module)
    module.save_adapter(tmp_path / "adapter")
    assert load(tmp_path / "adapter", backbone=str(folder)).method == "mam"
    alone = theirs("llama", folder, adapter=tmp_path / "adapter" / "prefix_tuning")
    for layer in module.model.modules():
        if hasattr(layer, "bottleneck_up"):
            layer.bottleneck_up["default"].zero_()
            layer.bottleneck_up_bias["default"].zero_()
    assert close(module.model(input_ids=text()).logits, alone(input_ids=text()).logits)


@torch.no_grad()
def test_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_tiny("llama", tmp_path / "llama")
    module = ours(folder, "prefix", prefix=SHORT)
    module.save_adapter(tmp_path / "adapter")
    export.run(str(tmp_path / "adapter"), str(tmp_path / "out"), backbone=str(folder))
    assert "transformers + peft" in capsys.readouterr().out
    other = theirs("llama", folder, adapter=tmp_path / "out")
    assert close(other(input_ids=text()).logits, module.model(input_ids=text()).logits)
    gated = ours(folder, "prefix", prefix={**SHORT, "gate": 0.5})
    gated.save_adapter(tmp_path / "gated")
    with pytest.raises(ValueError, match="HF PEFT has no word for some settings of this PREFIX_TUNING"):
        export.run(str(tmp_path / "gated"), str(tmp_path / "no"), backbone=str(folder))


def test_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_tiny("llama", tmp_path / "llama")
    ours(folder, "prefix", prefix=SHORT).save_adapter(tmp_path / "adapter")
    inspect.run(str(tmp_path / "adapter"))
    shown = capsys.readouterr().out
    assert "virtual tokens outside of the layers" in shown
    assert "in place" not in shown
    ours(folder, "unipelt", prefix=SHORT).save_adapter(tmp_path / "stack")
    inspect.run(str(tmp_path / "stack"))
    assert "lora bias" not in capsys.readouterr().out
