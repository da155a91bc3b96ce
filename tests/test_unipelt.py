"""MAM and UniPELT are their parts: turning the others off leaves one method, exactly; gates see no padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_peft.adapter import named_adapters
from lit_peft.gates import Gates
from lit_peft.named import adapters, routed
from lit_peft.selection import telling
from lit_peft.zoo import compose
from tests.models import VOCAB, save_tiny
from tests.test_methods import batch, outputs, shake

PARTS: dict[str, Any] = {
    "lora": {"r": 2, "alpha": 2},
    "prefix": {"num_virtual_tokens": 3, "encoder_hidden_size": 8},
    "bottleneck": {"bottleneck_size": 4},
}
ALONE = {"lora": "lora", "prefix": "prefix", "bottleneck": "pfeiffer"}


def built(method: str, folder: Path, **settings: Any) -> Any:
    module: Any = compose(method, "sft")(str(save_tiny("llama", folder)), **settings)
    module.configure_model()
    return module.eval()


def copy_weights(source: nn.Module, target: nn.Module) -> int:
    mine = {p.replace("base.", ""): a for p, a in named_adapters(source)}
    copied = 0
    with torch.no_grad():
        for name, parameter in target.named_parameters():
            path, leaf = name.replace("base.", "").rsplit(".", 2)[0], ".".join(name.rsplit(".", 2)[1:])
            for adapter_path, adapter in mine.items():
                found = dict(adapter.own_parameters())
                if adapter_path == path and leaf in found:
                    parameter.copy_(found[leaf])
                    copied += 1
    return copied


@torch.no_grad()
def test_fixed_gates_isolate_each_part(tmp_path: Path) -> None:
    ids = torch.randint(8, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
    for part, method in ALONE.items():
        if part == "prefix":  # a prefix of zeros still takes its share of the softmax, so the others alone are compared
            continue
        gates = {other: {**settings, "gate": 1.0 if other == part else 0.0} for other, settings in PARTS.items()}
        module = built("unipelt", tmp_path / f"all-{part}", **gates)
        shake(module)
        settings = {part: dict(PARTS[part])}
        if part == "lora":
            settings["lora"]["target_modules"] = ["q_proj", "v_proj"]
        alone = built(method, tmp_path / f"one-{part}", **settings)
        assert copy_weights(module.model, alone.model) == len([p for p in alone.model.parameters() if p.requires_grad])
        zero_prefix(module)
        assert torch.allclose(module.model(input_ids=ids).logits, alone.model(input_ids=ids).logits, atol=1e-5), part


def zero_prefix(module: Any) -> None:
    """Take the prefix away, by taking its adapters out of the model."""
    from lit_peft.methods.prefix import PrefixBackbone, PrefixGate

    for path, adapter in reversed(list(named_adapters(module.model))):
        if isinstance(adapter, PrefixBackbone | PrefixGate):
            module.model.set_submodule(path, adapter.base)


@torch.no_grad()
def test_mam_without_a_part_is_the_other(tmp_path: Path) -> None:
    ids = torch.randint(8, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
    module = built("mam", tmp_path / "mam", prefix=PARTS["prefix"], bottleneck=PARTS["bottleneck"])
    shake(module)
    alone = built("parallel", tmp_path / "one", bottleneck=PARTS["bottleneck"])
    assert copy_weights(module.model, alone.model) == 8
    zero_prefix(module)
    assert torch.allclose(module.model(input_ids=ids).logits, alone.model(input_ids=ids).logits, atol=1e-6)


@torch.no_grad()
def test_gate_formula() -> None:
    torch.manual_seed(0)
    gates = Gates("lora", 8)
    gates.add("default", torch.device("cpu"))
    h = torch.randn(2, 5, 8)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    each = torch.sigmoid(h.double() @ gates.weight["default"].double() + gates.bias["default"].double())
    found = gates("default", h, causal=True)
    assert isinstance(found, Tensor)
    assert torch.allclose(found[..., 0].double(), each, atol=1e-6)
    expected = torch.stack([each[0, :3].mean(), each[1].mean()])
    with telling(padding=mask):
        pooled = gates("default", h, causal=False)
    assert isinstance(pooled, Tensor)
    assert torch.allclose(pooled[:, 0, 0].double(), expected, atol=1e-6)


def test_padding_does_not_move_the_gates_of_an_encoder(tmp_path: Path) -> None:
    folder = save_tiny("bert", tmp_path / "bert", task="classification")
    module: Any = compose("unipelt", "classification")(str(folder), labels=["a", "b", "c"], **PARTS)
    module.configure_model()
    shake(module)
    rows = batch("classification", rows=1)
    assert torch.allclose(outputs(module, longer(rows)), outputs(module, rows), atol=1e-5)


def longer(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: torch.cat([v, torch.zeros_like(v)], 1) if v.ndim == 2 else v for k, v in rows.items()}


@pytest.mark.parametrize("method", ["mam", "unipelt"])
@torch.no_grad()
def test_a_further_set_of_all_parts_is_routed_and_saved(method: str, tmp_path: Path) -> None:
    parts = {key: value for key, value in PARTS.items() if method == "unipelt" or key != "lora"}
    module = built(method, tmp_path / "base", **parts)
    module.add_adapter("b")
    shake(module)
    ids = torch.randint(8, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
    with routed(module, ["default", "b"]):
        mixed = module.model(input_ids=ids).logits
    for row, name in enumerate(("default", "b")):
        with adapters(module, name):
            assert torch.allclose(mixed[row], module.model(input_ids=ids).logits[row], atol=1e-5)
    assert (mixed[0] - mixed[1]).abs().max() > 1e-3
    module.save_adapter(tmp_path / "b", "b")
    again = built(method, tmp_path / "again", **parts)
    again.check_base = False
    again.add_adapter("b", folder=tmp_path / "b")
    with adapters(again, "b"):
        assert torch.allclose(again.model(input_ids=ids).logits[1], mixed[1], atol=1e-5)
