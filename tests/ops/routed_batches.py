"""Batches of rows under several sets of weights, and their updates in float64, for the tests of `routed`."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lit_peft.ops.routed import reference, routed_linear, routed_update
from lit_peft.ops.routing import Routing
from tests.ops.exact import TOLERANCE, agree, drawn

# rows of sets, tokens in a row, in, out, ranks
BATCHES = {
    "shuffled": ([(1,), (0,), (), (2,), (1,)], 3, 33, 17, (7, 1, 8)),
    "sorted": ([(0,), (0,), (1,), ()], 4, 16, 70, (16, 64)),
    "one row": ([(1,)], 1, 5, 3, (2, 3)),
    "one token each": ([(0,), (1,), (0,), (1,)], 1, 64, 40, (8, 8)),
    "the base alone": ([(), ()], 2, 8, 8, (2,)),
}
TOGETHER = ([(0, 1), (), (1,), (2, 0, 1), (2,)], 3, 20, 12, (4, 1, 3))

Batch = tuple[list[tuple[int, ...]], int, int, int, tuple[int, ...]]


def tensors(batch: Batch, dtype: torch.dtype, pairs: torch.dtype, device: str | torch.device = "cpu") -> list[Tensor]:
    """Returns y, x and all A and B, drawn anew and asking for gradients."""
    rows, tokens, wide, tall, ranks = batch
    shapes = [(len(rows), tokens, tall), (len(rows), tokens, wide)]
    shapes += [(r, wide) for r in ranks] + [(tall, r) for r in ranks]  # type: ignore[misc]
    found = [drawn(*shape, dtype=dtype if i < 2 else pairs, seed=i) for i, shape in enumerate(shapes)]
    return [tensor.detach().to(device).requires_grad_() for tensor in found]


def check(
    batch: Batch,
    dtype: torch.dtype,
    kernels: bool | None,
    *,
    pairs: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    joined: bool = False,
    inputs: Sequence[Tensor] | None = None,
) -> None:
    """Compares values and every gradient with float64, and rows without sets with the layer to the bit."""
    number, routing = len(batch[4]), Routing(batch[0])
    scales = [0.5 + i for i in range(number)]
    given = list(inputs or tensors(batch, dtype, pairs or dtype, device))
    exact = [tensor.detach().double().requires_grad_() for tensor in given]
    base = nn.Linear(batch[2], batch[3]).to(device, dtype).requires_grad_(False)

    def split(parts: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        return parts[2 : 2 + number], parts[2 + number :]

    if joined:
        given[0] = base(given[1].detach())
        got = routed_linear(given[1], base, *split(given), scales, routing, kernels=kernels)
        below = nn.functional.linear(exact[1], base.weight.double(), base.bias.double())
    else:
        got = routed_update(given[0], given[1], *split(given), scales, routing, kernels=kernels)
        below = exact[0]
    wanted = reference(below, exact[1], *split(exact), scales, routing)
    assert got.dtype == dtype
    agree(got, wanted, TOLERANCE[dtype])
    for row, sets in enumerate(batch[0]):
        assert sets or got[row].equal(given[0][row]), "the base's own row"
    slope = torch.randn_like(got)
    got.backward(slope)
    wanted.backward(slope.double())
    for i, (mine, theirs) in enumerate(zip(given, exact, strict=True)):
        if i or not joined:
            gradient = torch.zeros_like(theirs) if theirs.grad is None else theirs.grad
            assert mine.grad is not None
            assert mine.grad.dtype == mine.dtype
            agree(mine.grad, gradient, TOLERANCE[dtype])
