"""Adapter folders against the real HF PEFT, both ways, and everything that must be refused."""

import json
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_peft import hub
from lit_peft.methods.bitfit import BitFitConfig
from lit_peft.methods.freeze import FreezeConfig
from lit_peft.methods.lora import LoRA, LoRAConfig
from lit_peft.module import AdaptableModule
from tests import tiny_adapted
from tests.tiny_adapted import (
    KINDS,
    BitFitTiny,
    FreezeTiny,
    FullTiny,
    LoRABitFitTiny,
    LoRAFreezeTiny,
    LoRATiny,
    RsLoRATiny,
    Tiny,
    base_model,
    by_peft,
    check_equal,
    in_peft,
    logits,
    placed,
    shake,
)

# Ours, read by PEFT ---------------------------------------------------------------------------------------------------

Q = {"llama": "q_proj", "gpt2": "c_attn", "bert": "query", "t5": "q"}
HEAD = {"llama": "lm_head", "gpt2": "lm_head", "bert": "pooler.dense", "t5": "lm_head"}
PER_LAYER = r".*\.(q|q_proj|query|c_attn)"
TABLES = {"llama": "embed_tokens", "gpt2": "wte", "bert": "word_embeddings", "t5": "embed_tokens"}
WHOLE = {"llama": ["lm_head", "norm"], "gpt2": ["lm_head"], "bert": ["pooler"], "t5": ["lm_head", "wo"]}
NO_BIAS = ("llama", "t5")
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "one layer's linears": {"target_modules": r".*\.0\..*(q|q_proj|query|c_attn|wi|fc1)"},
    "excluding": {"exclude_modules": r".*\.(1)\..*"},
    "scale": {"r": 3, "alpha": 7},
    "patterns": {"rank_pattern": {PER_LAYER: 2}, "alpha_pattern": {PER_LAYER: 5.0}},
    "lora_only": {"bias": "lora_only"},
    "all biases": {"bias": "all"},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_peft_reads_ours(tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    if "bias" in settings and kind in NO_BIAS:
        with pytest.raises(ValueError, match=r"has (a|no) bias"):
            placed(LoRATiny, kind, lora=LoRAConfig(r=4, **settings))
        return
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


OTHER_LAYERS: dict[str, Any] = {
    "embedding": lambda kind: {"target_modules": [Q[kind], TABLES[kind]]},
    "embedding alone": lambda kind: {"target_modules": [TABLES[kind]], "use_rslora": True},
    "head": lambda kind: {"target_modules": [HEAD[kind]]},
    "head whole": lambda kind: {"modules_to_save": WHOLE[kind]},
    "table whole": lambda kind: {"modules_to_save": [TABLES[kind]]},
    "layers": lambda kind: {"target_modules": [Q[kind]], "layers_to_transform": [1]},
}


@pytest.mark.parametrize("settings", OTHER_LAYERS.values(), ids=OTHER_LAYERS)
@pytest.mark.parametrize("kind", KINDS)
def test_peft_reads_other_layers(tmp_path: Path, kind: str, settings: Any) -> None:
    module = placed(LoRATiny, kind, lora=LoRAConfig(r=4, **settings(kind)))
    shake(module)
    module.save_adapter(tmp_path / "a")
    assert (logits(module.model, kind) - logits(base_model(kind), kind)).abs().max() > 1e-2
    check_equal(module.model, in_peft(tmp_path / "a", kind), kind)
    again = placed(LoRATiny, kind, adapter=str(tmp_path / "a"))
    assert torch.equal(logits(again.model, kind), logits(module.model, kind))
    trained = [{n for n, p in m.model.named_parameters() if p.requires_grad} for m in (module, again)]
    assert trained[0] == trained[1]


@pytest.mark.parametrize("stable", [False, True])
@pytest.mark.parametrize("targets", [["c_attn"], "all-linear"])
def test_slices_are_saved_as_one_exact_pair(tmp_path: Path, targets: Any, stable: bool) -> None:
    config = LoRAConfig(
        r=2,
        alpha=2,
        target_modules=targets,
        enable_lora=[True, False, True],
        rank_pattern={r".*\.1\.attn\.c_attn": 3},
        use_rslora=stable,
    )
    module = placed(LoRATiny, "gpt2", lora=config)
    shake(module)
    module.save_adapter(tmp_path / "a")
    check_equal(module.model, in_peft(tmp_path / "a", "gpt2"), "gpt2")
    again = placed(LoRATiny, "gpt2", adapter=str(tmp_path / "a"))  # three slices again, not one layer of higher rank
    assert torch.equal(logits(again.model, "gpt2"), logits(module.model, "gpt2"))
    assert {n: p.shape for n, p in again.state_dict().items()} == {n: p.shape for n, p in module.state_dict().items()}
    (tmp_path / "a" / hub.META).unlink()  # without our own words it is plain LoRA, and the same function
    plain = placed(LoRATiny, "gpt2", adapter=str(tmp_path / "a"))
    check_equal(plain.model, module.model, "gpt2")


def test_patterns_are_anchored_and_apart(tmp_path: Path) -> None:
    ranks = {r".*\.0\.self_attn\.q_proj": 2, "up_proj": 3}
    module = placed(LoRATiny, "llama", lora=LoRAConfig(r=4, rank_pattern=ranks))
    module.save_adapter(tmp_path / "a")
    config = json.loads((tmp_path / "a" / hub.CONFIG).read_text())
    assert config["rank_pattern"] == {r"^model\.layers\.0\.self_attn\.q_proj": 2, r"^(.*\.)?up_proj": 3}
    assert config["r"] == 4
    assert config["alpha_pattern"] == {}
    assert config["target_modules"] == sorted(config["target_modules"])


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolutions_both_ways(tmp_path: Path, dims: int) -> None:
    class Convolved(Tiny):
        def configure_model(self) -> None:
            AdaptableModule.configure_model(self)
            self.model = convolved(dims)
            self.peft_task_type = None

    class Ours(LoRA, Convolved): ...

    settings: dict[str, Any] = {"r": 4, "target_modules": ["one", "two"]}
    module = placed(Ours, "llama", lora=LoRAConfig(alpha=12, **settings))
    shake(module)
    module.save_adapter(tmp_path / "a")
    x = torch.randn(2, 4, *(7,) * dims, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns that it cannot merge groups
        read = peft.PeftModel.from_pretrained(convolved(dims), tmp_path / "a").eval()
        torch.testing.assert_close(read(x), module.model(x), rtol=1e-5, atol=1e-6)
        theirs = peft.get_peft_model(convolved(dims), peft.LoraConfig(**{**settings, "target_modules": ["one"]})).eval()
        shake(theirs, 3)
        theirs.save_pretrained(tmp_path / "b")
        again = placed(Ours, "llama", adapter=str(tmp_path / "b"), check_base=False)
        torch.testing.assert_close(again.model(x), theirs(x), rtol=1e-5, atol=1e-6)
        grouped = peft.get_peft_model(convolved(dims), peft.LoraConfig(**settings))
        shake(grouped, 3)
        grouped.save_pretrained(tmp_path / "c")
    with pytest.raises(ValueError, match="reads all channels of a convolution with 2 groups"):
        placed(Ours, "llama", adapter=str(tmp_path / "c"), check_base=False)


def convolved(dims: int) -> torch.nn.Module:
    conv: Any = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)[dims - 1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = {"one": conv(4, 6, 3, stride=2, padding=1), "two": conv(6, 4, 2, groups=2)}
    return torch.nn.Sequential(OrderedDict(layers))


def test_a_table_of_another_base_is_refused(tmp_path: Path) -> None:
    by_peft(tmp_path / "a", "llama", target_modules=["embed_tokens"])
    key = "base_model.model.model.embed_tokens.base_layer.weight"  # PEFT stores the whole table beside the adapter
    tensors = load_file(tmp_path / "a" / hub.WEIGHTS)
    placed(LoRATiny, "llama", adapter=str(tmp_path / "a"))
    for wrong in (tensors[key] + 0.1, torch.cat([tensors[key], tensors[key][:3]])):
        save_file({**tensors, key: wrong}, tmp_path / "a" / hub.WEIGHTS, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"a weight of its own for 'model\.embed_tokens', which is not this base"):
            placed(LoRATiny, "llama", adapter=str(tmp_path / "a"))


def test_biases_are_saved_where_peft_looks(tmp_path: Path) -> None:
    module = placed(LoRATiny, "gpt2", lora=LoRAConfig(r=2, target_modules=["c_attn"], bias="all"))
    module.save_adapter(tmp_path / "a")
    keys = load_file(tmp_path / "a" / hub.WEIGHTS)
    assert "base_model.model.transformer.h.0.attn.c_attn.base_layer.bias" in keys
    assert "base_model.model.transformer.h.0.mlp.c_fc.bias" in keys
    config = json.loads((tmp_path / "a" / hub.CONFIG).read_text())
    assert (config["bias"], config["modules_to_save"]) == ("all", None)


def test_head_is_a_module_to_save(tmp_path: Path) -> None:
    module = placed(LoRATiny, "bert")
    module.save_adapter(tmp_path / "a")
    assert json.loads((tmp_path / "a" / hub.CONFIG).read_text())["modules_to_save"] == ["classifier"]
    assert "base_model.model.classifier.weight" in load_file(tmp_path / "a" / hub.WEIGHTS)


# PEFT's, read by us ---------------------------------------------------------------------------------------------------

THEIR_SETTINGS: dict[str, Any] = {
    "default targets": lambda kind: {},
    "all linear": lambda kind: {"target_modules": "all-linear"},
    "list": lambda kind: {"target_modules": [Q[kind]]},
    "regex": lambda kind: {"target_modules": rf".*\.1\..*\.{Q[kind]}"},
    "exclude": lambda kind: {"target_modules": "all-linear", "exclude_modules": [Q[kind]]},
    "one layer": lambda kind: {"target_modules": [Q[kind]], "layers_to_transform": [1]},
    "rslora": lambda kind: {"target_modules": [Q[kind]], "use_rslora": True},
    "patterns": lambda kind: {
        "target_modules": "all-linear",
        "rank_pattern": {Q[kind]: 2},
        "alpha_pattern": {Q[kind]: 3},
    },
    "bias of its layers": lambda kind: {"target_modules": [Q[kind]], "bias": "lora_only"},
    "all biases": lambda kind: {"target_modules": [Q[kind]], "bias": "all"},
    "embedding": lambda kind: {"target_modules": [Q[kind], TABLES[kind]]},
    "embedding as a regular expression": lambda kind: {"target_modules": rf".*\.{TABLES[kind]}"},
    "head whole": lambda kind: {"target_modules": [Q[kind]], "modules_to_save": WHOLE[kind]},
    "no task type": lambda kind: {"target_modules": [Q[kind]], "task_type": None},
}


@pytest.mark.parametrize("settings", THEIR_SETTINGS.values(), ids=THEIR_SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_we_read_pefts(tmp_path: Path, kind: str, settings: Any) -> None:
    more = settings(kind)
    if kind == "bert" and "task_type" in more:
        more["modules_to_save"] = [*more.get("modules_to_save", []), "classifier"]
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


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("gpt_neox", {"target_modules": ["query_key_value"], "enable_lora": [True, False, True]}),
        ("gemma", {"target_modules": ["embed_tokens", "q_proj"]}),  # rows of the table are scaled
    ],
)
def test_peft_reads_other_models(tmp_path: Path, kind: str, settings: dict[str, Any], monkeypatch: Any) -> None:
    monkeypatch.setitem(tiny_adapted.KINDS, kind, "lm")
    monkeypatch.setitem(tiny_adapted.TASK_TYPES, kind, "CAUSAL_LM")
    module = placed(LoRATiny, kind, lora=LoRAConfig(r=2, alpha=2, **settings))
    shake(module)
    module.save_adapter(tmp_path / "a")
    assert (logits(module.model, kind) - logits(base_model(kind), kind)).abs().max() > 1e-2
    check_equal(module.model, in_peft(tmp_path / "a", kind), kind)
