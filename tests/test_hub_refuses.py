"""Adapter folders: writing is all or nothing, and what does not fit is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_peft import hub
from lit_peft.methods.lora import LoRAConfig
from lit_peft.mixin import PEFT
from tests.tiny_adapted import (
    BitFitTiny,
    FreezeTiny,
    FullTiny,
    LoRABitFitTiny,
    LoRATiny,
    by_peft,
    logits,
    placed,
    shake,
)

# Writing is all or nothing --------------------------------------------------------------------------------------------


def test_foreign_files_are_left_alone(tmp_path: Path) -> None:
    module = placed(LoRATiny, "llama")
    for name, make in (("notes.txt", Path.touch), ("work", Path.mkdir)):
        folder = tmp_path / f"with-{name}"
        folder.mkdir()
        make(folder / name)
        with pytest.raises(FileExistsError, match=f"holds other files \\({name}\\)"):
            module.save_adapter(folder)
        assert [path.name for path in folder.iterdir()] == [name]
    by_peft(tmp_path / "theirs", "llama")
    with pytest.raises(FileExistsError, match="holds other files"):
        module.save_adapter(tmp_path / "theirs")
    with pytest.raises(FileExistsError, match="is a file"):
        module.save_adapter(tmp_path / "theirs" / hub.CONFIG)


def test_saving_again_replaces_ours_and_keeps_what_lies_beside(tmp_path: Path) -> None:
    stack = placed(LoRABitFitTiny, "llama")
    stack.save_adapter(tmp_path / "a")
    (tmp_path / "a" / "README.md").write_text("mine")
    module = placed(LoRATiny, "llama")
    shake(module)
    module.save_adapter(tmp_path / "a")
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["README.md", hub.CONFIG, hub.WEIGHTS, hub.META]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]  # nothing temporary is left
    again = placed(LoRATiny, "llama", adapter=str(tmp_path / "a"))
    assert torch.equal(logits(module.model, "llama"), logits(again.model, "llama"))


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")])
def test_full_disk_leaves_the_old_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    module = placed(LoRATiny, "llama")
    module.save_adapter(tmp_path / "a")
    before = (tmp_path / "a" / hub.WEIGHTS).read_bytes()
    shake(module)

    def full(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(hub, "save_file", full)
    for folder in ("a", "new"):
        with pytest.raises(OSError, match="No space left"):
            module.save_adapter(tmp_path / folder)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a" / hub.WEIGHTS).read_bytes() == before


# What is refused ------------------------------------------------------------------------------------------------------


def edited(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / hub.CONFIG).read_text())
    (folder / hub.CONFIG).write_text(json.dumps({**config, **changes}))


def retensored(folder: Path, change: Any) -> None:
    save_file(change(load_file(folder / hub.WEIGHTS)), folder / hub.WEIGHTS, metadata={"format": "pt"})


def renamed(old: str, new: str) -> Any:
    return lambda tensors: {key.replace(old, new): tensor for key, tensor in tensors.items()}


def without(piece: str) -> Any:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if piece not in key}


def halve(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor[: len(tensor) // 2].contiguous() for key, tensor in tensors.items()}


def more(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**tensors, "base_model.model.model.norm.weight": torch.ones(32)}


DAMAGES: dict[str, tuple[Any, str]] = {
    "no prefix": (lambda f: retensored(f, renamed("base_model.model.", "")), "must start with 'base_model.model.'"),
    "wrong module": (lambda f: retensored(f, renamed("self_attn", "attention")), "this model has no such module"),
    "wrong leaf": (
        lambda f: retensored(f, renamed("lora_A", "lora_Q")),
        "holds no 'lora_A.weight' or 'lora_embedding_A'|lacks weights",
    ),
    "missing layer": (
        lambda f: retensored(f, without("layers.1.")),
        "lacks weights for 7 of them, such as 'model.layers",
    ),
    "missing B": (lambda f: retensored(f, without("layers.1.mlp.up_proj.lora_B")), "lacks 'model.layers.1.mlp.up_proj"),
    "surplus tensor": (lambda f: retensored(f, more), "1 tensors with no place in this model, such as 'model.norm"),
    "surplus layer": (lambda f: edited(f, target_modules=["q_proj"]), "its own target_modules do not name that layer"),
    "wrong shapes": (lambda f: retensored(f, halve), "Shapes differ for 'model.layers.0"),
    "wrong rank": (lambda f: edited(f, r=2), "Shapes differ for 'model.layers.0"),
    "truncated": (lambda f: cut(f / hub.WEIGHTS), "damaged or half-written"),
    "empty": (lambda f: (f / hub.WEIGHTS).write_bytes(b""), "damaged or half-written"),
    "pickled only": (lambda f: (f / hub.WEIGHTS).rename(f / "adapter_model.bin"), "Only a pickled adapter_model.bin"),
    "no weights": (lambda f: (f / hub.WEIGHTS).unlink(), "does not exist"),
    "not JSON": (lambda f: (f / hub.CONFIG).write_text("{"), "is not valid JSON"),
    "not an object": (lambda f: (f / hub.CONFIG).write_text("[]"), "must hold one JSON object"),
    "binary": (lambda f: (f / hub.CONFIG).write_bytes(b"\xff\xfe\x00\x80"), "is not a text file"),
    "no type": (lambda f: edited(f, peft_type=None), "has no peft_type"),
    "unknown type": (lambda f: edited(f, peft_type="WARP"), "holds WARP, but this model has LORA"),
    "another method": (lambda f: edited(f, peft_type="LIT_FREEZE"), "holds LIT_FREEZE, but this model has LORA"),
    "no targets": (lambda f: edited(f, target_modules=None), "names no target_modules"),
    "dora": (lambda f: edited(f, use_dora=True), "lacks 'model.layers.0.self_attn.q_proj.lora_magnitude_vector'"),
    "lora_bias": (lambda f: edited(f, lora_bias=True), "lora_bias=True"),
    "rank_pattern": (
        lambda f: edited(f, rank_pattern={"q_proj": 2}),
        "Shapes differ for 'model.layers.0.self_attn.q_proj",
    ),
    "tokens": (lambda f: edited(f, trainable_token_indices=[1]), "trainable_token_indices="),
    "a future setting": (lambda f: edited(f, use_warp=True), "use_warp=True"),
    "pissa": (lambda f: edited(f, init_lora_weights="pissa_niter_4"), "changed its base model"),
    "another base": (lambda f: edited(f, base_model_name_or_path="org/other"), "was made on 'org/other'"),
    "no folder": (lambda f: shutil.rmtree(f), "is no adapter folder"),
}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("writer", ["ours", "peft"])
def test_damage_is_an_error(tmp_path: Path, writer: str, damage: Any, message: str) -> None:
    folder = tmp_path / "a"
    if writer == "ours":
        placed(LoRATiny, "llama", lora=LoRAConfig(r=4)).save_adapter(folder)
        (folder / hub.META).unlink()  # its name of the base would win over the configuration's
    else:
        by_peft(folder, "llama", target_modules="all-linear")
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        placed(LoRATiny, "llama", adapter=str(folder))
    assert "\n" not in str(caught.value)


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    module = placed(BitFitTiny, "llama")
    module.save_adapter(tmp_path / "a")
    assert json.loads((tmp_path / "a" / hub.CONFIG).read_text())["lit_peft_format"] == 1
    edited(tmp_path / "a", lit_peft_format=2)
    with pytest.raises(ValueError, match=r"has format 2, and this lit_peft reads 1. Update it") as raised:
        module.load_adapter(tmp_path / "a")
    assert "\n" not in str(raised.value)
    edited(tmp_path / "a", lit_peft_format=None)  # written before there was a number
    path = tmp_path / "a" / hub.CONFIG
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "lit_peft_format"}))
    module.load_adapter(tmp_path / "a")


@pytest.mark.parametrize("damage", [without("layers.1.mlp.up_proj.lora_B"), halve, more])
def test_nothing_is_copied_from_a_folder_that_does_not_fit(tmp_path: Path, damage: Any) -> None:
    placed(LoRATiny, "llama").save_adapter(tmp_path / "a")
    retensored(tmp_path / "a", damage)
    module = placed(LoRATiny, "llama")
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    with pytest.raises(ValueError):
        module.load_adapter(tmp_path / "a")
    assert all(torch.equal(tensor, before[key]) for key, tensor in module.state_dict().items())


def test_the_trained_head_must_be_there(tmp_path: Path) -> None:
    placed(LoRATiny, "bert").save_adapter(tmp_path / "a")
    retensored(tmp_path / "a", without("classifier.weight"))
    with pytest.raises(ValueError, match=r"lacks the weight 'classifier\.weight', which is trained on this model"):
        placed(LoRATiny, "bert", adapter=str(tmp_path / "a"))


@pytest.mark.parametrize(("cls", "other"), [(LoRATiny, BitFitTiny), (BitFitTiny, FreezeTiny), (FullTiny, LoRATiny)])
def test_another_methods_folder(tmp_path: Path, cls: type[PEFT], other: type[PEFT]) -> None:
    placed(cls, "llama").save_adapter(tmp_path / "a")
    with pytest.raises(ValueError, match=r"holds (LORA|LIT_\w+), but this model has"):
        placed(other, "llama", adapter=str(tmp_path / "a"))


BASES = [
    ({"name": "org/a"}, {"name": "org/b"}, False),
    ({"name": "org/a"}, {"name": "mirror/A"}, True),
    ({"name": "org/a", "sha": "1"}, {"name": "org/a", "sha": "2"}, False),
    ({"name": "org/a", "sha": "1"}, {"name": "/copy/of/it", "sha": "1"}, True),
    ({"name": "org/a", "sha": "1"}, {"name": "org/a", "sha": None}, True),
    ({"name": None}, {"name": "org/b"}, True),
]


@pytest.mark.parametrize(("theirs", "ours", "fits"), BASES)
def test_base_is_compared(tmp_path: Path, theirs: dict[str, Any], ours: dict[str, Any], fits: bool) -> None:
    placed(LoRATiny, "llama", base=theirs).save_adapter(tmp_path / "a")
    if not fits:
        with pytest.raises(ValueError, match="This adapter was made on"):
            placed(LoRATiny, "llama", base=ours, adapter=str(tmp_path / "a"))
    placed(LoRATiny, "llama", base=ours, adapter=str(tmp_path / "a"), check_base=fits)
