"""Layers computed as one against the same layers one by one: values, gradients, and when they are left alone."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lit_peft import LoRAConfig, adapters, disabled, place, prefixed, routed
from lit_peft.adapter import merge
from lit_peft.low_rank.linear import LoRALinear
from lit_peft.ops import lean_blocks, parts
from lit_peft.ops.gated import gated_linear
from lit_peft.ops.gated import reference as gated_reference
from lit_peft.ops.lean import make_lean, make_plain
from lit_peft.ops.packed import Parts, packed_linear, reference
from lit_peft.ops.recipes import recipe_of
from tests.ops.exact import TOLERANCE, agree, drawn

IDS = torch.arange(20).view(2, 10)


@pytest.fixture
def packing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Computes layers as one wherever they can be, with plain operations."""
    monkeypatch.setattr(lean_blocks, "pays", lambda op, x, width: True)


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch, packing: None) -> list[str]:
    """Lists the calls that were computed as one."""
    found: list[str] = []
    for name in ("packed_linear", "gated_linear"):
        own = getattr(lean_blocks, name)

        def watched(*args: Any, own: Any = own, name: str = name, **kwargs: Any) -> Any:
            found.append(name)
            return own(*args, **kwargs)

        monkeypatch.setattr(lean_blocks, name, watched)
    return found


def tiny(kind: str = "llama", **settings: Any) -> Any:
    """Returns a model with an adapter on every linear layer of its blocks, in float64."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 64}
    shape |= {"num_key_value_heads": 2, "num_hidden_layers": 2, "head_dim": 8} | settings
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape)).double().requires_grad_(False)
    return model.train()


def adapted(model: Any, config: LoRAConfig | None = None, where: str = "_proj") -> Any:
    place(model, lambda path, _: path.endswith(where), lambda base: LoRALinear(base, config or LoRAConfig(r=2)))
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.double()
            nn.init.normal_(module.lora_b["default"])
    return model


def results(model: Any, **inputs: Any) -> list[Tensor]:
    loss = model(input_ids=IDS, labels=IDS, use_cache=False, **inputs).loss
    return [loss, *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])]


def same(got: list[Tensor], wanted: list[Tensor], tolerance: float = 1e-6) -> None:
    for one, other in zip(got, wanted, strict=True):
        agree(one, other, tolerance)  # the models' own norms work in float32


def pair(tall: int, wide: int, r: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, float]:
    return drawn(r, wide, dtype=dtype, seed=seed), drawn(tall, r, dtype=dtype, seed=seed + 1), 0.5 * seed


def exact(parts: Parts) -> Parts:
    pairs = tuple(
        None if pair is None else (*(part.detach().double().requires_grad_() for part in pair[:2]), pair[2])
        for pair in parts.pairs
    )
    return Parts(parts.weight.double(), None if parts.bias is None else parts.bias.double(), parts.sizes, pairs)


def leaves(x: Tensor, parts: Parts) -> list[Tensor]:
    return [x, *(part for pair in parts.pairs if pair is not None for part in pair[:2])]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("ranks", [(1, 7, 8), (16, None, 64), (None, None, None), (None, 3, None)], ids=str)
@pytest.mark.parametrize("shape", [(2, 5), (1,), (0, 4)], ids=str)
def test_three_layers(shape: tuple[int, ...], ranks: tuple[int | None, ...], dtype: torch.dtype) -> None:
    sizes = (11, 5, 3)
    pairs = tuple(None if r is None else pair(size, 7, r, dtype, r) for size, r in zip(sizes, ranks, strict=True))
    for apart, bias in ((False, None), (True, drawn(19, dtype=dtype, seed=8).detach())):
        x = drawn(*shape, 7, dtype=dtype, seed=9)
        parts = Parts(drawn(19, 7, dtype=dtype, seed=10).detach(), bias, sizes, pairs)
        x_exact, parts_exact = x.detach().double().requires_grad_(), exact(parts)
        got, wanted = packed_linear(x, parts, apart=apart), reference(x_exact, parts_exact)
        slopes = [torch.randn_like(y) for y in wanted]
        same(list(got), list(wanted), TOLERANCE[dtype])
        same(
            list(torch.autograd.grad(got, leaves(x, parts), [slope.to(dtype) for slope in slopes])),
            list(torch.autograd.grad(wanted, leaves(x_exact, parts_exact), slopes)),
            TOLERANCE[dtype],
        )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("ranks", [(2, 7), (None, 3), (None, None)], ids=str)
def test_gate_and_up(ranks: tuple[int | None, ...], dtype: torch.dtype) -> None:
    pairs = tuple(None if r is None else pair(9, 6, r, dtype, r) for r in ranks)
    # uneven memory, and two uses of one input
    x = drawn(4, 3, 6, dtype=dtype, seed=9).detach().transpose(0, 1).requires_grad_()
    parts = Parts(drawn(18, 6, dtype=dtype, seed=10).detach(), None, (9, 9), pairs)
    x_exact, parts_exact = x.detach().double().requires_grad_(), exact(parts)
    got = gated_linear(x, parts, kernels=False) + 2 * gated_linear(x, parts, kernels=False)
    wanted = 3 * gated_reference(x_exact, parts_exact)
    slope = torch.randn_like(wanted)
    agree(got, wanted, TOLERANCE[dtype])
    same(
        list(torch.autograd.grad(got, leaves(x, parts), slope.to(dtype))),
        list(torch.autograd.grad(wanted, leaves(x_exact, parts_exact), slope)),
        2 * TOLERANCE[dtype],
    )
    product = gated_linear(x, parts, kernels=False)
    recipe = recipe_of(product)
    assert recipe.make(*recipe.parts).view(product.shape).equal(product)


def test_only_what_is_asked_for_is_kept() -> None:
    """A frozen layer's input is not kept; with trained B alone, H is, and x is not."""
    first, second = pair(4, 6, 2, torch.float64, 1), pair(3, 6, 2, torch.float64, 3)
    first[0].requires_grad_(False), second[0].requires_grad_(False)
    parts = Parts(torch.ones(7, 6, dtype=torch.float64), None, (4, 3), (first, second))
    x, found = torch.randn(50, 6, dtype=torch.float64), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: found.append(tensor) or tensor, lambda tensor: tensor):
        outs = packed_linear(x, parts)
    assert sum(tensor.numel() for tensor in found if tensor is not None) == 4 * 50 + 2 * 4 + 2 * 3
    torch.autograd.grad(outs[0].sum(), first[1])


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "gemma2"])
def test_models_give_the_same(kind: str, used: list[str]) -> None:
    plain, packed = adapted(tiny(kind)), adapted(tiny(kind))
    wanted = results(plain)
    make_lean(packed)
    same(results(packed), wanted)
    assert used.count("packed_linear") == 2
    assert used.count("gated_linear") == (0 if kind == "gemma2" else 2)  # which has another activation
    mask = torch.ones_like(IDS)
    mask[0, -3:] = 0
    same(results(packed, attention_mask=mask), results(plain, attention_mask=mask))


@pytest.mark.parametrize("where", ["q_proj", "v_proj", "gate_proj", "down_proj"])
def test_layers_without_an_adapter_are_taken_along(where: str, used: list[str]) -> None:
    plain, packed = adapted(tiny(), where=where), adapted(tiny(), where=where)
    make_lean(packed)
    same(results(packed), results(plain))
    assert len(used) == 4


def test_it_falls_back(used: list[str]) -> None:
    """To calling the layers, whatever one of them does beyond a low-rank update."""

    def hooked(model: Any) -> None:
        for layer in model.model.layers:
            layer.self_attn.k_proj.register_forward_hook(lambda module, args, out: out * 2)
            layer.mlp.up_proj.base.register_forward_hook(lambda module, args, out: out * 2)

    def trained(model: Any) -> None:
        for layer in model.model.layers:
            layer.self_attn.v_proj.base.weight.requires_grad_()
            layer.mlp.gate_proj.base.weight.requires_grad_()

    def twice(model: Any) -> None:
        for name in ("q_proj", "gate_proj"):
            place(model, lambda path, _, name=name: path.endswith(name), lambda base: LoRALinear(base, LoRAConfig(r=2)))
        model.double()

    def biased(model: Any) -> None:
        for layer in model.model.layers:
            for base in (layer.self_attn.q_proj.base, layer.mlp.up_proj.base):
                base.bias = nn.Parameter(torch.ones(len(base.weight), dtype=torch.float64), requires_grad=False)

    for change in (hooked, trained, twice, biased):
        plain, packed = adapted(tiny()), adapted(tiny())
        for model in (plain, packed):
            torch.manual_seed(1)
            change(model)
        make_lean(packed)
        same(results(packed), results(plain))
        assert not used, change


def test_dropout_acts_in_training_only(used: list[str]) -> None:
    model = adapted(tiny(), LoRAConfig(r=2, dropout=0.5))
    make_lean(model)
    results(model)
    assert not used
    results(model.eval())
    assert len(used) == 4


def test_what_acts_is_asked_in_every_call(used: list[str]) -> None:
    plain, packed = adapted(tiny()), adapted(tiny())
    for model in (plain, packed):
        torch.manual_seed(1)
        for module in model.modules():
            if isinstance(module, LoRALinear):
                module.add("other", LoRAConfig(r=3))
                nn.init.normal_(module.double().lora_b["other"])
    make_lean(packed)
    found = []
    for model in (plain, packed):
        logits = []
        with adapters(model, "other"):
            logits.append(model(input_ids=IDS).logits)
        used.clear()
        with disabled(model):
            logits.append(model(input_ids=IDS).logits)
        with adapters(model, "default", "other"):
            logits.append(model(input_ids=IDS).logits)
        with routed(model, ["other", None]):
            logits.append(model(input_ids=IDS).logits)
        assert not used
        found.append(logits)
    same(found[1], found[0])


def test_checkpointing_and_accumulation_give_the_same(used: list[str]) -> None:
    wanted = results(adapted(tiny()))
    model = adapted(tiny())
    make_lean(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    same(results(model), wanted)
    assert len(used) == 8
    model.gradient_checkpointing_disable()
    losses = [model(input_ids=IDS, labels=IDS).loss for _ in range(2)]
    (losses[0] + losses[1]).backward()
    same([p.grad for p in model.parameters() if p.requires_grad], [2 * g for g in wanted[1:]])


def test_names_files_and_copies_stay_right(tmp_path: Path, used: list[str]) -> None:
    """The layers' weights are slices of one tensor once they were computed as one."""
    model, untouched = adapted(tiny()), adapted(tiny())
    names = {name: id(parameter) for name, parameter in model.named_parameters()}
    make_lean(model)
    wanted = results(model)
    attention = model.model.layers[0].self_attn
    weights = [layer.base.weight for layer in (attention.q_proj, attention.k_proj, attention.v_proj)]
    assert len({weight.untyped_storage().data_ptr() for weight in weights}) == 1
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == names
    for key, value in untouched.state_dict().items():
        assert value.equal(model.state_dict()[key])
    save_file(model.state_dict(), tmp_path / "all.safetensors")
    for key, value in load_file(tmp_path / "all.safetensors").items():
        assert value.equal(untouched.state_dict()[key])
    torch.save(weights[0].detach(), tmp_path / "one.pt")
    assert torch.load(tmp_path / "one.pt").equal(weights[0])
    again = copy.deepcopy(model)
    same(results(again), wanted, 1e-12)
    nn.init.zeros_(again.model.layers[0].self_attn.q_proj.base.weight)
    same(results(model), wanted, 1e-12)
    used.clear()
    same(results(model.float().double()), wanted, 1e-5)  # moved: apart again, and then together again
    assert len(used) == 4
    torch.save(model, tmp_path / "model.pt")
    same(results(torch.load(tmp_path / "model.pt", weights_only=False)), results(model), 1e-12)


def test_a_merged_model_is_saved_and_loaded(tmp_path: Path, used: list[str]) -> None:
    model, untouched = adapted(tiny()), adapted(tiny())
    make_lean(model)
    results(model)
    assert used
    for one in (model, untouched):
        merge(one)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    for key, value in untouched.state_dict().items():
        assert value.equal(again.state_dict()[key])


def test_the_plain_modules_come_back(used: list[str]) -> None:
    model = adapted(tiny())
    own = dict(model.named_modules())
    wanted = results(model)
    make_lean(model)
    results(model)
    make_plain(model)
    assert dict(model.named_modules()) == own
    used.clear()
    same(results(model), wanted, 1e-12)
    assert not used


def in_a_buffer(layer: nn.Linear) -> None:
    layer.weight.data = torch.cat([layer.weight, layer.weight])[: len(layer.weight)]


def exchanged(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)


@pytest.mark.parametrize("change", [in_a_buffer, exchanged])
def test_weights_that_others_look_after_are_not_moved(change: Callable[[nn.Linear], None], used: list[str]) -> None:
    """FSDP keeps them in flat buffers, or puts gathered ones in their place while a layer runs."""
    model = adapted(tiny())
    wanted = results(model)
    make_lean(model)
    for layer in model.model.layers:
        for child in (layer.self_attn.q_proj, layer.mlp.up_proj):
            change(child.base)
    same(results(model), wanted)
    assert not used


def test_generation_with_a_cache_is_the_models_own(used: list[str]) -> None:
    plain, packed = adapted(tiny()).eval(), adapted(tiny()).eval()
    make_lean(packed)
    found = [model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0) for model in (plain, packed)]
    assert found[0].equal(found[1])
    assert not used


@pytest.mark.parametrize("record", [True, False])
def test_attention_functions_see_the_models_own_module(record: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prefix finds its number in the module's __dict__, and by its class where the module is from."""
    model = adapted(tiny())
    seen: list[Any] = []

    def noted(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        seen.append((type(module), module.__dict__.get("number"), module.training, module.q_proj.weight.shape))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "noted", noted)
    model.config._attn_implementation = "noted"
    kind = type(model.model.layers[0].self_attn)
    model.model.layers[0].self_attn.__dict__["number"] = 0
    make_lean(model)
    model.model.layers[1].self_attn.__dict__["number"] = 1
    with torch.set_grad_enabled(record):
        model(input_ids=IDS, use_cache=False)
    assert seen == [(kind, number, True, (32, 32)) for number in (0, 1)]
    model.config._attn_implementation = "sdpa"
    prefixed.prepare(model, [layer.self_attn for layer in model.model.layers])
    assert model.model.layers[1].self_attn.__dict__[prefixed.INDEX] == 1


def test_sharded_weights_are_left_to_their_sharding(used: list[str], tmp_path: Path) -> None:
    """FSDP2 puts gathered parameters in place of those that `make_lean` saw while a layer runs."""
    from torch.distributed.fsdp import fully_shard

    model = adapted(tiny())
    wanted = results(model)
    make_lean(model)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        same([loss, *(p.grad.full_tensor() for p in trained)], wanted)
    finally:
        torch.distributed.destroy_process_group()
    assert not used


def test_it_is_on_where_it_was_measured_to_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(2, 3, 4)
    monkeypatch.delenv("LIT_PEFT_KERNELS", raising=False)
    assert not parts.pays("packed", x, 12)  # nowhere so far: on CPUs it gains nothing, on GPUs it was never measured
    monkeypatch.setattr(parts, "measured", lambda: {"cpu": {"packed": {"rows": 6, "width": 12}}})
    assert parts.pays("packed", x, 12)
    assert not parts.pays("packed", x, 11)
    assert not parts.pays("packed", x[:1], 12)
    assert not parts.pays("gated", x, 12)
    monkeypatch.setenv("LIT_PEFT_KERNELS", "1")
    assert parts.pays("gated", x, 12)
