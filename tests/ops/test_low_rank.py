"""Low-rank updates against float64: values, every gradient, dropout, and what they refuse."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lit_peft import AdaLoRAConfig, LoRAConfig
from lit_peft.low_rank.linear import LoRALinear
from lit_peft.low_rank.residual import ResidualLinear
from lit_peft.low_rank.singular import AdaLoRALinear
from lit_peft.ops import low_rank, residual
from lit_peft.ops.lora_linear import lora_linear
from tests.ops.exact import TOLERANCE, agree, drawn

SIZES = [(5, 7, 3, 1), (1, 33, 65, 7), (17, 64, 31, 16), (0, 9, 9, 8), (70, 96, 80, 64)]  # rows, in, out, r


def both(
    op: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    inputs: list[Tensor],
    tolerance: float,
    **settings: float,
) -> None:
    """Compares an op with its float64 reference: the value and the gradient of every input."""
    exact = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in inputs]
    got, wanted = op(*inputs, **settings), reference(*exact, **settings)
    assert got.dtype == inputs[0].dtype
    agree(got, wanted, tolerance)
    weight = torch.randn(wanted.shape, dtype=torch.float64)
    (got * weight.to(got.dtype)).sum().backward()
    (wanted * weight).sum().backward()
    for mine, theirs in zip(inputs, exact, strict=True):
        agree(mine.grad, theirs.grad, tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_low_rank_update(size: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    rows, wide, tall, r = size
    inputs = [
        drawn(rows, tall, dtype=dtype, seed=0),
        drawn(rows, wide, dtype=dtype, seed=1),
        drawn(r, wide, dtype=dtype, seed=2),
        drawn(tall, r, dtype=dtype, seed=3),
    ]
    both(low_rank.low_rank_update, low_rank.reference, inputs, TOLERANCE[dtype], scale=0.5)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_diagonal(size: tuple[int, int, int, int]) -> None:
    rows, wide, tall, r = size
    shapes = [(rows, tall), (rows, wide), (r, wide), (tall, r), (r,)]
    inputs = [drawn(*shape, dtype=torch.float64, seed=i) for i, shape in enumerate(shapes)]

    def op(y: Tensor, x: Tensor, a: Tensor, b: Tensor, diagonal: Tensor) -> Tensor:
        return low_rank.low_rank_update(y, x, a, b, 2.0, diagonal=diagonal)

    def plain(y: Tensor, x: Tensor, a: Tensor, b: Tensor, diagonal: Tensor) -> Tensor:
        return low_rank.reference(y, x, a, b, 2.0, diagonal)

    both(op, plain, inputs, 1e-12)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_residual_update(size: tuple[int, int, int, int]) -> None:
    rows, wide, tall, r = size
    shapes = [(rows, tall), (rows, wide), (r, wide), (tall, r), (r, wide), (tall, r)]
    inputs = [drawn(*shape, dtype=torch.float64, seed=i) for i, shape in enumerate(shapes)]
    for start in inputs[4:]:
        start.requires_grad_(False)
    both(residual.residual_update, residual.reference, inputs, 1e-12, scale=0.5)


def test_the_residual_is_nothing_at_the_start() -> None:
    a, b = drawn(2, 8, dtype=torch.bfloat16, seed=0).detach(), drawn(4, 2, dtype=torch.bfloat16, seed=1).detach()
    y, x = torch.randn(3, 4).bfloat16(), torch.randn(3, 8).bfloat16()
    assert residual.residual_update(y, x, a, b, a, b, 2.0).equal(y)


@pytest.mark.parametrize("r", [0, 3])
def test_without_gradients(r: int) -> None:
    shapes = [(2, 5, 7), (2, 5, 4), (r, 4), (7, r), (r,)]
    y, x, a, b, diagonal = (drawn(*shape, dtype=torch.float64, seed=i).detach() for i, shape in enumerate(shapes))
    with torch.no_grad():
        got = low_rank.low_rank_update(y, x, a, b, 0.5, diagonal=diagonal)
        agree(got, low_rank.reference(y, x, a, b, 0.5, diagonal), 1e-12)


def test_only_gradients_that_are_asked_for() -> None:
    y, x, b = (drawn(3, 4, dtype=torch.float32, seed=i).detach() for i in range(3))
    a = drawn(3, 4, dtype=torch.float32, seed=4)
    low_rank.low_rank_update(y, x, a, b.t().contiguous(), 1.0).sum().backward()
    assert a.grad is not None
    assert x.grad is None
    assert y.grad is None


def test_uneven_memory_and_several_dimensions() -> None:
    x = drawn(4, 6, 5, dtype=torch.float64, seed=0).transpose(0, 1)  # not contiguous
    y = drawn(6, 4, 3, dtype=torch.float64, seed=1)
    a, b = drawn(2, 5, dtype=torch.float64, seed=2), drawn(3, 2, dtype=torch.float64, seed=3)
    out = low_rank.low_rank_update(y, x, a, b, 1.0)
    agree(out, low_rank.reference(y, x, a, b, 1.0), 1e-12)
    mine = torch.autograd.grad(out.sin().sum(), [x, y, a, b])
    theirs = torch.autograd.grad(low_rank.reference(y, x, a, b, 1.0).sin().sum(), [x, y, a, b])
    for one, other in zip(mine, theirs, strict=True):
        agree(one, other, 1e-12)


def test_twice_in_one_graph() -> None:
    x, a, b = (drawn(4, 4, dtype=torch.float64, seed=i) for i in range(3))

    def run(op: Callable[..., Tensor]) -> Tensor:
        return op(op(x, x, a, b, 0.3), x, a, b, 0.3).pow(2).sum()

    mine = torch.autograd.grad(run(low_rank.low_rank_update), [x, a, b])
    theirs = torch.autograd.grad(run(low_rank.reference), [x, a, b])
    for one, other in zip(mine, theirs, strict=True):
        agree(one, other, 1e-12)


def test_a_second_derivative_is_refused() -> None:
    x, a, b = (drawn(4, 4, dtype=torch.float64, seed=i) for i in range(3))
    (first,) = torch.autograd.grad(low_rank.low_rank_update(x, x, a, b, 1.0).pow(2).sum(), [a], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("p", [0.3, 1.0])
def test_dropout_without_a_mask(p: float) -> None:
    """The mask of the backward pass is that of the forward pass, and about p of the entries are left out."""
    x, a, b = (drawn(64, 64, dtype=torch.float64, seed=i) for i in range(3))
    torch.manual_seed(7)
    out = low_rank.low_rank_update(torch.zeros_like(x), x, a, b, 1.0, dropout=p)
    torch.manual_seed(7)
    kept = low_rank.dropped(torch.ones_like(x), p, low_rank.drawn(p)).detach()
    wanted = low_rank.reference(torch.zeros_like(x), x * kept, a, b, 1.0)
    agree(out, wanted, 1e-12)
    for one, other in zip(
        torch.autograd.grad(out.sum(), [x, a, b]), torch.autograd.grad(wanted.sum(), [x, a, b]), strict=True
    ):
        agree(one, other, 1e-12)
    assert abs(float((kept == 0).double().mean()) - p) < 0.03
    assert set(kept.unique().tolist()) <= {0.0, 1 / (1 - p) if p < 1 else 0.0}


def test_dropout_differs_from_call_to_call_and_follows_the_seed() -> None:
    x = torch.ones(8, 8)
    once, again = (low_rank.dropped(x, 0.5, low_rank.drawn(0.5)) for _ in range(2))
    assert not once.equal(again)
    torch.manual_seed(1)
    first = low_rank.drawn(0.5)
    torch.manual_seed(1)
    assert first == low_rank.drawn(0.5)


def test_autocast_gives_gradients_in_the_parameters_dtype() -> None:
    layer = LoRALinear(nn.Linear(8, 4), LoRAConfig(r=2))
    nn.init.normal_(layer.lora_b["default"])
    x = torch.randn(3, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert layer.lora_a["default"].grad is not None
    assert layer.lora_a["default"].grad.dtype == torch.float32
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


@pytest.mark.parametrize("start", ["default", "trained", "pissa"])
def test_an_output_can_be_changed_in_place(start: str) -> None:
    """As OLMo does with its queries, keys and values."""
    kind, base = ResidualLinear if start == "pissa" else LoRALinear, nn.Linear(8, 4).requires_grad_(start == "trained")
    start = "default" if start == "trained" else start
    layer, x = kind(base, LoRAConfig(r=2, init_lora_weights=start)), torch.randn(2, 3, 8)
    y = layer(x).clamp_(-0.1, 0.1)
    wanted = torch.autograd.grad(layer(x).clamp(-0.1, 0.1).sum(), list(layer.lora_b.values()))
    agree(torch.autograd.grad(y.sum(), list(layer.lora_b.values()))[0], wanted[0], 1e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_shapes_can_be_had_on_meta(dropout: float) -> None:
    layer = LoRALinear(nn.Linear(8, 4, device="meta"), LoRAConfig(r=2, dropout=dropout))
    assert layer(torch.empty(3, 8, device="meta")).shape == (3, 4)


def test_small_steps_of_a_residual_reach_the_input_in_bfloat16() -> None:
    """The gradient is that of the differences, not the difference of two gradients a thousand times as large."""
    a0, b0 = drawn(8, 64, dtype=torch.float32, seed=0), drawn(64, 8, dtype=torch.float32, seed=1)
    a, b = a0 + 1e-4 * drawn(8, 64, dtype=torch.float32, seed=2), b0 + 1e-4 * drawn(64, 8, dtype=torch.float32, seed=3)
    found = []
    for op, dtype, kind in (
        (residual.reference, torch.float64, torch.float64),
        (residual.residual_update, torch.bfloat16, torch.float32),
    ):
        x = drawn(50, 64, dtype=dtype, seed=4)
        out = op(torch.zeros(50, 64, dtype=dtype), x, *(part.to(kind) for part in (a, b, a0, b0)), 1.0)
        found.append(torch.autograd.grad(out.sum(), x)[0])
    agree(found[1], found[0], 3e-2)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("size", [size for size in SIZES if size[0]], ids=str)
def test_joined_with_the_layer(size: tuple[int, int, int, int], dtype: torch.dtype, bias: bool, dropout: float) -> None:
    """The layer's product and the update in one function, against the two one after the other in float64."""
    rows, wide, tall, r = size
    shapes = [(rows, wide), (r, wide), (tall, r), (r,)]
    inputs = [drawn(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]
    layer = nn.Linear(wide, tall, bias).to(dtype).requires_grad_(False)
    exact = copy.deepcopy(layer).double()
    torch.manual_seed(0)
    kept = low_rank.dropped(torch.ones(rows, wide, dtype=dtype), dropout, low_rank.drawn(dropout)).double()

    def op(x: Tensor, a: Tensor, b: Tensor, diagonal: Tensor) -> Tensor:
        torch.manual_seed(0)
        return lora_linear(x, layer, a, b, 0.5, dropout=dropout, diagonal=diagonal)

    def plain(x: Tensor, a: Tensor, b: Tensor, diagonal: Tensor) -> Tensor:
        return low_rank.reference(exact(x), x * kept, a, b, 0.5, diagonal)

    both(op, plain, inputs, TOLERANCE[dtype])


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("size", [size for size in SIZES if size[0]], ids=str)
def test_residual_joined_with_the_layer(size: tuple[int, int, int, int], dtype: torch.dtype, dropout: float) -> None:
    """As above, for the update that PiSSA and OLoRA train."""
    rows, wide, tall, r = size
    shapes = [(rows, wide), (r, wide), (tall, r)]
    inputs = [drawn(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]
    for i, moved in enumerate(inputs[1:]):  # as in training A and B stay near where they started
        inputs.append((moved + 0.1 * drawn(*moved.shape, dtype=dtype, seed=i + 3)).detach())
    layer = nn.Linear(wide, tall).to(dtype).requires_grad_(False)
    exact = copy.deepcopy(layer).double()
    torch.manual_seed(0)
    kept = low_rank.dropped(torch.ones(rows, wide, dtype=dtype), dropout, low_rank.drawn(dropout)).double()

    def op(x: Tensor, *parts: Tensor) -> Tensor:
        torch.manual_seed(0)
        return residual.residual_linear(x, layer, *parts, 0.5, dropout=dropout)

    def plain(x: Tensor, *parts: Tensor) -> Tensor:
        return residual.reference(exact(x), x * kept, *parts, 0.5)

    both(op, plain, inputs, TOLERANCE[dtype])


def test_a_layer_is_joined_only_where_that_is_the_same() -> None:
    x = torch.randn(3, 8)

    def layer(**settings: float) -> LoRALinear:
        made = LoRALinear(nn.Linear(8, 4).requires_grad_(False), LoRAConfig(r=2, **settings))  # type: ignore[arg-type]
        nn.init.normal_(made.lora_b["default"])
        return made

    plain = layer()
    joined = plain.joined("default", x)
    assert joined is not None
    agree(joined, plain.change("default", x, plain.base(x)), 1e-6)
    hooked, trained = layer(), layer()
    seen: list[Tensor] = []
    hooked.base.register_forward_hook(lambda module, args, out: seen.append(out))
    trained.base.requires_grad_()
    assert hooked.joined("default", x) is None
    assert trained.joined("default", x) is None
    assert plain.joined("default", x.bfloat16()) is None
    hooked(x)
    assert len(seen) == 1
    with torch.no_grad():
        assert plain.joined("default", x) is None


def test_a_subclass_with_a_change_of_its_own_is_not_joined() -> None:
    class Louder(AdaLoRALinear):
        def change(self, name: str, x: Tensor, y: Tensor) -> Tensor:
            return super().change(name, x, y) * 2

    layer, x = Louder(nn.Linear(8, 4).requires_grad_(False), AdaLoRAConfig(init_r=2, target_r=1)), torch.randn(3, 8)
    nn.init.normal_(layer.adalora_lambda["default"])
    agree(layer(x), layer.change("default", x, layer.base(x)), 1e-6)
