"""MoRA's kernels against float64, gradients included, and a model that runs on them."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lit_peft.low_rank import square
from lit_peft.ops.mora import square_linear, square_update
from tests.kernels.where import DEVICE
from tests.ops.exact import TOLERANCE, agree, drawn
from tests.ops.test_bottleneck import both
from tests.ops.test_mora import SIZES

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def exact(y: Tensor, x: Tensor, m: Tensor) -> Tensor:
    return y + x @ square.delta(m, x.shape[-1], y.shape[-1], 6).t()


def inputs_of(size: tuple[int, int, int, int], dtype: torch.dtype) -> list[Tensor]:
    """Returns y, x, M."""
    rows, wide, tall, width = size
    made = [drawn(*s, dtype=dtype, seed=i) for i, s in enumerate([(rows, tall), (rows, wide), (width, width)])]
    return [tensor.detach().to(DEVICE).requires_grad_() for tensor in made]


def turn_of(inputs: int, width: int) -> Tensor:
    return square.angles(-(-inputs // width), width, DEVICE)


# the tiles are 32 or 64: one chunk over several of them, rows over two blocks
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [*SIZES, (70, 100, 150, 70), (2, 130, 64, 64)], ids=str)
def test_update(size: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    turn = turn_of(size[1], size[3])
    both(
        lambda y, x, m: square_update(y, x, m, 6, turn, kernels=bool(size[0])),
        exact,
        inputs_of(size, dtype),
        TOLERANCE[dtype],
    )


def test_with_the_layer_and_a_matrix_in_full() -> None:
    base = nn.Linear(23, 40, device=DEVICE, dtype=torch.bfloat16).requires_grad_(False)
    turn = turn_of(23, 6)
    _, x, m = inputs_of((5, 23, 40, 6), torch.bfloat16)
    m = m.detach().float().requires_grad_()
    found = square_linear(x, base, m, 6, turn, kernels=True)
    plain = square_linear(x, base, m, 6, turn, kernels=False)
    agree(found, plain, 1e-2)
    for one, other in zip(
        torch.autograd.grad(found.float().sin().sum(), [x, m]),
        torch.autograd.grad(plain.float().sin().sum(), [x, m]),
        strict=True,
    ):
        assert one.dtype == other.dtype
        agree(one, other, 3e-2)


def test_uneven_memory_double_use_and_checkpoints() -> None:
    turn, m = turn_of(5, 4), drawn(4, 4, dtype=torch.float32, seed=1).detach().to(DEVICE).requires_grad_()
    x = drawn(5, 3, 2, dtype=torch.float32, seed=0).detach().to(DEVICE).requires_grad_()

    def run(x: Tensor, m: Tensor) -> Tensor:
        h = square_update(x.permute(2, 1, 0), x.permute(2, 1, 0), m, 6, turn, kernels=True)
        return square_update(h * 2, h, m, 6, turn, kernels=True)

    def wanted(x: Tensor, m: Tensor) -> Tensor:
        h = exact(x.permute(2, 1, 0), x.permute(2, 1, 0), m)
        return exact(h * 2, h, m)

    def again(x: Tensor, m: Tensor) -> Tensor:
        out: Tensor = checkpoint(run, x, m, use_reentrant=False)
        return out

    both(again, wanted, [x, m], 1e-5)


def test_registered() -> None:
    """What the launches write to is told to compilers."""
    turn = turn_of(10, 4)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    wide, tall, m = (
        torch.randn(3, 10, device=DEVICE),
        torch.randn(3, 9, device=DEVICE),
        torch.randn(4, 4, device=DEVICE),
    )
    torch.library.opcheck(torch.ops.lit_peft.mora, (tall, wide, m, turn), test_utils=checks)
    torch.library.opcheck(torch.ops.lit_peft.mora_backward, (wide, tall, m, turn), test_utils=checks)
