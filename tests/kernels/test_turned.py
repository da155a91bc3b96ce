"""Updates and rotation in one launch, forward and for the gradients, against float64."""

import pytest
import torch
from torch import Tensor

from lit_peft.kernels.turned import turn_spread as launched
from lit_peft.ops.turned import expand_turn, expand_turn_reference, turn_spread, turn_spread_reference
from tests.kernels.test_gated import DTYPES, there
from tests.kernels.test_spread import deterministic
from tests.kernels.where import DEVICE
from tests.ops.exact import TOLERANCE, agree

SCALES = [0.5, 1.5, 2.0]
Size = tuple[int, int, int, tuple[int, ...], tuple[int, ...]]
# batch, length, width of a head, heads, ranks
SIZES = [
    (1, 1, 2, (1, 1, 1), (1, 1, 1)),
    (2, 3, 6, (2, 1, 1), (1, 7, 8)),
    (1, 70, 10, (2, 1, 1), (16, 0, 16)),
    (3, 5, 40, (1, 1, 1), (0, 64, 0)),
    (2, 20, 34, (1, 1, 2), (0, 0, 3)),
    (1, 3, 140, (1, 2, 1), (2, 1, 0)),  # halves of more than one block
]
PAIRS = [(size, torch.bfloat16) for size in SIZES] + [(SIZES[i], dtype) for i in (1, 2, 5) for dtype in DTYPES[::2]]


def factors(ranks: tuple[int, ...], heads: tuple[int, ...], width: int) -> list[Tensor]:
    """Returns the B_i in float32, as parameters are."""
    return [there(n * width, r, dtype=torch.float32, seed=i) for i, (n, r) in enumerate(zip(heads, ranks, strict=True))]


@pytest.mark.parametrize("batches", [1, None])
@pytest.mark.parametrize(("size", "dtype"), PAIRS, ids=str)
def test_forward(size: Size, dtype: torch.dtype, batches: int | None) -> None:
    batch, length, width, heads, ranks = size
    y = there(batch * length, sum(heads) * width, dtype=dtype, seed=7)
    h = there(sum(ranks), batch * length, dtype=dtype, seed=8)
    cos, sin = (there(batches or batch, length, width, dtype=dtype, seed=seed) for seed in (5, 6))
    bs, wanted = factors(ranks, heads, width), y.double()
    wide = wanted, h.double(), [b.double() for b in bs], SCALES, cos.double(), sin.double()
    expand_turn_reference(*wide, length, width)
    expand_turn(y, h, bs, SCALES, cos, sin, length, width, kernels=True)
    at = [0, heads[0] * width, (heads[0] + heads[1]) * width]
    agree(y[:, : at[1]], wanted[:, : at[1]], TOLERANCE[dtype])
    agree(y[:, at[1] : at[2]], wanted[:, at[1] : at[2]], TOLERANCE[dtype])
    agree(y[:, at[2] :], wanted[:, at[2] :], TOLERANCE[dtype])


def back(gs: list[Tensor], bs: list[Tensor], hs: list[Tensor], cos: Tensor, sin: Tensor) -> None:
    dtype, rest = gs[0].dtype, (gs[0].shape[2], gs[0].shape[3])
    g_exact, b_exact, h_exact = ([part.double() for part in parts] for parts in (gs, bs, hs))
    wanted = turn_spread_reference(g_exact, b_exact, h_exact, SCALES, cos.double(), sin.double(), *rest)
    p, whole, *dbs = turn_spread(gs, bs, hs, SCALES, cos, sin, *rest, kernels=True)
    assert p.dtype == whole.dtype == dtype
    agree(p, wanted[0], TOLERANCE[dtype])
    agree(whole, wanted[1], TOLERANCE[dtype])
    for b, mine, theirs in zip(bs, dbs, wanted[2:], strict=True):
        assert (mine.dtype, mine.shape) == (torch.float32, b.shape)
        agree(mine, theirs, TOLERANCE[dtype])


@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize(("size", "dtype"), PAIRS, ids=str)
def test_backward(size: Size, dtype: torch.dtype, staged: bool) -> None:
    batch, length, width, heads, ranks = size
    # as attention hands them back, its heads behind the places
    gs = [there(batch, length, n, width, dtype=dtype, seed=n).transpose(1, 2) for n in heads]
    cos, sin = (there(1 if staged else batch, length, width, dtype=dtype, seed=seed) for seed in (5, 6))
    h = there(sum(ranks), batch * length, dtype=dtype, seed=8)
    with deterministic(staged):
        back(gs, factors(ranks, heads, width), list(torch.split(h, list(ranks))), cos, sin)


def test_gradients_in_any_layout() -> None:
    """Each with strides of its own, one of them without unit stride in a head, one a gradient of a sum."""
    one = there(2, 6, 2, 3, dtype=torch.float32, seed=0).permute(0, 2, 3, 1)
    gs = [one, there(2, 1, 3, 6, dtype=torch.float32, seed=1), torch.ones(1, device=DEVICE).expand(2, 1, 3, 6)]
    cos, sin = (there(1, 6, 3, dtype=torch.float32, seed=seed).transpose(1, 2) for seed in (5, 6))
    hs = [there(6, r, dtype=torch.float32, seed=r).t() for r in (2, 3, 4)]
    back(gs, factors((2, 3, 4), (2, 1, 1), 6), hs, cos, sin)


@pytest.mark.parametrize("split", [2, 3])
def test_heads_shared_out(split: int) -> None:
    """As where there are few rows: also to more programs than there are heads."""
    gs = [there(2, n, 3, 4, dtype=torch.bfloat16, seed=n) for n in (3, 1, 2)]
    cos, sin = (there(1, 3, 4, dtype=torch.bfloat16, seed=seed) for seed in (5, 6))
    bs, hs = factors((2, 3, 4), (3, 1, 2), 4), [there(r, 6, dtype=torch.bfloat16, seed=r) for r in (2, 3, 4)]
    p, whole, dbs = launched(gs, bs, hs, SCALES, cos, sin, 3, 4, split)
    one = launched(gs, bs, hs, SCALES, cos, sin, 3, 4, 1)
    assert (p.dtype, p.shape) == (torch.bfloat16, (9, 6))
    agree(p, one[0], 5e-3)
    assert whole.equal(one[1])
    agree(dbs, one[2], 1e-6)


def test_without_db() -> None:
    gs = [there(2, n, 3, 4, dtype=torch.float32, seed=n) for n in (2, 1, 1)]
    cos, sin = (there(1, 3, 4, dtype=torch.float32, seed=seed) for seed in (5, 6))
    bs = factors((2, 0, 3), (2, 1, 1), 4)
    got = turn_spread(gs, bs, None, SCALES, cos, sin, 3, 4, kernels=True)
    wanted = turn_spread_reference(gs, bs, None, SCALES, cos, sin, 3, 4)
    agree(got[0], wanted[0], 1e-6)
    agree(got[1], wanted[1], 1e-6)
    assert [db.numel() for db in got[2:]] == [0, 0, 0]


def test_registered() -> None:
    """Shapes, strides and devices of the fake operations are those of the launches, and what they change."""
    bs, ranks = factors((2, 0, 3), (2, 1, 1), 4), [2, 0, 3]
    y, h = torch.randn(6, 16, device=DEVICE), torch.randn(5, 6, device=DEVICE)
    gs = [torch.randn(2, 3, n, 4, device=DEVICE).transpose(1, 2) for n in (2, 1, 1)]
    cos, sin = torch.randn(2, 1, 3, 4, device=DEVICE)
    torch.library.opcheck(torch.ops.lit_peft.expand_turn, (y, h, bs, SCALES, cos, sin, 3, 4))
    for hs in (list(torch.split(h, ranks)), []):
        torch.library.opcheck(torch.ops.lit_peft.turn_spread, (gs, bs, hs, SCALES, cos, sin, 3, 4))
