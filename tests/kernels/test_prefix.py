"""The prefix's kernels against one softmax in float64, gradients included."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lit_peft.ops.prefix_attention import prefix_attention
from tests.kernels.where import DEVICE
from tests.ops.exact import TOLERANCE, agree
from tests.ops.test_prefix_attention import exact, inputs

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# batch, heads, kv_heads, queries, keys, width, p, whether texts share the prefix; on CUDA widths are multiples of 8
SIZES = [
    (2, 4, 2, 7, 7, 8, 3, True),
    (1, 1, 1, 1, 1, 8, 1, False),
    (2, 2, 1, 33, 33, 24, 17, False),
    (1, 2, 2, 5, 11, 16, 70, True),
    (2, 2, 1, 1, 9, 64, 30, True),
]


def moved(size: tuple[Any, ...], dtype: torch.dtype) -> list[Tensor]:
    return [part.detach().to(DEVICE).requires_grad_() for part in inputs(size, dtype)]


def both(parts: list[Tensor], mask: Tensor | None = None, is_causal: bool = False) -> None:
    tolerance = TOLERANCE[parts[0].dtype]
    got = prefix_attention(*parts, mask=mask, is_causal=is_causal, kernels=True)  # type: ignore[misc]
    copies = [part.detach().double().cpu().requires_grad_(part.requires_grad) for part in parts]
    wanted = exact(*copies, None if mask is None else mask.cpu(), is_causal, None)  # type: ignore[misc]
    agree(got.cpu(), wanted, tolerance)
    slope = torch.randn(wanted.shape, dtype=torch.float64).to(got.dtype)
    asked = [i for i, part in enumerate(parts) if part.requires_grad]
    mine = torch.autograd.grad(got, [parts[i] for i in asked], slope.to(DEVICE))
    theirs = torch.autograd.grad(wanted, [copies[i] for i in asked], slope.double())
    for found, right in zip(mine, theirs, strict=True):
        assert found.dtype == got.dtype
        agree(found.cpu(), right, tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_against_one_softmax(size: tuple[Any, ...], dtype: torch.dtype) -> None:
    both(moved(size, dtype), is_causal=size[3] == size[4])


@pytest.mark.parametrize("left", [False, True])
def test_padding_that_sees_nothing(left: bool) -> None:
    there = torch.arange(7)[None] < torch.tensor([[7], [3]])
    there = there.flip(1) if left else there
    mask = (there[:, None, :, None] & there[:, None, None, :]) & torch.ones(7, 7, dtype=torch.bool).tril()
    both(moved(SIZES[0], torch.float32), mask.to(DEVICE))


@pytest.mark.parametrize("low", [float("inf"), float("-inf")])
def test_either_infinity_of_a_row_without_text(low: float) -> None:
    """Stock kernels say with one or the other that a row saw nothing, and leave anything in its output."""
    q, _, _, pk, pv = (part.detach() for part in moved(SIZES[0], torch.float32))
    o, lse = torch.full_like(q, float("nan")), torch.full(q.shape[:3], low, device=DEVICE)
    torch.ops.lit_peft.prefix(q, pk, pv, o, lse, 0.5)
    scores = 0.5 * q @ pk.repeat_interleave(2, 1).mT
    agree(o, scores.softmax(-1) @ pv.repeat_interleave(2, 1), 2e-6)
    agree(lse, scores.logsumexp(-1), 2e-6)


@pytest.mark.parametrize("frozen", [(0, 1, 2), (3, 4)], ids=str)
def test_only_gradients_that_are_asked_for(frozen: tuple[int, ...]) -> None:
    parts = moved(SIZES[0], torch.float32)
    for i in frozen:
        parts[i].requires_grad_(False)
    both(parts, is_causal=True)


def test_rows_of_a_table_and_heads_beside_tokens() -> None:
    q, k, v = (
        part.detach().transpose(1, 2).contiguous().transpose(1, 2) for part in moved(SIZES[0], torch.float32)[:3]
    )
    table = torch.randn(3, 4, 2, 8, generator=torch.Generator().manual_seed(3)).to(DEVICE).requires_grad_()
    rows = table.permute(1, 2, 0, 3)[:, None]
    both([*(part.requires_grad_() for part in (q, k, v)), rows[2], rows[3]], is_causal=True)


def test_many_tiles_are_added_up_the_same_at_every_run() -> None:
    """More rows of one head than one program takes: their sums are parts, added up in order."""
    parts = moved((1, 2, 1, 300, 300, 8, 2, True), torch.float32)
    both(parts, is_causal=True)
    first, second = (
        torch.autograd.grad(prefix_attention(*parts, is_causal=True, kernels=True).sum(), parts[3:])  # type: ignore[misc]
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_twice_in_a_graph_and_checkpointed() -> None:
    parts = moved(SIZES[0], torch.float32)

    def twice(*tensors: Tensor, kernels: bool = True) -> Tensor:
        once = prefix_attention(*tensors, is_causal=True, kernels=kernels)  # type: ignore[misc]
        return prefix_attention(once, *tensors[1:], is_causal=True, kernels=kernels)  # type: ignore[misc]

    kernel = torch.autograd.grad(twice(*parts).pow(2).sum(), parts)
    again = torch.autograd.grad(checkpoint(twice, *parts, use_reentrant=False).pow(2).sum(), parts)
    plain = torch.autograd.grad(twice(*parts, kernels=False).pow(2).sum(), parts)
    for a, b, wanted in zip(kernel, again, plain, strict=True):
        agree(a, wanted, 1e-5)
        assert torch.equal(a, b)


def test_registered() -> None:
    """Shapes, strides, devices and what is changed in place are as the fake operations say."""
    q, _, _, pk, pv = (part.detach() for part in moved(SIZES[0], torch.float32))
    o, lse = torch.randn_like(q), torch.randn(q.shape[:3], device=DEVICE)
    torch.library.opcheck(torch.ops.lit_peft.prefix, (q, pk, pv, o, lse, 0.5))
    for dq in (torch.randn_like(q), None):
        torch.library.opcheck(torch.ops.lit_peft.prefix_backward, (q, q, pk, pv, o, lse, 0.5, dq))
