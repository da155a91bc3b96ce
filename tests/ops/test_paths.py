"""Which path is taken: LIT_PEFT_KERNELS=0 launches nothing, =1 launches every kernel, and both give the same."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lit_peft
from benchmarks.kernel_cases import Case, all_cases
from lit_peft import LoRAConfig, adapters, routed
from lit_peft.low_rank.linear import LoRALinear
from lit_peft.ops.lean import make_lean
from tests.kernels.where import DEVICE
from tests.ops.exact import adapted, agree, gradients

OPS = Path(lit_peft.__file__).parent / "ops"
FILES = {path.stem: path.read_text() for path in OPS.glob("*.py") if path.stem != "choice"}
CASES = all_cases(small=True)


class Launches(TorchDispatchMode):
    """Lists which of our registered operations are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "lit_peft":
            self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


def test_every_op_that_has_a_kernel_has_a_case() -> None:
    asked = {name for text in FILES.values() for name in re.findall(r"takes_kernel\(\s*\"(\w+)\"", text)}
    assert asked
    assert asked <= {case.op for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_environment_decides(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = case.make(DEVICE)
    for forced in ("0", "1"):
        monkeypatch.setenv("LIT_PEFT_KERNELS", forced)
        with Launches() as launches:
            case.run(*inputs, kernels=None)
        assert bool(launches.names) == (forced == "1")


@pytest.mark.parametrize("rows", [None, ["default", "b"]], ids=["one set", "routed"])
def test_a_model_launches_kernels_or_none(rows: list[Any] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = adapted(num_hidden_layers=1).to(DEVICE, torch.float32), torch.arange(20, device=DEVICE).view(2, 10)
    make_lean(model)
    for layer in model.modules():
        if isinstance(layer, LoRALinear) and rows:
            layer.add("b", LoRAConfig(r=3))
    found = []
    for forced in ("0", "1"):
        monkeypatch.setenv("LIT_PEFT_KERNELS", forced)
        model.zero_grad()
        with Launches() as launches, routed(model, rows) if rows else adapters(model, "default"):
            found.append(gradients(model, ids))
        assert bool(launches.names) == (forced == "1")
        assert not rows or forced == "0" or "lit_peft::grouped_collect" in launches.names
    agree(found[1][0], found[0][0], 1e-5)
    for one, other in zip(found[1][1], found[0][1], strict=True):
        agree(one, other, 1e-3)  # as far as float32 itself is from float64 in this model
