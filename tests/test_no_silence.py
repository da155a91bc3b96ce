"""What would be silently wrong is an error, or right: settings of a loaded set, merges, checkpointing, idle sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_peft import EVA, AdaLoRA, AdaLoRAConfig, DoRA, LoRAConfig, LoReFT, MoRAConfig, Pfeiffer, ReLoRA
from lit_peft.adapter import adapter_names, named_adapters
from lit_peft.named import activate, adapters, add_adapter, disabled, routed, train_adapters
from lit_peft.zoo import compose
from tests.many_adapters import move
from tests.models import save_tiny
from tests.test_methods import Case, batch, build, loader, outputs, quick_trainer, shake


def made(folder: Path, method: str, **settings: Any) -> Any:
    return build(Case(method, lambda _: 0, settings), folder, "sft")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny("llama", tmp_path / "base")


@pytest.mark.parametrize(
    ("method", "one", "other"),
    [
        ("lora", {"lora": {"r": 4, "alpha": 64}}, {"lora": {"r": 4, "alpha": 8}}),
        ("lora", {"lora": {"r": 4, "use_rslora": True}}, {"lora": {"r": 4}}),
        ("mora", {"mora": {"r": 2, "mora_type": 1}}, {"mora": {"r": 2, "mora_type": 2}}),
        ("adalora", {"adalora": {"alpha": 64}}, {"adalora": {"alpha": 8}}),
        (
            "ia3",
            {"ia3": {"target_modules": ["q_proj"], "feedforward_modules": ["q_proj"]}},
            {"ia3": {"target_modules": ["q_proj"]}},
        ),
    ],
)
def test_a_set_of_other_settings_is_not_filled(method: str, one: Any, other: Any, folder: Path, tmp_path: Path) -> None:
    source = made(folder, method, **one)
    shake(source)
    source.save_adapter(tmp_path / "saved")
    target = made(folder, method, **other)
    before = {n: p.clone() for n, p in target.named_parameters()}
    with pytest.raises(ValueError, match=r"start\s+from the folder|from the folder"):
        target.load_adapter(tmp_path / "saved")
    assert all(torch.equal(p, before[n]) for n, p in target.named_parameters())


def test_a_merge_that_cannot_be_leaves_the_model_whole(folder: Path) -> None:
    module = made(folder, "lora")
    with pytest.raises(ValueError, match="No adapter is named 'defualt'"):
        module.merge_adapters("defualt")
    assert list(named_adapters(module.model))
    module = made(folder, "lora+prefix")
    before = len(list(named_adapters(module.model)))
    with pytest.raises(TypeError, match="cannot be merged"):
        module.merge_adapters()
    assert len(list(named_adapters(module.model))) == before


def test_checkpointing_that_is_switched_on_late(folder: Path) -> None:
    rows = batch("sft")
    found = []
    for late in (False, True):
        module = made(folder, "lora", lora={"r": 4})
        module.add_adapter("two")
        move(module.model, "default", 1)
        move(module.model, "two", 2)
        module.train()
        if late:
            module.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with adapters(module, "default"):
            one = module.model(**rows).loss
        with adapters(module, "two"):
            two = module.model(**rows).loss
        (one + 2 * two).backward()
        found.append({n: p.grad for n, p in module.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.allclose(found[1][n], g, atol=1e-6) for n, g in found[0].items())


def test_a_name_too_few_in_training(folder: Path) -> None:
    module = made(folder, "lora")
    with routed(module, ["default", None]), pytest.raises(ValueError, match="2 rows"):
        module.model(**batch("sft"))


def test_an_idle_set_keeps_its_ranks(folder: Path, tmp_path: Path) -> None:
    settings = {"init_r": 6, "target_r": 2, "tinit": 1, "tfinal": 1, "deltaT": 1}
    module = made(folder, "adalora", adalora=settings)
    module.add_adapter("two")
    move(module.model, "two", 2)
    rows = batch("sft")
    with adapters(module, "two"):
        before = outputs(module, rows)
    quick_trainer(tmp_path, max_steps=8).fit(module, loader("sft", 8))
    with adapters(module, "two"):
        assert torch.allclose(outputs(module, rows), before, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "one", "config", "noted"),
    [
        ("adalora", {"adalora": {"alpha": 8}}, AdaLoRAConfig(init_r=5, target_r=2, alpha=40), {"init_r": 5}),
        ("mora", {"mora": {"r": 3, "mora_type": 1}}, MoRAConfig(r=2, mora_type=2), {"r": 2, "mora_type": 2}),
        ("lora", {"lora": {"alpha": 8}}, LoRAConfig(r=2, alpha=40), {"r": 2, "lora_alpha": 40}),
    ],
)
def test_a_set_added_to_the_model_is_saved_with_its_own_settings(
    method: str, one: Any, config: Any, noted: Any, folder: Path, tmp_path: Path
) -> None:
    module, rows = made(folder, method, **one), batch("sft")
    add_adapter(module.model, "two", config)
    move(module.model, "two", 1)
    module.save_adapter(tmp_path / "two", "two")
    written = json.loads((tmp_path / "two/adapter_config.json").read_text())
    assert noted.items() <= written.items()
    with adapters(module, "two"):
        expected = outputs(module, rows)
    again = made(folder, method, adapter=str(tmp_path / "two"))
    assert torch.allclose(outputs(again, rows), expected, atol=1e-6)


def test_each_set_meets_a_budget_of_its_own(folder: Path, tmp_path: Path) -> None:
    settings = {"init_r": 6, "target_r": 4, "tinit": 1, "tfinal": 1, "deltaT": 1}
    module = made(folder, "adalora", adalora=settings)
    module.add_adapter("two", adalora={**settings, "init_r": 5, "target_r": 2, "target_modules": ["q_proj", "v_proj"]})
    activate(module, "default", "two")
    quick_trainer(tmp_path, max_steps=8).fit(module, loader("sft", 8))
    for name, layers, mean in (("default", 14, 4), ("two", 4, 2)):
        sets = [adapter for _, adapter in named_adapters(module.model) if name in adapter.configs]
        assert len(sets) == layers
        assert sum(len(adapter.adalora_lambda[name]) for adapter in sets) == layers * mean


def test_a_further_set_that_needs_hooks_or_shares_a_base_that_changes(folder: Path, tmp_path: Path) -> None:
    module = made(folder, "lora")
    for method in (AdaLoRA, EVA, ReLoRA, LoReFT):  # LoReFT would edit the answers, not knowing where prompts end
        with pytest.raises(TypeError, match=f"{method.__name__} takes part in the training by its"):
            module.add_adapter("other", method)
    with pytest.raises(TypeError, match=r"bottleneck\.random_drop of a further adapter"):
        module.add_adapter("other", Pfeiffer, bottleneck={"random_drop": True})
    assert adapter_names(module.model) == ["default"]
    module.add_adapter("narrow", Pfeiffer)
    module.add_adapter("ranked", AdaLoRA, adalora=AdaLoRAConfig(init_r=3, target_r=2), train=False)
    assert {n for n, p in module.named_parameters() if p.requires_grad and n.endswith(".ranked")} == set()
    train_adapters(module, "ranked")
    with pytest.raises(TypeError, match="Make it the first one"):
        quick_trainer(tmp_path, max_steps=1).fit(module, loader("sft", 1))
    module = made(folder, "relora", lora={"r": 4}, restart_every=2)
    module.add_adapter("beside", DoRA, lora=LoRAConfig(r=2), train=False)
    with pytest.raises(TypeError, match="would change the base below"):
        quick_trainer(tmp_path, max_steps=5).fit(module, loader("sft", 5))


@pytest.mark.parametrize("stack", ["mora+lora", "lora+mora"])
def test_mora_beside_lora(stack: str, folder: Path) -> None:
    module = made(folder, stack, mora={"r": 2, "mora_type": 1}, lora={"r": 3})
    kinds = {type(adapter).__name__ for _, adapter in named_adapters(module.model)}
    assert kinds == {"MoRALinear", "LoRALinear"}


def test_names_that_a_module_needs(folder: Path) -> None:
    with pytest.raises(ValueError, match="cannot be the name"):
        made(folder, "lora").add_adapter("training")


@pytest.mark.parametrize(
    ("method", "one", "other", "said"),
    [
        ("lora", {"lora": {"alpha": 64}}, {"lora": {"alpha": 8}}, r"lora.alpha is 8 here and 64"),
        ("lora", {"lora": {"use_rslora": True}}, {}, r"lora.use_rslora is False here and True"),
        ("lora", {"lora": {"alpha_pattern": {"q_proj": 3.0}}}, {}, r"lora.alpha is 16 here and 3.0 .*q_proj"),
        ("lora", {"lora": {"r": 4}}, {"lora": {"r": 8}}, r"lora.r is 8 here and 4 .* Set it to 4\.$"),
        ("dora", {}, {"method": "lora"}, r"lora.use_dora is False here and True"),
        ("adalora", {"adalora": {"alpha": 64}}, {"adalora": {"alpha": 8}}, r"adalora.alpha is 8 here and 64"),
        ("mora", {"mora": {"r": 2, "mora_type": 1}}, {"mora": {"r": 2, "mora_type": 2}}, r"mora_type is 2 here and 1"),
        ("remora", {"mora": {"r": 2, "cycle": [1, 2]}}, {"mora": {"r": 2, "cycle": [1, 3]}}, r"mora.cycle is"),
        (
            "ia3",
            {"ia3": {"target_modules": ["q_proj"], "feedforward_modules": ["q_proj"]}},
            {"ia3": {"target_modules": ["q_proj"]}},
            r"feedforward is False here and True",
        ),
        ("pfeiffer", {"bottleneck": {"scale": 2.0}}, {}, r"bottleneck.scale is 1.0 here and 2.0"),
        ("prefix", {"prefix": {"num_virtual_tokens": 3}}, {}, r"num_virtual_tokens is 30 here and 3 .* Set it to 3\.$"),
        ("loreft", {"reft": {"first": 1, "last": 2}}, {"reft": {"first": 2, "last": 1}}, r"reft.first is 2 here and 1"),
    ],
)
def test_a_checkpoint_under_settings_of_another_meaning(
    method: str, one: Any, other: Any, said: str, folder: Path, tmp_path: Path
) -> None:
    module = made(folder, method, **one)
    trainer = quick_trainer(tmp_path, max_steps=1)
    trainer.fit(module, loader("sft", 1))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    settings = {key: value for key, value in other.items() if key != "method"}
    target = made(folder, other.get("method", method), **settings)
    before = {n: p.clone() for n, p in target.named_parameters()}
    with pytest.raises(ValueError, match=said):
        quick_trainer(tmp_path, max_steps=2).fit(target, loader("sft", 2), ckpt_path=tmp_path / "a.ckpt")
    assert all(torch.equal(p, before[n]) for n, p in target.named_parameters())


def test_a_change_of_meaning_that_is_meant(folder: Path, tmp_path: Path) -> None:
    module = made(folder, "lora", lora={"alpha": 64})
    module.add_adapter("two", lora=LoRAConfig(r=2, alpha=4))
    trainer = quick_trainer(tmp_path, max_steps=1)
    trainer.fit(module, loader("sft", 1))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    stored = torch.load(tmp_path / "a.ckpt", weights_only=True)
    other = made(folder, "lora", lora={"alpha": 64, "dropout": 0.1})
    other.add_adapter("two", lora=LoRAConfig(r=2, alpha=5))
    with pytest.raises(ValueError, match=r"alpha is 5 here in the adapter 'two' and 4 "):
        other.on_load_checkpoint(stored)
    other.check_settings = False
    quick_trainer(tmp_path, max_steps=2).fit(other, loader("sft", 2), ckpt_path=tmp_path / "a.ckpt")
    # what trains otherwise, but means the same, is no change of meaning
    same = made(folder, "lora", lora={"alpha": 64, "dropout": 0.2}, check_settings=False)
    same.add_adapter("two", lora=LoRAConfig(r=2, alpha=4))
    same.check_settings = True
    same.on_load_checkpoint(stored)


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers(weight: float, folder: Path) -> None:
    module = made(folder, "lora")
    module.add_adapter("two")
    with pytest.raises(ValueError, match=f"A weight is {weight}; each must be a finite number"):
        module.combine_adapters(["default", "two"], [0.5, weight], "both", "cat")
    assert adapter_names(module.model) == ["default", "two"]


def test_no_names_are_the_base_or_an_error(folder: Path) -> None:
    rows = batch("sft")
    module = made(folder, "lora")
    shake(module)
    with disabled(module):
        base = outputs(module, rows)
    with adapters(module):
        assert torch.equal(outputs(module, rows), base)
    module = made(folder, "lora", lora={"modules_to_save": ["norm"]})
    shake(module)
    with pytest.raises(TypeError, match="Use `disabled`"), adapters(module):
        pass
    with disabled(module):
        assert torch.equal(outputs(module, rows), base)


@pytest.mark.parametrize(
    ("method", "settings", "said"),
    [
        ("lora", {"lora": {"r": True}}, "lora.r is True; the rank must be 1 or more, a whole number"),
        ("lora", {"lora": {"rank_pattern": {"q_proj": 2.0}}}, "is 2.0; the rank must be 1 or more, a whole number"),
        ("lora", {"lora": {"init_lora_weights": "foo"}}, "lora.init_lora_weights is 'foo'; it must be one of default,"),
        ("adalora", {"adalora": {"init_r": 2.5, "target_r": 2}}, "adalora.init_r is 2.5; the rank must be a whole"),
        ("adalora", {"adalora": {"target_r": 2.5}}, "adalora.target_r is 2.5; it must be a whole number"),
        ("mora", {"mora": {"r": float("nan")}}, "mora.r is nan; it must be a whole number"),
        ("relora", {"lora": {"init_lora_weights": "pissa_niter_4"}}, "ReLoRA restarts plain LoRA only"),
    ],
)
def test_values_that_were_refused_late_or_in_riddles(method: str, settings: Any, said: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=said):
        compose(method, "sft")(str(folder), **settings)


@pytest.mark.parametrize("variant", ["dora", "rslora"])
def test_a_variant_does_not_become_plain_lora(variant: str, folder: Path, tmp_path: Path) -> None:
    made(folder, "lora").save_adapter(tmp_path / "plain")
    with pytest.raises(ValueError, match=f"{variant} is LoRA with it. Use --method lora"):
        made(folder, variant, adapter=str(tmp_path / "plain"))
    made(folder, variant).save_adapter(tmp_path / "own")
    assert made(folder, variant, adapter=str(tmp_path / "own")).lora.target_modules
    made(folder, "pissa", adapter=str(tmp_path / "plain"))  # what it saves is plain LoRA too


@pytest.mark.parametrize("stack", ["lora+relora", "lora+qlora"])
def test_a_method_below_its_own_variant(stack: str) -> None:
    with pytest.raises(TypeError, match=r"already, with more. Leave lora out of the stack") as caught:
        compose(stack, "sft")
    assert "\n" not in str(caught.value)


def test_one_adapter_named_twice(folder: Path) -> None:
    module = made(folder, "lora")
    with pytest.raises(ValueError, match="'default' is named twice"), adapters(module, "default", "default"):
        pass
    with pytest.raises(ValueError, match="'default' is named twice"), routed(module, ["default", ("default",) * 2]):
        pass
    with pytest.raises(ValueError, match="'default' is named twice"):
        module.merge_adapters("default", "default")
    with pytest.raises(ValueError, match="'default' is named twice"):
        activate(module.model, "default", "default")
    assert len(list(named_adapters(module.model))) == 14
