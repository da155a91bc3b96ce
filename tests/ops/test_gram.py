"""The distance from orthonormal rows and columns against float64: value and gradients, sizes mixed."""

import pytest
import torch
from torch import Tensor

from lit_peft.ops.gram import orthogonality, reference
from tests.ops.exact import agree, drawn

SHAPES = [(1, 5), (7, 33), (8, 64), (7, 33), (16, 9), (0, 5), (64, 70)]  # r, width


def problem(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    rows = [drawn(*shape, dtype=dtype, seed=i) for i, shape in enumerate(SHAPES)]
    columns = [drawn(*shape[::-1], dtype=dtype, seed=10 + i) for i, shape in enumerate(SHAPES)]
    return rows, columns


def compare(rows: list[Tensor], columns: list[Tensor], tolerance: float, kernels: bool | None = None) -> None:
    exact = [[tensor.detach().double().requires_grad_() for tensor in side] for side in (rows, columns)]
    value, wanted = orthogonality(rows, columns, kernels=kernels), reference(*exact)
    agree(value, wanted, tolerance)
    got = torch.autograd.grad(0.3 * value, [*rows, *columns])
    for one, other in zip(got, torch.autograd.grad(0.3 * wanted, [*exact[0], *exact[1]]), strict=True):
        agree(one, other, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_float64(dtype: torch.dtype, tolerance: float) -> None:
    compare(*problem(dtype), tolerance)


def test_float32_and_float64_together_and_none_at_all() -> None:
    rows, columns = problem(torch.float32)
    compare(rows, problem(torch.float64)[1], 2e-6)
    compare([], columns[:1], 2e-6)
    assert orthogonality([]).item() == 0


def test_float32_under_autocast() -> None:
    rows, columns = problem(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        value = orthogonality(rows, columns)
        value.backward()
    assert value.dtype == torch.float32
    agree(value, reference([row.double() for row in rows], [column.double() for column in columns]), 2e-6)
    agree(rows[1].grad, (4 * (rows[1] @ rows[1].t() - torch.eye(7)) @ rows[1]).detach(), 2e-6)


def test_uneven_memory_and_only_gradients_that_are_asked_for() -> None:
    row = drawn(9, 4, dtype=torch.float64, seed=0)
    still = drawn(3, 4, dtype=torch.float64, seed=1).detach()
    compare([row.t()], [drawn(4, 9, dtype=torch.float64, seed=2).t()], 1e-12)
    orthogonality([still, row], [still.t()]).backward()
    agree(row.grad, (4 * (row @ row.t() - torch.eye(9)) @ row).detach(), 1e-12)
    assert still.grad is None


def test_kept_are_the_products_alone() -> None:
    rows, columns = problem(torch.float32)
    given = {tensor.data_ptr() for tensor in (*rows, *columns)}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        orthogonality(rows, columns)
    found = sum(tensor.numel() for tensor in kept if tensor.data_ptr() not in given)
    assert found == 2 * sum(r * r for r, _ in SHAPES)
