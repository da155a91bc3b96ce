"""What the GPU script will run, at sizes that the interpreter manages: the kernels agree with float64."""

from pathlib import Path

import pytest

import benchmarks.kernel_cases
from benchmarks.kernel_cases import Case, all_cases
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


def test_every_kernel_has_cases() -> None:
    assert set(KERNELS) <= {path.stem for path in Path(benchmarks.kernel_cases.__path__[0]).glob("*.py")}
