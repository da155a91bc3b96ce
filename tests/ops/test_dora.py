"""DoRA's op against float64: values, every gradient, what is kept, and norms that are never out of date."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lit_peft import LoRAConfig, add_adapter, place
from lit_peft.adapter import merge, named_adapters
from lit_peft.low_rank.dora import DoRALinear
from lit_peft.ops.dora import dora_linear, dora_update, reference
from lit_peft.ops.lean import make_lean
from lit_peft.ops.row_norms import across, row_norms
from tests.ops.exact import TOLERANCE, agree, drawn, gradients, llama
from tests.ops.test_scaled import layer

CONFIG = LoRAConfig(r=3, alpha=5, use_dora=True)
SIZES = [(5, 7, 3, 1), (1, 33, 65, 7), (17, 64, 31, 16), (9, 5, 6, 8), (70, 96, 80, 64), (0, 9, 9, 8)]


def problem(rows: int, wide: int, tall: int, r: int, dtype: torch.dtype, bias: bool) -> tuple[nn.Linear, list[Tensor]]:
    """A layer with x, A, B, m and n."""
    small = torch.float64 if dtype == torch.float64 else torch.float32
    shapes = [(rows, wide), (r, wide), (tall, r), (tall,), (tall,)]
    x, a, b, m, n = (drawn(*shape, dtype=small, seed=i).detach() for i, shape in enumerate(shapes))
    n = n.abs() + 0.5
    m = n * (1 + 0.3 * m.tanh())
    inputs = [x.to(dtype), a, b / max(1, r) ** 0.5, m, n]
    return layer(wide, tall, dtype, bias), [tensor.requires_grad_() for tensor in inputs]


def compare(run: Callable[..., Tensor], base: nn.Linear, inputs: list[Tensor], tolerance: float) -> None:
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    bias = None if base.bias is None else base.bias.double()
    wanted = reference(exact[0], base.weight.double(), bias, *exact[1:], 0.7)
    out = run(*inputs)
    assert out.dtype == inputs[0].dtype
    agree(out, wanted, tolerance)
    slope = drawn(*out.shape, dtype=torch.float64, seed=9).detach().to(out.device)
    got = torch.autograd.grad(out, inputs[:4], slope.to(out.dtype))
    asked = torch.autograd.grad(wanted, exact[:4], slope)
    for i, (one, other, of) in enumerate(zip(got, asked, inputs, strict=False)):
        assert one.dtype == of.dtype
        # dm is told from y - b, which has lost digits to b where numbers have few
        lossy = i == 3 and bias is not None and out.dtype.itemsize < 4
        agree(one, other, 3 * tolerance if lossy else tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_float64(bias: bool, size: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    base, inputs = problem(*size, dtype, bias)
    compare(lambda *given: dora_linear(given[0], base, *given[1:], 0.7), base, inputs, TOLERANCE[dtype])
    compare(lambda x, *given: dora_update(base(x), x, base.bias, *given, 0.7), base, inputs, 2 * TOLERANCE[dtype])


def test_a_length_of_zero_has_its_gradient() -> None:
    base, inputs = problem(5, 7, 4, 2, torch.float32, bias=False)
    inputs[3].data[1] = 0
    inputs[3].data[2] = -1e-30
    compare(lambda *given: dora_linear(given[0], base, *given[1:], 0.7), base, inputs, 2e-6)


def test_uneven_memory_twice_in_one_graph_and_checkpointing() -> None:
    base, inputs = problem(1, 5, 5, 2, torch.float64, bias=True)
    x = drawn(4, 6, 5, dtype=torch.float64, seed=5)
    leaves = [x, *inputs[1:4]]

    def run(x: Tensor, *given: Tensor) -> Tensor:
        inner = dora_linear(x.transpose(0, 1), base, *given, inputs[4], 0.7)
        return dora_linear(inner, base, *given, inputs[4], 0.7)

    def plain(x: Tensor, *given: Tensor) -> Tensor:
        settings = (base.weight, base.bias, *given, inputs[4], 0.7)
        return reference(reference(x.transpose(0, 1), *settings), *settings)

    wanted = torch.autograd.grad(plain(*leaves).sin().sum(), leaves)
    for found in (run(*leaves), checkpoint(run, *leaves, use_reentrant=False)):
        for mine, theirs in zip(torch.autograd.grad(found.sin().sum(), leaves), wanted, strict=True):
            agree(mine, theirs, 1e-12)


@pytest.mark.parametrize("asked", range(4))
def test_only_gradients_that_are_asked_for(asked: int) -> None:
    base, inputs = problem(6, 5, 4, 2, torch.float64, bias=True)
    given = [tensor.detach().requires_grad_(i == asked) for i, tensor in enumerate(inputs)]
    exact = [tensor.detach().requires_grad_(i == asked) for i, tensor in enumerate(inputs)]
    wanted = reference(exact[0], base.weight, base.bias, *exact[1:], 0.7).sin().sum()
    wanted.backward()
    for out in (
        dora_linear(given[0], base, *given[1:], 0.7),
        dora_update(base(given[0]), given[0], base.bias, *given[1:], 0.7),
    ):
        out.sin().sum().backward()
        agree(given[asked].grad, exact[asked].grad, 1e-12)
        given[asked].grad = None
        assert all(tensor.grad is None for tensor in given)


def test_kept_are_the_input_the_output_and_what_is_rank_r() -> None:
    base, inputs = problem(50, 40, 30, 2, torch.float32, bias=True)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = dora_linear(inputs[0], base, *inputs[1:], 0.7)
    for given in (*inputs, base.weight, base.bias, out):
        kept.pop(given.untyped_storage().data_ptr(), None)
    assert sum(kept.values()) == 4 * (2 * 50 + 2 * 30)  # H, c and m


def test_a_change_in_place_is_noticed() -> None:
    base, inputs = problem(5, 7, 4, 2, torch.float64, bias=False)
    out = dora_linear(inputs[0], base, *inputs[1:], 0.7)
    out.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_norms_in_float64() -> None:
    weight, a, b = (drawn(*shape, dtype=torch.float64, seed=i) for i, shape in enumerate([(6, 9), (3, 9), (6, 3)]))
    agree(row_norms(weight.square().sum(1), across(weight, a), a, b, 0.7), (weight + 0.7 * b @ a).norm(dim=1), 1e-12)


# Never out of date ----------------------------------------------------------------------------------------------------


def adapter(bias: bool = True) -> DoRALinear:
    torch.manual_seed(0)
    made = DoRALinear(nn.Linear(7, 5, bias=bias), CONFIG)
    made.base.requires_grad_(False)
    with torch.no_grad():
        for _, parameter in made.own_parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return made


def up_to_date(made: DoRALinear, name: str = "default") -> None:
    turned = made.base.weight.double() + 5 / 3 * made.lora_b[name].double() @ made.lora_a[name].double()
    agree(made.norm(name), turned.norm(dim=1).detach(), 1e-6)


def optimizer_step(made: DoRALinear) -> None:
    optimizer = torch.optim.AdamW([parameter for _, parameter in made.own_parameters()], lr=0.1)
    made(torch.randn(4, 7)).sum().backward()
    optimizer.step()


def loaded(made: DoRALinear) -> None:
    made.load_state_dict({key: value + 0.5 for key, value in made.state_dict().items()})


def assigned(made: DoRALinear) -> None:
    made.load_state_dict({key: value + 0.5 for key, value in made.state_dict().items()}, assign=True)


def data_assigned(made: DoRALinear) -> None:
    for _ in range(2):  # the second may lie where the first one lay
        made.lora_a["default"].data = torch.randn(3, 7)


def data_written(made: DoRALinear) -> None:
    """No version counter sees this; Lightning's averaging of weights does so."""
    made.lora_b["default"].data.copy_(torch.randn(5, 3))


def base_assigned(made: DoRALinear) -> None:
    for _ in range(2):
        made.base.weight.data = torch.randn(5, 7)


def base_replaced(made: DoRALinear) -> None:
    made.base = nn.Linear(7, 5).requires_grad_(False)


def base_written(made: DoRALinear) -> None:
    with torch.no_grad():
        made.base.weight.mul_(2)


CHANGES = [optimizer_step, loaded, assigned, data_assigned, data_written, base_assigned, base_replaced, base_written]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_norms_follow(change: Callable[[DoRALinear], None]) -> None:
    made = adapter()
    x = torch.randn(4, 7)
    made(x)
    before = made.norm("default")
    change(made)
    assert not torch.allclose(made.norm("default"), before, rtol=1e-3)
    up_to_date(made)


def test_norms_follow_casts_merging_and_named_sets() -> None:
    made = adapter()
    model = nn.Sequential(made)
    made.norm("default")
    assert made.double().norm("default").dtype == torch.float64
    up_to_date(made)
    made.float()
    up_to_date(made)
    add_adapter(model, "other")
    with torch.no_grad():
        made.lora_b["other"].normal_()
    up_to_date(made, "other")
    up_to_date(made)
    assert not torch.allclose(made.norm("default"), made.norm("other"))
    made.remove("other")
    add_adapter(model, "other")  # another one of the same name
    torch.testing.assert_close(made.norm("other"), made.base.weight.norm(dim=1))
    x = torch.randn(4, 7)
    expected = made(x)
    folded = copy.deepcopy(model)
    torch.testing.assert_close(merge(folded, ("default",))(x), expected, rtol=1e-5, atol=1e-5)
    made.merge(("default",))  # the adapter stays in use over the new weight
    up_to_date(made)


def test_a_magnitude_that_starts_as_the_norm_does_not_change_it() -> None:
    made = DoRALinear(nn.Linear(7, 5), CONFIG)
    with torch.no_grad():
        made.lora_magnitude["default"].mul_(3)
    up_to_date(made)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one each time a norm is worked out."""
    calls: list[int] = []

    def count(*args: Any) -> Tensor:
        calls.append(1)
        return row_norms(*args)

    monkeypatch.setattr("lit_peft.low_rank.dora.row_norms", count)
    return calls


def test_norms_are_worked_out_once_a_step(counted: list[int]) -> None:
    made = adapter()
    counted.clear()
    x = torch.randn(4, 7, requires_grad=True)
    optimizer = torch.optim.SGD([parameter for _, parameter in made.own_parameters()], lr=0.1)
    for step in range(1, 3):
        for _ in range(2):  # accumulated
            checkpoint(made, x, use_reentrant=False).sum().backward()
        assert len(counted) == step
        with torch.inference_mode():
            made(x)
            made(x)
        assert len(counted) == step
        optimizer.step()
    with torch.inference_mode():
        made(x)
    made(x).sum().backward()  # what was worked out in inference mode can be kept
    assert len(counted) == 3


def test_elsewhere_norms_are_handed_out_to_replays_only(counted: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """On devices where numbers cannot be compared without a stop, played by the CPU."""
    monkeypatch.setattr("lit_peft.ops.row_norms._compared", lambda tensor: False)
    made = adapter()
    counted.clear()
    x = torch.randn(4, 7, requires_grad=True)
    out = checkpoint(made, x, use_reentrant=False)
    assert len(counted) == 1
    out.sum().backward()
    assert len(counted) == 1
    made(x)
    assert len(counted) == 2
    out = checkpoint(made, x, use_reentrant=False)
    with torch.no_grad():
        made.lora_a["default"].mul_(2)
    assert len(counted) == 3
    out.sum().backward()
    assert len(counted) == 4
    for change in CHANGES:
        made(x)
        change(made)
        up_to_date(made)


def test_what_is_known_is_in_no_copy_and_no_file() -> None:
    made = adapter()
    made(torch.randn(2, 7))
    for again in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert not again.norms._found
        up_to_date(again)


# In a model -----------------------------------------------------------------------------------------------------------


def adapted(bias: bool = False) -> nn.Module:
    model = llama(attention_bias=bias)
    place(model, lambda path, m: path.endswith("_proj"), lambda base: DoRALinear(base, CONFIG))
    for _, found in named_adapters(model):
        found.double()
        torch.manual_seed(1)
        with torch.no_grad():
            for _, parameter in found.own_parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_model_is_what_it_is_without_the_ops(bias: bool, lean: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.arange(14).view(2, 7)
    model = adapted(bias)
    if lean:
        make_lean(model)
    loss, mine = gradients(model, ids)
    monkeypatch.setenv("LIT_PEFT_KERNELS", "0")
    wanted, theirs = gradients(adapted(bias), ids)
    tolerance = 1e-5 if lean else 1e-11  # a norm computes in float32
    agree(loss, wanted, tolerance)
    assert len(mine) == 42
    for one, other in zip(mine, theirs, strict=True):
        agree(one, other, tolerance)
