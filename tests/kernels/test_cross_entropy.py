"""The kernels of cross entropy and log-probabilities against float64, gradients included."""

import itertools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lit_peft.kernels import cross_entropy as launchers
from lit_peft.ops import logits
from lit_peft.ops.cross_entropy import linear_cross_entropy
from lit_peft.ops.log_probabilities import linear_log_probabilities
from tests.kernels.where import DEVICE
from tests.ops.exact import agree, drawn
from tests.ops.head_checks import aimed, check_cross_entropy, check_divergence, check_log_probabilities, layer

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def made(rows: int, entries: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = drawn(rows, 12, dtype=dtype, seed=0).detach().to(DEVICE).requires_grad_()
    return x, *layer(entries, 12, dtype, DEVICE)


@pytest.fixture(params=["one block", "blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "blocks":
        monkeypatch.setattr(launchers, "WIDEST", 16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "entries"), [(5, 37), (1, 64), (3, 5), (0, 37)])
@pytest.mark.usefixtures("blocks")
def test_cross_entropy(rows: int, entries: int, dtype: torch.dtype) -> None:
    x, weight, bias = made(rows, entries, dtype)
    for ignored in (False, True):
        check_cross_entropy(x, weight, aimed(rows, entries, ignored, DEVICE), bias, True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("blocks")
def test_scaled_and_capped(dtype: torch.dtype) -> None:
    x, weight, bias = made(4, 37, dtype)
    targets = aimed(4, 37, False, DEVICE)
    check_cross_entropy(x, weight, targets, bias, True, scale=0.25)
    check_cross_entropy(x, weight, targets, bias, True, scale=0.5, softcap=3.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "entries"), [(5, 37), (1, 64), (0, 37)])
@pytest.mark.parametrize("entropy", [False, True], ids=["", "entropy"])
@pytest.mark.usefixtures("blocks")
def test_log_probabilities(rows: int, entries: int, entropy: bool, dtype: torch.dtype) -> None:
    x, weight, bias = made(rows, entries, dtype)
    check_log_probabilities(x, weight, aimed(rows, entries, True, DEVICE), bias, True, entropy)
    targets = aimed(rows, entries, False, DEVICE)
    check_log_probabilities(x, weight, targets, None, True, entropy, temperature=0.7, softcap=3.0)


def test_rows_that_begin_at_multiples(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, for both paths."""
    monkeypatch.setitem(logits.ALIGNED, "cpu", 64)
    x, weight, bias = made(5, 37, torch.bfloat16)
    targets = aimed(5, 37, True, DEVICE)
    for kernels in (True, False):
        check_cross_entropy(x, weight, targets, bias, kernels)
        check_log_probabilities(x, weight, targets, bias, kernels, True)
        check_divergence(x, weight, (x.detach().flip(0), weight), kernels, kind="jsd")


def test_a_vocabulary_wider_than_a_block() -> None:
    x, weight, bias = made(2, 9001, torch.bfloat16)
    check_cross_entropy(x, weight, torch.tensor([9000, 17], device=DEVICE), bias, True)
    check_log_probabilities(x, weight, torch.tensor([8192, 8191], device=DEVICE), bias, True, True)


def test_in_pieces_uneven_memory_and_twice_in_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    for device in ("cpu", "cuda"):
        monkeypatch.setitem(logits.PIECE, device, 2 * 19 * 4)
    base = drawn(12, 5, dtype=torch.float32, seed=0).detach().to(DEVICE).requires_grad_()
    weight, bias = layer(19, 12, torch.float32, DEVICE)
    targets = aimed(5, 19, False, DEVICE)
    check_cross_entropy(base.detach().t().requires_grad_(), weight, targets, bias, True)
    check_log_probabilities(base.detach().t().requires_grad_(), weight, targets, bias, True, True)
    for op in (linear_cross_entropy, linear_log_probabilities):
        once = torch.autograd.grad(op(base.t(), weight, targets, kernels=True).sum(), base)[0]
        both = op(base.t(), weight, targets, kernels=True) + op(base.t(), weight, targets, kernels=True)
        agree(torch.autograd.grad(both.sum(), base)[0], 2 * once, 1e-6)
        again = checkpoint(op, base.t(), weight, targets, kernels=True, use_reentrant=False)
        agree(torch.autograd.grad(again.sum(), base)[0], once, 1e-6)


def test_entries_that_are_masked_out(blocks: None) -> None:
    """A bias of minus infinity, over whole blocks and at the first entries."""
    x, weight, bias = made(3, 50, torch.float32)
    bias[:20], bias[-20:] = -torch.inf, -torch.inf
    targets = torch.tensor([20, 25, 29], device=DEVICE)
    both = linear_log_probabilities(x, weight, targets, bias, entropy=True, kernels=True)
    exact = x.detach().double().requires_grad_()
    logs = (exact @ weight[20:30].double().t() + bias[20:30].double()).log_softmax(1)
    wanted = logs.gather(1, targets[:, None] - 20)[:, 0], -(logs.exp() * logs).sum(1)
    for got, right in zip(both, wanted, strict=True):
        agree(got, right, 1e-6)
    agree(torch.autograd.grad(sum(both).sum(), x)[0], torch.autograd.grad(sum(wanted).sum(), exact)[0], 1e-5)  # type: ignore[union-attr]


def test_all_rows_ignored() -> None:
    x, weight, _ = made(3, 19, torch.bfloat16)
    loss = linear_cross_entropy(x, weight, torch.full((3,), -100, device=DEVICE), kernels=True)
    (slope,) = torch.autograd.grad(loss, x)
    assert loss.item() == 0
    assert not slope.any()


def test_a_target_outside_of_the_vocabulary_gives_no_number() -> None:
    """Not what happens to lie behind the row."""
    x, weight, _ = made(2, 19, torch.float32)
    targets = torch.tensor([19, -100], device=DEVICE)
    found = linear_log_probabilities(x, weight, targets, ignore_index=None, kernels=True)
    assert found.isnan().all()


def test_tokens_that_are_all_but_learned() -> None:
    """1 - p of the target is as exact as p, which rounds to 1."""
    torch.manual_seed(0)
    weight = torch.randn(64, 12, device=DEVICE)
    weight /= weight.norm(dim=1, keepdim=True)
    targets = torch.arange(4, device=DEVICE)
    x = (weight[targets] * 40).requires_grad_()  # 1 - p from 1e-3 to 1e-9
    exact = x.detach().double().requires_grad_()
    for op in (linear_cross_entropy, linear_log_probabilities):
        (mine,) = torch.autograd.grad(op(x, weight, targets, kernels=True).sum(), x)
        (theirs,) = torch.autograd.grad(op(exact, weight.double(), targets).sum(), exact)
        for one, other in zip(mine, theirs, strict=True):
            agree(one, other, 1e-4)


def test_registered() -> None:
    """Shapes, strides and devices of the fake operations are those of the launches, and only v changes."""
    v, targets = torch.randn(3, 19, device=DEVICE), torch.tensor([0, 7, 18], device=DEVICE)
    lse, miss, entropies, g, h = torch.rand(5, 3, device=DEVICE).unbind()
    ops = torch.ops.lit_peft
    for height, gain in itertools.product((0.0, 3.0), (0.0, 1.0)):
        torch.library.opcheck(ops.cross_entropy, (v.clone(), targets, 1.0, height, gain))
    torch.library.opcheck(ops.log_probabilities, (v, targets, 1.0, 0.0, True))
    backward = ops.log_probabilities_backward
    numbers = [part.clone() for part in (lse, miss, entropies, g, h)]
    torch.library.opcheck(backward, (v.clone(), targets, *numbers, 1.0, 0.0))
    torch.library.opcheck(backward, (v.clone(), targets, *numbers[:2], None, numbers[3], None, 1.0, 0.0))
