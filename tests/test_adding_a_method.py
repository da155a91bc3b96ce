"""The method on the page `docs/adding_a_method.md` keeps the contract that every method of the library keeps."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from lit_peft import place
from lit_peft.adapter import merge, named_adapters
from lit_peft.catalogue import METHODS
from lit_peft.named import disabled
from lit_peft.sites import linears, widths
from tests import test_methods as contract
from tests.models import save_tiny, tiny

PAGE = Path(__file__).parents[1] / "docs" / "adding_a_method.md"
PROMISES = [
    contract.test_starts_as_the_base_and_steps_aside,
    contract.test_only_what_is_declared_trains,
    contract.test_merged_equals_unmerged,
    contract.test_checkpoint_holds_only_what_is_trained_and_resumes_exactly,
    contract.test_saved_and_reloaded_equals_trained,
    contract.test_gradient_checkpointing_and_accumulation_change_no_gradient,
]


@pytest.fixture
def scaling(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The first block of the page, imported as the file that the page says it is, and entered into the catalogue."""
    found = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    assert found is not None
    module = ModuleType("lit_peft.methods.scaling")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(found[1], str(PAGE), "exec"), module.__dict__)
    monkeypatch.setitem(METHODS, "scaling", "methods.scaling.Scaling")
    yield module
    from lit_peft import zoo

    for name in [name for name in zoo._MADE if "Scaling" in name]:
        del zoo._MADE[name]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_on_a_plain_model(kind: str, scaling: Any) -> None:
    model, ids = tiny(kind), torch.arange(5, 17)[None]
    with torch.no_grad():
        base = model(ids).logits
        place(model, list(linears(model)), lambda layer: scaling.ScalingLinear(layer, scaling.ScalingConfig()))
        assert torch.equal(model(ids).logits, base)
        for _, adapter in named_adapters(model):
            torch.nn.init.uniform_(adapter.scaling_vector["default"], 0.5, 1.5)
        adapted = model(ids).logits
        assert (adapted - base).abs().max() > 0.01
        with disabled(model):
            assert torch.equal(model(ids).logits, base)
        merge(model)
        assert not list(named_adapters(model))
        assert (model(ids).logits - adapted).abs().max() < 1e-5 * adapted.abs().max()


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.__name__.removeprefix("test_"))
@pytest.mark.parametrize("method", ["scaling", "scaling+lora"])
def test_keeps_the_contract(method: str, promise: Any, scaling: Any, tmp_path: Path) -> None:
    def count(model: torch.nn.Module) -> int:
        scales = sum(widths(linear)[1] for linear in linears(model).values())
        return scales + (contract.lora_count(4)(model) if "lora" in method else 0)

    case = contract.Case(method, count, {"lora": {"r": 4}} if "lora" in method else {})
    backbone = save_tiny("llama", tmp_path / "backbone")
    wanted: dict[str, Any] = {"case": case, "kind": "llama", "task": "sft", "tmp_path": tmp_path}
    wanted["folders"] = lambda kind, task: backbone
    asked = promise.__code__.co_varnames[: promise.__code__.co_argcount]
    promise(**{name: wanted[name] for name in asked})
