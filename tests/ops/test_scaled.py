"""Factors on one side of a linear layer against float64: values, every gradient, and what is kept."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lit_peft import IA3Config, place
from lit_peft.methods.ia3 import IA3Linear
from lit_peft.ops.lean import make_lean
from lit_peft.ops.recipes import note, recipe_of
from lit_peft.ops.scaled import scaled, scaled_linear, scaled_output
from tests.ops.exact import TOLERANCE, agree, drawn, gradients, llama

SIZES = [(5, 7, 3), (1, 33, 65), (70, 96, 80), (0, 9, 9)]  # rows, in, out


def layer(wide: int, tall: int, dtype: torch.dtype, bias: bool = True) -> nn.Linear:
    made = nn.Linear(wide, tall, bias=bias).requires_grad_(False)
    made.weight.data = drawn(tall, wide, dtype=dtype, seed=7).detach()
    if bias:
        made.bias.data = drawn(tall, dtype=dtype, seed=8).detach()
    return made


def compare(out: Tensor, wanted: Tensor, mine: list[Tensor], theirs: list[Tensor], tolerance: float) -> None:
    agree(out, wanted, tolerance)
    slope = drawn(*out.shape, dtype=torch.float64, seed=9).detach()
    got = torch.autograd.grad(out, mine, slope.to(out.dtype))
    for one, other, of in zip(got, torch.autograd.grad(wanted, theirs, slope), mine, strict=True):
        assert one.dtype == of.dtype
        agree(one, other, tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("side", ["output", "input", "output alone", "input alone"])
def test_float64(side: str, size: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, wide, tall = size
    x = drawn(rows, wide, dtype=dtype, seed=0)
    inside = side.startswith("input")
    factor = drawn(wide if inside else tall, dtype=torch.float64 if dtype == torch.float64 else torch.float32, seed=1)
    base = layer(wide, tall, dtype)
    if side.endswith("alone"):
        out = base(scaled(x, factor)) if inside else scaled_output(base(x), factor)
    else:
        out = scaled_linear(x, base, factor, inside=inside)
    assert out.dtype == dtype
    exact_x, exact_factor = (tensor.detach().double().requires_grad_() for tensor in (x, factor))
    weight, bias = base.weight.double(), base.bias.double()
    if inside:
        wanted = (exact_x * exact_factor) @ weight.t() + bias
    else:
        wanted = (exact_x @ weight.t() + bias) * exact_factor
    compare(out, wanted, [x, factor], [exact_x, exact_factor], TOLERANCE[dtype])


@pytest.mark.parametrize("inside", [False, True])
def test_a_factor_of_zero_has_its_gradient(inside: bool) -> None:
    """Where the output alone is kept, the layer's own output can still be told from it."""
    x, factor, base = drawn(5, 4, dtype=torch.float32, seed=0), drawn(4, dtype=torch.float32, seed=1), nn.Linear(4, 4)
    base.requires_grad_(False)
    factor.data[1] = 0
    factor.data[2] = -1e-30
    exact_x, exact_factor = (tensor.detach().double().requires_grad_() for tensor in (x, factor))
    exact = base.weight.double()
    wanted = (exact_x * exact_factor) @ exact.t() if inside else (exact_x @ exact.t()) * exact_factor
    base.bias.zero_()
    out = scaled_linear(x, base, factor, inside=inside)
    compare(out, wanted, [x, factor], [exact_x, exact_factor], 2e-6)


def test_uneven_memory_twice_in_one_graph_and_checkpointing() -> None:
    x = drawn(4, 6, 5, dtype=torch.float64, seed=0)
    one, two = drawn(5, dtype=torch.float64, seed=1), drawn(5, dtype=torch.float64, seed=2)
    base = layer(5, 5, torch.float64)

    def run(x: Tensor, one: Tensor, two: Tensor) -> Tensor:
        inner = scaled_linear(x.transpose(0, 1), base, one)
        return scaled_linear(inner, base, two, inside=True) + scaled_linear(inner, base, one)

    def plain(x: Tensor, one: Tensor, two: Tensor) -> Tensor:
        inner = base(x.transpose(0, 1)) * one
        return base(inner * two) + base(inner) * one

    leaves = [x, one, two]
    wanted = torch.autograd.grad(plain(*leaves).sin().sum(), leaves)
    for found in (run(*leaves), checkpoint(run, *leaves, use_reentrant=False)):
        for mine, theirs in zip(torch.autograd.grad(found.sin().sum(), leaves), wanted, strict=True):
            agree(mine, theirs, 1e-12)


def test_only_gradients_that_are_asked_for() -> None:
    base, factor = layer(4, 3, torch.float64), drawn(3, dtype=torch.float64, seed=0)
    x = drawn(2, 4, dtype=torch.float64, seed=1).detach()
    scaled_linear(x, base, factor).sum().backward()
    agree(factor.grad, base(x).sum(0), 1e-12)
    x = x.requires_grad_()
    scaled_linear(x, base, factor.detach()).sum().backward()
    agree(x.grad, ((torch.ones(2, 3).double() * factor) @ base.weight).detach(), 1e-12)
    assert scaled_linear(x.detach(), base, factor.detach()).grad_fn is None


def test_what_the_input_is_made_of_is_kept_and_not_the_input() -> None:
    e, factor = drawn(5, 8, dtype=torch.float32, seed=0), drawn(8, dtype=torch.float32, seed=1)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        x = note(e.sin(), e, make=torch.sin)
        out = scaled(x, factor)
    assert x.data_ptr() not in [tensor.data_ptr() for tensor in kept]
    recipe = recipe_of(out)
    assert torch.equal(recipe.make(*recipe.parts), out)
    out.sum().backward()
    agree(factor.grad, e.sin().sum(0).detach(), 1e-6)


def test_a_change_in_place_is_noticed() -> None:
    base, factor = layer(4, 3, torch.float64), drawn(3, dtype=torch.float64, seed=0)
    out = scaled_linear(drawn(2, 4, dtype=torch.float64, seed=1), base, factor)
    out.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def adapted() -> nn.Module:
    model = llama()
    place(model, IA3Config().sites(model), lambda base, config: IA3Linear(base, config))
    for module in model.modules():
        if isinstance(module, IA3Linear):
            module.double()
            nn.init.normal_(module.ia3_l["default"], mean=1.0)
    return model


@pytest.mark.parametrize("lean", [False, True])
def test_a_model_is_what_it_is_without_the_ops(lean: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.arange(14).view(2, 7)
    model = adapted()
    if lean:
        make_lean(model)
    loss, mine = gradients(model, ids)
    monkeypatch.setenv("LIT_PEFT_KERNELS", "0")
    wanted, theirs = gradients(adapted(), ids)
    tolerance = 1e-5 if lean else 1e-12  # a norm computes in float32
    agree(loss, wanted, tolerance)
    assert len(mine) == 6
    for one, other in zip(mine, theirs, strict=True):
        agree(one, other, tolerance)
