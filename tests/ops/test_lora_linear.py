"""LoRA's linear layer as one function: under autocast, what it keeps, and how many operations it takes."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lit_peft import LoRAConfig, make_lean
from lit_peft.low_rank.linear import LoRALinear
from lit_peft.ops import border
from lit_peft.ops.lora_linear import joins, lora_linear
from lit_peft.ops.recipes import note, recipe_of
from tests.ops.exact import TOLERANCE, adapted, agree, drawn, gradients


def layer_of(dtype: torch.dtype, wide: int = 24, tall: int = 20, bias: bool = True) -> nn.Linear:
    return nn.Linear(wide, tall, bias).to(dtype).requires_grad_(False)


def parts_of(x_dtype: torch.dtype, r: int = 3) -> list[Tensor]:
    shapes = ((2, 7, 24), x_dtype), ((r, 24), torch.float32), ((20, r), torch.float32)
    return [drawn(*shape, dtype=dtype, seed=i) for i, (shape, dtype) in enumerate(shapes)]


def trained(out: Tensor, parts: list[Tensor]) -> list[Tensor]:
    slope = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out).to(out.dtype)
    return [out, *torch.autograd.grad(out, parts, slope)]


@pytest.mark.parametrize("lined", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(kind: torch.dtype, dtype: torch.dtype, x_dtype: torch.dtype, bias: bool, lined: bool) -> None:
    """In autocast's dtype, as near to float64 as what autocast makes of plain operations; gradients as parameters."""
    layer, parts = layer_of(dtype, bias=bias), parts_of(x_dtype)
    exact = [part.detach().double().requires_grad_() for part in parts]
    full = copy.deepcopy(layer).double()
    wanted = trained(full(exact[0]) + 0.5 * F.linear(F.linear(exact[0], exact[1]), exact[2]), exact)
    if lined:
        border.surround(layer, 3)
    with torch.autocast("cpu", dtype=kind):
        assert joins(layer, parts[0], casts=True)
        found = trained(lora_linear(parts[0], layer, parts[1], parts[2], 0.5), parts)
        plain = trained(layer(parts[0]) + 0.5 * F.linear(F.linear(parts[0], parts[1]), parts[2]), parts)
    for mine, theirs, right in zip(found, plain, wanted, strict=True):
        assert mine.dtype == theirs.dtype
        agree(mine, right, TOLERANCE[torch.bfloat16])
        assert (mine.double() - right).norm() <= 1.5 * (theirs.double() - right).norm() + 1e-9


def test_autocast_off_inside_and_double_precision() -> None:
    layer, parts = layer_of(torch.float64), parts_of(torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not joins(layer, parts[0], casts=True)  # autocast leaves float64 alone
        assert not joins(layer_of(torch.float32), parts[0], casts=True)
        with torch.autocast("cpu", enabled=False):
            assert joins(layer, parts[0], casts=True)
            assert not joins(layer, parts[0].float(), casts=True)


def kept_by(run: Callable[[], Any]) -> int:
    """Returns the bytes that a graph keeps, each storage once, but for parameters."""
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    alive = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        alive.append(run())
    return sum(held.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_keeps_one_copy_of_an_input_that_three_layers_share(dtype: torch.dtype) -> None:
    """And none of the weights, which autocast by itself keeps in its dtype."""
    layers, parts = [layer_of(dtype, bias=False) for _ in range(3)], parts_of(torch.float32)

    def run(one: Callable[[nn.Linear], Tensor]) -> list[Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return [one(layer) for layer in layers]

    ours = kept_by(lambda: run(lambda layer: lora_linear(parts[0], layer, parts[1], parts[2], 0.5)))
    plain = kept_by(lambda: run(lambda layer: layer(parts[0]) + 0.5 * F.linear(F.linear(parts[0], parts[1]), parts[2])))
    rows, r = 14, 3
    assert ours == 2 * (rows * 24 + 3 * (rows * r + r * (24 + 20)))
    assert ours < plain


@pytest.mark.parametrize("lean", [False, True])
def test_autocast_keeps_no_more_of_a_model_than_plain_operations_do(
    lean: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = adapted().float(), torch.randint(64, (2, 9))
    if lean:
        make_lean(model)

    def run() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(input_ids=ids, labels=ids, use_cache=False).loss  # type: ignore[no-any-return]

    ours = kept_by(run)
    got = torch.autograd.grad(run(), [p for p in model.parameters() if p.requires_grad])
    monkeypatch.setenv("LIT_PEFT_KERNELS", "0")
    assert ours < (0.8 if lean else 1.0) * kept_by(run)
    plain = torch.autograd.grad(run(), [p for p in model.parameters() if p.requires_grad])
    exact = gradients(copy.deepcopy(model).double(), ids)[1]
    for mine, theirs, right in zip(got, plain, exact, strict=True):
        assert mine.dtype == torch.float32
        assert (mine - right).norm() <= 1.5 * (theirs - right).norm() + 0.02 * right.norm()


def test_a_copy_is_made_again_when_its_tensor_has_changed() -> None:
    layer, (x, a, b) = layer_of(torch.float32), parts_of(torch.float32)
    x = x.detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first = lora_linear(x, layer, a, b, 0.5)
        x.add_(1.0)
        second = lora_linear(x, layer, a, b, 0.5)
        agree(second, layer(x) + 0.5 * F.linear(F.linear(x, a), b), 2e-2)
    assert not first.equal(second)


class Counted(TorchDispatchMode):
    """Counts operations that a GPU would launch a kernel for: all but views and empty memory."""

    FREE = ("view", "_unsafe_view", "t", "detach", "alias", "as_strided", "slice", "empty", "new_empty", "expand")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.partition(".")[0]
        if name not in self.FREE:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("dtype", "lined", "forward", "backward"),
    [
        # A x^T; x W^T; and the update | B^T g^T; dB; dA; g W; and the update
        (torch.float32, False, 3, 5),
        # and A and B to bfloat16 | their gradients to float32
        (torch.bfloat16, False, 5, 7),
        # A x^T; x, z and 0 side by side; one product | B^T g^T; dB; dA; g, p and 0 side by side; one product
        (torch.float32, True, 5, 7),
    ],
)
def test_operations(dtype: torch.dtype, lined: bool, forward: int, backward: int) -> None:
    layer, parts = layer_of(dtype, bias=False), parts_of(dtype)
    if lined:
        border.surround(layer, 3).hold(layer.weight, parts[1], parts[2])
    with Counted() as there:
        out = lora_linear(parts[0], layer, parts[1], parts[2], 0.5)
    slope = torch.ones_like(out)
    with Counted() as back:
        torch.autograd.grad(out, parts, slope)
    assert len(there.seen) <= forward, there.seen
    assert len(back.seen) <= backward, back.seen


def test_operations_of_an_adapter_beside_its_layer() -> None:
    """Two operations forward and four backwards are what the update adds."""
    adapter, x = LoRALinear(layer_of(torch.float32), LoRAConfig(r=2)), parts_of(torch.float32)[0]
    seen = []
    for layer in (adapter.base, adapter):
        with Counted() as counted:
            out = layer(x)
            own = [x, *(p for p in layer.parameters() if p.requires_grad)]
            torch.autograd.grad(out, own, torch.ones(out.shape))
        seen.append(counted.seen)
    assert len(seen[1]) <= len(seen[0]) + 6, seen


def test_an_input_is_made_again_once_for_all_that_need_it() -> None:
    """Queries, keys and values are made of one normalised tensor; a second backward pass makes it again."""
    (x, a, b), calls = parts_of(torch.float32), []

    def double(part: Tensor) -> Tensor:
        calls.append(part)
        return part * 2

    layers = [layer_of(torch.float32) for _ in range(3)]
    made = x * 2
    note(made, x, make=double)
    out = sum(lora_linear(made, layer, a, b, 0.5).sin().sum() for layer in layers)
    exact = sum((layer(x * 2) + 0.5 * F.linear(F.linear(x * 2, a), b)).sin().sum() for layer in layers)
    wanted = torch.autograd.grad(exact, [x, a, b])  # type: ignore[arg-type]
    for times in (1, 4):
        found = torch.autograd.grad(out, [x, a, b], retain_graph=True)  # type: ignore[arg-type]
        assert len(calls) == times
        for mine, theirs in zip(found, wanted, strict=True):
            agree(mine, theirs, 1e-5)
    assert recipe_of(made).again.made is None


def test_copies_and_files_of_an_input_hold_it_alone() -> None:
    layer, (x, a, b) = layer_of(torch.float32), parts_of(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first = lora_linear(x, layer, a, b, 0.5)
        file = io.BytesIO()
        torch.save(x, file)
        file.seek(0)
        for again in (copy.deepcopy(x), torch.load(file)):
            assert again.equal(x)
            assert lora_linear(again, layer, a, b, 0.5).equal(first)
