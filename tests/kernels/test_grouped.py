"""The grouped kernels against float64: tokens of several sets in one launch, values and every gradient."""

import pytest
import torch

from lit_peft.ops import grouped
from lit_peft.ops.routed import routed_update
from lit_peft.ops.routing import Routing, Sets
from tests.kernels.where import DEVICE
from tests.ops.routed_batches import BATCHES, Batch, check, tensors

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# blocks of 64 places, of which the last ones are not full; columns that end inside a block
LONG: Batch = ([(1,), (0,), (1,), ()], 75, 150, 139, (16, 7))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BATCHES)
def test_grouped(name: str, dtype: torch.dtype) -> None:
    check(BATCHES[name], dtype, True, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_full_blocks_joined_with_the_layer(dtype: torch.dtype) -> None:
    check(LONG, dtype, True, pairs=torch.float32, device=DEVICE, joined=True)


def test_large_ranks_and_uneven_memory() -> None:
    given = tensors(([(0,), (1,)], 2, 9, 6, (100, 128)), torch.float32, torch.float32, DEVICE)
    for i in (0, 1):
        given[i] = given[i].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    check(([(0,), (1,)], 2, 9, 6, (100, 128)), torch.float32, True, device=DEVICE, inputs=given)


@pytest.mark.parametrize("batch", [([(0, 1), (0,)], 2, 9, 6, (2, 2)), ([(0,)], 2, 9, 6, (130,))], ids=["two", "rank"])
def test_what_the_kernels_do_not_take_goes_another_way(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped, "shrink", None)
    check(batch, torch.float32, True, device=DEVICE)


def test_rows_under_none_and_broken_sets_stay_apart() -> None:
    """A set with a NaN in it reaches its own rows alone, forward and backward."""
    batch = BATCHES["shuffled"]
    y, x, *pairs = tensors(batch, torch.float32, torch.float32, DEVICE)
    with torch.no_grad():
        pairs[4].fill_(torch.nan)
    out = routed_update(y, x, pairs[:3], pairs[3:], [1.0] * 3, Routing(batch[0]), kernels=True)
    assert [bool(row.isnan().any()) for row in out] == [True, False, False, False, True]
    out.sum().backward()
    assert x.grad is not None
    assert [bool(row.isnan().any()) for row in x.grad] == [True, False, False, False, True]
    broken = [bool(part.grad.isnan().any()) for part in pairs if part.grad is not None]
    assert broken == [False, True, False, False, False, False]


def test_the_same_twice() -> None:
    found = []
    for _ in range(2):
        y, x, *pairs = tensors(LONG, torch.float32, torch.float32, DEVICE)
        out = routed_update(y, x, pairs[:2], pairs[2:], [1.0] * 2, Routing(LONG[0]), kernels=True)
        found.append([out, *torch.autograd.grad(out.sin().sum(), [x, *pairs])])
    assert all(one.equal(other) for one, other in zip(*found, strict=True))


def test_registered() -> None:
    """Shapes, strides and devices of the fake operations are those of the launches."""
    batch = BATCHES["shuffled"]
    y, x, *pairs = (tensor.detach() for tensor in tensors(batch, torch.float32, torch.float32, DEVICE))
    sets = Sets(pairs[:3], pairs[3:], [1.0] * 3, Routing(batch[0]))
    t = sets.rows.tables(sets.ranks, 3, DEVICE)
    x, y, a, b = x.flatten(0, 1), y.flatten(0, 1), sets.stacked_a(x.dtype), sets.stacked_b(x.dtype).t().contiguous()
    places = (t.order, t.blocks, t.sets, t.tokens, t.block)
    h = grouped.shrink(x, a, *places, t.rank)
    ops = torch.ops.lit_peft
    torch.library.opcheck(ops.grouped_shrink, (x, a, *places, t.rank))
    torch.library.opcheck(ops.grouped_expand, (y, h, b, *places))
    torch.library.opcheck(ops.grouped_collect, (h, x, sum(sets.ranks), t.order, t.sets, t.tokens, t.block))
