"""What the GPU script will run, at sizes that the interpreter manages: the kernels agree with float64."""

import sys
from pathlib import Path
from typing import Any

import pytest

import benchmarks.kernel_cases
from benchmarks.kernel_cases import Case, all_cases
from lit_peft.ops.choice import takes_kernel
from tests.kernels.test_aot import KERNELS
from tests.kernels.where import DEVICE
from tests.ops.exact import agree


@pytest.mark.parametrize("case", all_cases(small=True), ids=lambda case: case.name)
def test_kernel_and_plain_path_agree_with_float64(case: Case) -> None:
    inputs = case.make(DEVICE)
    wanted = case.exact(*inputs)
    for kernels in (True, False):
        found = case.run(*inputs, kernels=kernels)
        assert len(found) == len(wanted)
        for got, exact in zip(found, wanted, strict=True):
            agree(got, exact, case.tolerance)


@pytest.mark.parametrize("case", all_cases(small=True), ids=lambda case: case.name)
def test_crossovers_are_told_in_what_the_op_asks_with(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, set[str]] = {}

    def noting(op: str, x: Any, kernels: bool | None = None, **sizes: int) -> bool:
        asked.setdefault(op, set()).update(sizes)
        return takes_kernel(op, x, kernels, **sizes)

    for name, module in list(sys.modules.items()):
        if name.startswith("lit_peft.ops.") and hasattr(module, "takes_kernel") and name != "lit_peft.ops.choice":
            monkeypatch.setattr(module, "takes_kernel", noting)
    case.run(*case.make(DEVICE), kernels=True)
    if case.op == "nf4_product" and DEVICE.type == "cpu":
        return  # bitsandbytes' own product is for GPUs: nothing is to be chosen here
    assert case.op in asked
    assert set(case.sizes) <= asked[case.op]


def test_every_kernel_has_cases() -> None:
    assert set(KERNELS) <= {path.stem for path in Path(benchmarks.kernel_cases.__path__[0]).glob("*.py")}
