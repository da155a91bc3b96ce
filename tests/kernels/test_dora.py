"""DoRA's kernels against float64, and a model that runs on them."""

import pytest
import torch
from torch import Tensor

from lit_peft.ops.dora import dora_linear, reference
from tests.kernels.where import DEVICE
from tests.ops.exact import TOLERANCE, agree, gradients
from tests.ops.test_dora import adapted, compare, problem

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(5, 7, 3, 1), (1, 33, 65, 7), (66, 16, 31, 16), (9, 5, 6, 8), (70, 20, 65, 64)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_float64(bias: bool, size: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    base, inputs = problem(*size, dtype, bias)
    base, inputs = base.to(DEVICE), [tensor.detach().to(DEVICE).requires_grad_() for tensor in inputs]
    compare(lambda *x: dora_linear(x[0], base, *x[1:], 0.7, kernels=True), base, inputs, TOLERANCE[dtype])


@pytest.mark.parametrize("asked", range(4))
def test_only_gradients_that_are_asked_for(asked: int) -> None:
    base, inputs = problem(6, 5, 4, 2, torch.float32, bias=True)
    base = base.to(DEVICE)
    given = [tensor.detach().to(DEVICE).requires_grad_(i == asked) for i, tensor in enumerate(inputs)]
    exact = [tensor.detach().double().requires_grad_(i == asked) for i, tensor in enumerate(given)]
    reference(exact[0], base.weight.double(), base.bias.double(), *exact[1:], 0.7).sum().backward()
    dora_linear(given[0], base, *given[1:], 0.7, kernels=True).sum().backward()
    agree(given[asked].grad, exact[asked].grad, 2e-6)


def test_uneven_memory_and_twice_in_one_graph() -> None:
    base, inputs = problem(1, 5, 5, 2, torch.float32, bias=False)
    base, inputs = base.to(DEVICE), [tensor.detach().to(DEVICE) for tensor in inputs]
    x = torch.randn(4, 3, 5, device=DEVICE)

    def run(*given: Tensor, kernels: bool) -> tuple[Tensor, ...]:
        leaves = [tensor.detach().requires_grad_() for tensor in given]
        x, *factors, n = leaves
        inner = dora_linear(x.transpose(0, 1), base, *factors, n, 0.7, kernels=kernels)
        out = dora_linear(inner, base, *factors, n, 0.7, kernels=kernels)
        return out, *torch.autograd.grad(out.sin().sum(), leaves[:4])

    for one, other in zip(run(x, *inputs[1:], kernels=True), run(x, *inputs[1:], kernels=False), strict=True):
        agree(one, other, 5e-6)


def test_no_rows() -> None:
    base, inputs = problem(0, 5, 4, 2, torch.float32, bias=True)
    base, inputs = base.to(DEVICE), [tensor.detach().to(DEVICE).requires_grad_() for tensor in inputs]
    out = dora_linear(inputs[0], base, *inputs[1:], 0.7, kernels=True)
    out.sum().backward()
    assert out.shape == (0, 4)
    assert not any(tensor.grad.any() for tensor in inputs[:4])  # type: ignore[union-attr]


def test_a_model_on_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.arange(6).view(2, 3)
    found = []
    for forced in ("0", "1"):
        monkeypatch.setenv("LIT_PEFT_KERNELS", forced)
        found.append(gradients(adapted().float().to(DEVICE), ids.to(DEVICE)))
    agree(found[1][0], found[0][0], 2e-6)
    for one, other in zip(found[1][1], found[0][1], strict=True):
        agree(one, other, 1e-4)


def test_registered() -> None:
    shapes = [(6, 16), (2, 6), (16, 2), (16,), (16,)]
    out, h, b, c, bias = (torch.randn(*shape, device=DEVICE) for shape in shapes)
    for given in (bias, None):
        torch.library.opcheck(torch.ops.lit_peft.turn, (out, h, b, c, given, 0.5))
        torch.library.opcheck(torch.ops.lit_peft.turn_backward, (out, out.clone(), h, given))
    torch.library.opcheck(torch.ops.lit_peft.turn_backward, (out, None, h, None))
    torch.library.opcheck(torch.ops.lit_peft.turn_backward, (out, out.clone(), None, bias))
