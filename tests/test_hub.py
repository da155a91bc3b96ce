"""Adapter folders against the real HF PEFT, both ways, and everything that must be refused."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

from lit_peft import hub
from lit_peft.methods.bitfit import BitFitConfig
from lit_peft.methods.freeze import FreezeConfig
from lit_peft.methods.lora import LoRAConfig
from tests.tiny_adapted import (
    KINDS,
    BitFitTiny,
    FreezeTiny,
    FullTiny,
    LoRABitFitTiny,
    LoRAFreezeTiny,
    LoRATiny,
    RsLoRATiny,
    base_model,
    by_peft,
    check_equal,
    in_peft,
    logits,
    placed,
    shake,
)

# Ours, read by PEFT ---------------------------------------------------------------------------------------------------

SETTINGS = {
    "default": {},
    "one layer's linears": {"target_modules": r".*\.0\..*(q|q_proj|query|c_attn|wi|fc1)"},
    "excluding": {"exclude_modules": r".*\.(1)\..*"},
    "scale": {"r": 3, "alpha": 7},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_peft_reads_ours(tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    module = placed(LoRATiny, kind, lora=LoRAConfig(**{"r": 4, **settings}))
    shake(module)
    module.save_adapter(tmp_path / "a")
    assert (logits(module.model, kind) - logits(base_model(kind), kind)).abs().max() > 1e-2
    check_equal(module.model, in_peft(tmp_path / "a", kind), kind)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [hub.CONFIG, hub.WEIGHTS, hub.META]


def test_peft_reads_rslora(tmp_path: Path) -> None:
    module = placed(RsLoRATiny, "llama", lora=LoRAConfig(r=4, target_modules=["q_proj", "up_proj"]))
    shake(module)
    module.save_adapter(tmp_path / "a")
    check_equal(module.model, in_peft(tmp_path / "a", "llama"), "llama")
    config = json.loads((tmp_path / "a" / hub.CONFIG).read_text())
    assert config["use_rslora"] is True
    assert config["target_modules"] == ["q_proj", "up_proj"]


def test_head_is_a_module_to_save(tmp_path: Path) -> None:
    module = placed(LoRATiny, "bert")
    module.save_adapter(tmp_path / "a")
    assert json.loads((tmp_path / "a" / hub.CONFIG).read_text())["modules_to_save"] == ["classifier"]
    assert "base_model.model.classifier.weight" in load_file(tmp_path / "a" / hub.WEIGHTS)


# PEFT's, read by us ---------------------------------------------------------------------------------------------------

Q = {"llama": "q_proj", "gpt2": "c_attn", "bert": "query", "t5": "q"}
THEIR_SETTINGS: dict[str, Any] = {
    "default targets": lambda kind: {},
    "all linear": lambda kind: {"target_modules": "all-linear"},
    "list": lambda kind: {"target_modules": [Q[kind]]},
    "regex": lambda kind: {"target_modules": rf".*\.1\..*\.{Q[kind]}"},
    "exclude": lambda kind: {"target_modules": "all-linear", "exclude_modules": [Q[kind]]},
    "one layer": lambda kind: {"target_modules": [Q[kind]], "layers_to_transform": [1]},
    "rslora": lambda kind: {"target_modules": [Q[kind]], "use_rslora": True},
    "no task type": lambda kind: {"target_modules": [Q[kind]], "task_type": None},
}


@pytest.mark.parametrize("settings", THEIR_SETTINGS.values(), ids=THEIR_SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_we_read_pefts(tmp_path: Path, kind: str, settings: Any) -> None:
    more = settings(kind)
    if kind == "bert" and "task_type" in more:
        more["modules_to_save"] = ["classifier"]
    theirs = by_peft(tmp_path / "a", kind, **more)
    module = placed(LoRATiny, kind, adapter=str(tmp_path / "a"))
    assert (logits(theirs, kind) - logits(base_model(kind), kind)).abs().max() > 1e-2
    check_equal(theirs, module.model, kind)
    assert (module.lora.r, module.lora.alpha) == (4, 12)
    module.save_adapter(tmp_path / "b")  # and back
    check_equal(theirs, in_peft(tmp_path / "b", kind), kind)


def test_layers_pattern(tmp_path: Path) -> None:
    theirs = by_peft(tmp_path / "a", "llama", target_modules=["v_proj"], layers_to_transform=0, layers_pattern="layers")
    module = placed(LoRATiny, "llama", adapter=str(tmp_path / "a"))
    check_equal(theirs, module.model, "llama")
    assert module.lora.target_modules == ["model.layers.0.self_attn.v_proj"]


def test_load_into_a_second_name(tmp_path: Path) -> None:
    theirs = by_peft(tmp_path / "a", "llama", target_modules=["q_proj"], r=8, lora_alpha=16)
    module = placed(LoRATiny, "llama", lora=LoRAConfig(target_modules=["q_proj"]))
    module.load_adapter(tmp_path / "a")
    check_equal(theirs, module.model, "llama")


# Our own formats ------------------------------------------------------------------------------------------------------

STACKS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "bitfit": (BitFitTiny, {}),
    "bitfit on some": (BitFitTiny, {"bitfit": BitFitConfig(target_modules="all-linear")}),
    "freeze": (FreezeTiny, {"freeze": FreezeConfig(last_layers=1)}),
    "full": (FullTiny, {}),
    "lora+bitfit": (LoRABitFitTiny, {"lora": LoRAConfig(r=2)}),
    "lora+freeze": (LoRAFreezeTiny, {"lora": LoRAConfig(r=2), "freeze": FreezeConfig(last_layers=1)}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("cls", "settings"), STACKS.values(), ids=STACKS)
def test_round_trip(tmp_path: Path, cls: type[Any], settings: dict[str, Any], kind: str) -> None:
    module = placed(cls, kind, **settings)
    shake(module)
    ours = logits(module.model, kind)
    assert (ours - logits(base_model(kind), kind)).abs().max() > 1e-3
    module.save_adapter(tmp_path / "a")
    again = placed(cls, kind, adapter=str(tmp_path / "a"))  # the settings come from the folder
    assert torch.equal(ours, logits(again.model, kind))
    assert again.parts() == module.parts() or "LORA" in str(module.parts())  # LoRA's targets become the exact list


def test_stack_is_a_folder_of_folders(tmp_path: Path) -> None:
    module = placed(LoRABitFitTiny, "llama", lora=LoRAConfig(r=2))
    module.save_adapter(tmp_path / "a")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["bitfit", hub.META, "lora"]
    assert hub.read_meta(tmp_path / "a")["stack"] == ["bitfit", "lora"]
    assert len(peft.PeftModel.from_pretrained(base_model("llama"), tmp_path / "a" / "lora").peft_config) == 1


def test_one_kind_twice_cannot_share_a_folder(tmp_path: Path) -> None:
    module = placed(LoRATiny, "llama")
    with pytest.raises(ValueError, match="two methods of one kind"):
        hub.write(tmp_path / "a", module.model, module.parts() * 2, declared={}, base={})
    with pytest.raises(ValueError, match="Nothing to save"):
        hub.write(tmp_path / "a", module.model, [], declared={}, base={})
