"""Named adapters of a module: added, frozen, saved, rebuilt in a fresh process."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lit_peft import (
    IA3,
    Freeze,
    Full,
    IA3Config,
    LoRA,
    LoRAConfig,
    activate,
    adapters,
    add_adapter,
    hub,
    load,
    place,
    routed,
    train_adapters,
)
from lit_peft.adapter import adapter_names, named_adapters
from lit_peft.methods.lora import LoRALinear
from lit_peft.tasks.sft import SFT
from tests.many_adapters import LoRATiny, four, inputs, move, out, own
from tests.models import save_tiny
from tests.test_methods import batch, loader, quick_trainer
from tests.tiny_adapted import Tiny, check_equal, in_peft, placed, shake


class LoRASFT(LoRA, SFT): ...


class Nameless(LoRA):
    """A method that was written before there were names."""

    def place_adapters(self) -> None:
        assert self.model is not None
        place(self.model, ["model.layers.0.mlp.up_proj"], lambda base: LoRALinear(base, LoRAConfig()))


def test_sets_have_their_own_targets_ranks_and_methods() -> None:
    module = four("llama")
    sets: dict[str, dict[str, int]] = {}
    for path, adapter in named_adapters(module.model):
        for name in adapter.configs:
            sets.setdefault(name, {}).setdefault(type(adapter).__name__, 0)
            sets[name][type(adapter).__name__] += 1
        assert path
    assert sets == {
        "default": {"LoRALinear": 14, "IA3Linear": 6, "BitFitBias": 14},
        "policy": {"LoRALinear": 8},
        "value": {"BitFitBias": 14},
        "reward": {"LoRALinear": 14, "IA3Linear": 6},
    }
    ranks = {adapter.configs["policy"].r for _, adapter in named_adapters(module.model) if "policy" in adapter.configs}
    assert ranks == {4}
    module.delete_adapter("reward")
    assert adapter_names(module.model) == ["default", "policy", "value"]
    assert not own(module.model, "reward")
    assert "reward" not in module.hparams["named"]
    with pytest.raises(ValueError, match="first adapter is the module's own"):
        module.delete_adapter("default")


def test_each_set_is_saved_alone_and_loads_elsewhere(tmp_path: Path) -> None:
    module = four("llama")
    module.save_adapter(tmp_path / "policy", "policy")
    check_equal(_active(module, "policy"), in_peft(tmp_path / "policy", "llama"), "llama")
    module.save_adapter(tmp_path / "reward", "reward")
    assert sorted(p.name for p in (tmp_path / "reward").iterdir() if p.is_dir()) == ["ia3", "lora"]
    fresh = placed(LoRATiny, "llama", lora=LoRAConfig(r=7, target_modules=["q_proj"]))
    fresh.load_adapter(tmp_path / "policy", "mine")
    assert torch.equal(out(fresh, "mine"), out(module, "policy"))
    with pytest.raises(ValueError, match=r"holds IA3 \+ LORA, and no method here reads IA3. Name its class"):
        fresh.load_adapter(tmp_path / "reward", "other")
    assert adapter_names(fresh.model) == ["default", "mine"]
    fresh.add_adapter("other", LoRA, IA3, folder=tmp_path / "reward")
    assert torch.allclose(out(fresh, "other"), out(module, "reward"), atol=1e-5)
    move(fresh.model, "mine", 9)
    fresh.load_adapter(tmp_path / "policy", "mine")  # filled again
    assert torch.equal(out(fresh, "mine"), out(module, "policy"))


def _active(module: Any, name: str) -> nn.Module:
    model = copy.deepcopy(module.model)
    activate(model, name)
    return model


def test_mistakes_in_adding_change_nothing(tmp_path: Path) -> None:
    module = placed(LoRATiny, "llama", lora=LoRAConfig(r=2))
    shake(module)
    module.save_adapter(tmp_path / "a")
    module.add_adapter("two")
    before = {key: p.clone() for key, p in module.model.named_parameters()}

    class Other(LoRA, Freeze, Full, Tiny): ...

    other = Other("llama")
    other.configure_model()
    (tmp_path / "a" / hub.WEIGHTS).rename(tmp_path / "kept")
    cases: list[tuple[Any, type[Exception], str]] = [
        (lambda: module.add_adapter("two"), ValueError, "already has an adapter named 'two'"),
        (lambda: module.add_adapter("default"), ValueError, "already has an adapter named 'default'"),
        (lambda: module.add_adapter("keys"), ValueError, "'keys' cannot be the name of an adapter"),
        (lambda: module.add_adapter("a.b"), ValueError, "'a.b' cannot be the name of an adapter"),
        (lambda: add_adapter(module, "a b"), ValueError, "'a b' cannot be the name of an adapter"),
        (
            lambda: module.add_adapter("new", ia3=IA3Config()),
            TypeError,
            r"no setting 'ia3'; these methods take \['lora'",
        ),
        (
            lambda: module.add_adapter("new", lora=LoRAConfig(target_modules=["nope"])),
            ValueError,
            "No module path ends",
        ),
        (lambda: module.add_adapter("new", folder=tmp_path / "a"), FileNotFoundError, "does not exist"),
        (lambda: module.save_adapter(tmp_path / "b", "nobody"), ValueError, "No adapter is named 'nobody'"),
        (lambda: module.delete_adapter("nobody"), ValueError, "No adapter is named 'nobody'"),
        (lambda: train_adapters(module, "nobody"), ValueError, "No adapter is named 'nobody'"),
        (lambda: module.add_adapter("new", Nameless), TypeError, "Nameless does not place under a name"),
        (lambda: other.add_adapter("new", freeze={"last_layers": 1}), TypeError, "Freeze trains existing weights"),
    ]
    for act, kind, message in cases:
        with pytest.raises(kind, match=message) as raised:
            act()
        assert "\n" not in str(raised.value)
    after = dict(module.model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(p, before[key]) for key, p in after.items())
    assert adapter_names(module.model) == ["default", "two"]


def test_a_shared_head_is_not_replaced_by_another_adapters(tmp_path: Path) -> None:
    one = placed(LoRATiny, "bert")
    shake(one)
    one.save_adapter(tmp_path / "a")
    with pytest.raises(ValueError, match="which all adapters share"):
        placed(LoRATiny, "bert").load_adapter(tmp_path / "a", "two")
    one.load_adapter(tmp_path / "a", "two")  # the same head
    assert adapter_names(one.model) == ["default", "two"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("bases") / "llama")


def built(base: Path, **settings: Any) -> Any:
    torch.manual_seed(1)
    return LoRASFT(str(base), lr=1e-2, scheduler="constant", **{"lora": {"r": 2}, **settings})


def test_a_frozen_adapter_acts_under_a_trained_one(base: Path, tmp_path: Path) -> None:
    first = built(base)
    quick_trainer(tmp_path, max_steps=3).fit(first, loader("sft", 3))
    first.save_adapter(tmp_path / "sft")
    second = built(base, named={"sft": {"adapter": str(tmp_path / "sft"), "train": False}}, active=["sft", "default"])
    second.configure_model()
    frozen = {key: p.detach().clone() for key, p in own(second.model, "sft").items()}
    assert not any(p.requires_grad for p in own(second.model, "sft").values())
    rows = {key: value for key, value in batch("sft").items() if key != "labels"}
    with torch.no_grad():
        start, learned = second.model(**rows).logits, first.model(**rows).logits
    torch.testing.assert_close(start, learned)  # the trained one is the identity yet
    trainer = quick_trainer(tmp_path, max_steps=3)
    trainer.fit(second, loader("sft", 3))
    optimised = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert optimised == {id(p) for p in own(second.model, "default").values()}
    assert all(torch.equal(p, frozen[key]) for key, p in own(second.model, "sft").items())
    with torch.no_grad():
        assert not torch.allclose(second.model(**rows).logits, start)
    train_adapters(second, "sft")
    assert {key.rpartition(".")[2] for key, p in second.model.named_parameters() if p.requires_grad} == {"sft"}


class Routed(LoRASFT):
    """Trains each row of the batch under another adapter."""

    def training_step(self, rows: dict[str, Tensor], index: int) -> Tensor:
        with routed(self, ["default", "two", "three", "two"]):
            return super().training_step(rows, index)


def many(base: Path, tmp_path: Path, **settings: Any) -> Any:
    torch.manual_seed(1)
    named = {"two": {"lora": {"r": 3}}, "three": {"lora": {"r": 1, "target_modules": "attention"}, "train": True}}
    return Routed(str(base), lr=1e-2, scheduler="constant", **{"lora": {"r": 2}, "named": named, **settings})


def test_a_checkpoint_with_several_names_resumes_exactly_and_is_rebuilt(base: Path, tmp_path: Path) -> None:
    straight = many(base, tmp_path)
    quick_trainer(tmp_path, max_epochs=2).fit(straight, loader("sft", 3))
    first = many(base, tmp_path)
    trainer = quick_trainer(tmp_path, max_epochs=1)
    trainer.fit(first, loader("sft", 3))
    activate(first, "two")
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    second = many(base, tmp_path)
    quick_trainer(tmp_path, max_epochs=2).fit(
        second, loader("sft", 3), ckpt_path=tmp_path / "a.ckpt", weights_only=True
    )
    expected = dict(straight.named_parameters())
    assert {key.rpartition(".")[2] for key in expected} >= {"default", "two", "three"}
    for name, parameter in second.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    again = load(tmp_path / "a.ckpt", device="cpu")  # from the file alone
    assert adapter_names(again.model) == ["default", "three", "two"]
    with torch.no_grad():
        for names in (["two"], ["three"], ["default", "two"]):
            rows = {k: v for k, v in batch("sft").items() if k != "labels"}
            with adapters(again, *names), adapters(first, *names):
                torch.testing.assert_close(again.model(**rows).logits, first.model(**rows).logits)
        torch.testing.assert_close(again.model(**rows).logits, first.model(**rows).logits)  # "two" acts in both


def test_what_was_added_later_is_in_the_checkpoint_too(base: Path, tmp_path: Path) -> None:
    source = built(base)
    source.configure_model()
    shake(source)
    source.save_adapter(tmp_path / "folder")
    module = built(base)
    module.add_adapter("early", lora=LoRAConfig(r=1))  # before there is a model
    module.configure_model()
    module.add_adapter("scaled", IA3)
    module.add_adapter("read", folder=tmp_path / "folder", train=False)
    module.combine_adapters(["default", "read"], [0.5, 2.0], "both", "cat")
    for index, name in enumerate(("default", "early", "scaled", "both")):
        move(module.model, name, index)
    activate(module, "both", "scaled")
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    for file in (tmp_path / "folder").iterdir():
        file.unlink()
    again = load(tmp_path / "a.ckpt", device="cpu")
    assert adapter_names(again.model) == ["both", "default", "early", "read", "scaled"]
    assert not any(p.requires_grad for p in own(again.model, "read").values())
    for names in (["early"], ["scaled"], ["read"], ["both"], ["both", "scaled"]):
        assert torch.equal(out(again, *names), out(module.eval(), *names)), names
    with torch.no_grad():
        assert torch.equal(again.model(**inputs("llama")).logits, out(again, "both", "scaled"))


def test_the_page_runs(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = built(base)
    source.configure_model()
    source.save_adapter("adapter")
    page = (Path(__file__).parents[1] / "docs" / "named_adapters.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len(blocks) == 4
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block.replace("Qwen/Qwen3-0.6B", str(base)), names)
    assert adapter_names(names["module"].model) == ["both", "default", "reward", "sft"]


def test_the_command_line_takes_named_adapters(base: Path) -> None:
    given = ["--model.named", '{"two": {"lora": {"r": 3}, "train": false}}', "--model.active", "[two, default]"]
    fit = [
        "fit",
        "--method",
        "lora",
        "--task",
        "sft",
        "--model.backbone",
        str(base),
        "--data.path",
        "x",
        "--print_config",
    ]
    command = [sys.executable, "-m", "lit_peft", *fit, *given]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]).stdout
    settings = yaml.safe_load(shown)["model"]
    settings = settings.get("init_args", settings)
    assert settings["named"] == {"two": {"lora": {"r": 3}, "train": False}}
    assert settings["active"] == ["two", "default"]


def test_merging_chosen_names() -> None:
    module = four("llama")
    expected = out(module, "policy", "reward")
    plain = copy.deepcopy(module).merge_adapters("policy", "reward")
    with torch.no_grad():
        found = plain(**inputs("llama")).logits
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
