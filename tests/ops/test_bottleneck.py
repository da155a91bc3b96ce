"""The bottleneck adapter against float64: values, every gradient, gates, dropout, and what it keeps."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lit_peft.ops import bottleneck as op
from lit_peft.ops import low_rank
from lit_peft.ops.recipes import note
from tests.ops.exact import TOLERANCE, agree, drawn

SIZES = [(5, 7, 1), (1, 33, 7), (17, 64, 8), (0, 9, 3), (11, 48, 16), (9, 40, 64)]  # rows, width, bottleneck


def inputs_of(rows: int, width: int, m: int, dtype: torch.dtype) -> list[Tensor]:
    """Returns x, D, b_d, U, b_u."""
    shapes = [(rows, width), (m, width), (m,), (width, m), (width,)]
    return [drawn(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]


def both(
    run: Callable[..., Tensor], plain: Callable[..., Tensor], inputs: list[Tensor], tolerance: float, slope: int = 7
) -> None:
    """Compares values and the gradient of every input with float64."""
    exact = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in inputs]
    got, wanted = run(*inputs), plain(*exact)
    assert got.dtype == inputs[0].dtype
    agree(got, wanted, tolerance)
    weight = drawn(*wanted.shape, dtype=torch.float64, seed=slope).detach().to(wanted.device)
    mine = torch.autograd.grad(got, inputs, weight.to(got.dtype))
    theirs = torch.autograd.grad(wanted, exact, weight)
    for one, other in zip(mine, theirs, strict=True):
        agree(one, other, tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_behind_and_beside(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    inputs = inputs_of(*size, dtype)
    tolerance = TOLERANCE[dtype]
    both(
        lambda x, *w: op.bottleneck(x, x, *w, "gelu", 0.5),
        lambda x, *w: op.reference(x, x, *w, "gelu", 0.5),
        inputs,
        tolerance,
    )
    y = drawn(size[0], size[1], dtype=dtype, seed=9)
    both(
        lambda y, *rest: op.bottleneck(y, *rest, "tanh", 4.0, kernels=False),
        lambda y, *rest: op.reference(y, *rest, "tanh", 4.0),
        [y, *inputs],
        tolerance,
    )
    both(lambda *rest: op.bottleneck(None, *rest), lambda *rest: op.reference(None, *rest), inputs, tolerance)


@pytest.mark.parametrize("activation", [*op.FORMULAS, "relu6", "quick_gelu"])
def test_activations(activation: str) -> None:
    inputs = inputs_of(6, 10, 5, torch.float64)
    if activation in op.FORMULAS:
        assert op.bottleneck(None, *inputs, activation).grad_fn.name() == "_BottleneckBackward"  # type: ignore[union-attr]
    both(
        lambda x, *w: op.bottleneck(x, x, *w, activation),
        lambda x, *w: op.reference(x, x, *w, activation),
        inputs,
        1e-6 if activation == "gelu_fast" else 1e-12,  # which rounds a constant
    )


@pytest.mark.parametrize("gate", [(2, 3, 1), (2, 1, 1), (1,)], ids=str)
def test_gates(gate: tuple[int, ...]) -> None:
    x = drawn(2, 3, 8, dtype=torch.float64, seed=0)
    inputs = [x, *inputs_of(1, 8, 4, torch.float64)[1:], drawn(*gate, dtype=torch.float64, seed=8)]
    for y in (x, x.detach() * 2, None):
        both(
            lambda x, *rest, y=y: op.bottleneck(x if y is inputs[0] else y, x, *rest[:-1], "silu", 2.0, gate=rest[-1]),
            lambda x, *rest, y=y: op.reference(x if y is inputs[0] else y, x, *rest[:-1], "silu", 2.0, rest[-1]),
            inputs,
            1e-12,
        )
    fixed = op.bottleneck(x, x, *inputs[1:5], gate=0.25)
    agree(fixed, op.reference(x, x, *inputs[1:5], scale=0.25), 1e-12)


def test_another_width_comes_out() -> None:
    shapes = [(4, 6), (3, 6), (3,), (9, 3), (9,)]
    inputs = [drawn(*shape, dtype=torch.float64, seed=i) for i, shape in enumerate(shapes)]
    both(lambda *rest: op.bottleneck(None, *rest), lambda *rest: op.reference(None, *rest), inputs, 1e-12)


def test_uneven_memory_double_use_and_checkpoints() -> None:
    inputs = inputs_of(1, 5, 3, torch.float64)
    inputs[0] = drawn(4, 6, 5, dtype=torch.float64, seed=0)

    def run(of: Callable[..., Tensor], x: Tensor, *weights: Tensor) -> Tensor:
        h = of(x.transpose(0, 1), x.transpose(0, 1), *weights)
        return of(h * 2, h, *weights)

    both(lambda *rest: run(op.bottleneck, *rest), lambda *rest: run(op.reference, *rest), inputs, 1e-12)

    def again(*rest: Tensor) -> Tensor:
        out: Tensor = checkpoint(lambda *rest: run(op.bottleneck, *rest), *rest, use_reentrant=False)
        return out

    both(again, lambda *rest: run(op.reference, *rest), inputs, 1e-12)


def test_only_gradients_that_are_asked_for() -> None:
    for which in range(5):
        inputs = [tensor.detach() for tensor in inputs_of(3, 8, 2, torch.float64)]
        inputs[which].requires_grad_()
        (got,) = torch.autograd.grad(op.bottleneck(inputs[0], *inputs).sin().sum(), inputs[which])
        (wanted,) = torch.autograd.grad(op.reference(inputs[0], *inputs).sin().sum(), inputs[which])
        agree(got, wanted, 1e-12)


def test_dropout_without_a_mask() -> None:
    inputs = inputs_of(8, 16, 4, torch.float64)
    torch.manual_seed(7)
    kept = low_rank.dropped(torch.ones_like(inputs[0]), 0.3, low_rank.drawn(0.3)).detach()

    def run(x: Tensor, *weights: Tensor) -> Tensor:
        torch.manual_seed(7)
        return op.bottleneck(x, x, *weights, dropout=0.3)

    both(run, lambda x, *weights: op.reference(x, x * kept, *weights), inputs, 1e-12)
    assert 0 < float((kept == 0).double().mean()) < 1


def test_under_autocast() -> None:
    inputs = inputs_of(4, 8, 3, torch.float32)

    def run(of: Callable[..., Tensor], behind: bool) -> list[Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = of(inputs[0] if behind else inputs[0].bfloat16(), *inputs)
        return [out, *torch.autograd.grad(out.float().sum(), inputs)]

    for behind in (True, False):
        for one, other in zip(run(op.bottleneck, behind), run(op.reference, behind), strict=True):
            assert one.dtype == other.dtype
            agree(one, other, 2e-2)


def kept_by(run: Callable[[], Tensor], known: list[Tensor]) -> int:
    """Returns the bytes that a graph holds beside what is known."""
    seen = {tensor.untyped_storage().data_ptr(): 0 for tensor in known}

    def pack(tensor: Tensor) -> Tensor:
        seen.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(seen.values())


def test_it_keeps_what_it_reads_and_z() -> None:
    """And not even what it reads where that can be made again."""
    inputs = inputs_of(100, 32, 4, torch.float32)
    x = inputs[0]
    mine = kept_by(lambda: op.bottleneck(x, *inputs, "gelu"), inputs)
    plain = kept_by(lambda: op.reference(x, *inputs, "gelu"), inputs)
    assert mine == 5 * 100 * 4, "Z, and its row of ones"
    assert mine < plain
    read = note(x.detach().clone().requires_grad_(), x, make=lambda x: x.clone())
    assert kept_by(lambda: op.bottleneck(None, read, *inputs[1:]), inputs) == mine
    assert kept_by(lambda: op.bottleneck(None, x.clone(), *inputs[1:]), inputs) == mine + 100 * 32 * 4


def test_a_second_derivative_is_refused() -> None:
    inputs = inputs_of(3, 4, 2, torch.float64)
    (first,) = torch.autograd.grad(op.bottleneck(inputs[0], *inputs).pow(2).sum(), inputs[1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_the_plain_operations_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = inputs_of(3, 4, 2, torch.float64)
    monkeypatch.setenv("LIT_PEFT_KERNELS", "0")
    assert op.bottleneck(inputs[0], *inputs).grad_fn.name() == "AddBackward0"  # type: ignore[union-attr]
