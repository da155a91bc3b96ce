"""QLoRA, and other methods over a base in four bits: defaults, adapters that fit either base, merging, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from lit_peft import LoRAConfig, load
from lit_peft.callbacks.adapter_freeze import AdapterFreeze
from lit_peft.callbacks.adapter_merge import AdapterMerge
from lit_peft.merging import write_merged
from lit_peft.quantised.linear import NF4Linear
from lit_peft.saved import merge_summary
from lit_peft.sites import linears
from lit_peft.weights import dense
from lit_peft.zoo import compose
from tests.models import VOCAB, save_tiny, tiny
from tests.test_merging import logits, trained
from tests.test_methods import batch, gradients, loader, quick_trainer

EXACT: dict[str, Any] = {"lora": {"r": 4, "dropout": 0.0}, "dtype": "float32"}
IDS = torch.randint(5, 128, (2, 9), generator=torch.Generator().manual_seed(0))


def test_defaults_are_the_papers(tmp_path: Path) -> None:
    folder = str(save_tiny("llama", tmp_path))
    module: Any = compose("qlora", "sft")(folder)
    module.configure_model()
    assert module.lora == LoRAConfig(r=64, alpha=16, dropout=0.1, target_modules="all-linear")
    assert module.lora.default_lr == 2e-4
    found = linears(module.model)
    assert len(found) == 14
    assert all(isinstance(layer.base, NF4Linear) and layer.base.double_quant for layer in found.values())
    assert {p.dtype for p in module.model.parameters() if not p.requires_grad} == {torch.bfloat16, torch.uint8}
    assert {p.dtype for p in module.model.parameters() if p.requires_grad} == {torch.float32}
    assert module.preferred_optim() == "paged_adamw_32bit"
    changed: Any = compose("qlora", "sft")(folder, lora={"r": 8})
    assert changed.lora == LoRAConfig(r=8, alpha=16, dropout=0.1)
    assert compose("qlora", "sft")(folder, lora=LoRAConfig(r=2)).lora == LoRAConfig(r=2)


def test_trains_on_this_cpu_without_a_word_about_optimizers(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    module: Any = compose("qlora", "sft")(str(save_tiny("llama", tmp_path / "base")), lora={"r": 4})
    trainer = quick_trainer(tmp_path, max_steps=2)
    trainer.fit(module, loader("sft", 2))
    assert type(trainer.optimizers[0]) is torch.optim.AdamW
    assert not [w for w in recwarn if "adamw" in str(w.message).lower()]
    asked: Any = compose("qlora", "sft")(str(tmp_path / "base"), optim="paged_adamw_32bit")
    with pytest.raises(ValueError, match=r"optim 'paged_adamw_32bit' needs a CUDA device; this is cpu\."):
        quick_trainer(tmp_path, max_steps=2).fit(asked, loader("sft", 2))


def test_any_method_and_none_by_one_argument(tmp_path: Path) -> None:
    folder = str(save_tiny("gpt2", tmp_path))

    def quantised(module: Any) -> int:
        module.configure_model()
        return sum(isinstance(m, NF4Linear) for m in module.model.modules())

    assert quantised(compose("lora+bitfit", "sft")(folder, quantize="nf4")) == 8
    assert quantised(compose("lora", "sft")(folder)) == 0
    assert quantised(compose("qlora", "sft")(folder, quantize="none")) == 0
    plain: Any = compose("lora", "sft")(folder, quantize="nf4", double_quant=False)
    assert quantised(plain) == 8
    assert not any(m.double_quant for m in plain.model.modules() if isinstance(m, NF4Linear))
    with pytest.raises(ValueError, match="quantize is 'fp4'; it must be 'nf4' or 'none'"):
        compose("lora", "sft")(folder, quantize="fp4")


def test_gradients_are_those_of_lora_on_the_dequantised_weights(tmp_path: Path) -> None:
    """A float64 check of the whole model: backbone swapped for its own dequantised weights."""
    folder = str(save_tiny("llama", tmp_path))
    torch.manual_seed(0)
    module: Any = compose("qlora", "sft")(folder, **EXACT)
    module.configure_model()
    torch.manual_seed(0)
    other: Any = compose("lora", "sft")(folder, lora={"r": 4})
    other.configure_model()
    with torch.no_grad():
        for path, layer in linears(module.model).items():
            twin: Any = other.model.get_submodule(path)
            twin.base.weight.copy_(dense(layer.base))  # type: ignore[arg-type]
            for name in ("lora_a", "lora_b"):
                value = torch.randn(getattr(layer, name)["default"].shape) * 0.1
                getattr(layer, name)["default"].copy_(value)
                getattr(twin, name)["default"].copy_(value)
    other.model.double()
    expected = gradients(other, batch("sft"))
    found = gradients(module, batch("sft"))
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(found[name].double(), gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max())), name


# Either base ---------------------------------------------------------------------------------------------------------


def adapter_tensors(module: Any) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in module.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(("one", "two"), [("nf4", "none"), ("none", "nf4"), ("nf4", "nf4")])
def test_an_adapter_fits_either_base(one: str, two: str, kind: str, tmp_path: Path) -> None:
    module = trained("qlora", kind, tmp_path, quantize=one, **EXACT)
    module.save_adapter(tmp_path / "saved")
    files = {f.name: f.stat().st_size for f in (tmp_path / "saved").iterdir()}
    assert files["adapter_model.safetensors"] < 6 * sum(t.nbytes for t in adapter_tensors(module).values())
    loaded = load(tmp_path / "saved", quantize=two, dtype="float32", device="cpu")
    assert any(isinstance(m, NF4Linear) for m in loaded.model.modules()) == (two == "nf4")
    assert all(torch.equal(p, adapter_tensors(loaded)[n]) for n, p in adapter_tensors(module).items())
    distance = (logits(loaded.model, IDS) - logits(module.model, IDS)).abs().max()
    assert distance == 0 if one == two else 1e-3 < distance < 10


@pytest.mark.parametrize("quantize", [None, "none"])
def test_a_checkpoint_holds_adapters_only_and_fits_either_base(quantize: Any, tmp_path: Path) -> None:
    module: Any = compose("qlora", "sft")(str(save_tiny("llama", tmp_path / "base")), **EXACT)
    trainer = quick_trainer(tmp_path, max_steps=2)
    trainer.fit(module, loader("sft", 2))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    stored = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert len(stored) == 28
    assert all("lora_" in key for key in stored)
    loaded = load(tmp_path / "a.ckpt", quantize=quantize, device="cpu")
    assert any(isinstance(m, NF4Linear) for m in loaded.model.modules()) == (quantize is None)
    assert all(torch.equal(p, adapter_tensors(loaded)[n]) for n, p in adapter_tensors(module).items())
    if quantize is None:
        assert torch.equal(logits(loaded.model, IDS), logits(module.model.eval(), IDS))


def test_an_adapter_of_another_base_is_still_refused(tmp_path: Path) -> None:
    module = trained("qlora", "llama", tmp_path, **EXACT)
    module.save_adapter(tmp_path / "saved")
    other = save_tiny("llama", tmp_path / "other", seed=5)
    with pytest.raises(ValueError, match="This adapter was made on"):
        load(tmp_path / "saved", backbone=str(other), quantize="nf4", device="cpu")


# Merging -------------------------------------------------------------------------------------------------------------

MERGED = [
    ("qlora", "llama", "sft", AutoModelForCausalLM, EXACT),
    ("qlora", "gpt2", "sft", AutoModelForCausalLM, EXACT),
    ("qlora", "t5", "sft", AutoModelForSeq2SeqLM, EXACT),
    ("qlora", "bert", "classification", AutoModelForSequenceClassification, EXACT),
    ("bitfit", "gpt2", "sft", AutoModelForCausalLM, {"quantize": "nf4"}),
    ("lora+bitfit", "llama", "sft", AutoModelForCausalLM, {"quantize": "nf4"}),
]


@pytest.mark.parametrize(("method", "kind", "task", "auto", "options"), MERGED, ids=lambda value: str(value)[:12])
def test_merges_into_a_dequantised_copy(
    method: str, kind: str, task: str, auto: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    more = {"labels": ["a", "b", "c"]} if task == "classification" else {}
    module = trained(method, kind, tmp_path, task, **options, **more)
    before, stored = logits(module.model, IDS), {n: p.clone() for n, p in module.model.named_parameters()}
    report = write_merged(module, tmp_path / "merged")
    assert all(torch.equal(p, stored[n]) for n, p in module.model.named_parameters()), "the module was left alone"
    model = auto.from_pretrained(tmp_path / "merged").eval()
    assert torch.allclose(logits(model, IDS), before, atol=1e-4 * float(before.abs().max()))
    assert not (tmp_path / "merged" / "config.json").read_text().count("quantization_config")
    errors = []  # of the written weights, by the paper's formula
    from tests.test_quantised import reference

    for layer in linears(model).values():
        weight = dense(layer).double()
        errors.append(float((reference(weight) - weight).norm() / weight.norm()))
    assert report["requantised"]["mean"] == pytest.approx(sum(errors) / len(errors), rel=1e-3, abs=1e-6)
    assert report["requantised"]["max"] == pytest.approx(max(errors), rel=1e-3, abs=1e-6)
    assert 0.04 < max(errors) < 0.13 or method == "bitfit"  # BitFit leaves W as it is: on the grid already
    assert json.loads((tmp_path / "merged" / "merge_report.json").read_text())["requantised"] == report["requantised"]
    assert "In four bits again" in merge_summary(report)


def test_a_merged_bf16_base_is_written_in_bf16(tmp_path: Path) -> None:
    module = trained("qlora", "llama", tmp_path, lora={"r": 4, "dropout": 0.0})
    report = write_merged(module, tmp_path / "merged")
    assert report["dtype"] == "bfloat16"
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_merging_in_place_is_refused_before_any_weight_is_touched(tmp_path: Path) -> None:
    module = trained("lora+bitfit", "gpt2", tmp_path, quantize="nf4")
    before = {n: p.clone() for n, p in module.model.named_parameters()}
    with pytest.raises(TypeError, match=r"cannot be merged into in place.*lit-peft merge.*quantize='none'"):
        module.merge_adapters()
    after = dict(module.model.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(after[n], p) for n, p in before.items())


def test_callback_merges_after_training(tmp_path: Path) -> None:
    module: Any = compose("qlora", "sft")(str(save_tiny("llama", tmp_path / "base")), **EXACT)
    callback = AdapterMerge(tmp_path / "merged")
    quick_trainer(tmp_path, max_steps=2, callbacks=[callback]).fit(module, loader("sft", 2))
    assert 0 < callback.report["requantised"]["mean"] < callback.report["requantised"]["max"] < 0.13
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.allclose(logits(model, IDS), logits(module.model.eval(), IDS), atol=1e-3)


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "options"), [("full", {}), ("freeze", {"freeze": {"last_layers": 1}})])
def test_methods_that_train_the_base_refuse(method: str, options: dict[str, Any], tmp_path: Path) -> None:
    module: Any = compose(method, "sft")(str(save_tiny("llama", tmp_path)), quantize="nf4", **options)
    with pytest.raises(TypeError, match=r"is stored in four bits and cannot be trained in place. Set quantize='none'"):
        module.configure_model()


def test_thawing_four_bits_is_refused(tmp_path: Path) -> None:
    module: Any = compose("qlora", "sft")(str(save_tiny("llama", tmp_path / "base")), **EXACT)
    freeze = AdapterFreeze(thaw_epoch=1, thaw_modules="layers")
    with pytest.raises(TypeError, match="stored in four bits"):
        quick_trainer(tmp_path, max_epochs=2, callbacks=[freeze]).fit(module, loader("sft", 2))


@pytest.mark.slow
def test_200_steps_end_within_one_percent_of_lora(tmp_path: Path) -> None:
    """A small model learns one random language; LoRA then teaches it another, on its weights as they are and in NF4."""

    def language(seed: int) -> Tensor:
        return torch.softmax(2 * torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed)), -1)

    def sentences(table: Tensor, generator: torch.Generator) -> Tensor:
        ids = torch.randint(8, VOCAB, (16, 1), generator=generator)
        for _ in range(31):
            ids = torch.cat([ids, torch.multinomial(table[ids[:, -1]], 1, generator=generator)], 1)
        return ids

    def learn(model: Any, table: Tensor, steps: int) -> list[float]:
        generator, found = torch.Generator().manual_seed(3), []
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        for _ in range(steps):
            ids = sentences(table, generator)
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(float(loss))
        return found

    first, second = language(1), 0.5 * language(1) + 0.5 * language(2)
    model: Any = tiny("llama", hidden_size=64, intermediate_size=128, initializer_range=0.05)
    learn(model, first, 400)
    save_tiny("llama", tmp_path)
    model.save_pretrained(tmp_path)
    losses = {}
    for method in ("lora", "qlora"):
        torch.manual_seed(0)
        module: Any = compose(method, "sft")(str(tmp_path), lora={"r": 8, "dropout": 0.0}, dtype="float32")
        module.configure_model()
        losses[method] = learn(module.model, second, 200)
    start, end = sum(losses["lora"][:5]) / 5, sum(losses["lora"][-50:]) / 50
    assert end < start - 0.2 < 4.85 - 0.2  # it had learned something (log 128 = 4.85), and learns again
    assert sum(losses["qlora"][-50:]) / 50 == pytest.approx(end, rel=0.01)
