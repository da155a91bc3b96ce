"""Updates and rotation in one, by plain operations, against what the models do, and autograd in float64."""

import pytest
import torch
from torch import Tensor
from transformers.models.llama import modeling_llama

from lit_peft.ops.turned import expand_turn, fits, turn_spread
from tests.ops.exact import TOLERANCE, agree, drawn

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BATCH, LENGTH = 2, 3


def exact(y: Tensor, h: Tensor, bs: list[Tensor], scales: list[float], cos: Tensor, sin: Tensor) -> list[Tensor]:
    """Returns turned queries and keys, and values, (batch, heads, length, width), as the models and `packed` say."""
    width, hs = cos.shape[-1], torch.split(h, [b.shape[1] for b in bs])
    parts = torch.split(y, [len(b) for b in bs], 1)
    whole = [y_i + s * h_i.t() @ b.t() for y_i, h_i, b, s in zip(parts, hs, bs, scales, strict=True)]
    q, k, v = (part.view(BATCH, LENGTH, -1, width).transpose(1, 2) for part in whole)
    return [*modeling_llama.apply_rotary_pos_emb(q, k, cos, sin), v]


def rows_of(part: Tensor) -> Tensor:
    return part.transpose(1, 2).flatten(0, 1).flatten(1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("ranks", [(1, 7, 8), (16, 0, 2), (0, 64, 0)], ids=str)
def test_forward_and_its_gradients(ranks: tuple[int, int, int], batches: int, dtype: torch.dtype) -> None:
    width, sizes, scales = 6, (12, 6, 6), [0.5, 1.5, 2.0]
    y = drawn(BATCH * LENGTH, sum(sizes), dtype=dtype, seed=0)
    h = drawn(sum(ranks), BATCH * LENGTH, dtype=dtype, seed=1)
    bs = [drawn(n, r, dtype=dtype, seed=r + 2) for n, r in zip(sizes, ranks, strict=True)]
    cos, sin = (drawn(batches, LENGTH, width, dtype=dtype, seed=seed).detach() for seed in (5, 6))
    leaves = [tensor.detach().double().requires_grad_() for tensor in (y, h, *bs)]
    wanted = exact(leaves[0], leaves[1], leaves[2:], scales, cos.double(), sin.double())

    changed = y.detach().clone()
    with torch.no_grad():
        expand_turn(changed, h, bs, scales, cos, sin, LENGTH, width)
    agree(changed[:, :12], rows_of(wanted[0]), TOLERANCE[dtype])
    agree(changed[:, 12:18], rows_of(wanted[1]), TOLERANCE[dtype])
    agree(changed[:, 18:], rows_of(wanted[2]), TOLERANCE[dtype])

    gs = [torch.randn_like(part).to(dtype) for part in wanted]
    dy, dh, *dbs = torch.autograd.grad(wanted, leaves, [g.double() for g in gs], allow_unused=True)
    with torch.no_grad():
        p, whole, *got = turn_spread(gs, bs, list(torch.split(h, list(ranks))), scales, cos, sin, LENGTH, width)
    agree(whole, dy, TOLERANCE[dtype])
    agree(p, dh, TOLERANCE[dtype])
    for mine, theirs in zip(got, dbs, strict=True):
        assert mine.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        agree(mine, theirs, TOLERANCE[dtype])
    assert all(db.numel() == 0 for db in turn_spread(gs, bs, None, scales, cos, sin, LENGTH, width)[2:])


def test_no_rows() -> None:
    bs, angles = [torch.ones(4, 1), torch.ones(2, 1), torch.ones(2, 1)], torch.ones(1, 3, 2)
    expand_turn(torch.empty(0, 8), torch.empty(3, 0), bs, [1.0] * 3, angles, angles, 3, 2, kernels=True)
    gs = [torch.empty(0, heads, 3, 2) for heads in (2, 1, 1)]
    h = [torch.empty(1, 0)] * 3
    p, whole, *dbs = turn_spread(gs, bs, h, [1.0] * 3, angles, angles, 3, 2, kernels=True)
    assert (p.shape, whole.shape) == ((3, 0), (0, 8))
    assert [tuple(db.shape) for db in dbs] == [(4, 1), (2, 1), (2, 1)]
    assert not any(db.any() for db in dbs)


@pytest.mark.parametrize(
    ("dtype", "sizes", "ranks", "width", "yes"),
    [
        (torch.bfloat16, (4096, 1024, 1024), (16, 16, 16), 128, True),
        (torch.float16, (4096, 1024, 1024), (0, 64, 0), 128, True),
        (torch.float64, (4096, 1024, 1024), (16, 16, 16), 128, False),
        (torch.float32, (4096, 1024, 1024), (32, 32, 1), 128, False),
        (torch.float32, (4096, 1024, 1024), (0, 0, 0), 128, False),
        (torch.float32, (30, 15, 15), (2, 2, 2), 15, False),
        (torch.float32, (30, 12, 10), (2, 2, 2), 10, False),
        (torch.float32, (512, 512, 512), (2, 2, 2), 512, False),
        (torch.float32, (20, 10), (2, 2), 10, False),
    ],
)  # fmt: skip
def test_what_the_kernels_take(
    dtype: torch.dtype, sizes: tuple[int, ...], ranks: tuple[int, ...], width: int, yes: bool
) -> None:
    assert fits(dtype, sizes, ranks, width) is yes
