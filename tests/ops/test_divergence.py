"""Divergences between a student and a teacher against float64, and their limits."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lit_peft.ops import logits
from lit_peft.ops.divergence import KINDS, linear_divergence
from tests.ops.exact import agree, drawn
from tests.ops.head_checks import check_divergence, layer

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "piece"), [(7, 2**25), (7, 400), (1, 1), (0, 40)])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(
    rows: int, piece: int, kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(logits.PIECE, "cpu", piece)
    monkeypatch.setitem(logits.STRIP, "cpu", 4 * 19)
    x, (weight, bias) = drawn(rows, 12, dtype=dtype, seed=0), layer(19, 12, dtype)
    teacher = drawn(rows, 6, dtype=dtype, seed=2).detach(), layer(19, 6, dtype, seed=3)[0]
    check_divergence(x, weight, teacher, False, kind=kind)
    check_divergence(x, weight, teacher, False, kind=kind, temperature=2.0, bias=bias)


@pytest.mark.parametrize("kind", KINDS)
def test_caps_biases_and_a_teacher_in_another_dtype(kind: str) -> None:
    x, (weight, bias) = drawn(5, 12, dtype=torch.float32, seed=0), layer(19, 12, torch.float32)
    other = layer(19, 6, torch.float32, seed=3)
    teacher = drawn(5, 6, dtype=torch.float32, seed=2).detach(), other[0]
    more = {"bias": bias, "teacher_bias": other[1], "softcap": 3.0, "teacher_softcap": 2.0}
    check_divergence(x, weight, teacher, False, kind=kind, temperature=0.5, **more)
    half = teacher[0].bfloat16(), teacher[1].bfloat16()
    got = linear_divergence(x, weight, *half, kind=kind)
    agree(got, linear_divergence(x.double(), weight.double(), half[0].double(), half[1].double(), kind=kind), 1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_that_is_its_teacher(kind: str) -> None:
    x, (weight, _) = drawn(5, 12, dtype=torch.float32, seed=0), layer(19, 12, torch.float32)
    loss = linear_divergence(x, weight, x.detach(), weight, kind=kind)
    (slope,) = torch.autograd.grad(loss, x)
    assert abs(float(loss.detach())) < 1e-6
    assert slope.abs().max() < 1e-5


def test_limits_of_the_mixture() -> None:
    x, (weight, _) = drawn(5, 12, dtype=torch.float64, seed=0).detach() * 0.3, layer(19, 12, torch.float64)
    teacher = drawn(5, 12, dtype=torch.float64, seed=4).detach() * 0.3, weight
    for beta, kind in ((1e-4, "forward_kl"), (1 - 1e-4, "reverse_kl")):
        mixed = linear_divergence(x, weight, *teacher, kind="jsd", beta=beta) / (beta * (1 - beta))
        agree(mixed, linear_divergence(x, weight, *teacher, kind=kind), 1e-2)


def test_the_gradient_keeps_its_size_when_the_temperature_changes() -> None:
    x, (weight, _) = drawn(5, 12, dtype=torch.float64, seed=0), layer(19, 12, torch.float64)
    teacher = drawn(5, 12, dtype=torch.float64, seed=4).detach(), weight
    sizes = []
    for temperature in (20.0, 40.0):  # for large T it goes to a constant, the difference of centred logits
        loss = linear_divergence(x, weight, *teacher, temperature=temperature)
        sizes.append(float(torch.autograd.grad(loss, x)[0].norm()))
    assert abs(sizes[0] / sizes[1] - 1) < 0.2


def test_entries_that_are_masked_out() -> None:
    """Biases of minus infinity, as padding of the vocabulary has them."""
    x, (weight, bias) = drawn(5, 12, dtype=torch.float64, seed=0), layer(19, 12, torch.float64)
    teacher, masked = drawn(5, 12, dtype=torch.float64, seed=4).detach(), bias.clone()
    masked[-3:] = -torch.inf
    for kind in KINDS:
        got = linear_divergence(x, weight, teacher, weight, kind=kind, bias=masked, teacher_bias=masked)
        cut, few = weight[:-3], bias[:-3]
        wanted = linear_divergence(x, cut, teacher, cut, kind=kind, bias=few, teacher_bias=few)
        agree(got, wanted, 1e-12)
        agree(torch.autograd.grad(got, x)[0], torch.autograd.grad(wanted, x)[0], 1e-12)


def test_uneven_memory_twice_in_a_graph_and_checkpointed() -> None:
    base, (weight, _) = drawn(12, 5, dtype=torch.float64, seed=0), layer(19, 12, torch.float64)
    teacher = drawn(12, 5, dtype=torch.float64, seed=4).detach().t()
    check_divergence(base.detach().t().requires_grad_(), weight, (teacher, weight), False, kind="jsd")
    once = torch.autograd.grad(linear_divergence(base.t(), weight, teacher, weight), base)[0]
    both = linear_divergence(base.t(), weight, teacher, weight) + linear_divergence(base.t(), weight, teacher, weight)
    agree(torch.autograd.grad(both, base)[0], 2 * once, 1e-12)
    again = checkpoint(linear_divergence, base.t(), weight, teacher, weight, use_reentrant=False)
    agree(torch.autograd.grad(again, base)[0], once, 1e-12)


def test_refusals() -> None:
    x, weight = torch.ones(1, 2, requires_grad=True), torch.eye(3, 2)
    with pytest.raises(ValueError, match="output layer is to be trained"):
        linear_divergence(x, weight.clone().requires_grad_(), x, weight)
    with pytest.raises(ValueError, match="kind is 'kl'"):
        linear_divergence(x, weight, x, weight, kind="kl")
    with pytest.raises(ValueError, match="beta is 1"):
        linear_divergence(x, weight, x, weight, kind="jsd", beta=1.0)
    with pytest.raises(ValueError, match="3 entries and the teacher's 2"):
        linear_divergence(x, weight, x, weight[:2])
    with pytest.raises(ValueError, match="1 rows and the teacher 2"):
        linear_divergence(x, weight, torch.ones(2, 2), weight)
    with pytest.raises(ValueError, match="temperature is 0"):
        linear_divergence(x, weight, x, weight, temperature=0)
    loss = linear_divergence(x, weight, 2 * x.detach(), weight).pow(2)
    (slope,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()
