"""What the ops on a frozen output layer compute and hold, on the shapes of an 8B Llama, counted without doing it."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from lit_peft.ops import logits
from lit_peft.ops.cross_entropy import linear_cross_entropy
from lit_peft.ops.divergence import linear_divergence
from lit_peft.ops.log_probabilities import linear_log_probabilities
from tests.ops.exact import agree
from tests.ops.test_memory import Live

TOKENS, WIDTH, ENTRIES, TEACHER = 8192, 4096, 128256, 8192


class Peak(Live):
    """Counts the most bytes that are alive at once."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        self.most = max(self.most, self.bytes)
        return out


def loss(op: str, x: Tensor, weight: Tensor, targets: Tensor, teacher: list[Tensor], kernels: bool | None) -> Tensor:
    if op == "cross entropy":
        return linear_cross_entropy(x, weight, targets, ignore_index=None, kernels=kernels)
    if op == "log-probabilities":
        return linear_log_probabilities(x, weight, targets, ignore_index=None, kernels=kernels).sum()
    return linear_divergence(x, weight, teacher[0], teacher[1], kind=op, kernels=kernels)


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "plain"])
@pytest.mark.parametrize("op", ["cross entropy", "log-probabilities", "forward_kl", "jsd"])
def test_half_a_gigabyte_beside_the_inputs(op: str, kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a GPU's sizes of pieces; all logits would be 2.1 GB, and F.cross_entropy holds 4.2 GB of float32 beside."""
    for sizes in (logits.PIECE, logits.STRIP, logits.ALIGNED):
        monkeypatch.setitem(sizes, "cpu", sizes["cuda"])
    if kernels:
        pytest.importorskip("triton")
        monkeypatch.setenv("TRITON_INTERPRET", "1")  # no kernel runs: only its shapes are asked for
    with FakeTensorMode():
        x, weight = torch.empty(TOKENS, WIDTH, dtype=torch.bfloat16), torch.empty(ENTRIES, WIDTH, dtype=torch.bfloat16)
        teacher = [torch.empty(size, TEACHER, dtype=torch.bfloat16) for size in (TOKENS, ENTRIES)]
        x.requires_grad_()
        targets = torch.empty(TOKENS, dtype=torch.int64)
        with Peak([x, weight, targets, *teacher]) as peak:
            loss(op, x, weight, targets, teacher, kernels).backward()
    assert 2 * TOKENS * WIDTH < peak.most < 0.5e9


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "plain"])
@pytest.mark.parametrize(("op", "products"), [("cross entropy", 2), ("log-probabilities", 3), ("jsd", 4)])
def test_products(op: str, products: int, kernels: bool) -> None:
    """In rows x entries x width; the teacher of `jsd` is twice as wide as its student."""
    if kernels:
        pytest.importorskip("triton")
    with FakeTensorMode():
        x, weight = torch.empty(512, 64, requires_grad=True), torch.empty(4096, 64)
        teacher = [torch.empty(512, 128), torch.empty(4096, 128)]
        with FlopCounterMode(display=False) as counted:
            loss(op, x, weight, torch.empty(512, dtype=torch.int64), teacher, kernels).backward()
    assert counted.get_total_flops() == products * 2 * 512 * 4096 * 64


def test_products_of_rows_that_count() -> None:
    """Ignored rows take part in none, and without a gradient there is one."""
    x, weight = torch.randn(64, 8), torch.randn(500, 8)
    targets = torch.where(torch.arange(64) < 48, -100, torch.arange(64))
    for needs, products in ((True, 2), (False, 1)):
        with FlopCounterMode(display=False) as counted:
            linear_cross_entropy(x.requires_grad_(needs), weight, targets)
        assert counted.get_total_flops() == products * 2 * 16 * 500 * 8
    with FlopCounterMode(display=False) as counted:
        linear_log_probabilities(x.requires_grad_(), weight, targets).sum().backward()
    assert counted.get_total_flops() == 3 * 2 * 16 * 500 * 8


@pytest.mark.parametrize("entries", [128256, 49152, 32000, 100])
@pytest.mark.parametrize("rows", [1, 100, 1000, 8192])
def test_pieces_are_within_their_bytes(rows: int, entries: int) -> None:
    x, weight = torch.empty(rows, 4, dtype=torch.bfloat16, device="meta"), torch.empty(entries, 4, device="meta")
    found = list(logits.parts(x, weight))
    assert [row for part in found for row in range(part.start, part.stop)] == list(range(rows))
    assert max(part.stop - part.start for part in found) * entries * 2 <= logits.PIECE["cpu"]


@pytest.mark.parametrize("op", ["cross entropy", "log-probabilities", "jsd"])
def test_compiled(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one graph, with the pieces in it: not with all logits."""
    monkeypatch.setitem(logits.PIECE, "cpu", 2 * 50 * 4)
    x, weight, targets = torch.randn(5, 8, requires_grad=True), torch.randn(50, 8), torch.arange(5)
    teacher = [torch.randn(5, 4), torch.randn(50, 4)]
    plain = loss(op, x, weight, targets, teacher, None)
    compiled: Any = torch.compile(loss, backend="aot_eager", fullgraph=True)
    found = compiled(op, x, weight, targets, teacher, None)
    agree(found, plain, 1e-6)
    agree(torch.autograd.grad(found, x)[0], torch.autograd.grad(plain, x)[0], 1e-6)


@pytest.mark.parametrize("op", ["cross entropy", "log-probabilities", "jsd"])
def test_under_autocast(op: str) -> None:
    """Products in bfloat16, all else in float32, and gradients in the dtype of x."""
    x, weight, targets = torch.randn(5, 8, requires_grad=True), torch.randn(50, 8), torch.arange(5)
    teacher = [torch.randn(5, 4), torch.randn(50, 4)]
    plain = loss(op, x, weight, targets, teacher, False)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(op, x, weight, targets, teacher, False)
    assert found.dtype == torch.float32
    agree(found, plain, 2e-2)
    (mine,) = torch.autograd.grad(found, x)
    assert mine.dtype == torch.float32
    agree(mine, torch.autograd.grad(plain, x)[0], 2e-2)
