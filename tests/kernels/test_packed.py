"""The launches that add updates to packed layers, and gather their gradients, against float64."""

import pytest
import torch
from torch import Tensor

from lit_peft.ops.packed import Parts, packed_linear, reference
from tests.kernels.test_gated import DTYPES, there
from tests.kernels.where import DEVICE
from tests.ops.exact import TOLERANCE
from tests.ops.test_packed import exact, leaves, same

SIZES = (37, 66, 5)


def three(wide: int, ranks: tuple[int | None, ...], dtype: torch.dtype, scales: tuple[float, ...]) -> Parts:
    pairs = tuple(
        None
        if r is None
        else (
            there(r, wide, dtype=torch.float32, seed=r).requires_grad_(),
            there(size, r, dtype=torch.float32, seed=r + 1).requires_grad_(),
            scale / r,
        )
        for size, r, scale in zip(SIZES, ranks, scales, strict=False)
    )
    sizes = SIZES[: len(ranks)]
    return Parts(there(sum(sizes), wide, dtype=dtype, seed=3), there(sum(sizes), dtype=dtype, seed=4), sizes, pairs)


def both(x: Tensor, parts: Parts, apart: bool) -> None:
    x_exact, parts_exact = x.detach().double().requires_grad_(), exact(parts)
    got, wanted = packed_linear(x, parts, apart=apart, kernels=True), reference(x_exact, parts_exact)
    slopes = [torch.randn_like(y) for y in wanted]
    same(list(got), list(wanted), TOLERANCE[x.dtype])
    assert (got[-1].untyped_storage().data_ptr() == got[0].untyped_storage().data_ptr()) is not apart
    mine = torch.autograd.grad(got, leaves(x, parts), [slope.to(x.dtype) for slope in slopes])
    theirs = torch.autograd.grad(wanted, leaves(x_exact, parts_exact), slopes)
    same(list(mine), list(theirs), 2 * TOLERANCE[x.dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ranks", [(1, 7, 8), (16, 64, None), (None, 3, None), (None, None, 2)], ids=str)
def test_three_layers(ranks: tuple[int | None, ...], dtype: torch.dtype) -> None:
    apart = ranks[0] != 16
    both(there(2, 5, 7, dtype=dtype, seed=0).requires_grad_(), three(7, ranks, dtype, (1.0, 2.0, 3.0)), apart)


def test_two_layers_and_one_scale() -> None:
    parts = three(7, (4, 4), torch.float32, (1.0, 1.0))
    for shape in ((1, 7), (40, 7)):
        both(there(*shape, dtype=torch.float32, seed=0).requires_grad_(), parts, False)


def test_uneven_memory_and_no_rows() -> None:
    parts = three(6, (2, 3, 4), torch.float32, (1.0, 1.0, 1.0))
    both(there(4, 5, 6, dtype=torch.float32, seed=0).transpose(0, 1).requires_grad_(), parts, True)
    outs = packed_linear(torch.empty(0, 6, device=DEVICE, requires_grad=True), parts, kernels=True)
    assert [tuple(out.shape) for out in outs] == [(0, size) for size in SIZES]


def test_gradients_in_any_layout() -> None:
    """As attention hands them back."""
    parts = three(6, (2, 3, 4), torch.float32, (1.0, 1.0, 1.0))
    x = there(4, 6, dtype=torch.float32, seed=0).requires_grad_()
    outs = packed_linear(x, parts, kernels=True)
    slopes = [torch.randn(y.shape[1], 4, device=DEVICE).t() for y in outs]
    mine = torch.autograd.grad(outs, leaves(x, parts), slopes)
    theirs = torch.autograd.grad(reference(x, parts), leaves(x, parts), slopes)
    same(list(mine), list(theirs), 1e-5)


def test_registered() -> None:
    """Shapes, strides and devices of the fake operations are those of the launches, and what they change."""
    bs = [torch.randn(5, 2, device=DEVICE), torch.randn(4, 0, device=DEVICE), torch.randn(3, 1, device=DEVICE)]
    y, h = torch.randn(6, 12, device=DEVICE), torch.randn(3, 6, device=DEVICE)
    gs = list(torch.randn(6, 12, device=DEVICE).split((5, 4, 3), 1))
    for yes in (True, False):
        torch.library.opcheck(torch.ops.lit_peft.expand, (y, h, bs, [1.0, 1.0, 2.0], yes))
        torch.library.opcheck(torch.ops.lit_peft.packed_spread, (gs, bs, [1.0, 1.0, 2.0], yes))
