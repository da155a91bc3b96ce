"""Prefix tuning's folders, both ways with HF PEFT; the network that PEFT drops lies beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_peft import load
from lit_peft.named import adapters
from lit_peft.zoo import compose
from tests.models import PAD, VOCAB, _auto, save_tiny
from tests.test_methods import batch, outputs, quick_trainer, shake

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
    assert (tmp_path / "adapter" / "prompt_encoder.safetensors").is_file() == (method == "prefix")
    other = theirs(kind, folder, adapter=tmp_path / "adapter")
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    one, two = (model(input_ids=text(), attention_mask=mask).logits for model in (module.model, other))
    assert close(one[0], two[0])
    assert close(one[1, :6], two[1, :6])
    again = theirs(kind, folder, adapter=tmp_path / "adapter", is_trainable=True)  # the rows can be trained on there
    assert sum(p.numel() for p in again.parameters() if p.requires_grad) == again.prompt_encoder.default.embedding.weight.numel()


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


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_gradients_are_pefts(kind: str, projection: bool, tmp_path: Path) -> None:
    folder = save_tiny(kind, tmp_path / kind)
    width = {"token_dim": 32} if projection else {}
    if kind == "llama" and projection:
        width = {}  # PEFT's network is as wide as a key, ours as the model: only the flat gradients can be compared
    other = theirs(kind, folder, num_virtual_tokens=4, prefix_projection=projection, encoder_hidden_size=8, **width)
    module = ours(folder, "prefix", prefix={**SHORT, "num_virtual_tokens": 4, "prefix_projection": projection})
    (backbone,) = module._backbones("default")
    encoder = other.prompt_encoder.default
    if not projection:
        pairs = {"table": encoder.embedding.weight}
    elif kind == "gpt2":
        first, _, last = encoder.transform
        pairs = dict(zip(("embedding", "hidden", "hidden_bias", "output", "output_bias"),
                         (encoder.embedding.weight, first.weight, first.bias, last.weight, last.bias), strict=True))
    else:
        pytest.skip("PEFT's network is as wide as a key, ours as the model")
    for part, parameter in pairs.items():
        with torch.no_grad():
            getattr(backbone, f"prefix_{part}")["default"].copy_(parameter)
    losses = [model(input_ids=text(), labels=text()).loss for model in (module.model, other)]
    assert torch.allclose(*losses, atol=1e-6)
    for loss in losses:
        loss.backward()
    for part, parameter in pairs.items():
        found = getattr(backbone, f"prefix_{part}")["default"].grad
        assert parameter.grad is not None and parameter.grad.abs().max() > 1e-4
        assert (found - parameter.grad).abs().max() <= 1e-5 * parameter.grad.abs().max(), part
