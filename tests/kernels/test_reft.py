"""The kernel that edits chosen rows against float64, gradients included, and a model that runs on it."""

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lit_peft.ops.reft import edit_rows
from tests.kernels.where import DEVICE
from tests.ops.exact import TOLERANCE, drawn
from tests.ops.test_bottleneck import both
from tests.ops.test_reft import exact, rows_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(5, 7, 3, 1), (1, 33, 1, 7), (30, 150, 20, 8), (17, 40, 4, 16), (6, 70, 2, 64)]  # tokens, width, edited, r


def inputs_of(tokens: int, width: int, r: int, dtype: torch.dtype) -> list[Tensor]:
    shapes = [(tokens, width), (r, width), (r,), (width, r)]
    made = [drawn(*shape, dtype=dtype, seed=i).detach().to(DEVICE) for i, shape in enumerate(shapes)]
    return [tensor.requires_grad_() for tensor in made]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_edit(size: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    tokens, width, number, r = size
    rows, inputs = rows_of(tokens, number).to(DEVICE), inputs_of(tokens, width, r, dtype)
    both(
        lambda h, *rest: edit_rows(h, rows, *rest, kernels=True),
        lambda h, *rest: exact(h, rows, *rest),
        inputs,
        TOLERANCE[dtype],
    )
    found = edit_rows(inputs[0], rows, *inputs[1:], kernels=True)
    rest = [t for t in range(tokens) if t not in rows.tolist()]
    assert found[rest].equal(inputs[0][rest])


def test_in_place_uneven_memory_double_use_and_checkpoints() -> None:
    rows, others = torch.tensor([4, 0], device=DEVICE), torch.tensor([1, 4, 7], device=DEVICE)
    inputs = inputs_of(1, 5, 3, torch.float32)
    inputs[0] = drawn(4, 2, 5, dtype=torch.float32, seed=0).detach().to(DEVICE).requires_grad_()

    def run(h: Tensor, matrix: Tensor, bias: Tensor, rotation: Tensor) -> Tensor:
        other = rotation.t().contiguous().t()  # the same numbers, laid out in another way
        h = edit_rows(h.transpose(0, 1), rows, matrix, bias, rotation, kernels=True) + 1
        return edit_rows(h, others, matrix, bias, other, kernels=True, in_place=True).sin()

    def wanted(h: Tensor, *weights: Tensor) -> Tensor:
        return exact(exact(h.transpose(0, 1), rows, *weights) + 1, others, *weights).sin()

    def again(*rest: Tensor) -> Tensor:
        out: Tensor = checkpoint(run, *rest, use_reentrant=False)
        return out

    both(run, wanted, inputs, 1e-5)
    both(again, wanted, inputs, 1e-5)


def test_no_rows() -> None:
    inputs = inputs_of(4, 8, 2, torch.float32)
    out = edit_rows(inputs[0], torch.empty(0, dtype=torch.long, device=DEVICE), *inputs[1:], kernels=True)
    assert out.equal(inputs[0])
    out.sum().backward()
    assert inputs[1].grad is not None


def test_registered() -> None:
    """Shapes, strides and devices of the fake operation are those of the launch, and what it writes to is told."""
    h, matrix, bias, rotation = (tensor.detach() for tensor in inputs_of(6, 9, 2, torch.float32))
    rows = torch.tensor([5, 1], device=DEVICE)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    for b in (bias, None):
        torch.library.opcheck(torch.ops.lit_peft.edit_rows, (h, rows, matrix, b, rotation), test_utils=checks)
