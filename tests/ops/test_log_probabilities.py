"""Log-probabilities of tokens against float64, and the preference losses they are for."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lit_peft.ops import logits
from lit_peft.ops.log_probabilities import linear_log_probabilities
from tests.ops.exact import agree, drawn
from tests.ops.head_checks import aimed, check_log_probabilities, layer

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "piece"), [(7, 2**25), (7, 200), (1, 1), (0, 40)])
@pytest.mark.parametrize("entropy", [False, True], ids=["", "entropy"])
@pytest.mark.parametrize("ignored", [False, True], ids=["", "ignored"])
def test_values_and_gradients(
    rows: int, piece: int, entropy: bool, ignored: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(logits.PIECE, "cpu", piece)
    monkeypatch.setitem(logits.STRIP, "cpu", 2 * 19)
    x, (weight, bias) = drawn(rows, 12, dtype=dtype, seed=0), layer(19, 12, dtype)
    check_log_probabilities(x, weight, aimed(rows, 19, ignored), bias, False, entropy)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("temperature", [0.7, 2.0])
@pytest.mark.parametrize("entropy", [False, True], ids=["", "entropy"])
def test_temperature_and_cap(temperature: float, softcap: float | None, entropy: bool) -> None:
    x, (weight, _) = drawn(5, 12, dtype=torch.float32, seed=0), layer(19, 12, torch.float32)
    check_log_probabilities(
        x, weight, aimed(5, 19, True), None, False, entropy, temperature=temperature, softcap=softcap
    )


def test_shapes_and_uneven_memory() -> None:
    """Rows of a batch, as a preference loss has them, from a tensor that is not contiguous."""
    base = drawn(12, 3, 4, dtype=torch.float64, seed=0)
    x, (weight, _) = base.permute(1, 2, 0), layer(19, 12, torch.float64)
    targets = aimed(12, 19, True).view(3, 4)
    got = linear_log_probabilities(x, weight, targets)
    wanted = F.linear(x, weight).log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0] * (targets >= 0)
    agree(got, wanted, 1e-12)
    slope = torch.randn(3, 4, dtype=torch.float64)
    agree(torch.autograd.grad(got, base, slope)[0], torch.autograd.grad(wanted, base, slope)[0], 1e-12)


def test_a_preference_loss() -> None:
    """DPO's: -log sigmoid of what the chosen answer gained over the rejected one."""
    x, (weight, _) = drawn(4, 6, 12, dtype=torch.float64, seed=0), layer(19, 12, torch.float64)
    targets, before = aimed(24, 19, True).view(4, 6), torch.randn(4, dtype=torch.float64)
    plain = F.linear(x, weight).log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0] * (targets >= 0)
    found = []
    for logs in (linear_log_probabilities(x, weight, targets), plain):
        gain = logs.sum(1) - before
        loss = -F.logsigmoid(0.1 * (gain[::2] - gain[1::2])).mean()
        found.append((loss, torch.autograd.grad(loss, x)[0]))
    agree(found[0][0], found[1][0], 1e-12)
    agree(found[0][1], found[1][1], 1e-12)


def test_twice_in_a_graph_and_checkpointed() -> None:
    x, (weight, _) = drawn(5, 12, dtype=torch.float64, seed=0), layer(19, 12, torch.float64)
    targets = aimed(5, 19, False)
    once = torch.autograd.grad(linear_log_probabilities(x, weight, targets).sum(), x)[0]
    both = linear_log_probabilities(x, weight, targets) + linear_log_probabilities(x, weight, targets)
    agree(torch.autograd.grad(both.sum(), x)[0], 2 * once, 1e-12)
    again = checkpoint(linear_log_probabilities, x, weight, targets, use_reentrant=False)
    agree(torch.autograd.grad(again.sum(), x)[0], once, 1e-12)


def test_entries_that_are_masked_out() -> None:
    """A bias of minus infinity, as padding of the vocabulary has it."""
    x, (weight, bias) = drawn(5, 12, dtype=torch.float64, seed=0), layer(19, 12, torch.float64)
    bias[-3:] = -torch.inf
    targets = torch.arange(5)
    both = linear_log_probabilities(x, weight, targets, bias, entropy=True)
    same = linear_log_probabilities(x, weight[:-3], targets, bias[:-3], entropy=True)
    for got, wanted in zip(both, same, strict=True):
        agree(got, wanted, 1e-12)
    (mine,) = torch.autograd.grad(sum(part.sum() for part in both), x)  # type: ignore[arg-type]
    (theirs,) = torch.autograd.grad(sum(part.sum() for part in same), x)  # type: ignore[arg-type]
    agree(mine, theirs, 1e-12)


def test_tiny_and_huge_slopes_in_float16() -> None:
    """A token's gradient is as good whatever the loss multiplies it by."""
    x, (weight, _) = drawn(4, 12, dtype=torch.float16, seed=0), layer(19, 12, torch.float16)
    exact, targets = x.detach().double().requires_grad_(), aimed(4, 19, False)
    slope = torch.tensor([1e-4, 1.0, 1e3, -1e-3])
    (mine,) = torch.autograd.grad(linear_log_probabilities(x, weight, targets), x, slope)
    wanted = linear_log_probabilities(exact, weight.double(), targets)
    (theirs,) = torch.autograd.grad(wanted, exact, slope.double())
    for one, other in zip(mine, theirs, strict=True):
        agree(one, other, 5e-3)


def test_refusals() -> None:
    x, weight, targets = torch.ones(1, 2, requires_grad=True), torch.ones(3, 2), torch.tensor([0])
    with pytest.raises(ValueError, match="output layer is to be trained"):
        linear_log_probabilities(x, weight.clone().requires_grad_(), targets)
    with pytest.raises(ValueError, match=r"temperature is 0\.0"):
        linear_log_probabilities(x, weight, targets, temperature=0.0)
    with pytest.raises(ValueError, match=r"softcap is -1\.0"):
        linear_log_probabilities(x, weight, targets, softcap=-1.0)
    loss = linear_log_probabilities(x, weight, targets).pow(2).sum()
    (slope,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()
