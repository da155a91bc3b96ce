"""Edits of chosen rows against float64, when they happen in place, and rotations that are computed once a step."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lit_peft.methods.reft import EDIT, DiReFTLayer, Edit, LoReFTLayer, ReFTConfig
from lit_peft.ops import low_rank
from lit_peft.ops import reft as op
from tests.ops.exact import TOLERANCE, agree, drawn
from tests.ops.test_bottleneck import both, kept_by
from tests.ops.test_mora import Made

SIZES = [(5, 7, 3, 1), (1, 33, 1, 7), (17, 64, 4, 16), (6, 9, 0, 8), (0, 9, 0, 2)]  # tokens, width, edited ones, r


def exact(h: Tensor, rows: Tensor, matrix: Tensor, bias: Tensor, rotation: Tensor) -> Tensor:
    """Edits row by row."""
    lines = list(h.reshape(-1, h.shape[-1]))
    for t in rows.tolist():
        lines[t] = lines[t] + rotation @ (matrix @ lines[t] + bias)
    unused = 0 * (matrix.sum() + bias.sum() + rotation.sum())
    return (torch.stack(lines).view(h.shape) if lines else h) + unused


def inputs_of(tokens: int, width: int, r: int, dtype: torch.dtype) -> list[Tensor]:
    """Returns h, E, b, Q."""
    shapes = [(tokens, width), (r, width), (r,), (width, r)]
    return [drawn(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]


def rows_of(tokens: int, number: int) -> Tensor:
    return torch.randperm(tokens, generator=torch.Generator().manual_seed(3))[:number]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_edit(size: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    tokens, width, number, r = size
    rows, inputs = rows_of(tokens, number), inputs_of(tokens, width, r, dtype)
    for of in (op.edit_rows, op.reference):
        both(
            lambda h, *rest, of=of: of(h, rows, *rest),
            lambda h, *rest: exact(h, rows, *rest),
            inputs,
            TOLERANCE[dtype],
        )
    found = op.edit_rows(inputs[0], rows, *inputs[1:])
    rest = [t for t in range(tokens) if t not in rows.tolist()]
    assert found[rest].equal(inputs[0][rest])


def test_uneven_memory_double_use_and_checkpoints() -> None:
    rows, others = torch.tensor([4, 0]), torch.tensor([1, 4, 7])
    inputs = inputs_of(1, 5, 3, torch.float64)
    inputs[0] = drawn(4, 2, 5, dtype=torch.float64, seed=0)

    def run(of: Callable[..., Tensor], h: Tensor, *weights: Tensor) -> Tensor:
        return of(of(h.transpose(0, 1), rows, *weights) * 2, others, *weights)

    def again(*rest: Tensor) -> Tensor:
        out: Tensor = checkpoint(lambda *rest: run(op.edit_rows, *rest), *rest, use_reentrant=False)
        return out

    for of in (lambda *rest: run(op.edit_rows, *rest), again):
        both(of, lambda *rest: run(exact, *rest), inputs, 1e-12)


def test_in_place() -> None:
    rows, inputs = torch.tensor([3, 1]), inputs_of(5, 6, 2, torch.float64)

    def run(h: Tensor, *weights: Tensor) -> Tensor:
        h = h + 1
        out = op.edit_rows(h, rows, *weights, in_place=True)
        assert out is h
        return op.edit_rows(out, torch.tensor([1, 0]), *weights, in_place=True).sin()

    both(
        run,
        lambda h, *weights: exact(exact(h + 1, rows, *weights), torch.tensor([1, 0]), *weights).sin(),
        inputs,
        1e-12,
    )


def test_only_gradients_that_are_asked_for() -> None:
    rows = torch.tensor([2, 0])
    for which in range(4):
        inputs = [tensor.detach() for tensor in inputs_of(4, 6, 2, torch.float64)]
        inputs[which].requires_grad_()
        (got,) = torch.autograd.grad(op.edit_rows(inputs[0], rows, *inputs[1:]).sin().sum(), inputs[which])
        (wanted,) = torch.autograd.grad(exact(inputs[0], rows, *inputs[1:]).sin().sum(), inputs[which])
        agree(got, wanted, 1e-12)


def test_dropout_of_the_edit() -> None:
    rows, inputs = torch.arange(16), inputs_of(16, 6, 4, torch.float64)
    torch.manual_seed(7)
    kept = low_rank.dropped(torch.ones(16, 4, dtype=torch.float64), 0.5, low_rank.drawn(0.5))

    def run(h: Tensor, *weights: Tensor) -> Tensor:
        torch.manual_seed(7)
        return op.edit_rows(h, rows, *weights, dropout=0.5)

    both(run, lambda h, e, b, q: h + (kept * (h @ e.t() + b)) @ q.t(), inputs, 1e-12)


def test_what_is_kept_and_made() -> None:
    """Of h only the chosen rows are kept, and all of it is copied once."""
    rows, inputs = torch.tensor([5, 1]), inputs_of(100, 32, 2, torch.float32)
    held = kept_by(lambda: op.edit_rows(inputs[0], rows, *inputs[1:]), inputs)
    assert held == 4 * (2 * 32 + 2 * 2) + 8 * 2
    with Made(4 * 100 * 32, inputs) as forward:
        op.edit_rows(inputs[0], rows, *inputs[1:])
    assert forward.sizes == [(100, 32)]
    h = inputs[0] + 1
    with Made(4 * 100 * 32, [h]) as forward:
        out = op.edit_rows(h, rows, *inputs[1:], in_place=True)
    assert forward.sizes == []
    with Made(4 * 100 * 32, [out, *inputs]) as backward:
        torch.autograd.grad(out, inputs[:1], out.detach())
    assert backward.sizes == [(100, 32)]


class Adds(nn.Module):
    """A layer that ends in a residual sum, and one that hands on what it was given."""

    def __init__(self, width: int, adds: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width) / 2)
        self.adds = adds
        self.made = 0

    def forward(self, h: Tensor) -> Any:
        out = h + h * self.weight if self.adds else h
        self.made = out.data_ptr()
        return (out,)


def edited(layer: Any, h: Tensor) -> Tensor:
    marks = torch.tensor([[1, 0, 2], [0, 1, 0]])
    out: Tensor = layer(h, **{EDIT: Edit({"default": marks})})[0]
    return out


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", [LoReFTLayer, DiReFTLayer])
def test_a_layers_sum_is_edited_where_it_lies_unless_somebody_holds_it(kind: Any, tied: bool) -> None:
    layer = kind(Adds(8), ReFTConfig(r=2, tied=tied, hidden_size=8, start_at_identity=False))
    h = torch.randn(2, 3, 8, requires_grad=True)
    out = edited(layer, h)
    assert out.data_ptr() == layer.base.made
    seen: list[Tensor] = []
    handle = layer.base.register_forward_hook(lambda m, a, o: seen.append(o[0]))
    other = edited(layer, h)
    assert other.data_ptr() != layer.base.made, "a hook holds the sum"
    agree(seen[0], h * 1.5, 1e-6)
    agree(other, out, 1e-6)
    handle.remove()
    own = [p for _, p in layer.own_parameters()]
    for one, two in zip(
        torch.autograd.grad(out.sin().sum(), [h, *own]), torch.autograd.grad(other.sin().sum(), [h, *own]), strict=True
    ):
        agree(one, two, 1e-6)
    with torch.no_grad():
        assert edited(layer, h).data_ptr() != layer.base.made
    layer.base.adds = False
    given = h * 1
    before = given.detach().clone()
    edited(layer, given)
    sums = h + 0
    edited(layer, sums)
    assert given.equal(before)
    assert sums.equal(h), "a layer that hands on what it was given: the caller holds it"


def test_what_the_graph_holds_is_not_overwritten() -> None:
    """A sum may be overwritten; a view, a leaf, a square that its backward pass needs, may not."""
    leaf = torch.ones(2, 2, requires_grad=True)

    def whether(make: Callable[[], Tensor]) -> bool:
        h = make()
        return op.unshared(h, held=1)

    assert whether(lambda: leaf + 1)
    assert not whether(lambda: leaf.tanh())
    assert not whether(lambda: (leaf + 1).view(4))
    assert not whether(lambda: leaf)
    assert not whether(lambda: leaf.detach() + 1)
    kept = leaf + 1
    assert not whether(lambda: kept)

    def watched() -> Tensor:
        h = leaf + 1
        h.register_hook(lambda g: g)
        return h

    assert not whether(watched)


@pytest.mark.parametrize("shape", [(6, 3), (2, 9, 4), (5, 1), (4, 4)], ids=str)
def test_rotation_and_its_gradient(shape: tuple[int, ...]) -> None:
    matrix = drawn(*shape, dtype=torch.float64, seed=0)
    both(op.Rotations(), op.orthonormal, [matrix], 1e-11)
    q = op.Rotations()(matrix)
    agree(q.transpose(-2, -1) @ q, torch.eye(shape[-1]).expand(*shape[:-2], -1, -1), 1e-12)
    agree(op.Rotations()(q.detach()), q, 1e-12)
    assert op.Rotations()(matrix.detach().bfloat16()).dtype == torch.float32


def test_a_rotation_is_computed_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    qr = torch.linalg.qr

    def counted(matrix: Tensor) -> Any:
        nonlocal calls
        calls += 1
        return qr(matrix)

    monkeypatch.setattr(torch.linalg, "qr", counted)
    layer = LoReFTLayer(Adds(8), ReFTConfig(r=2, hidden_size=8, start_at_identity=False))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    calls = 0
    for step in range(3):
        for _ in range(4):
            edited(layer, torch.randn(2, 3, 8)).sin().sum().backward()
        assert calls == step + 1
        optimizer.step()
        optimizer.zero_grad()
    fresh = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
    for other in fresh:
        assert other.rotations["default"].kept is None
        agree(edited(other, torch.ones(2, 3, 8)), edited(layer, torch.ones(2, 3, 8)), 1e-6)


def test_a_rotation_is_never_stale() -> None:
    rotations, matrix = op.Rotations(), drawn(6, 2, dtype=torch.float32, seed=0)

    def check() -> None:
        agree(rotations(matrix), op.orthonormal(matrix), 1e-7)

    check()
    with torch.no_grad():
        matrix.mul_(torch.randn(6, 2))
    check()
    matrix.data.add_(torch.randn(6, 2))  # has no new version
    check()
    matrix.data = torch.randn(6, 2)
    check()
    matrix.detach().numpy()[:] = 3 * torch.randn(6, 2).numpy()
    check()
    with torch.inference_mode():
        check()
    assert rotations(matrix).requires_grad
