"""QLoRA's layer as one function against float64: values, every gradient, what it keeps, and where it stands aside."""

import copy
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from lit_peft import AdaLoRAConfig, LoRAConfig, make_lean, place
from lit_peft.low_rank.dora import DoRALinear
from lit_peft.low_rank.linear import LoRALinear
from lit_peft.low_rank.singular import AdaLoRALinear
from lit_peft.ops import low_rank
from lit_peft.ops.nf4 import parts
from lit_peft.ops.nf4_linear import takes_few
from lit_peft.ops.nf4_lora import joins_nf4, nf4_lora_linear
from lit_peft.ops.norm import rms_norm
from lit_peft.quantised.linear import NF4Linear
from lit_peft.quantised.model import quantise
from tests.models import tiny
from tests.ops.exact import TOLERANCE, agree, drawn
from tests.ops.test_low_rank import both
from tests.ops.test_memory import SHAPES as MODELS
from tests.ops.test_memory import TOKENS, Live
from tests.ops.test_nf4 import SIZES, weight_of


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_layer_with_an_update(
    size: tuple[int, int, int, int], dtype: torch.dtype, bias: bool, dropout: float, double: bool
) -> None:
    rows, wide, tall, r = size
    shapes = [(rows, wide), (r, wide), (tall, r), (r,)]
    inputs = [drawn(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]
    c = nn.Parameter(drawn(tall, dtype=dtype, seed=8).detach(), requires_grad=False) if bias else None
    layer = NF4Linear(drawn(tall, wide, dtype=torch.float32, seed=9).detach(), c, double_quant=double)
    weight = weight_of(layer)
    torch.manual_seed(0)
    kept = low_rank.dropped(torch.ones(rows, wide, dtype=dtype), dropout, low_rank.drawn(dropout)).double()

    def op(x: Tensor, a: Tensor, b: Tensor, diagonal: Tensor) -> Tensor:
        torch.manual_seed(0)
        return nf4_lora_linear(x, layer, a, b, 0.5, dropout=dropout, diagonal=diagonal)

    def plain(x: Tensor, a: Tensor, b: Tensor, diagonal: Tensor) -> Tensor:
        y = nn.functional.linear(x, weight, None if c is None else c.double())
        return low_rank.reference(y, x * kept, a, b, 0.5, diagonal)

    both(op, plain, inputs, TOLERANCE[dtype])


def qlora(tall: int = 12, wide: int = 64, **settings: Any) -> LoRALinear:
    layer = LoRALinear(NF4Linear(drawn(tall, wide, dtype=torch.float32, seed=0).detach(), **settings), LoRAConfig(r=2))
    nn.init.normal_(layer.lora_b["default"], generator=torch.Generator().manual_seed(1))
    return layer


def gradients(call: Callable[[Tensor], Tensor], layer: nn.Module, x: Tensor) -> list[Tensor]:
    return list(
        torch.autograd.grad(call(x).float().pow(2).sum(), [x, *(p for p in layer.parameters() if p.requires_grad)])
    )


def exactly(layer: LoRALinear) -> Callable[[Tensor], Tensor]:
    """Returns the same layer with plain operations in float64 on the decoded weight."""
    base: Any = layer.base
    pair = [part["default"] for part in (layer.lora_a, layer.lora_b)]

    def call(x: Tensor) -> Tensor:
        y = x.double() @ weight_of(base).t() + (0 if base.bias is None else base.bias.double())
        return y + layer.configs["default"].scale * (x.double() @ pair[0].double().t()) @ pair[1].double().t()

    return call


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    layer, x = qlora(), drawn(3, 64, dtype=torch.float32, seed=2)
    wanted = gradients(exactly(layer), layer, x)
    for found in (
        gradients(layer, layer, x),
        # the reentrant way leads through `backward` alone
        _backward(lambda x: checkpoint(layer, x, use_reentrant=reentrant), layer, x),
    ):
        for got, exact in zip(found, wanted, strict=True):
            agree(got, exact, 1e-5)


def _backward(call: Callable[[Tensor], Any], layer: nn.Module, x: Tensor) -> list[Tensor]:
    trained = [x, *(p for p in layer.parameters() if p.requires_grad)]
    call(x).pow(2).sum().backward()
    return [p.grad for p in trained if p.grad is not None]


def test_twice_in_one_graph_and_uneven_memory() -> None:
    layer = qlora(tall=64)
    x = drawn(4, 6, 64, dtype=torch.float32, seed=2).detach().transpose(0, 1).requires_grad_()
    exact = exactly(layer)
    wanted = gradients(lambda x: exact(exact(x) / 9), layer, x)
    for got, right in zip(gradients(lambda x: layer(layer(x) / 9), layer, x), wanted, strict=True):
        agree(got, right, 1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_autocast(dropout: float) -> None:
    """As Lightning's bf16-mixed: everything in float32, products in bfloat16, gradients in float32 again."""
    layer, x = qlora(), drawn(40, 64, dtype=torch.float32, seed=2)
    layer.configs["default"] = LoRAConfig(r=2, dropout=dropout)
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    found = gradients(lambda _: out, layer, x)
    assert {gradient.dtype for gradient in found} == {torch.float32}
    torch.manual_seed(3)
    kept = low_rank.dropped(torch.ones_like(x), dropout, low_rank.drawn(dropout)).detach()
    exact, scale = exactly(layer), layer.configs["default"].scale
    a, b = layer.lora_a["default"], layer.lora_b["default"]

    def call(x: Tensor) -> Tensor:
        return exact(x) + scale * ((x * (kept - 1)) @ a.t()) @ b.t()

    agree(out, call(x), 3e-2)
    for got, right in zip(found, gradients(call, layer, x), strict=True):
        agree(got, right, 3e-2)


def saved(call: Callable[[], Tensor], known: list[Tensor]) -> int:
    """Returns the bytes that autograd keeps beside some tensors; what is made of them is made outside."""
    kept: dict[int, Tensor] = {}
    mine = {tensor.untyped_storage().data_ptr() for tensor in known}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.detach()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        call()
    return sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in mine)


@pytest.mark.parametrize("autocast", [False, True])
def test_what_is_kept(autocast: bool) -> None:
    """H alone beside x, bytes and parameters: no W, and no A, B or x in another dtype."""
    rows, wide, tall = 32, 256, 192
    layer, x = qlora(tall, wide), drawn(rows, wide, dtype=torch.float32, seed=2)

    def call() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return layer(x)  # type: ignore[no-any-return]

    assert saved(call, [x, *layer.parameters()]) == (2 if autocast else 4) * 2 * rows


def test_what_is_made_of_something_kept_is_made_again() -> None:
    layer, h = qlora(12, 256), drawn(32, 256, dtype=torch.float32, seed=2)
    weight = torch.rand(256)
    kept = saved(lambda: layer(rms_norm(h, weight, 1e-6)), [h, weight, *layer.parameters()])
    assert kept == 4 * (32 + 2 * 32)  # rho and H; the normalised x is not among it
    exact = exactly(layer)
    found = gradients(lambda h: layer(rms_norm(h, weight, 1e-6)), layer, h)
    wanted = gradients(lambda h: exact(weight * h / (h.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()), layer, h)
    for got, right in zip(found, wanted, strict=True):
        agree(got, right, 1e-5)


def test_only_gradients_that_are_asked_for() -> None:
    layer, x = qlora(12, 256), drawn(32, 256, dtype=torch.float32, seed=2).detach()
    layer.lora_b.requires_grad_(False)
    known = [x, *(p for name, p in layer.named_parameters() if "packed" not in name)]
    assert saved(lambda: layer(x), known) == 0  # no bytes of the weight and no H either
    layer(x).sum().backward()
    assert layer.lora_a["default"].grad is not None
    assert layer.lora_b["default"].grad is None


def test_an_output_can_be_changed_in_place_and_nothing_is_differentiated_twice() -> None:
    layer, x = qlora(), drawn(2, 3, 64, dtype=torch.float32, seed=2)
    wanted = gradients(lambda x: exactly(layer)(x).clamp(-0.1, 0.1), layer, x)
    for got, right in zip(gradients(lambda x: layer(x).clamp_(-0.1, 0.1), layer, x), wanted, strict=True):
        agree(got, right, 1e-5)
    (first,) = torch.autograd.grad(layer(x).pow(2).sum(), [layer.lora_a["default"]], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_an_evaluation_changes_no_gradient() -> None:
    layer, x = qlora(64, 64), drawn(3, 64, dtype=torch.bfloat16, seed=2)
    before, stored = gradients(layer, layer, x), layer.base.packed.clone()  # type: ignore[operator, union-attr]
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            layer.eval()(x[:1])
            layer(x)
    layer.train()
    assert all(a.equal(b) for a, b in zip(gradients(layer, layer, x), before, strict=True))
    assert stored.equal(layer.base.packed)  # type: ignore[arg-type]
    assert not takes_few(x, (64, 64, True))


def test_joined_only_where_that_is_the_same() -> None:
    x = torch.randn(3, 64)

    class Louder(NF4Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    plain = qlora()
    joined = plain.joined("default", x)
    assert joined is not None
    agree(joined, plain.change("default", x, plain.base(x)), 1e-6)
    hooked, trained, between, other = qlora(), qlora(bias=nn.Parameter(torch.ones(12))), qlora(), qlora()
    seen: list[Tensor] = []
    hooked.base.register_forward_hook(lambda module, args, out: seen.append(out))
    between.base = copy.deepcopy(plain)
    other.base = Louder(torch.randn(12, 64))
    assert not any(joins_nf4(layer.base, x) for layer in (hooked, trained, between, other))
    hooked(x)
    assert len(seen) == 1
    assert trained.base.bias is not None
    agree(torch.autograd.grad(trained(x).sum(), trained.base.bias)[0], torch.full((12,), 3.0), 1e-6)  # type: ignore[arg-type]
    agree(other(x), other.change("default", x, other.base(x)), 1e-6)
    with torch.no_grad():
        assert not joins_nf4(plain.base, x)


def test_layers_that_fsdp_shards_again_after_each_pass() -> None:
    """The bytes are saved while they are whole, and are whole again when the backward pass comes to them."""
    from torch.distributed.fsdp import fully_shard

    plain, x = nn.Sequential(qlora(64, 64), qlora(64, 64)), drawn(3, 64, dtype=torch.float32, seed=2)
    wanted = gradients(plain, plain, x)[1:]
    model = copy.deepcopy(plain)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for layer in (*model, model):
            fully_shard(layer, reshard_after_forward=True)
        y = model(x)
        assert type(y.grad_fn).__name__ == "_JoinedBackward"
        y.pow(2).sum().backward()
        found: list[Any] = [p.grad for p in model.parameters() if p.grad is not None]
        for got, right in zip(found, wanted, strict=True):
            agree(got.full_tensor(), right, 1e-6)
    finally:
        dist.destroy_process_group()


def test_adalora_is_joined_too() -> None:
    layer = AdaLoRALinear(NF4Linear(torch.randn(12, 64)), AdaLoRAConfig(init_r=2, target_r=1))
    nn.init.normal_(layer.adalora_lambda["default"])
    x = drawn(3, 64, dtype=torch.float32, seed=0)
    joined = layer.joined("default", x)
    assert joined is not None
    agree(joined, layer.change("default", x, layer.base(x)), 1e-6)


def test_eight_billion_in_four_bits() -> None:
    """A decoder layer of true shapes keeps what LoRA keeps on plain weights: 23 bytes a token and width, and rank r."""

    def kept(layers: int) -> int:
        width, inner, heads, shared = MODELS["8B"]
        sizes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": 32}
        with torch.device("meta"):
            config = LlamaConfig(**sizes, num_attention_heads=heads, num_key_value_heads=shared)
            model: Any = LlamaForCausalLM(config).to(torch.bfloat16).requires_grad_(False)

        def packed(base: nn.Module) -> LoRALinear:
            shape = cast(nn.Linear, base).weight.shape
            empty = torch.empty(parts(*shape, True)[2].stop, dtype=torch.uint8, device="meta")
            return LoRALinear(NF4Linear.of(empty, shape, torch.bfloat16), LoRAConfig(r=16))

        place(model, lambda path, _: path.endswith("_proj"), packed)
        make_lean(model)
        with FakeTensorMode():
            for module in model.modules():
                for key, old in list(module._parameters.items()):
                    if old is not None:
                        new = torch.empty(old.shape, dtype=old.dtype)
                        module._parameters[key] = nn.Parameter(new, requires_grad=old.requires_grad)
            h = torch.empty(1, TOKENS, width, dtype=torch.bfloat16)
            turns = tuple(torch.empty(1, TOKENS, width // heads, dtype=torch.bfloat16) for _ in range(2))
            with Live([h, *turns, *model.parameters()]) as live:
                for layer in model.model.layers:
                    h = layer(h, position_embeddings=turns)
                    h = h[0] if isinstance(h, tuple) else h
                return live.bytes

    assert (kept(3) - kept(2)) / TOKENS / MODELS["8B"][0] <= 24


def test_weights_that_gpt2_stores_the_other_way_round() -> None:
    model = tiny("gpt2").float().requires_grad_(False)
    quantise(model)
    layer = LoRALinear(model.get_submodule("transformer.h.0.attn.c_attn"), LoRAConfig(r=2))
    nn.init.normal_(layer.lora_b["default"])
    assert layer.base.transposed
    x = drawn(3, 32, dtype=torch.float32, seed=2)
    assert layer.joined("default", x) is not None
    for got, right in zip(gradients(layer, layer, x), gradients(exactly(layer), layer, x), strict=True):
        agree(got, right, 1e-5)


def test_dora_turns_the_decoded_weight() -> None:
    """It is not joined: its layer is as on plain weights of the same numbers, in float64."""
    config = LoRAConfig(r=2, use_dora=True)
    layer = DoRALinear(NF4Linear(drawn(12, 64, dtype=torch.float32, seed=0).detach()), config)
    plain = DoRALinear(nn.Linear(64, 12, bias=False).requires_grad_(False).double(), config)
    with torch.no_grad():
        plain.base.weight.copy_(weight_of(layer.base))  # type: ignore[arg-type, operator, union-attr]
        plain.dora_square = None
        for (_, mine), (_, theirs) in zip(layer.own_parameters(), plain.own_parameters(), strict=True):
            theirs.copy_(mine.normal_(generator=torch.Generator().manual_seed(1)))
    x = drawn(3, 64, dtype=torch.float32, seed=2)
    assert layer.joined("default", x) is None
    exact = x.detach().double().requires_grad_()
    agree(layer(x), plain.double()(exact), 1e-5)
    for got, right in zip(gradients(layer, layer, x), gradients(plain, plain, exact), strict=True):
        agree(got, right, 1e-5)
