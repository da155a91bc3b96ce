"""The bottleneck adapter's kernels against float64, gradients included, and a model that runs on them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lit_peft.methods.compacter import kronecker, matrix
from lit_peft.ops.bottleneck import bottleneck, reference
from tests.kernels.where import DEVICE
from tests.ops.exact import TOLERANCE, agree, drawn
from tests.ops.test_bottleneck import both

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(5, 70, 1), (1, 33, 7), (70, 40, 8), (3, 96, 16), (9, 40, 64)]  # rows, width, bottleneck


def inputs_of(rows: int, width: int, m: int, dtype: torch.dtype) -> list[Tensor]:
    shapes = [(rows, width), (m, width), (m,), (width, m), (width,)]
    made = [drawn(*shape, dtype=dtype, seed=i).detach().to(DEVICE) for i, shape in enumerate(shapes)]
    return [tensor.requires_grad_() for tensor in made]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_behind_a_module(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    both(
        lambda x, *w: bottleneck(x, x, *w, "gelu", 0.5, kernels=True),
        lambda x, *w: reference(x, x, *w, "gelu", 0.5),
        inputs_of(*size, dtype),
        TOLERANCE[dtype],
    )


@pytest.mark.parametrize("activation", ["relu", "gelu_new", "silu", "tanh", "sigmoid", "linear"])
def test_beside_a_module_with_a_gate(activation: str) -> None:
    inputs = inputs_of(6, 20, 5, torch.float32)
    more = [drawn(6, 20, dtype=torch.float32, seed=8), drawn(6, 1, dtype=torch.float32, seed=9)]
    y, gate = (tensor.detach().to(DEVICE).requires_grad_() for tensor in more)
    both(
        lambda y, gate, *rest: bottleneck(y, *rest, activation, 4.0, gate=gate, kernels=True),
        lambda y, gate, *rest: reference(y, *rest, activation, 4.0, gate),
        [y, gate, *inputs],
        2e-6,
    )


def test_alone_to_another_width_and_only_what_is_asked_for() -> None:
    shapes = [(3, 6), (3, 6), (3,), (40, 3), (40,)]
    inputs = [drawn(*shape, dtype=torch.float32, seed=i).detach().to(DEVICE) for i, shape in enumerate(shapes)]
    for asked in ([0], [3], [1, 2, 4], [0, 1, 2, 3, 4]):
        fresh = [tensor.clone().requires_grad_(i in asked) for i, tensor in enumerate(inputs)]
        found = bottleneck(None, *fresh, kernels=True)
        wanted = reference(None, *fresh)
        agree(found, wanted, 2e-6)
        for one, other in zip(
            torch.autograd.grad(found.sin().sum(), [fresh[i] for i in asked]),
            torch.autograd.grad(wanted.sin().sum(), [fresh[i] for i in asked]),
            strict=True,
        ):
            agree(one, other, 1e-5)


def test_uneven_memory_double_use_and_checkpoints() -> None:
    inputs = inputs_of(1, 5, 3, torch.float32)
    inputs[0] = drawn(4, 2, 5, dtype=torch.float32, seed=0).detach().to(DEVICE).requires_grad_()

    def run(of: Callable[..., Tensor], x: Tensor, *weights: Tensor) -> Tensor:
        h = of(x.transpose(0, 1), x.transpose(0, 1), *weights)
        return of(h * 2, h, *weights)

    def again(*rest: Tensor) -> Tensor:
        out: Tensor = checkpoint(
            lambda *rest: run(lambda *of: bottleneck(*of, kernels=True), *rest), *rest, use_reentrant=False
        )
        return out

    both(again, lambda *rest: run(reference, *rest), inputs, 1e-5)


def test_no_rows_and_a_bottleneck_too_wide_for_it() -> None:
    inputs = inputs_of(0, 8, 3, torch.float32)
    bottleneck(inputs[0], *inputs).sum().backward()
    assert inputs[1].grad is not None
    both(
        lambda x, *w: bottleneck(x, x, *w, kernels=True),
        lambda x, *w: reference(x, x, *w),
        inputs_of(2, 8, 300, torch.float32),
        5e-6,
    )


def test_registered() -> None:
    """Shapes, strides and devices of the fake operations are those of the launches."""
    x, down, db, up, ub = (tensor.detach() for tensor in inputs_of(3, 16, 4, torch.float32))
    gate = torch.rand(3, device=DEVICE)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    op, back = torch.ops.lit_peft.bottleneck, torch.ops.lit_peft.bottleneck_backward
    torch.library.opcheck(op, (x, x, down, db, up, ub, gate, "relu", 2.0), test_utils=checks)
    z = torch.randn(3, 4, device=DEVICE)
    torch.library.opcheck(back, (x, z, down, up, ub, gate, "gelu", 2.0, True), test_utils=checks)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_compacters_matrices(n: int) -> None:
    shapes = [(n, n, n), (n, 3), (n, 2)]
    rule, s, t = (drawn(*shape, dtype=torch.float64, seed=i) for i, shape in enumerate(shapes))
    both(
        matrix,
        lambda rule, s, t: kronecker(torch.eye(3 * n).double(), rule, s, t, torch.zeros(2 * n)).t(),
        [rule, s, t],
        1e-12,
    )
