"""The kernel back through the gated product against float64: both gradients, h again, P and both dB."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lit_peft.kernels.gated_back import gated_back as launch
from lit_peft.ops import gated_back as module
from lit_peft.ops.gated_back import gated_back
from tests.kernels.test_spread import DTYPES, deterministic
from tests.kernels.where import DEVICE
from tests.ops.exact import TOLERANCE, agree
from tests.ops.test_gated_back import RANKS, check, exact, problem


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the plain path, what is returned is the kernel's."""
    monkeypatch.delattr(module, "gated_back_reference")


def drawn(rows: int, f: int, ranks: tuple[int | None, ...], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    low = torch.float32 if ranks[0] == 16 else dtype  # adapters in float32 are rounded in registers
    return problem(rows, f, ranks, dtype, low, DEVICE)


@pytest.mark.usefixtures("launched")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ranks", [*RANKS, (1, 48, 16)], ids=str)
def test_all_results(ranks: tuple[int | None, ...], dtype: torch.dtype) -> None:
    given = drawn(19, 131 if dtype != torch.float32 else 67, ranks, dtype)  # two blocks of columns
    check(gated_back(**given, again=True, kernels=True), given)


@pytest.mark.usefixtures("launched")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 5), (70, 3), (2, 130)], ids=str)
def test_shapes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    given = drawn(*shape, (2, 3, 1), dtype)
    check(gated_back(**given, again=False, kernels=True), given, again=False)


def test_no_rows() -> None:
    both, out, p, db_e, db_g = gated_back(**drawn(0, 5, (2, 3, 1)), again=True, kernels=True)
    assert (both.shape, out.shape, p.shape) == ((0, 10), (0, 5), (4, 0))
    assert not db_e.any()
    assert not db_g.any()
    assert (db_e.shape, db_g.shape) == ((5, 3), (5, 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("staged", [False, True])
def test_sums_of_several_programs(dtype: torch.dtype, staged: bool) -> None:
    """Three programs share out the rows, the last with fewer, and two or more the columns."""
    given = drawn(75, 140, (3, 7, 2), dtype)
    with deterministic(staged):
        found = [launch(*given.values(), True, strip=32) for _ in range(2)]
    wanted = exact(given)
    for results in found:
        for got, right in zip(results, [*wanted[:3], torch.cat([db.flatten() for db in wanted[3:]])], strict=True):
            agree(got, right, TOLERANCE[dtype])
    if staged:
        assert all(one.equal(other) for one, other in zip(*found, strict=True))


@pytest.mark.usefixtures("launched")
def test_uneven_memory() -> None:
    given = drawn(9, 11, (2, 3, 4))
    for name, value in given.items():
        if isinstance(value, Tensor):
            given[name] = value.t().contiguous().t()
    check(gated_back(**given, again=True, kernels=True), given)
    wide = drawn(9, 22, (None, None, None))["d"]
    given["d"] = wide[:, 4:15]
    check(gated_back(**given, again=True, kernels=True), given)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # which is as it should be: 1 / inf is 0
@pytest.mark.usefixtures("launched")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_far_from_zero(dtype: torch.dtype) -> None:
    """Where the logistic function is 0 or 1, with exponentials too large for float32 on the way."""
    given = drawn(9, 11, (2, 3, 4), dtype)
    given["e"] = given["e"] * 300
    check(gated_back(**given, again=True, kernels=True), given)


def test_what_the_kernel_does_not_take_goes_the_plain_way() -> None:
    for ranks, dtype in (((65, 1, 1), torch.float32), ((1, 40, 40), torch.float32), ((1, 1, 1), torch.float64)):
        given = drawn(3, 5, ranks, dtype)
        check(gated_back(**given, again=True, kernels=True), given)


@pytest.mark.parametrize("ranks", [(2, 3, 4), (None, None, 1), (None, None, None)], ids=str)
def test_registered(ranks: tuple[int | None, ...]) -> None:
    """Shapes, strides and devices of the fake operation are those of the launch."""
    for again in (False, True):
        torch.library.opcheck(torch.ops.lit_peft.gated_back, (*drawn(5, 12, ranks).values(), again))
