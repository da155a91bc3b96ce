"""A layer's additions and norms by plain operations, against formulas and derivatives in float64."""

import pytest
import torch
from torch import Tensor

from lit_peft.ops.add_norm import add_expand, add_norm_shrink, fits, norm_back
from tests.ops.exact import TOLERANCE, agree, drawn

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ROWS, WIDTH, EPS = 5, 12, 1e-2


def some(*shape: int, dtype: torch.dtype = torch.float64, seed: int) -> Tensor:
    return drawn(*shape, dtype=dtype, seed=seed).detach()


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.square().sum(-1, keepdim=True) / x.shape[-1] + EPS).sqrt()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums(dtype: torch.dtype) -> None:
    x, y = (some(ROWS, WIDTH, dtype=dtype, seed=seed) for seed in (0, 1))
    h, b = some(3, ROWS, dtype=dtype, seed=2), some(WIDTH, 3, seed=3)
    wanted = x.double() + y.double() + 0.5 * torch.einsum("rt,wr->tw", h.double(), b.to(dtype).double())
    got = add_expand(x, y, h, b, 0.5)
    assert got.dtype == dtype
    agree(got, wanted, TOLERANCE[dtype])
    agree(add_expand(x, y, None, None, 0.5), x.double() + y.double(), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("updated", [True, False])
def test_norm_of_a_sum(updated: bool, dtype: torch.dtype) -> None:
    x, y = (some(ROWS, WIDTH, dtype=dtype, seed=seed) for seed in (0, 1))
    h, b = (some(3, ROWS, dtype=dtype, seed=2), some(WIDTH, 3, dtype=dtype, seed=3)) if updated else (None, None)
    weight, factors = some(WIDTH, dtype=dtype, seed=4), [some(r, WIDTH, seed=r) for r in (1, 2, 4)]
    x2, out, rho, low, a = add_norm_shrink(x, y, h, b, 0.5, weight, EPS, factors)
    assert {part.dtype for part in (x2, out, low, a)} == {dtype}
    total = x.double() + y.double()
    if h is not None and b is not None:
        total += 0.5 * h.double().t() @ b.double().t()
    agree(x2, total, TOLERANCE[dtype])
    wanted = normed(x2.double(), weight.double())  # of what was rounded: nearer than the sum itself
    agree(out, wanted, TOLERANCE[dtype] / 2)
    agree(rho, (x2.double().square().mean(-1) + EPS).rsqrt(), 1e-12 if dtype == torch.float64 else 1e-6)
    assert a.equal(torch.cat(factors).to(dtype))
    agree(low, torch.cat(factors) @ wanted.t(), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("updated", [True, False])
def test_back_through_a_norm(updated: bool, residual: bool, dtype: torch.dtype) -> None:
    x, g = (some(ROWS, WIDTH, dtype=dtype, seed=seed) for seed in (0, 1))
    p, a = (some(3, ROWS, dtype=dtype, seed=2), some(3, WIDTH, dtype=dtype, seed=3)) if updated else (None, None)
    past = some(ROWS, WIDTH, dtype=dtype, seed=4) if residual else None
    weight = some(WIDTH, dtype=dtype, seed=5)
    exact = x.double().requires_grad_()
    wanted = normed(exact, weight.double())
    loss = (wanted * g.double()).sum()
    if p is not None and a is not None:
        loss = loss + (wanted @ a.double().t() * p.double().t()).sum()
    if past is not None:
        loss = loss + (exact * past.double()).sum()
    (slope,) = torch.autograd.grad(loss, exact)
    rho = (exact.detach().square().mean(-1) + EPS).rsqrt()
    if dtype != torch.float64:
        rho = rho.float()
    dx, out = norm_back(g, p, a, past, x, weight, rho, True)
    assert dx.dtype == out.dtype == dtype
    agree(dx, slope, TOLERANCE[dtype])
    agree(out, wanted, TOLERANCE[dtype] / 2)
    once, nothing = norm_back(g, p, a, past, x, weight, rho, False)
    assert once.equal(dx)
    assert nothing.shape == (0,)


def test_large_numbers_in_float16() -> None:
    """The norm's input times its weight would be infinite."""
    x = 3e4 * torch.ones(2, WIDTH, dtype=torch.float16)
    weight = torch.full((WIDTH,), 4.0, dtype=torch.float16)
    _, out, rho, low, _ = add_norm_shrink(x, x / 2, None, None, 1.0, weight, EPS, [torch.ones(1, WIDTH)])
    assert out.unique().tolist() == [4.0]
    assert low.unique().tolist() == [4.0 * WIDTH]
    dx, _ = norm_back(x, None, None, None, x, weight, rho, False)
    assert dx.isfinite().all()


def test_no_rows() -> None:
    x, weight = torch.empty(0, WIDTH), torch.ones(WIDTH)
    h, b = torch.empty(2, 0), torch.empty(WIDTH, 2)
    assert add_expand(x, x, h, b, 1.0, kernels=True).shape == (0, WIDTH)
    found = add_norm_shrink(x, x, h, b, 1.0, weight, EPS, [torch.ones(3, WIDTH)], kernels=True)
    assert [tuple(part.shape) for part in found] == [(0, WIDTH), (0, WIDTH), (0,), (3, 0), (3, WIDTH)]
    found = norm_back(x, h, b.t(), x, x, weight, torch.empty(0), True, kernels=True)
    assert [tuple(part.shape) for part in found] == [(0, WIDTH), (0, WIDTH)]


def test_what_the_kernels_take() -> None:
    x, weight = torch.empty(2, 4), torch.empty(4)
    assert fits(x, weight)
    assert fits(x.half(), None, 64, 64)
    assert not fits(x, weight, 1, 65)
    assert not fits(x, weight.bfloat16(), 1)
    assert not fits(x.double(), weight.double(), 1)
    assert not fits(x[None], weight, 1)
