"""`lit_peft.load` gives back what was saved, whatever it is, or says in one line why not."""

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from lit_peft import LoRA, disabled, load
from lit_peft.adapter import named_adapters
from lit_peft.tasks.sft import SFT
from lit_peft.zoo import compose
from tests.models import save_tiny
from tests.test_hub import shake

MESSAGES = [{"role": "user", "content": "What is this?"}]
IDS = torch.arange(5, 29).view(2, 12)


class OwnSFT(LoRA, SFT):
    """A user's own class, found by import."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {
        "llama": save_tiny("llama", folder / "llama"),
        "other": save_tiny("llama", folder / "other", seed=7),
        "t5": save_tiny("t5", folder / "t5"),
        "bert": save_tiny("bert", folder / "bert", "base"),
        "classifier": save_tiny("bert", folder / "classifier", "classification"),
    }


@torch.no_grad()
def logits(module: Any) -> Tensor:
    more = {"decoder_input_ids": IDS[:, :4]} if module.model.config.is_encoder_decoder else {}
    return module.model(input_ids=IDS, attention_mask=torch.ones_like(IDS), **more).logits  # type: ignore[no-any-return]


def built(cls: type[Any], base: Path, **settings: Any) -> Any:
    if cls.__name__.endswith("Classification"):
        settings["labels"] = ["yes", "no", "perhaps"]
    module = cls(str(base), **settings)
    module.configure_model()
    shake(module)
    return module.eval()


def checkpoint(module: Any, path: Path) -> Path:
    """Let the Trainer write a checkpoint, without training."""
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(module)
    module.trainer = trainer
    trainer.save_checkpoint(path, weights_only=True)
    return path


SAVED = [
    ("lora", "sft", "llama"),
    ("rslora", "sft", "t5"),
    ("bitfit", "sft", "llama"),
    ("freeze", "sft", "llama"),
    ("full", "sft", "t5"),
    ("lora+bitfit", "sft", "llama"),
    ("lora", "classification", "bert"),
    ("lora+bitfit", "classification", "bert"),
]


@pytest.mark.parametrize(("method", "task", "kind"), SAVED)
def test_checkpoint_and_folder(tmp_path: Path, bases: dict[str, Path], method: str, task: str, kind: str) -> None:
    settings = {"freeze": {"last_layers": 1}} if method == "freeze" else {}
    module = built(compose(method, task), bases[kind], **settings)
    wanted = logits(module)
    module.save_adapter(tmp_path / "adapter")
    for path in (checkpoint(module, tmp_path / "a.ckpt"), tmp_path / "adapter"):
        again = load(path, device="cpu")
        assert torch.equal(wanted, logits(again))
        assert not any(part.training for part in again.modules())
        assert again.tokenizer.chat_template
        if task == "sft":
            assert isinstance(again.reply(MESSAGES, max_new_tokens=3), str)
        else:
            assert again.labels == ["yes", "no", "perhaps"]
    assert type(load(tmp_path / "a.ckpt", device="cpu")) is type(module)


def test_adapter_only_checkpoint_restores_the_base(tmp_path: Path, bases: dict[str, Path]) -> None:
    module = built(compose("lora", "sft"), bases["llama"])
    again = load(checkpoint(module, tmp_path / "a.ckpt"), device="cpu")
    assert not torch.equal(logits(module), logits(built(compose("lora", "sft"), bases["llama"], lora={"r": 1})))
    with disabled(module), disabled(again):
        assert torch.equal(logits(module), logits(again))


def test_users_own_class(tmp_path: Path, bases: dict[str, Path]) -> None:
    module = built(OwnSFT, bases["llama"], lora={"r": 2, "target_modules": ["q_proj"]})
    again = load(checkpoint(module, tmp_path / "a.ckpt"), device="cpu")
    assert type(again) is OwnSFT
    assert (again.lora.r, again.lora.target_modules) == (2, ["q_proj"])
    assert torch.equal(logits(module), logits(again))


def test_run_that_started_from_an_adapter_that_is_gone(tmp_path: Path, bases: dict[str, Path]) -> None:
    built(compose("lora", "sft"), bases["llama"], lora={"r": 3}).save_adapter(tmp_path / "first")
    module = built(compose("lora", "sft"), bases["llama"], adapter=str(tmp_path / "first"))
    path = checkpoint(module, tmp_path / "a.ckpt")
    shutil.rmtree(tmp_path / "first")
    again = load(path, device="cpu")
    assert again.lora.r == 3
    assert torch.equal(logits(module), logits(again))


def test_thawed_weights_are_restored_and_never_dropped(tmp_path: Path, bases: dict[str, Path]) -> None:
    module = built(compose("lora", "sft"), bases["llama"])
    thawed = module.model.get_parameter("model.layers.1.input_layernorm.weight")
    with torch.no_grad(), disabled(module):
        base = logits(module)
    thawed.requires_grad_(True)
    with torch.no_grad():
        thawed.mul_(2)
    again = load(checkpoint(module, tmp_path / "a.ckpt"), device="cpu")
    assert torch.equal(logits(module), logits(again))
    with disabled(again):
        assert torch.equal(base, logits(again))
    for either in (module, again):
        with pytest.raises(ValueError, match="1 thawed weights of the base were trained too"):
            either.save_adapter(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


# HF PEFT's folders ----------------------------------------------------------------------------------------------------


def test_pefts_language_model(tmp_path: Path, bases: dict[str, Path]) -> None:
    for task_type in ("CAUSAL_LM", None):
        model = AutoModelForCausalLM.from_pretrained(bases["llama"])
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type=task_type)
        theirs = peft.get_peft_model(model, config).eval()
        shake(theirs)
        theirs.save_pretrained(tmp_path / str(task_type))
        module = load(tmp_path / str(task_type), device="cpu")
        with torch.no_grad():
            assert (theirs(IDS).logits - logits(module)).abs().max() < 1e-5
        assert type(module).__name__ == "LoRASFT"


def test_pefts_classifier(tmp_path: Path, bases: dict[str, Path]) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(bases["bert"], num_labels=5)
    theirs = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS")).eval()
    shake(theirs)
    theirs.save_pretrained(tmp_path / "a")
    module = load(tmp_path / "a", device="cpu")
    assert module.labels == [f"LABEL_{i}" for i in range(5)]
    with torch.no_grad():
        assert (theirs(IDS).logits - logits(module)).abs().max() < 1e-5


def test_tokenizer_beside_the_adapter_wins(tmp_path: Path, bases: dict[str, Path]) -> None:
    module = built(compose("lora", "sft"), bases["llama"])
    module.save_adapter(tmp_path / "a")
    tokenizer = AutoTokenizer.from_pretrained(bases["llama"])
    tokenizer.chat_template = "{% for m in messages %}Q: {{ m['content'] }} A:{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "a")
    assert load(tmp_path / "a", device="cpu").tokenizer.chat_template == tokenizer.chat_template


# Whole models and run folders -----------------------------------------------------------------------------------------


def test_merged_model(tmp_path: Path, bases: dict[str, Path]) -> None:
    module = built(compose("lora", "sft"), bases["llama"])
    wanted = logits(module)
    module.merge_adapters().save_pretrained(tmp_path / "merged")
    module.tokenizer.save_pretrained(tmp_path / "merged")
    again = load(tmp_path / "merged", device="cpu")
    assert (wanted - logits(again)).abs().max() < 1e-4
    assert not list(named_adapters(again.model))
    assert load(bases["classifier"], device="cpu").labels == ["LABEL_0", "LABEL_1", "LABEL_2"]
    with pytest.raises(ValueError, match="no base to choose"):
        load(tmp_path / "merged", backbone="x")


def test_run_folder_prefers_the_best(tmp_path: Path, bases: dict[str, Path]) -> None:
    folder = tmp_path / "run" / "checkpoints"
    paths = {}
    for seed, name in enumerate(("step=2", "best", "last")):
        module = built(compose("lora", "sft"), bases["llama"], lora={"r": seed + 1})
        paths[name] = checkpoint(module, folder / f"{name}.ckpt")
        os.utime(paths[name], (seed, seed))
    assert load(tmp_path / "run", device="cpu").lora.r == 2
    paths["best"].unlink()
    assert load(tmp_path / "run", device="cpu").lora.r == 3
    stored = torch.load(paths["last"], weights_only=True)
    stored["callbacks"] = {"ModelCheckpoint{}": {"best_model_path": "/elsewhere/step=2.ckpt"}}
    torch.save(stored, paths["last"])
    assert load(tmp_path / "run", device="cpu").lora.r == 1


# What is refused ------------------------------------------------------------------------------------------------------


class Bomb:
    """What a hostile checkpoint would hold."""

    def __reduce__(self) -> Any:
        return os.system, ("true",)


def changed(path: Path, **changes: Any) -> None:
    torch.save({**torch.load(path, weights_only=True), **changes}, path)


def noted(path: Path, **changes: Any) -> None:
    stored = torch.load(path, weights_only=True)
    torch.save({**stored, "lit_peft": {**stored["lit_peft"], **changes}}, path)


def tensors(path: Path, change: Any) -> None:
    stored = torch.load(path, weights_only=True)
    state = change(stored["state_dict"])
    changed(path, state_dict=state)
    noted(path, keys=sorted(state))


MISTAKES: dict[str, tuple[Any, str]] = {
    "missing": (lambda p: p.unlink(), "There is nothing at"),
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-200]), "damaged"),
    "empty": (lambda p: p.write_bytes(b""), "damaged"),
    "text": (lambda p: p.write_text("hello"), "damaged"),
    "code": (lambda p: p.write_bytes(pickle.dumps({"state_dict": Bomb()})), "could run code|damaged"),
    "zipped code": (lambda p: torch.save({"state_dict": Bomb()}, p), "could run code"),
    "another library's": (lambda p: torch.save({"state_dict": {}}, p), "no checkpoint of lit_peft"),
    "unknown class": (lambda p: noted(p, class_path="nowhere.Mine"), "cannot be imported here"),
    "unknown method": (lambda p: noted(p, class_path="lit_peft.zoo.WarpSFT"), "cannot be imported here"),
    "no module": (lambda p: noted(p, class_path="pathlib.Path"), "no module of lit_peft"),
    "another base": (lambda p: noted(p, base={"name": "x", "sha": "sha256:1"}), "This adapter was made on 'x'"),
    "lacking keys": (lambda p: tensors(p, lambda s: dict(list(s.items())[3:])), "lacks 3 of the weights"),
    "surplus keys": (lambda p: tensors(p, lambda s: {**s, "model.x": torch.ones(1)}), "holds 1 weights"),
    "other shapes": (lambda p: tensors(p, lambda s: {k: v[:1] for k, v in s.items()}), "Shapes differ for 'model."),
}


@pytest.mark.parametrize(("mistake", "message"), MISTAKES.values(), ids=MISTAKES)
def test_bad_checkpoint_is_one_line(tmp_path: Path, bases: dict[str, Path], mistake: Any, message: str) -> None:
    path = checkpoint(built(compose("lora", "sft"), bases["llama"]), tmp_path / "a.ckpt")
    mistake(path)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        load(path, device="cpu")
    assert "\n" not in str(caught.value)


def test_other_base_by_its_hash(tmp_path: Path, bases: dict[str, Path]) -> None:
    module = built(compose("lora", "sft"), bases["llama"])
    module.save_adapter(tmp_path / "a")
    copy = shutil.copytree(bases["llama"], tmp_path / "a-copy-of-it")
    for path in (checkpoint(module, tmp_path / "a.ckpt"), tmp_path / "a"):
        with pytest.raises(ValueError, match="This adapter was made on"):
            load(path, backbone=str(bases["other"]), device="cpu")
        assert not torch.equal(
            logits(load(path, backbone=str(bases["other"]), check_base=False, device="cpu")), logits(module)
        )
        assert torch.equal(logits(load(path, backbone=str(copy), device="cpu")), logits(module))


def test_folders_without_anything(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no checkpoint, adapter or model"):
        load(tmp_path)
    (tmp_path / ".metadata").touch()
    with pytest.raises(FileNotFoundError, match="sharded checkpoint"):
        load(tmp_path)


def test_adapter_that_says_too_little(tmp_path: Path, bases: dict[str, Path]) -> None:
    theirs = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(bases["llama"]), peft.LoraConfig(target_modules=["q_proj"])
    )
    folder = tmp_path / "a"
    theirs.save_pretrained(folder)
    text = (folder / "adapter_config.json").read_text()
    for old, new, message in (
        ("LlamaForCausalLM", "", "does not say which task it is for"),
        ("LlamaForCausalLM", "WhisperForAudioClassification", "which no task here covers"),
        ('"peft_type": "LORA"', '"peft_type": "WARP"', "holds an adapter of type WARP"),
        (str(bases["llama"]), "", "does not say which base model"),
        (str(bases["llama"]), "/gone/llama", "/gone/llama"),
    ):
        (folder / "adapter_config.json").write_text(text.replace(old, new))
        with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
            load(folder, device="cpu")
        assert "\n" not in str(caught.value)
    (folder / "adapter_config.json").write_text(text.replace("LlamaForCausalLM", ""))
    assert type(load(folder, task="sft", device="cpu")).__name__ == "LoRASFT"
    with pytest.raises(ValueError, match="Did you mean sft"):
        load(folder, task="sfft", device="cpu")
