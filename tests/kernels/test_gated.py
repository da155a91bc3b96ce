"""The gated product's kernels against float64, gradients included, with the updates that they add on the way."""

import pytest
import torch
from torch import Tensor

from lit_peft.ops.gated import gated_linear, gated_product, reference
from lit_peft.ops.packed import Parts
from lit_peft.ops.recipes import recipe_of
from tests.kernels.where import DEVICE
from tests.ops.exact import TOLERANCE, agree, drawn
from tests.ops.test_packed import exact, leaves, same

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def there(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return drawn(*shape, dtype=dtype, seed=seed).detach().to(DEVICE)


def two(f: int, wide: int, ranks: tuple[int | None, ...], dtype: torch.dtype, low: torch.dtype) -> Parts:
    pairs = tuple(
        None
        if r is None
        else (
            there(r, wide, dtype=low, seed=r).requires_grad_(),
            there(f, r, dtype=low, seed=r + 1).requires_grad_(),
            1.5 / r,
        )
        for r in ranks
    )
    return Parts(there(2 * f, wide, dtype=dtype, seed=3), None, (f, f), pairs)


def both(x: Tensor, parts: Parts, uses: int = 1) -> None:
    x_exact, parts_exact = x.detach().double().requires_grad_(), exact(parts)
    got = sum(gated_linear(x, parts, kernels=True) for _ in range(uses))
    wanted = uses * reference(x_exact, parts_exact)
    slope = torch.randn_like(wanted)
    assert isinstance(got, Tensor)
    agree(got, wanted, TOLERANCE[x.dtype])
    mine = torch.autograd.grad(got, leaves(x, parts), slope.to(x.dtype))
    assert [one.dtype for one in mine] == [leaf.dtype for leaf in leaves(x, parts)]
    same(list(mine), list(torch.autograd.grad(wanted, leaves(x_exact, parts_exact), slope)), 2 * TOLERANCE[x.dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ranks", [(1, 7), (8, 16), (64, 64), (None, 3), (3, None), (None, None)], ids=str)
def test_two_layers(ranks: tuple[int | None, ...], dtype: torch.dtype) -> None:
    low = torch.float32 if ranks[0] == 8 else dtype  # adapters in float32 are rounded in registers
    both(there(3, 11, 10, dtype=dtype, seed=0).requires_grad_(), two(37, 10, ranks, dtype, low))


@pytest.mark.parametrize("shape", [(1, 6), (70, 6), (2, 3, 6)], ids=str)
def test_rows(shape: tuple[int, ...]) -> None:
    both(there(*shape, dtype=torch.float32, seed=0).requires_grad_(), two(66, 6, (2, 2), torch.float32, torch.float32))


def test_uneven_memory_and_double_use() -> None:
    x = there(4, 5, 6, dtype=torch.float32, seed=0).transpose(0, 1).requires_grad_()
    both(x, two(9, 6, (2, 3), torch.float32, torch.float32), uses=2)


def test_no_rows() -> None:
    x = torch.empty(0, 6, device=DEVICE, requires_grad=True)
    out = gated_linear(x, two(9, 6, (2, 3), torch.float32, torch.float32), kernels=True)
    out.sum().backward()
    assert out.shape == (0, 9)


def test_checkpointing() -> None:
    x = there(5, 6, dtype=torch.float32, seed=0).requires_grad_()
    parts = two(9, 6, (2, 3), torch.float32, torch.float32)
    found = []
    for again in (False, True):

        def run(x: Tensor) -> Tensor:
            return gated_linear(x, parts, kernels=True).sin()

        out = torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False) if again else run(x)
        found.append(torch.autograd.grad(out.sum(), leaves(x, parts)))
    same(list(found[1]), list(found[0]), 1e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_product_alone(dtype: torch.dtype) -> None:
    e, g = (there(4, 3, 35, dtype=dtype, seed=seed).requires_grad_() for seed in (0, 1))
    e_exact, g_exact = (x.detach().double().requires_grad_() for x in (e, g))
    got, wanted = gated_product(e, g, kernels=True), torch.nn.functional.silu(e_exact) * g_exact
    slope = torch.randn_like(wanted)
    agree(got, wanted, TOLERANCE[dtype])
    mine = torch.autograd.grad(got, (e, g), slope.to(dtype))
    same(list(mine), list(torch.autograd.grad(wanted, (e_exact, g_exact), slope)), TOLERANCE[dtype])


def test_what_is_made_again_is_the_same() -> None:
    x = there(5, 6, dtype=torch.bfloat16, seed=0).requires_grad_()
    for out in (
        gated_linear(x, two(9, 6, (2, None), torch.bfloat16, torch.float32), kernels=True),
        gated_product(x, 2 * x, kernels=True),
    ):
        recipe = recipe_of(out)
        assert recipe.make(*recipe.parts).view(out.shape).equal(out)


def test_registered() -> None:
    """Shapes, strides and devices of the fake operations are those of the launches."""
    both_, d = torch.randn(5, 24, device=DEVICE), torch.randn(5, 12, device=DEVICE)
    e, g = both_.split(12, 1)
    low = (torch.randn(2, 5, device=DEVICE), torch.randn(12, 2, device=DEVICE), 0.5, None, None, 1.0)
    torch.library.opcheck(torch.ops.lit_peft.gated, (e, g, *low))
    torch.library.opcheck(torch.ops.lit_peft.gated_backward, (d, e, g, *low))
