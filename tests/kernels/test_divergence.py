"""The divergences' kernel against float64, gradients included."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lit_peft.kernels import cross_entropy, divergence
from lit_peft.ops import logits
from lit_peft.ops.divergence import KINDS, linear_divergence
from tests.kernels.where import DEVICE
from tests.ops.exact import agree, drawn
from tests.ops.head_checks import check_divergence, layer

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["one block", "blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "blocks":
        monkeypatch.setattr(divergence, "WIDEST", 32)
        monkeypatch.setattr(cross_entropy, "WIDEST", 16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "entries"), [(4, 37), (1, 64), (0, 37)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("blocks")
def test_divergence(kind: str, rows: int, entries: int, dtype: torch.dtype) -> None:
    x = drawn(rows, 12, dtype=dtype, seed=0).detach().to(DEVICE).requires_grad_()
    weight, bias = layer(entries, 12, dtype, DEVICE)
    other = layer(entries, 6, dtype, DEVICE, seed=3)
    teacher = drawn(rows, 6, dtype=dtype, seed=2).detach().to(DEVICE), other[0]
    check_divergence(x, weight, teacher, True, kind=kind)
    more = {"bias": bias, "teacher_bias": other[1], "softcap": 3.0, "teacher_softcap": 2.0}
    check_divergence(x, weight, teacher, True, kind=kind, temperature=2.0, **more)


@pytest.mark.parametrize("kind", KINDS)
def test_a_vocabulary_wider_than_a_block_and_a_teacher_in_another_dtype(kind: str) -> None:
    x = drawn(2, 12, dtype=torch.float32, seed=0).detach().to(DEVICE).requires_grad_()
    weight, teacher_weight = layer(9001, 12, torch.float32, DEVICE)[0], layer(9001, 6, torch.bfloat16, DEVICE)[0]
    teacher_x = drawn(2, 6, dtype=torch.bfloat16, seed=2).detach().to(DEVICE)
    settings = {"kind": kind, "beta": 0.1}
    got = linear_divergence(x, weight, teacher_x, teacher_weight, **settings, kernels=True)  # type: ignore[arg-type]
    wanted = linear_divergence(x, weight, teacher_x, teacher_weight, **settings, kernels=False)  # type: ignore[arg-type]
    agree(got, wanted, 1e-5)
    agree(torch.autograd.grad(got, x)[0], torch.autograd.grad(wanted, x)[0], 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_entries_that_are_masked_out(kind: str, blocks: None) -> None:
    x = drawn(2, 12, dtype=torch.float32, seed=0).detach().to(DEVICE).requires_grad_()
    teacher_x = drawn(2, 12, dtype=torch.float32, seed=5).detach().to(DEVICE)
    weight, bias = layer(50, 12, torch.float32, DEVICE)
    bias[:20] = -torch.inf
    got = linear_divergence(x, weight, teacher_x, weight, kind=kind, bias=bias, teacher_bias=bias, kernels=True)
    cut, few = weight[20:], bias[20:]
    wanted = linear_divergence(x, cut, teacher_x, cut, kind=kind, bias=few, teacher_bias=few, kernels=False)
    agree(got, wanted, 1e-5)
    agree(torch.autograd.grad(got, x)[0], torch.autograd.grad(wanted, x)[0], 1e-5)


def test_in_pieces_uneven_memory_and_twice_in_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    for device in ("cpu", "cuda"):
        monkeypatch.setitem(logits.PIECE, device, 4 * 19 * 4)
    base = drawn(12, 5, dtype=torch.float32, seed=0).detach().to(DEVICE).requires_grad_()
    weight = layer(19, 12, torch.float32, DEVICE)[0]
    teacher = drawn(12, 5, dtype=torch.float32, seed=4).detach().to(DEVICE).t(), weight
    check_divergence(base.detach().t().requires_grad_(), weight, teacher, True, kind="jsd")
    once = torch.autograd.grad(linear_divergence(base.t(), weight, *teacher, kernels=True), base)[0]
    both = [linear_divergence(base.t(), weight, *teacher, kernels=True) for _ in range(2)]
    agree(torch.autograd.grad(both[0] + both[1], base)[0], 2 * once, 1e-6)
    again = checkpoint(linear_divergence, base.t(), weight, *teacher, kernels=True, use_reentrant=False)
    agree(torch.autograd.grad(again, base)[0], once, 1e-6)


@pytest.mark.parametrize("kind", range(3))
def test_registered(kind: int) -> None:
    v, w = torch.randn(3, 19, device=DEVICE), torch.randn(3, 19, device=DEVICE)
    for gain in (0.0, 1.0):
        numbers = (0.5, gain, 1.0, 0.0, 1.0, 2.0)
        torch.library.opcheck(torch.ops.lit_peft.divergence, (v.clone(), w, kind, *numbers))
