"""AdaLoRA's folders against the real HF PEFT, both ways, with layers that are left with no rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lit_peft import hub
from lit_peft.methods.adalora import AdaLoRAConfig
from tests.test_adalora import AdaLoRATiny, close, found, prune
from tests.tiny_adapted import KINDS, TASK_TYPES, base_model, check_equal, in_peft, logits, placed, shake


@pytest.mark.parametrize("cut", ["whole", "settled", "cut"])
@pytest.mark.parametrize("kind", KINDS)
def test_peft_reads_ours(tmp_path: Path, kind: str, cut: str) -> None:
    module = placed(AdaLoRATiny, kind, adalora=AdaLoRAConfig(init_r=5, target_r=2, alpha=7))
    shake(module)
    if cut != "whole":
        prune(module)
    if cut == "cut":
        module.shrink()
    module.save_adapter(tmp_path / "a")
    assert (logits(module.model, kind) - logits(base_model(kind), kind)).abs().max() > 1e-2
    check_equal(module.model, in_peft(tmp_path / "a", kind), kind)
    stored = load_file(tmp_path / "a" / hub.WEIGHTS)
    rows = {key: len(value) for key, value in stored.items() if key.endswith("lora_E")}
    assert {0, 5} & set(rows.values()) if cut != "whole" else set(rows.values()) == {5}
    pattern = json.loads((tmp_path / "a" / hub.CONFIG).read_text())["rank_pattern"]
    if cut == "whole":
        assert pattern is None
    else:
        sums = {f"{hub.PREFIX}{key}": sum(flags) for key, flags in pattern.items()}
        assert sums == {key: rank for key, rank in rows.items() if rank < 5}
    again = placed(AdaLoRATiny, kind, adapter=str(tmp_path / "a"))
    assert torch.equal(logits(again.model, kind), logits(module.model, kind)) or cut == "settled"
    check_equal(again.model, module.model, kind)
    assert again.adalora.alpha == 7


def by_peft(folder: Path, kind: str, steps: int = 8, **settings: Any) -> nn.Module:
    """A folder written by the real PEFT after its own pruning."""
    options = {"init_r": 4, "target_r": 1, "lora_alpha": 12, "total_step": steps, "task_type": TASK_TYPES[kind]}
    model = peft.get_peft_model(base_model(kind), peft.AdaLoraConfig(**{**options, **settings}))
    ids = torch.arange(5, 29).view(2, 12)
    labels = torch.tensor([0, 2]) if kind == "bert" else ids
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 3e-2)
    for step in range(1, steps + 1):
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)  # type: ignore[operator]
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_we_read_pefts(tmp_path: Path, kind: str) -> None:
    more: dict[str, Any] = {"modules_to_save": ["classifier"]} if kind == "bert" else {}
    if kind == "gpt2":
        more = {"target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True}
    theirs = by_peft(tmp_path / "a", kind, **more)
    rows = {k: len(v) for k, v in load_file(tmp_path / "a" / hub.WEIGHTS).items() if k.endswith("lora_E")}
    assert len(set(rows.values())) > 1
    module = placed(AdaLoRATiny, kind, adapter=str(tmp_path / "a"))
    assert (logits(theirs, kind) - logits(base_model(kind), kind)).abs().max() > 1e-2
    check_equal(theirs, module.model, kind)
    assert (module.adalora.init_r, module.adalora.target_r) == (4, 1)
    assert sum(len(a.adalora_lambda["default"]) for a in found(module.model)) == sum(rows.values())
    module.save_adapter(tmp_path / "b")  # and back
    check_equal(theirs, in_peft(tmp_path / "b", kind), kind)


def test_a_layer_left_with_no_rank_both_ways(tmp_path: Path) -> None:
    theirs = by_peft(tmp_path / "a", "llama", target_modules=["q_proj", "v_proj", "up_proj"], steps=12)
    stored = load_file(tmp_path / "a" / hub.WEIGHTS)
    assert 0 in {len(v) for k, v in stored.items() if k.endswith("lora_E")}
    module = placed(AdaLoRATiny, "llama", adapter=str(tmp_path / "a"))
    check_equal(theirs, module.model, "llama")
    module.merge_adapters()
    close(logits(module.model, "llama"), logits(theirs, "llama"))


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    module = placed(AdaLoRATiny, "llama", adalora=AdaLoRAConfig(init_r=4, target_r=2, target_modules=["q_proj"]))
    module.save_adapter(tmp_path / "a")
    config = json.loads((tmp_path / "a" / hub.CONFIG).read_text())
    (tmp_path / "a" / hub.CONFIG).write_text(json.dumps({**config, "use_dora": True}))
    with pytest.raises(ValueError, match="uses use_dora=True"):
        placed(AdaLoRATiny, "llama", adapter=str(tmp_path / "a"))
    (tmp_path / "a" / hub.CONFIG).write_text(json.dumps(config))
    stored = load_file(tmp_path / "a" / hub.WEIGHTS)
    key = next(key for key in stored if key.endswith("lora_B"))
    save_file({**stored, key: stored[key][:, :3].contiguous()}, tmp_path / "a" / hub.WEIGHTS)
    before = [p.detach().clone() for p in module.parameters()]
    with pytest.raises(ValueError, match=r"Shapes differ for .*lora_B.*\(32, 3\) in .*\(32, 4\)"):
        module.load_adapter(tmp_path / "a")
    small = placed(AdaLoRATiny, "llama", adalora=AdaLoRAConfig(init_r=3, target_r=2, target_modules=["q_proj"]))
    save_file(stored, tmp_path / "a" / hub.WEIGHTS)
    with pytest.raises(ValueError, match=r"\(4, 32\) in .*\(3, 32\) in this model"):
        small.load_adapter(tmp_path / "a")
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
