"""A layer's additions and norms in one launch each, against the same in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lit_peft.kernels import add_norm as launchers
from lit_peft.ops.add_norm import add_expand, add_norm_shrink, norm_back
from tests.kernels.where import DEVICE
from tests.ops.exact import TOLERANCE, agree, drawn

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 3), (5, 33), (19, 130)]
RANKS = [None, 1, 7, 8, 16, 64]
EPS = 1e-6


def some(*shape: int, dtype: torch.dtype = torch.float32, seed: int) -> Tensor:
    return drawn(*shape, dtype=dtype, seed=seed).detach().to(DEVICE)


def update(r: int | None, rows: int, width: int, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """Returns H (r, rows), for some r turned over, and B (width, r); adapters in float32 are rounded in registers."""
    if r is None:
        return None, None
    h = some(rows, r, dtype=dtype, seed=r).t() if r in (7, 16) else some(r, rows, dtype=dtype, seed=r)
    return h, some(width, r, seed=r + 1)


def doubled(*values: Any) -> list[Any]:
    return [value.double() if isinstance(value, Tensor) else value for value in values]


def same(got: Any, wanted: Any, tolerance: float) -> None:
    for one, other in zip(got, wanted, strict=True):
        assert one.shape == other.shape
        agree(one, other, tolerance)


def rounded_alike(out: Tensor, x: Tensor, weight: Tensor, rho: Tensor) -> None:
    """Asserts that a norm's output is rounded as the models round it, twice."""
    if x.dtype != torch.float32:
        assert (out == weight * (x.float() * rho[:, None]).to(x.dtype)).double().mean() > 0.98


def sums(rows: int, width: int, r: int | None, dtype: torch.dtype) -> None:
    x, y = (some(rows, width, dtype=dtype, seed=seed) for seed in (0, 1))
    arguments = (x, y, *update(r, rows, width, dtype), 0.5)
    got = add_expand(*arguments, kernels=True)
    assert got.dtype == dtype
    agree(got, add_expand(*doubled(*arguments)), TOLERANCE[dtype])


def norms(rows: int, width: int, r: int | None, ranks: tuple[int, ...], dtype: torch.dtype) -> None:
    x, y = (some(rows, width, dtype=dtype, seed=seed) for seed in (0, 1))
    start = (x, y, *update(r, rows, width, dtype), 0.5, some(width, dtype=dtype, seed=2), EPS)
    factors = [some(rank, width, seed=rank) for rank in ranks]
    got = add_norm_shrink(*start, factors, kernels=True)
    assert [part.dtype for part in got] == [dtype, dtype, torch.float32, dtype, dtype]
    same(got, add_norm_shrink(*doubled(*start), doubled(*factors)), TOLERANCE[dtype])
    assert got[4].equal(torch.cat(factors).to(dtype))
    # everything after the sum is of the sum as it was rounded
    exact = add_norm_shrink(*doubled(got[0], 0 * y, None, None, *start[4:]), doubled(*got[4].split(list(ranks))))
    assert got[0].double().equal(exact[0])
    same(got[1:4], exact[1:4], TOLERANCE[dtype] / 3)
    agree(got[2], exact[2], 1e-6)
    rounded_alike(got[1], got[0], start[5], got[2])


def backward(rows: int, width: int, r: int | None, dtype: torch.dtype, residual: bool, again: bool) -> None:
    g, x, past = (some(rows, width, dtype=dtype, seed=seed) for seed in (0, 1, 2))
    p, a = update(r, rows, width, dtype)
    rho = (x.double().square().mean(-1) + EPS).rsqrt().float()
    low = p, None if a is None else a.t().to(dtype)
    arguments = (g, *low, past if residual else None, x, some(width, dtype=dtype, seed=3), rho, again)
    got = norm_back(*arguments, kernels=True)
    assert {part.dtype for part in got} == {dtype}
    same(got, norm_back(*doubled(*arguments)), TOLERANCE[dtype])
    if again:
        rounded_alike(got[1], x, arguments[5], rho)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("r", RANKS)
def test_ranks(r: int | None, dtype: torch.dtype) -> None:
    sums(5, 70, r, dtype)
    norms(5, 70, r, (r or 2,), dtype)
    backward(5, 70, r, dtype, r != 7, r != 8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    sums(*shape, 3, dtype)
    norms(*shape, 3, (2, 3), dtype)
    backward(*shape, 3, dtype, True, True)


@pytest.mark.parametrize("ranks", [(1, 7, 8), (16, 16, 16), (40, 24)], ids=str)
def test_factors(ranks: tuple[int, ...]) -> None:
    norms(5, 70, 2, ranks, torch.bfloat16)


def test_of_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launchers, "_height", lambda rows, itemsize: 32)
    norms(35, 33, 2, (3,), torch.bfloat16)
    backward(35, 33, 2, torch.bfloat16, True, True)


def test_large_numbers_in_float16() -> None:
    """The norm's input times its weight would be infinite."""
    x, weight = torch.full((2, 8), 3e4, device=DEVICE).half(), torch.full((8,), 4.0, device=DEVICE).half()
    factors = [torch.ones(1, 8, device=DEVICE)]
    _, out, rho, low, _ = add_norm_shrink(x, x / 2, None, None, 1.0, weight, EPS, factors, kernels=True)
    assert out.unique().tolist() == [4.0]
    assert low.unique().tolist() == [32.0]
    assert norm_back(x, None, None, None, x, weight, rho, False, kernels=True)[0].isfinite().all()


def test_uneven_memory() -> None:
    x, y, past = (some(12, 5, seed=seed).t() for seed in (0, 1, 2))
    h, b, weight = some(5, 2, seed=3).t(), some(2, 12, seed=4).t(), some(24, seed=5)[::2]
    factors = [some(12, 3, seed=6).t()]
    agree(add_expand(x, y, h, b, 0.5, kernels=True), add_expand(*doubled(x, y, h, b, 0.5)), 2e-6)
    start = (x, y, h, b, 0.5, weight, EPS)
    same(add_norm_shrink(*start, factors, kernels=True), add_norm_shrink(*doubled(*start), doubled(*factors)), 2e-6)
    rho = some(10, seed=7)[::2].abs()
    arguments = (y, h, b.t(), past, x, weight, rho, True)
    same(norm_back(*arguments, kernels=True), norm_back(*doubled(*arguments)), 2e-6)


def test_registered() -> None:
    """Shapes, strides and devices of the fake operations are those of the launches."""
    x, h, b = some(3, 16, seed=0), some(2, 3, seed=1), some(16, 2, seed=2)
    weight, a = torch.ones(16, device=DEVICE), some(4, 16, seed=3)
    uneven = some(16, 3, seed=4).t()
    ops = torch.ops.lit_peft
    for first in (x, uneven):
        torch.library.opcheck(ops.add_expand, (first, x, h, b, 0.5))
        torch.library.opcheck(ops.add_norm_shrink, (first, x, h, b, 0.5, weight, EPS, [a, a]))
        torch.library.opcheck(ops.norm_back, (x, h, b.t(), x, first, weight, weight[:3], True))
    torch.library.opcheck(ops.add_expand, (x, x, None, None, 0.5))
    torch.library.opcheck(ops.norm_back, (x, None, None, None, x, weight, weight[:3], False))
