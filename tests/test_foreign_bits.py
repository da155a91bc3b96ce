"""A base that bitsandbytes has quantised already: its layers become ours, with the same numbers and right gradients."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lit_peft import load
from lit_peft.adapter import named_adapters
from lit_peft.merging import write_merged
from lit_peft.quantised.foreign import own_layers
from lit_peft.quantised.linear import NF4Linear, codec
from lit_peft.zoo import compose
from tests.models import save_tiny
from tests.test_methods import batch, gradients, outputs, shake


def foreign(weight: torch.Tensor, **options: Any) -> Any:
    codec()  # imports bitsandbytes without its search for kernels
    import bitsandbytes as bnb

    out, wide = weight.shape
    layer: Any = bnb.nn.Linear4bit(wide, out, quant_type=options.pop("quant_type", "nf4"), **options)
    layer.weight.data = weight.clone()
    return layer.to("cpu")


def quantised_folder(folder: Path, kind: str = "llama", **options: Any) -> Path:
    """A folder as others publish them: `quantization_config` in config.json, packed weights in the file."""
    codec()
    config = BitsAndBytesConfig(
        load_in_4bit=True, **{"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, **options}
    )
    plain = save_tiny(kind, folder.with_name(f"{folder.name}-plain"))
    AutoModelForCausalLM.from_pretrained(plain, quantization_config=config, device_map="cpu").save_pretrained(folder)
    for file in plain.glob("token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    assert "quantization_config" in json.loads((folder / "config.json").read_text())
    return folder


@pytest.mark.parametrize("shape", [(64, 64), (40, 192), (128, 320), (3, 64)])
@pytest.mark.parametrize(
    "options",
    [{"compress_statistics": True}, {"compress_statistics": False}, {"quant_storage": torch.bfloat16}],
    ids=["double", "single", "bfloat16"],
)
def test_numbers_are_those_of_bitsandbytes(shape: tuple[int, int], options: dict[str, Any]) -> None:
    layer = foreign(torch.randn(shape, generator=torch.Generator().manual_seed(1)), **options)
    layer.bias.data.normal_()
    expected = codec().dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    model, x = nn.Sequential(layer), torch.randn(2, shape[1])
    model.train()
    answer = model(x)
    assert own_layers(model) == ["0"]
    own: Any = model[0]
    assert isinstance(own, NF4Linear)
    assert torch.equal(own.dequantised(), expected)
    assert torch.allclose(model(x), answer, atol=1e-5)
    assert own_layers(model) == []


@pytest.mark.parametrize("double", [True, False])
def test_an_evaluation_changes_no_gradient(double: bool, tmp_path: Path) -> None:
    """bitsandbytes' own layer repacks its weight in one, on CPUs with AVX512-BF16."""
    base = quantised_folder(tmp_path / "four", bnb_4bit_use_double_quant=double)
    module: Any = compose("lora", "sft")(str(base), lora={"r": 4}, dtype="float32")
    module.configure_model()
    assert sum(isinstance(m, NF4Linear) for m in module.model.modules()) == 14
    assert not any("bitsandbytes" in type(m).__module__ for m in module.model.modules())
    shake(module)
    rows = batch("sft")
    before = gradients(module, rows)
    first = outputs(module, rows)
    after = gradients(module, rows)
    assert before.keys() == after.keys()
    assert len(before) == 28
    assert all(torch.equal(after[name], gradient) for name, gradient in before.items())
    assert torch.equal(outputs(module, rows), first)


def test_saved_loaded_and_merged(tmp_path: Path) -> None:
    base = quantised_folder(tmp_path / "four", "gpt2")
    module: Any = compose("lora", "sft")(str(base), lora={"r": 4}, dtype="float32")
    module.configure_model()
    shake(module)
    rows = batch("sft")
    expected = outputs(module, rows)
    module.save_adapter(tmp_path / "adapter")
    assert torch.allclose(outputs(load(tmp_path / "adapter", dtype="float32"), rows), expected, atol=1e-5)
    with pytest.raises(TypeError, match="4-bit base cannot be merged into in place"):
        module.merge_adapters()
    write_merged(module, tmp_path / "merged")
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())
    assert torch.allclose(outputs(load(tmp_path / "merged", dtype="float32"), rows), expected, atol=1e-4)


def test_other_formats_are_refused(tmp_path: Path) -> None:
    weight = torch.randn(64, 64)
    with pytest.raises(ValueError, match=r"0 is a 4-bit layer .* of fp4 in blocks of 64.* quantize='nf4'"):
        own_layers(nn.Sequential(foreign(weight, quant_type="fp4")))
    repacked = foreign(weight)
    repacked.weight.quant_state.packing_format_for_cpu = True
    model = nn.Sequential(foreign(weight), repacked)
    before = list(model)
    with pytest.raises(ValueError, match=r"1 is a 4-bit layer .* an evaluation on this CPU has repacked"):
        own_layers(model)
    assert list(model) == before
    base = quantised_folder(tmp_path / "fp4", bnb_4bit_quant_type="fp4")
    with pytest.raises(ValueError, match="Load the unquantised model"):
        compose("lora", "sft")(str(base)).configure_model()


def test_a_base_in_eight_bits_is_not_half_merged(tmp_path: Path) -> None:
    module: Any = compose("lora", "sft")(str(save_tiny("llama", tmp_path / "base")), lora={"r": 4})
    module.configure_model()
    *_, last = [adapter for _, adapter in named_adapters(module.model)]
    last.base.weight = nn.Parameter(last.base.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"holds its weight as torch.int8: .* Load the base unquantised"):
        module.merge_adapters()
    assert len(list(named_adapters(module.model))) == 14
