"""The kernels of the backward pass against float64."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from lit_peft.kernels.spread import dyb_db
from lit_peft.ops import shrink
from tests.kernels.where import DEVICE
from tests.ops.exact import TOLERANCE, agree

SIZES = [(5, 3, 1), (1, 65, 7), (35, 40, 8), (9, 140, 16), (33, 24, 64)]  # rows, out, r
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PAIRS = [(size, torch.bfloat16) for size in SIZES] + [(SIZES[i], dtype) for i in (0, 2) for dtype in DTYPES[::2]]


@contextmanager
def deterministic(on: bool) -> Iterator[None]:
    torch.use_deterministic_algorithms(on)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize(("size", "dtype"), PAIRS, ids=str)
@pytest.mark.parametrize("staged", [False, True])
def test_both_products_in_one_read(size: tuple[int, int, int], dtype: torch.dtype, staged: bool, split: int) -> None:
    rows, tall, r = size
    g, b = torch.randn(rows, tall, device=DEVICE).to(dtype), torch.randn(tall, r, device=DEVICE)
    h, gain = torch.randn(rows, r, device=DEVICE).to(dtype), torch.linspace(-1, 2, r, device=DEVICE)
    with deterministic(staged):
        inner, db, packed = dyb_db(g, b, h, gain, 0.5, 0.0, 0, 64, split)
    exact = 0.5 * g.double() @ b.double()
    agree(inner, exact, TOLERANCE[dtype])
    assert db.dtype == torch.float32
    agree(db, 0.5 * g.double().t() @ (h.double() * gain.double()), 1e-6)
    assert packed[:, :tall].equal(g)
    agree(packed[:, tall : tall + r], exact * gain.double(), TOLERANCE[dtype])
    assert not packed[:, tall + r :].any()


def test_only_what_is_asked_for() -> None:
    g, b = torch.randn(5, 8, device=DEVICE), torch.randn(8, 2, device=DEVICE)
    inner, db, packed = shrink.dyb_db(g[:, ::1], b, None, None, 2.0, 0)
    agree(inner, 2 * g.double() @ b.double(), 1e-6)
    assert db.numel() == packed.numel() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(5, 3, 1), (35, 140, 8), (3, 24, 64)], ids=str)
def test_the_update_of_a_gradient_under_dropout(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, wide, r = size
    dx, inner = torch.randn(rows, wide, device=DEVICE).to(dtype), torch.randn(rows, r, device=DEVICE).to(dtype)
    a = torch.randn(r, wide, device=DEVICE)
    ones = torch.ones(rows, wide, device=DEVICE)
    mask = shrink.taken(ones, torch.eye(rows, device=DEVICE)[:, : shrink.MOST], 0.4, 9).t().double()
    wanted = dx.double() + mask * (inner.double() @ a.double())
    shrink.spread(dx, inner, a, 0.4, 9)
    agree(dx, wanted, TOLERANCE[dtype])
