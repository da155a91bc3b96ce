"""Adapter folders against the real HF PEFT, both ways, and everything that must be refused."""

import copy
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lit_peft import hub
from lit_peft.methods.bitfit import BitFit, BitFitConfig
from lit_peft.methods.freeze import Freeze, FreezeConfig
from lit_peft.methods.full import Full
from lit_peft.methods.lora import LoRA, LoRAConfig, RsLoRA
from lit_peft.mixin import PEFT
from lit_peft.module import AdaptableModule
from tests.models import tiny

KINDS = {"llama": "lm", "gpt2": "lm", "bert": "classification", "t5": "lm"}
TASK_TYPES = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}
HEADS = ("classifier", "score")


class Tiny(AdaptableModule):
    """A task without a loss: a tiny model, its head trained where it has one."""

    def __init__(self, kind: str, seed: int = 0, base: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.kind = kind
        self.seed = seed
        self.backbone_identity = {"name": f"tiny/{kind}", "revision": None, "sha": None, **(base or {})}
        self.peft_task_type = TASK_TYPES[kind]

    def configure_model(self) -> None:
        super().configure_model()
        if self.model is None:
            self.model = tiny(self.kind, KINDS[self.kind], seed=self.seed)

    def is_trainable(self, name: str, parameter: nn.Parameter) -> bool:
        return name.split(".")[0] in HEADS or super().is_trainable(name, parameter)


class LoRATiny(LoRA, Tiny): ...


class RsLoRATiny(RsLoRA, Tiny): ...


class BitFitTiny(BitFit, Tiny): ...


class FreezeTiny(Freeze, Tiny): ...


class FullTiny(Full, Tiny): ...


class LoRABitFitTiny(LoRA, BitFit, Tiny): ...


class LoRAFreezeTiny(LoRA, Freeze, Tiny): ...


def placed(cls: type[Any], kind: str, **kwargs: Any) -> Any:
    module = cls(kind, **kwargs)
    module.configure_model()
    return module.eval()


def shake(module: nn.Module, seed: int = 1, size: float = 0.1) -> None:
    """Give everything that is trained other values, so that a tensor that was lost on the way is noticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=size)


@torch.no_grad()
def logits(model: nn.Module, kind: str) -> Tensor:
    ids = torch.arange(5, 29).view(2, 12)
    inputs: dict[str, Tensor] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if kind == "t5":
        inputs["decoder_input_ids"] = ids[:, :4]
    return model(**inputs).logits  # type: ignore[no-any-return]


@torch.no_grad()
def check_equal(one: nn.Module, other: nn.Module, kind: str) -> None:
    """Logits agree to 1e-6 of the largest in fp32, which leaves room for the order of sums, and exactly in fp64."""
    a, b = logits(one, kind), logits(other, kind)
    assert (a - b).abs().max() <= 1e-6 * a.abs().max().clamp(min=1)
    a, b = logits(copy.deepcopy(one).double(), kind), logits(copy.deepcopy(other).double(), kind)
    assert (a - b).abs().max() <= 1e-12


def base_model(kind: str) -> Any:
    return tiny(kind, KINDS[kind])


def in_peft(folder: Path, kind: str) -> nn.Module:
    """Load a folder with the real PEFT, which must have nothing to complain about."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # what it says about configurations and keys
        return peft.PeftModel.from_pretrained(base_model(kind), folder).eval()  # type: ignore[no-any-return]


def by_peft(folder: Path, kind: str, **settings: Any) -> nn.Module:
    """Write a folder with the real PEFT, random B, and return its model."""
    defaults = {"r": 4, "lora_alpha": 12, "task_type": TASK_TYPES[kind]}
    model = peft.get_peft_model(base_model(kind), peft.LoraConfig(**{**defaults, **settings})).eval()
    shake(model, 2)
    model.save_pretrained(folder)
    return model  # type: ignore[no-any-return]


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
    "wrong leaf": (lambda f: retensored(f, renamed("lora_A", "lora_Q")), "holds no 'lora_A.weight'|lacks weights"),
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
    "dora": (lambda f: edited(f, use_dora=True), "use_dora=True"),
    "bias": (lambda f: edited(f, bias="all"), "bias='all'"),
    "lora_bias": (lambda f: edited(f, lora_bias=True), "lora_bias=True"),
    "rank_pattern": (lambda f: edited(f, rank_pattern={"q_proj": 4}), "rank_pattern="),
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
