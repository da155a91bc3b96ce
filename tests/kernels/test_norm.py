"""The normalisation's kernels against float64, gradients included."""

import pytest
import torch
from torch import Tensor

from lit_peft.ops.norm import norm_shrink, reference, rms_norm
from lit_peft.ops.recipes import recipe_of
from tests.kernels.where import DEVICE
from tests.ops.exact import TOLERANCE, agree, drawn

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def both(x: Tensor, weight: Tensor) -> None:
    exact = x.detach().double().requires_grad_()
    got = rms_norm(x, weight, 1e-6, kernels=True)
    wanted = weight.double() * exact / (exact.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    tolerance = TOLERANCE[x.dtype]
    agree(got, wanted, tolerance)
    slope = torch.randn_like(wanted).to(x.dtype)
    mine, theirs = torch.autograd.grad(got, x, slope), torch.autograd.grad(wanted, exact, slope.double())
    agree(mine[0], theirs[0], tolerance)
    agree(reference(x, weight, 1e-6), wanted, tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 33), (1, 3), (2, 3, 64), (7, 100)], ids=str)
def test_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = drawn(*shape, dtype=dtype, seed=0).detach().to(DEVICE).requires_grad_()
    both(x, drawn(shape[-1], dtype=dtype, seed=1).detach().to(DEVICE))


def test_uneven_memory_and_gradients() -> None:
    x = drawn(6, 4, 5, dtype=torch.float32, seed=0).detach().to(DEVICE).transpose(0, 1).requires_grad_()
    both(x, torch.ones(5, device=DEVICE))


def test_no_rows() -> None:
    x = torch.empty(0, 8, device=DEVICE, requires_grad=True)
    out = rms_norm(x, torch.ones(8, device=DEVICE), 1e-6)
    out.sum().backward()
    assert out.shape == (0, 8)


def test_what_is_made_again_is_the_same() -> None:
    x = drawn(5, 33, dtype=torch.bfloat16, seed=0).detach().to(DEVICE).requires_grad_()
    out = rms_norm(x, torch.ones(33, dtype=x.dtype, device=DEVICE), 1e-6, kernels=True)
    recipe = recipe_of(out)
    agree(recipe.make(*recipe.parts), out, 5e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ranks", [(1,), (7, 8), (16, 16, 16), (64,), (40, 40)], ids=str)
def test_with_a_narrow_product(ranks: tuple[int, ...], dtype: torch.dtype) -> None:
    x = (100 * drawn(2, 5, 70, dtype=torch.float32, seed=0)).detach().to(DEVICE, dtype).requires_grad_()
    weight = drawn(70, dtype=dtype, seed=1).detach().to(DEVICE)
    factors = [drawn(r, 70, dtype=torch.float32, seed=r).detach().to(DEVICE) for r in ranks]
    y, a, h = norm_shrink(x, weight, 1e-6, factors, kernels=True)
    exact = reference(x.detach().double(), weight.double(), 1e-6)
    agree(y, exact, TOLERANCE[dtype])
    assert a.equal(torch.cat(factors).to(dtype))
    agree(h, torch.cat(factors).double() @ exact.reshape(-1, 70).t(), TOLERANCE[dtype])
    slope = torch.randn_like(y)
    (got,) = torch.autograd.grad(y, x, slope)
    (wanted,) = torch.autograd.grad(rms_norm(x, weight, 1e-6, kernels=False), x, slope)
    agree(got, wanted, TOLERANCE[dtype])
    recipe = recipe_of(y)
    agree(recipe.make(*recipe.parts), y, 5e-3)


def test_a_narrow_product_of_no_rows() -> None:
    x = torch.empty(0, 8, device=DEVICE, requires_grad=True)
    y, a, h = norm_shrink(x, torch.ones(8, device=DEVICE), 1e-6, [torch.ones(2, 8, device=DEVICE)], kernels=True)
    assert (y.shape, a.shape, h.shape) == ((0, 8), (2, 8), (2, 0))


def test_registered() -> None:
    """Shapes, strides and devices of the fake operations are those of the launches."""
    x, weight = torch.randn(3, 2, 16, device=DEVICE), torch.ones(16, device=DEVICE)
    torch.library.opcheck(torch.ops.lit_peft.norm, (x, weight, 1e-6))
    torch.library.opcheck(torch.ops.lit_peft.norm_backward, (x, x, weight, torch.ones(3, 2, 1, device=DEVICE)))
    factors = [torch.randn(2, 16, device=DEVICE), torch.randn(1, 16, device=DEVICE)]
    torch.library.opcheck(torch.ops.lit_peft.norm_shrink, (x, weight, factors, 1e-6))
