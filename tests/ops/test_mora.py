"""MoRA's update against float64: values, every gradient, with the layer and beside it, and what it keeps."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lit_peft.low_rank import square
from lit_peft.ops import low_rank
from lit_peft.ops import mora as op
from lit_peft.ops.recipes import note
from tests.ops.exact import TOLERANCE, agree, drawn
from tests.ops.test_bottleneck import both, kept_by

# rows, in, out, r̂: whole chunks; a last one that is filled up, cut, both; outputs that repeat; one chunk; no row
SIZES = [(6, 24, 24, 8), (5, 23, 17, 6), (1, 20, 7, 6), (4, 10, 33, 4), (3, 9, 40, 8), (7, 8, 8, 8), (0, 12, 9, 4)]
KINDS = (1, 2, 3, 4, 6)


def exact(y: Tensor, x: Tensor, m: Tensor, kind: int) -> Tensor:
    """Adds the product with the change of the weight, as it is merged."""
    return y + x @ square.delta(m, x.shape[-1], y.shape[-1], kind).t()


def turn_of(inputs: int, width: int, kind: int) -> Tensor | None:
    return square.angles(-(-inputs // width), width).double() if kind == 6 else None


def inputs_of(size: tuple[int, int, int, int], dtype: torch.dtype) -> list[Tensor]:
    """Returns y, x, M."""
    rows, wide, tall, width = size
    shapes = [(rows, tall), (rows, wide), (width, width)]
    return [drawn(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_update(size: tuple[int, int, int, int], kind: int, dtype: torch.dtype) -> None:
    turn, inputs, tolerance = turn_of(size[1], size[3], kind), inputs_of(size, dtype), TOLERANCE[dtype]
    # angles are float32; in float64 both sides are handed the same
    tolerance = max(tolerance, 1e-6) if kind == 6 else tolerance
    both(lambda y, x, m: op.square_update(y, x, m, kind, turn), lambda *rest: exact(*rest, kind), inputs, tolerance)
    agree(op.reference(*inputs, kind, turn), exact(*(part.double() for part in inputs), kind), tolerance)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_with_the_layer(kind: int, bias: bool) -> None:
    for size in SIZES[:-1]:
        _, wide, tall, width = size
        base = nn.Linear(wide, tall, bias).double().requires_grad_(False)
        turn = turn_of(wide, width, kind)
        both(
            lambda x, m, base=base, turn=turn: op.square_linear(x, base, m, kind, turn),
            lambda x, m, base=base: exact(base(x), x, m, kind),
            inputs_of(size, torch.float64)[1:],
            1e-6 if kind == 6 else 1e-12,
        )


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_without_a_mask(kind: int) -> None:
    size = (8, 20, 14, 6)
    base, turn = nn.Linear(20, 14).double().requires_grad_(False), turn_of(20, 6, kind)
    y, x, m = inputs_of(size, torch.float64)
    torch.manual_seed(7)
    kept = low_rank.dropped(torch.ones_like(x), 0.3, low_rank.drawn(0.3)).detach()

    def run(of: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        torch.manual_seed(7)
        return of(*inputs)

    def update(y: Tensor, x: Tensor, m: Tensor) -> Tensor:
        return op.square_update(y, x, m, kind, turn, dropout=0.3)

    def linear(x: Tensor, m: Tensor) -> Tensor:
        return op.square_linear(x, base, m, kind, turn, dropout=0.3)

    tolerance = 1e-6 if kind == 6 else 1e-12
    both(lambda *rest: run(update, *rest), lambda y, x, m: exact(y, x * kept, m, kind), [y, x, m], tolerance)
    both(lambda *rest: run(linear, *rest), lambda x, m: exact(base(x), x * kept, m, kind), [x, m], tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_uneven_memory_double_use_and_checkpoints(kind: int) -> None:
    turn, m = turn_of(5, 4, kind), drawn(4, 4, dtype=torch.float64, seed=1)
    x = drawn(5, 3, 2, dtype=torch.float64, seed=0)

    def run(of: Callable[..., Tensor], x: Tensor, m: Tensor) -> Tensor:
        h = of(x.permute(2, 1, 0), x.permute(2, 1, 0), m)
        return of(h * 2, h, m)

    def mine(x: Tensor, m: Tensor) -> Tensor:
        return run(lambda *rest: op.square_update(*rest, kind, turn), x, m)

    def again(x: Tensor, m: Tensor) -> Tensor:
        out: Tensor = checkpoint(mine, x, m, use_reentrant=False)
        return out

    for of in (mine, again):
        both(of, lambda x, m: run(lambda *rest: exact(*rest, kind), x, m), [x, m], 1e-6 if kind == 6 else 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_only_gradients_that_are_asked_for(kind: int) -> None:
    turn = turn_of(23, 6, kind)
    for which in range(3):
        inputs = [part.detach() for part in inputs_of((5, 23, 17, 6), torch.float64)]
        inputs[which].requires_grad_()
        (got,) = torch.autograd.grad(op.square_update(*inputs, kind, turn).sin().sum(), inputs[which])
        (wanted,) = torch.autograd.grad(exact(*inputs, kind).sin().sum(), inputs[which])
        agree(got, wanted, 1e-6 if kind == 6 else 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_with_weights_in_full(kind: int) -> None:
    """The gradient of M comes in M's dtype, and nothing but rounding differs."""
    y, x, m = inputs_of((16, 24, 20, 8), torch.bfloat16)
    m = m.detach().float().requires_grad_()
    turn = turn_of(24, 8, kind)
    got, wanted = op.square_update(y, x, m, kind, turn), exact(y.double(), x.double(), m.double(), kind)
    agree(got, wanted, 1e-2)
    for one, other in zip(
        torch.autograd.grad(got.float().sin().sum(), [y, x, m]),
        torch.autograd.grad(wanted.sin().sum(), [y, x, m]),
        strict=True,
    ):
        agree(one, other, 3e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept(kind: int) -> None:
    """x for type 6, the narrow sums for the others; and nothing where x can be made again, but M R_c is not kept."""
    base, turn = nn.Linear(32, 32).requires_grad_(False), turn_of(32, 8, kind)
    start = torch.randn(100, 32, requires_grad=True)
    m = torch.randn(8, 8, requires_grad=True)
    known = [start, m, *base.parameters(), *([] if turn is None else [turn])]
    read = start * 1
    alone = kept_by(lambda: op.square_linear(read, base, m, kind, turn), known)
    assert alone == 4 * 100 * (32 if kind == 6 else 8)
    noted = note(start * 1, start, make=lambda x: x * 1)
    assert kept_by(lambda: op.square_linear(noted, base, m, kind, turn), known) == 0
    both(
        lambda x, m: op.square_linear(note(x * 1, x, make=lambda x: x * 1), base, m, kind, turn),
        lambda x, m: exact(x @ base.weight.double().t() + base.bias.double(), x, m, kind),
        [start, m],
        1e-5,
    )


class Made(TorchDispatchMode):
    """Collects the sizes of all storages that are made, the large ones."""

    def __init__(self, least: int, known: list[Tensor]) -> None:
        super().__init__()
        self.least = least
        self.sizes: list[tuple[int, ...]] = []
        self.seen = [tensor.untyped_storage() for tensor in known]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, list | tuple) else (out,):
            storage = tensor.untyped_storage()
            if storage.nbytes() >= self.least and all(storage.data_ptr() != old.data_ptr() for old in self.seen):
                self.seen.append(storage)
                self.sizes.append(tuple(tensor.shape))
        return out


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_as_long_as_x_is_copied(kind: int) -> None:
    """All that is made is the output, and in the backward pass the gradient of x."""
    base, turn = nn.Linear(22, 20).requires_grad_(False), turn_of(22, 8, kind)
    x, m, slope = torch.randn(100, 22, requires_grad=True), torch.randn(8, 8, requires_grad=True), torch.ones(100, 20)
    with Made(4 * 100 * 18, [x, base.weight]) as forward:
        out = op.square_linear(x, base, m, kind, turn)
    with Made(4 * 100 * 18, [x, out, slope]) as backward:
        out.backward(slope)
    assert forward.sizes == [(100, 20)]
    assert backward.sizes == [(100, 22)]


def test_a_second_derivative_is_refused() -> None:
    y, x, m = inputs_of((3, 8, 8, 4), torch.float64)
    (first,) = torch.autograd.grad(op.square_update(y, x, m, 1).pow(2).sum(), m, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_without_gradients_and_with_plain_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = inputs_of((3, 10, 9, 4), torch.float64)
    for kind in KINDS:
        turn = turn_of(10, 4, kind)
        with torch.no_grad():
            agree(op.square_update(*inputs, kind, turn), exact(*inputs, kind), 1e-6)
    monkeypatch.setenv("LIT_PEFT_KERNELS", "0")
    assert op.square_update(*inputs, 1).grad_fn.name() == "AddBackward0"  # type: ignore[union-attr]
