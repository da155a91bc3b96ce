"""Cross entropy of hidden states against float64, in pieces of any size."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lit_peft.ops import cross_entropy, logits
from tests.ops.exact import TOLERANCE, agree, drawn
from tests.ops.head_checks import aimed, check_cross_entropy, layer


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "piece"), [(7, 2**25), (7, 160), (1, 1), (0, 160)])
@pytest.mark.parametrize("biased", [False, True])
def test_linear_cross_entropy(
    rows: int, piece: int, biased: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(logits.PIECE, "cpu", piece)
    x = drawn(rows, 12, dtype=dtype, seed=0)
    weight, bias = (drawn(*shape, dtype=dtype, seed=1).detach() for shape in ((19, 12), (19,)))
    targets = torch.arange(rows) * 5 % 19
    exact = x.detach().double().requires_grad_()
    wanted = cross_entropy.reference(exact, weight.double(), targets, bias.double() if biased else None)
    got = cross_entropy.linear_cross_entropy(x, weight, targets, bias if biased else None)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = {torch.float64: 1e-6}.get(dtype, TOLERANCE[dtype])  # the plain one works in float32
    agree(got, wanted, tolerance)
    (got * 0.5).backward()
    (wanted * 0.5).backward()
    agree(x.grad, exact.grad, tolerance)
    losses, hits = cross_entropy.token_scores(x, weight, targets, bias if biased else None)
    agree(losses.sum(), wanted, tolerance)
    likeliest = torch.nn.functional.linear(x, weight, bias if biased else None).argmax(-1)
    assert hits.bool().equal(likeliest == targets)


def test_a_trained_head_is_refused() -> None:
    with pytest.raises(ValueError, match="output layer is to be trained"):
        cross_entropy.linear_cross_entropy(torch.ones(1, 2), torch.ones(3, 2, requires_grad=True), torch.tensor([0]))


def test_logits_are_never_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor of the step has rows x vocabulary entries."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.ndim and out.shape[-1] == 501:
                largest = max(largest, out.numel())
            return out

    monkeypatch.setitem(logits.PIECE, "cpu", 4 * 501 * 8)
    x, weight = drawn(64, 4, dtype=torch.float32, seed=0), torch.randn(501, 4)
    with Watch():
        cross_entropy.linear_cross_entropy(x, weight, torch.arange(64)).backward()
    assert 0 < largest <= 501 * 8


def test_small_gradients_live_in_float16() -> None:
    """A scaled loss keeps gradients of tokens that are all but learned, which float16 by itself would lose."""
    torch.manual_seed(0)
    weight, targets = (torch.randn(32000, 128) * 0.02).half(), torch.randint(32000, (64,))
    x = (weight[targets].float() * 360 + torch.randn(64, 128) * 0.3).half()
    found = []
    for dtype, scale in ((torch.float64, 1.0), (torch.float16, 2.0**14)):
        rows = x.to(dtype, copy=True).requires_grad_()
        (cross_entropy.linear_cross_entropy(rows, weight.to(dtype), targets) * scale).backward()
        assert rows.grad is not None
        found.append(rows.grad.double() / scale)
    errors = (found[1] - found[0]).norm(dim=1) / found[0].norm(dim=1)
    assert errors.max() < 0.1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [7, 1, 0])
@pytest.mark.parametrize("piece", [2**25, 200])
def test_ignored_rows(rows: int, piece: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows whose target is -100, as if they were not there; others may be told apart before."""
    monkeypatch.setitem(logits.PIECE, "cpu", piece)
    monkeypatch.setitem(logits.STRIP, "cpu", 2 * 19)
    x, (weight, bias) = drawn(rows, 12, dtype=dtype, seed=0), layer(19, 12, dtype)
    targets = aimed(rows, 19, True)
    check_cross_entropy(x, weight, targets, bias, False)
    kept = targets != -100
    chosen = cross_entropy.linear_cross_entropy(x[kept], weight, targets[kept], bias, ignore_index=None)
    agree(chosen, cross_entropy.linear_cross_entropy(x, weight, targets, bias), 1e-6)


@pytest.mark.parametrize("rows", [5, 0])
def test_all_rows_ignored(rows: int) -> None:
    x, weight = drawn(rows, 4, dtype=torch.float32, seed=0), torch.randn(9, 4)
    loss = cross_entropy.linear_cross_entropy(x, weight, torch.full((rows,), -100))
    assert loss.item() == 0
    loss.backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert not x.grad.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [{"scale": 0.25}, {"softcap": 3.0}, {"softcap": 3.0, "scale": 0.5}], ids=str)
def test_models_that_scale_or_cap_their_logits(shape: dict[str, float], dtype: torch.dtype) -> None:
    x, (weight, bias) = drawn(5, 12, dtype=dtype, seed=0), layer(19, 12, dtype)
    check_cross_entropy(x, weight, aimed(5, 19, True), bias, False, **shape)


def test_uneven_memory_twice_in_a_graph_and_checkpointed() -> None:
    base, (weight, _) = drawn(12, 5, dtype=torch.float64, seed=0), layer(19, 12, torch.float64)
    targets = aimed(5, 19, False)
    check_cross_entropy(base.detach().t().requires_grad_(), weight, targets, None, False)
    once = torch.autograd.grad(cross_entropy.linear_cross_entropy(base.t(), weight, targets), base)[0]
    both = sum(cross_entropy.linear_cross_entropy(base.t(), weight, targets) for _ in range(2))
    agree(torch.autograd.grad(both, base)[0], 2 * once, 1e-12)  # type: ignore[arg-type]
    again = checkpoint(cross_entropy.linear_cross_entropy, base.t(), weight, targets, use_reentrant=False)
    agree(torch.autograd.grad(again, base)[0], once, 1e-12)


def test_a_second_derivative_is_refused() -> None:
    x, weight = drawn(2, 4, dtype=torch.float32, seed=0), torch.randn(9, 4)
    loss = cross_entropy.linear_cross_entropy(x, weight, torch.tensor([0, 1])).pow(2)
    (slope,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()
