"""Every method has a learning rate of its own, and one far from it is a warning: the costliest mistake of all."""

from __future__ import annotations

import re
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from lit_peft import IA3, LoRA, LoRAConfig, LoRAPlus, PiSSA
from lit_peft.catalogue import FACTS, METHODS
from lit_peft.zoo import compose
from tests.models import save_tiny
from tests.test_methods import CASES


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("rates") / "llama")


def usual(method: str) -> float:
    """The method's own, else that of its settings: several methods share LoRA's."""
    own, settings = (import_class(path) for path in (METHODS[method], FACTS[method].config))
    return float(own.default_lr if hasattr(own, "default_lr") else settings.default_lr)


def import_class(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(f"lit_peft.{module}"), name) if path else None


def groups(method: str, folder: Path, **more: Any) -> tuple[list[dict[str, Any]], list[str]]:
    """The optimizer's groups and what was warned while they were made."""
    settings = next((case.settings for case in CASES if case.method == method), {})
    module: Any = compose(method, "sft")(str(folder), **settings, **more)
    module.configure_model()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = module.parameter_groups()
    messages = [str(entry.message) for entry in caught]
    return found, [message for message in messages if re.search(r"\blr\b|learning rate", message)]


@pytest.mark.parametrize("config", sorted({facts.config for facts in FACTS.values() if facts.config}))
def test_every_config_has_one(config: str) -> None:
    assert isinstance(import_class(config).default_lr, float)


@pytest.mark.parametrize("method", METHODS)
def test_own_learning_rate_is_used_and_is_a_sensible_one(method: str, folder: Path) -> None:
    own = usual(method)
    assert 1e-6 <= own <= 1e-1
    found, warned = groups(method, folder)
    assert own in {group["lr"] for group in found}
    assert not warned


@pytest.mark.parametrize("method", METHODS)
def test_more_than_a_decade_away_warns_once_with_both_numbers(method: str, folder: Path) -> None:
    own = usual(method)
    for factor in (30, 1 / 30):
        found, warned = groups(method, folder, lr=own * factor)
        assert len(warned) == 1
        assert f"{own * factor:g}" in warned[0]
        assert f"{own:g}" in warned[0]
        assert own * factor in {group["lr"] for group in found}
    for factor in (5, 0.2):
        assert not groups(method, folder, lr=own * factor)[1]


def test_a_stack_warns_once(folder: Path) -> None:
    _, warned = groups("lora+bitfit", folder, lr=0.5)
    assert len(warned) == 1
    _, warned = groups("lora+bitfit", folder, lr=1.5e-3)  # near both
    assert not warned


def test_each_named_set_has_the_rates_of_its_method(folder: Path) -> None:
    module: Any = compose("lora", "sft")(str(folder), lora={"r": 2})
    module.add_adapter("raised", LoRAPlus, lora=LoRAConfig(r=2, loraplus_lr_ratio=4))
    module.add_adapter("principal", PiSSA, lora=LoRAConfig(r=2))
    module.add_adapter("scaled", IA3)
    module.configure_model()
    names = {id(p): n for n, p in module.named_parameters()}

    def rates(**given: float) -> dict[tuple[str, str], set[float]]:
        found: dict[tuple[str, str], set[float]] = {}
        for group in module.parameter_groups(**given):
            for parameter in group["params"]:
                part, name = names[id(parameter)].split(".")[-2:]
                found.setdefault((name, part), set()).add(group["lr"])
        return found

    assert rates() == {
        ("default", "lora_a"): {2e-4},
        ("default", "lora_b"): {2e-4},
        ("raised", "lora_a"): {1e-4},
        ("raised", "lora_b"): {4e-4},
        ("principal", "lora_a"): {2e-5},
        ("principal", "lora_b"): {2e-5},
        ("scaled", "ia3_l"): {3e-3},
    }
    given = rates(lr=1e-3)
    assert given.pop(("raised", "lora_b")) == {4e-3}
    assert set().union(*given.values()) == {1e-3}


def test_two_ratios(folder: Path) -> None:
    module: Any = compose("loraplus", "sft")(str(folder), lora={"r": 2, "loraplus_lr_ratio": 8})
    module.add_adapter("two", lora=LoRAConfig(r=2, loraplus_lr_ratio=2))
    module.add_adapter("plain", LoRA, lora=LoRAConfig(r=2))
    module.configure_model()
    names = {id(p): n.rpartition(".")[2] for n, p in module.named_parameters()}
    found = {(names[id(p)], g["lr"]) for g in module.parameter_groups(lr=1e-4) for p in g["params"]}
    assert found == {("default", 1e-4), ("default", 8e-4), ("two", 1e-4), ("two", 2e-4), ("plain", 1e-4)}
