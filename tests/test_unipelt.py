"""MAM and UniPELT are their parts: turning the others off leaves one method, exactly; gates see no padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_peft.adapter import named_adapters
from lit_peft.gates import Gates
from lit_peft.named import adapters, disabled, routed
from lit_peft.selection import telling
from lit_peft.zoo import compose
from tests.models import VOCAB, save_tiny
from tests.test_methods import batch, loader, outputs, quick_trainer, shake

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


TEXT = torch.randint(8, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))


def logits(module: Any) -> Tensor:
    found: Tensor = module.model(input_ids=TEXT).logits
    return found


def turned(method: str, folder: Path, **gates: float) -> Any:
    """A composed method with fixed gates, all of its weights moved away from where they do nothing."""
    settings = {part: {**PARTS[part], "gate": gate} for part, gate in gates.items()}
    module = built(method, folder, **settings)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for _, adapter in named_adapters(module.model):
            for _, parameter in adapter.own_parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return module


def plain(parts: list[str], folder: Path) -> Any:
    """The methods of some parts, stacked in UniPELT's order, without gates."""
    settings = {part: dict(PARTS[part]) for part in parts}
    if "lora" in settings:
        settings["lora"]["target_modules"] = ["q_proj", "v_proj"]
    return built("+".join(ALONE[part] for part in parts), folder, **settings)


@pytest.mark.parametrize("on", [["lora"], ["prefix"], ["bottleneck"], ["lora", "bottleneck"], ["prefix", "bottleneck"]])
@torch.no_grad()
def test_fixed_gates_isolate_each_part(on: list[str], tmp_path: Path) -> None:
    module = turned("unipelt", tmp_path / "all", **{part: float(part in on) for part in PARTS})
    alone = plain(on, tmp_path / "one")
    assert copy_weights(module.model, alone.model) == len([p for p in alone.model.parameters() if p.requires_grad])
    assert torch.allclose(logits(module), logits(alone), atol=1e-6 * float(logits(alone).abs().max()))
    settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(TEXT)}
    assert torch.equal(*(one.model.generate(input_ids=TEXT, **settings) for one in (module, alone)))


@torch.no_grad()
def test_all_gates_at_one_are_the_parts_together(tmp_path: Path) -> None:
    module = turned("unipelt", tmp_path / "all", **dict.fromkeys(PARTS, 1.0))
    together = plain(list(PARTS), tmp_path / "stack")
    assert copy_weights(module.model, together.model) == len(
        [p for p in together.model.parameters() if p.requires_grad]
    )
    assert torch.allclose(logits(module), logits(together), atol=1e-6 * float(logits(together).abs().max()))


@torch.no_grad()
def test_all_gates_at_zero_are_the_base(tmp_path: Path) -> None:
    module = turned("unipelt", tmp_path / "all", **dict.fromkeys(PARTS, 0.0))
    with disabled(module):
        expected = logits(module)
    assert torch.equal(logits(module), expected)


@pytest.mark.parametrize(("on", "method"), [("prefix", "prefix"), ("bottleneck", "parallel")])
@torch.no_grad()
def test_mam_without_a_part_is_the_other(on: str, method: str, tmp_path: Path) -> None:
    module = turned("mam", tmp_path / "mam", **{part: float(part == on) for part in ("prefix", "bottleneck")})
    alone = built(method, tmp_path / "one", **{on: PARTS[on]})
    assert copy_weights(module.model, alone.model) == len([p for p in alone.model.parameters() if p.requires_grad])
    assert torch.allclose(logits(module), logits(alone), atol=1e-6 * float(logits(alone).abs().max()))


def test_what_is_switched_off_is_not_trained(tmp_path: Path) -> None:
    module = turned("mam", tmp_path / "mam", prefix=0.0, bottleneck=1.0)
    trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    assert trained
    assert not [name for name in trained if "prefix" in name]


@torch.no_grad()
def test_a_prefix_that_is_off_beside_one_that_is_on(tmp_path: Path) -> None:
    module = turned("unipelt", tmp_path / "all", lora=0.0, prefix=0.0, bottleneck=0.0)
    module.add_adapter("b", **{part: {**settings, "gate": 1.0} for part, settings in PARTS.items()})
    shake(module)
    with routed(module, ["default", "b"]):
        mixed = logits(module)
    for row, name in enumerate(("default", "b")):
        with adapters(module, name):
            assert torch.allclose(mixed[row], logits(module)[row], atol=1e-5)
    assert (mixed[0] - mixed[1]).abs().max() > 1e-3


@pytest.mark.parametrize(("kind", "task"), [("llama", "sft"), ("bert", "classification")])
def test_gates_are_metrics(kind: str, task: str, tmp_path: Path) -> None:
    folder = save_tiny(kind, tmp_path / kind, task="classification" if task == "classification" else "lm")
    labels = {"labels": ["a", "b", "c"]} if task == "classification" else {}
    module: Any = compose("unipelt", task)(str(folder), gradient_checkpointing=True, **labels, **PARTS)
    trainer = quick_trainer(tmp_path, max_steps=2)
    trainer.fit(module, loader(task, 2))
    gates = {key: float(value) for key, value in trainer.logged_metrics.items() if "gate" in key}
    assert gates.keys() == {"train_gate_lora", "train_gate_prefix", "train_gate_bottleneck"}
    assert all(0.2 < value < 0.8 and value != 0.5 for value in gates.values())


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
