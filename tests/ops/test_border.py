"""A frozen weight in a border: values, gradients, and everything that is done to a layer besides calling it."""

import copy
import gc
import io
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint
from transformers import LlamaForCausalLM

from lit_peft import LoRAConfig, make_lean, make_plain
from lit_peft.adapter import merge
from lit_peft.low_rank.linear import LoRALinear
from lit_peft.ops import border, lora_linear, low_rank
from tests.ops.exact import TOLERANCE, adapted, agree, drawn, gradients

SIZES = [(5, 7, 3, 1), (1, 33, 65, 7), (17, 64, 31, 16), (9, 12, 40, 8), (20, 96, 80, 70)]  # rows, in, out, r


def layer_of(wide: int, tall: int, dtype: torch.dtype = torch.float64, bias: bool = False) -> nn.Linear:
    return nn.Linear(wide, tall, bias).to(dtype).requires_grad_(False)


def results(layer: nn.Linear, inputs: list[Tensor], **settings: float) -> list[Tensor]:
    x, a, b, *diagonal = inputs
    torch.manual_seed(0)
    out = lora_linear.lora_linear(x, layer, a, b, 0.5, diagonal=diagonal[0] if diagonal else None, **settings)  # type: ignore[arg-type]
    slope = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out).to(out.dtype)
    return [out, *torch.autograd.grad(out, inputs, slope)]


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equal_to_the_plain_form_in_float64(
    size: tuple[int, int, int, int], bias: bool, dropout: float, diagonal: bool
) -> None:
    rows, wide, tall, r = size
    shapes = [(rows, wide), (r, wide), (tall, r), *([(r,)] if diagonal else [])]
    inputs = [drawn(*shape, dtype=torch.float64, seed=i) for i, shape in enumerate(shapes)]
    layer = layer_of(wide, tall, bias=bias)
    wanted = results(layer, inputs, dropout=dropout)
    assert border.surround(layer, r).width == (64 if r <= 64 else 128)
    for mine, theirs in zip(results(layer, inputs, dropout=dropout), wanted, strict=True):
        agree(mine, theirs, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_against_float64_with_parameters_in_float32(dtype: torch.dtype) -> None:
    x = drawn(3, 6, 24, dtype=dtype, seed=0)
    a, b = drawn(8, 24, dtype=torch.float32, seed=1), drawn(20, 8, dtype=torch.float32, seed=2)
    layer = layer_of(24, 20, dtype)
    wanted = results(copy.deepcopy(layer).double(), [part.detach().double().requires_grad_() for part in (x, a, b)])
    border.surround(layer, 8)
    found = results(layer, [x, a, b])
    assert [part.dtype for part in found] == [dtype, dtype, torch.float32, torch.float32]
    for mine, theirs in zip(found, wanted, strict=True):
        agree(mine, theirs, TOLERANCE[dtype])


@pytest.mark.parametrize("needed", list(itertools.product([False, True], repeat=3))[1:], ids=str)
def test_only_gradients_that_are_asked_for(needed: tuple[bool, ...]) -> None:
    layer = layer_of(8, 12)
    border.surround(layer, 2)
    shapes = [(5, 8), (2, 8), (12, 2)]
    parts = [
        drawn(*shape, dtype=torch.float64, seed=i).detach().requires_grad_(need)
        for i, (shape, need) in enumerate(zip(shapes, needed, strict=True))
    ]
    lora_linear.lora_linear(parts[0], layer, parts[1], parts[2], 2.0).sum().backward()
    exact = [part.detach().requires_grad_(need) for part, need in zip(parts, needed, strict=True)]
    low_rank.reference(layer(exact[0]), exact[0], exact[1], exact[2], 2.0).sum().backward()
    for mine, theirs in zip(parts, exact, strict=True):
        agree(mine.grad, theirs.grad, 1e-12)


def stepped(change: Callable[[nn.Parameter], None]) -> None:
    """Trains, changes the parameters in some way, trains again: the border has to follow."""
    adapter = LoRALinear(layer_of(8, 12), LoRAConfig(r=2)).double()
    nn.init.normal_(adapter.lora_b["default"])
    border.surround(adapter.base, 2)  # type: ignore[arg-type]
    x = drawn(5, 8, dtype=torch.float64, seed=0)
    adapter(x).sum().backward()
    for parameter in (adapter.lora_a["default"], adapter.lora_b["default"]):
        change(parameter)
    y = adapter(x)
    exact = adapter.change("default", x, adapter.base(x))
    assert border.bordered(adapter.base) is not None
    agree(y, exact, 1e-12)
    inputs = [x, *adapter.lora_a.values(), *adapter.lora_b.values()]
    for mine, theirs in zip(
        torch.autograd.grad(y.sum(), inputs), torch.autograd.grad(exact.sum(), inputs), strict=True
    ):
        agree(mine, theirs, 1e-12)


def test_the_border_follows_an_optimizer() -> None:
    stepped(lambda parameter: torch.optim.AdamW([parameter], lr=0.1).step())


def test_the_border_follows_changes_that_no_version_shows() -> None:
    stepped(lambda parameter: parameter.data.add_(1.0))  # type: ignore[arg-type, return-value]


def test_the_border_follows_new_memory() -> None:
    def change(parameter: nn.Parameter) -> None:
        parameter.data = parameter.data * 2

    stepped(change)


def test_sets_that_take_turns_and_differ_in_rank() -> None:
    adapter = LoRALinear(layer_of(8, 12), LoRAConfig(r=5))
    adapter.add("other", LoRAConfig(r=2))
    adapter.add("wide", LoRAConfig(r=70))
    adapter.double()
    for b in adapter.lora_b.values():
        nn.init.normal_(b)
    border.surround(adapter.base, 5)  # type: ignore[arg-type]
    x = drawn(4, 8, dtype=torch.float64, seed=0)
    names = ("default", "other", "default", "wide", "other")

    def total(joined: bool) -> Tensor:
        h = x
        for name in names:  # the borders hold what the last call has put there; the backward pass of the others knows
            y = adapter.joined(name, h) if joined else adapter.change(name, h, adapter.base(h))
            assert y is not None
            h = y.tanh()[:, :8]
        return h.sum()

    inputs = [x, *adapter.lora_a.values(), *adapter.lora_b.values()]
    for mine, theirs in zip(
        torch.autograd.grad(total(True), inputs), torch.autograd.grad(total(False), inputs), strict=True
    ):
        agree(mine, theirs, 1e-12)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    adapter = LoRALinear(layer_of(8, 8), LoRAConfig(r=2)).double()
    nn.init.normal_(adapter.lora_b["default"])
    x = drawn(5, 8, dtype=torch.float64, seed=0)
    inputs = [x, *adapter.lora_a.values(), *adapter.lora_b.values()]

    def train(again: bool) -> tuple[Tensor | None, ...]:
        for tensor in inputs:
            tensor.grad = None
        run = (lambda h: checkpoint(adapter, h, use_reentrant=reentrant)) if again else adapter
        run(run(x)).sum().backward()
        return tuple(tensor.grad for tensor in inputs)

    wanted = train(False)
    border.surround(adapter.base, 2)  # type: ignore[arg-type]
    for mine, theirs in zip(train(True), wanted, strict=True):
        agree(mine, theirs, 1e-12)


def test_values_files_and_copies_stay_what_they_are(tmp_path: Path) -> None:
    layer = layer_of(6, 10, torch.float32, bias=True)
    before, weight = copy.deepcopy(layer), layer.weight
    border.surround(layer, 3)
    assert layer.weight is weight
    assert weight.stride() == (70, 1)
    assert layer.weight.equal(before.weight)
    x = torch.randn(4, 6)
    assert layer(x).equal(before(x))
    state = layer.state_dict()
    assert all(value.is_contiguous() and value.equal(before.state_dict()[key]) for key, value in state.items())
    assert layer.state_dict(keep_vars=True)["weight"] is weight
    safetensors.torch.save_file(state, tmp_path / "a.safetensors")
    safetensors.torch.save_model(layer, str(tmp_path / "b.safetensors"))
    for name in "ab":
        assert safetensors.torch.load_file(tmp_path / f"{name}.safetensors")["weight"].equal(before.weight)
    file = io.BytesIO()
    torch.save(state, file)
    assert file.tell() < 3000  # not the borders too: they alone are 4 * 64 * 16 bytes
    whole = io.BytesIO()
    torch.save(layer, whole)
    whole.seek(0)
    again = torch.load(whole, weights_only=False)
    assert again.weight.equal(before.weight)
    assert border.bordered(again) is None
    twin = copy.deepcopy(layer)
    assert twin.weight.is_contiguous()
    assert twin.weight.equal(before.weight)
    assert border.bordered(twin) is None
    layer.load_state_dict({"weight": torch.ones(10, 6), "bias": torch.zeros(10)})
    assert border.bordered(layer) is not None
    assert (layer.weight == 1).all()
    layer.load_state_dict(before.state_dict(), assign=True)
    assert border.bordered(layer) is None
    assert layer.weight.equal(before.weight)


def test_another_dtype_or_device_is_plain_again() -> None:
    layer = layer_of(6, 10, torch.float32)
    wanted = layer.weight.double()
    border.surround(layer, 3)
    layer.float()  # which changes nothing
    assert border.bordered(layer) is not None
    layer.double()
    assert border.bordered(layer) is None
    assert layer.weight.is_contiguous()
    assert layer.weight.equal(wanted)
    border.surround(layer, 3)
    layer.to("meta")
    assert border.bordered(layer) is None


def test_a_layer_that_is_cast_between_forward_and_backward() -> None:
    layer, x = layer_of(6, 10), drawn(4, 6, dtype=torch.float64, seed=0)
    a, b = drawn(2, 6, dtype=torch.float64, seed=1), drawn(10, 2, dtype=torch.float64, seed=2)
    wanted = results(layer, [x, a, b])[1:]
    border.surround(layer, 2)
    out = lora_linear.lora_linear(x, layer, a, b, 0.5)
    border.undo(layer)
    slope = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
    for mine, theirs in zip(torch.autograd.grad(out, [x, a, b], slope), wanted, strict=True):
        agree(mine, theirs, 1e-12)


def test_merging_and_plain_models_have_no_border() -> None:
    model, ids = adapted(), torch.randint(64, (2, 9))
    make_lean(model)
    wanted = model(input_ids=ids).logits
    bases = [module.base for module in model.modules() if isinstance(module, LoRALinear)]
    for base in bases:
        border.surround(base, 2)  # type: ignore[arg-type]
    agree(model(input_ids=ids).logits, wanted, 1e-12)
    make_plain(model)
    assert all(border.bordered(base) is None and base.weight.is_contiguous() for base in bases)  # type: ignore[operator, union-attr]
    border.surround(bases[0], 2)  # type: ignore[arg-type]
    merge(model)
    agree(model(input_ids=ids).logits, wanted, 1e-6)  # folding adds in float32
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert all(module.weight.is_contiguous() for module in linear)


def test_a_model_is_saved_as_before(tmp_path: Path) -> None:
    model = adapted()
    model.requires_grad_(False)
    ids = torch.randint(64, (2, 9))
    wanted = model(input_ids=ids).logits
    for module in model.modules():
        if isinstance(module, LoRALinear):
            border.surround(module.base, 2)  # type: ignore[arg-type]
    twin = copy.deepcopy(model)
    agree(twin(input_ids=ids).logits, wanted, 1e-12)
    merge(twin)
    twin.save_pretrained(tmp_path)
    agree(LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)(input_ids=ids).logits, wanted, 1e-6)


def test_gradients_of_a_model() -> None:
    model, ids = adapted(), torch.randint(64, (2, 9))
    wanted = gradients(model, ids)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            border.surround(module.base, 2)  # type: ignore[arg-type]
    found = gradients(model, ids)
    agree(found[0], wanted[0], 1e-12)
    for mine, theirs in zip(found[1], wanted[1], strict=True):
        agree(mine, theirs, 1e-11)


class Lines(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(8, 8) for _ in range(3))
        self.two.weight = self.one.weight
        self.requires_grad_(False)


def test_who_is_allowed_one() -> None:
    lines = Lines()
    border.allow(lines)
    assert [border.allowed(line) for line in (lines.one, lines.two, lines.three)] == [False, False, True]
    lines.double()  # the same parameter
    assert border.allowed(lines.three)
    lines.three.weight = nn.Parameter(torch.ones(8, 8), requires_grad=False)  # as FSDP puts others in its place
    assert not border.allowed(lines.three)
    border.allow(lines)
    make_plain(lines)
    assert not border.allowed(lines.three)


def test_what_cannot_have_one() -> None:
    trained, part = nn.Linear(4, 4), layer_of(4, 4)
    part.weight.data = torch.ones(8, 4, dtype=torch.float64)[:4]

    class Other(nn.Linear):
        pass

    for layer, reason in (
        (trained, "trained"),
        (part, "other memory"),
        (Other(4, 4).requires_grad_(False), "a Other|A Other"),
        (layer_of(4, 4).to("meta"), "meta"),
    ):
        assert border.complaint(layer)
        with pytest.raises(ValueError, match=reason):
            border.surround(layer, 2)


def test_nothing_is_held_for_a_layer_that_is_gone() -> None:
    gc.collect()  # those of other tests
    layer = layer_of(4, 4)
    border.surround(layer, 2)
    border.allow(nn.Sequential(layer))
    held = len(border._AROUND), len(border._ALONE)
    del layer
    gc.collect()
    assert (len(border._AROUND), len(border._ALONE)) == (held[0] - 1, held[1] - 1)


def test_where_it_pays() -> None:
    tall, wide = layer_of(8, 32).weight, layer_of(32, 8).weight
    assert (border.pays_forward(tall), border.pays_backward(tall)) == (True, False)
    assert (border.pays_forward(wide), border.pays_backward(wide)) == (False, True)


def test_training_again_takes_the_layer_out() -> None:
    layer = layer_of(4, 4)
    border.surround(layer, 2)
    layer.requires_grad_(True)
    assert border.bordered(layer) is None


def test_a_border_is_made_only_where_it_was_measured_or_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, x = LoRALinear(layer_of(8, 12, torch.float32), LoRAConfig(r=2)), torch.randn(3, 8)
    asked: list[dict[str, int]] = []

    def takes(op: str, x: Tensor, kernels: bool | None = None, **sizes: int) -> bool:
        asked.append(sizes)
        return op == "border"

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    adapter(x)
    monkeypatch.setattr(lora_linear, "takes_kernel", takes)
    adapter(x)
    assert not border.lined(adapter.base)  # nobody has said that no other layer has this weight
    border.allow(adapter)
    with monkeypatch.context() as plain:
        plain.setattr(lora_linear, "takes_kernel", lambda *args, **sizes: False)
        adapter(x)
        assert not border.lined(adapter.base)
    adapter(x)
    assert border.bordered(adapter.base) is not None
    assert asked == [{"rows": 3, "width": 8, "tall": 12, "r": 2}]


def test_a_sharded_weight_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP2 puts whole weights in the place of shards while it computes: these are no weights of the layer's own."""
    monkeypatch.setattr(lora_linear, "takes_kernel", lambda op, *args, **sizes: op == "border")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    adapter, x = LoRALinear(layer_of(8, 12, torch.float32), LoRAConfig(r=2)), torch.randn(3, 8)
    nn.init.normal_(adapter.lora_b["default"])
    border.allow(adapter)
    wanted = torch.autograd.grad(adapter(x).sum(), list(adapter.lora_a.values()))
    assert border.bordered(adapter.base) is not None
    border.undo(adapter)  # sharding wants weights with memory of their own
    border.allow(adapter)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(adapter, mesh=init_device_mesh("cpu", (1,)))
        adapter(x).sum().backward()
        assert not border.lined(adapter.base)
        gradient: Any = adapter.lora_a["default"].grad
        agree(gradient.full_tensor(), wanted[0], 1e-5)
    finally:
        dist.destroy_process_group()
