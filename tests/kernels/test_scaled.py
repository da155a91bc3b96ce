"""The kernel of column factors against float64, and a model that runs on it."""

import pytest
import torch
from torch import Tensor

from lit_peft.ops.scaled import scaled, scaled_linear, scaled_output
from tests.kernels.where import DEVICE
from tests.ops.exact import TOLERANCE, agree, drawn, gradients
from tests.ops.test_scaled import adapted, compare, layer

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def moved(tensor: Tensor) -> Tensor:
    return tensor.detach().to(DEVICE).requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(5, 7, 3), (1, 33, 65), (70, 20, 130)], ids=str)
@pytest.mark.parametrize("inside", [False, True])
def test_float64(inside: bool, size: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, wide, tall = size
    base = layer(wide, tall, dtype).to(DEVICE)
    x = moved(drawn(rows, wide, dtype=dtype, seed=0))
    factor = moved(drawn(wide if inside else tall, dtype=torch.float32, seed=1))
    exact_x, exact_factor = (tensor.detach().double().requires_grad_() for tensor in (x, factor))
    weight, bias = base.weight.double(), base.bias.double()
    if inside:
        wanted = (exact_x * exact_factor) @ weight.t() + bias
    else:
        wanted = (exact_x @ weight.t() + bias) * exact_factor
    apart = base(scaled(x, factor, kernels=True)) if inside else scaled_output(base(x), factor, kernels=True)
    for out in (scaled_linear(x, base, factor, inside=inside, kernels=True), apart):
        slope = drawn(*out.shape, dtype=torch.float64, seed=9).detach().to(DEVICE)
        agree(out, wanted, TOLERANCE[dtype])
        got = torch.autograd.grad(out, [x, factor], slope.to(dtype))
        asked = torch.autograd.grad(wanted, [exact_x, exact_factor], slope, retain_graph=True)
        for one, other in zip(got, asked, strict=True):
            agree(one, other, TOLERANCE[dtype])


def test_many_rows_in_shares_and_uneven_memory() -> None:
    from lit_peft.kernels import scaled as kernels

    assert kernels.shared_out(1) == (1, 32)
    assert kernels.shared_out(10_000) == (63, 160)
    x, factor = moved(drawn(3, 90, 5, dtype=torch.float32, seed=0)), moved(drawn(5, dtype=torch.float32, seed=1))
    exact_x, exact_factor = (tensor.detach().double().requires_grad_() for tensor in (x, factor))
    slope = drawn(90, 3, 5, dtype=torch.float64, seed=9).detach().to(DEVICE)
    got = torch.autograd.grad(scaled(x.transpose(0, 1), factor, kernels=True), [x, factor], slope.float())
    wanted = torch.autograd.grad(exact_x.transpose(0, 1) * exact_factor, [exact_x, exact_factor], slope)
    for one, other in zip(got, wanted, strict=True):
        agree(one, other, 2e-6)


def test_no_rows_and_frozen_factors() -> None:
    base, factor = layer(4, 3, torch.float32).to(DEVICE), moved(drawn(3, dtype=torch.float32, seed=0))
    x = torch.empty(0, 4, device=DEVICE, requires_grad=True)
    scaled_linear(x, base, factor, kernels=True).sum().backward()
    assert factor.grad is not None
    assert not factor.grad.any()
    x = moved(drawn(2, 4, dtype=torch.float32, seed=1))
    out = scaled_linear(x, base, factor.detach(), kernels=True)
    compare(out, x * 1 @ base.weight.t() * factor.detach() + base.bias * factor.detach(), [x], [x], 2e-6)


def test_a_model_on_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.arange(6).view(2, 3)
    found = []
    for forced in ("0", "1"):
        monkeypatch.setenv("LIT_PEFT_KERNELS", forced)
        found.append(gradients(adapted().float().to(DEVICE), ids.to(DEVICE)))
    agree(found[1][0], found[0][0], 2e-6)
    for one, other in zip(found[1][1], found[0][1], strict=True):
        agree(one, other, 1e-5)


def test_registered() -> None:
    g, z, factor = (torch.randn(*shape, device=DEVICE) for shape in ((3, 16), (3, 16), (16,)))
    torch.library.opcheck(torch.ops.lit_peft.scale_and_sum, (g, z, factor))
