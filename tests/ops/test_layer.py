"""Decoder layers as two functions around their attention: values, gradients, and when they are the model's own."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, apply_rotary_pos_emb

from lit_peft import LoRAConfig, place
from lit_peft.low_rank.linear import LoRALinear
from lit_peft.ops import lean_blocks, lean_layer
from lit_peft.ops.lean import make_lean, make_plain
from tests.ops.exact import TOLERANCE, agree
from tests.ops.test_packed import IDS, adapted, results, same, tiny

KINDS = ["llama", "mistral", "qwen2", "qwen3"]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lists the layers that are computed by the functions, and not by the model's own code."""
    found: list[str] = []
    own = lean_layer.leave

    def leave(*args: Any) -> Tensor:
        found.append("layer")
        return own(*args)

    monkeypatch.setattr(lean_layer, "leave", leave)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_models_give_the_same(kind: str, calls: list[str]) -> None:
    model = adapted(tiny(kind))
    wanted = results(model)
    make_lean(model)
    same(results(model), wanted)
    assert len(calls) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("r", [1, 7, 8, 16, 64])
def test_against_float64(r: int, dtype: torch.dtype, calls: list[str]) -> None:
    exact = adapted(tiny(num_hidden_layers=1), LoRAConfig(r=r, alpha=1))
    for name, parameter in exact.named_parameters():  # as near to what is rounded as can be
        parameter.data = (
            parameter.data.to(dtype).double() if "lora" not in name else parameter.data.mul_(0.1).float().double()
        )
    model = copy.deepcopy(exact).to(dtype)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.data = parameter.data.float()
    make_lean(model)
    layer, turns = model.model.layers[0], model.model.rotary_emb(torch.zeros(1, dtype=dtype), torch.arange(5)[None])
    x = torch.randn(2, 5, 32, dtype=dtype).requires_grad_()
    y = layer(x, position_embeddings=turns)
    slope = torch.randn_like(y)
    got = torch.autograd.grad(y, [x, *(p for p in layer.parameters() if p.requires_grad)], slope)
    assert calls
    x_exact, layer = x.detach().double().requires_grad_(), exact.model.layers[0]
    wanted = layer(x_exact, position_embeddings=tuple(part.double() for part in turns))
    agree(y, wanted, 2 * TOLERANCE[dtype])
    leaves = [x_exact, *(p for p in layer.parameters() if p.requires_grad)]
    for one, other in zip(got, torch.autograd.grad(wanted, leaves, slope.double()), strict=True):
        agree(one, other, 4 * TOLERANCE[dtype])


@pytest.mark.parametrize("without", ["none", "o_proj", "down_proj"])
def test_layers_that_are_wide_inside(without: str, calls: list[str]) -> None:
    """Of which one sum is computed again."""
    model = tiny(intermediate_size=128, attention_bias=True)
    adapted(model)
    for path, module in list(model.named_modules()):
        if isinstance(module, LoRALinear) and path.endswith(without):
            model.set_submodule(path, module.base)
    nn.init.normal_(model.model.layers[0].self_attn.o_proj.bias)
    wanted = results(model)
    make_lean(model)
    same(results(model), wanted, 5e-6)
    assert len(calls) == 2


@pytest.mark.parametrize("without", ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj", "self_attn", "mlp", "_proj"])
def test_layers_without_an_adapter(without: str, calls: list[str]) -> None:
    """Those of one kind, all of an attention or an MLP, or all of the second layer."""
    model = tiny(num_hidden_layers=3)
    where = [path for path, _ in model.named_modules() if path.endswith("_proj")]
    chosen = [path for path in where if (without not in path if without != "_proj" else ".1." not in path)]
    place(model, chosen, lambda base: LoRALinear(base, LoRAConfig(r=2)))
    for module in model.modules():
        if isinstance(module, LoRALinear):
            nn.init.normal_(module.double().lora_b["default"])
    wanted = results(model)
    make_lean(model)
    same(results(model), wanted, 5e-6)
    assert len(calls) == 3


def test_layers_with_biases(calls: list[str]) -> None:
    model = adapted(tiny(attention_bias=True, mlp_bias=True))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    wanted = results(model)
    make_lean(model)
    same(results(model), wanted)
    assert len(calls) == 2


def test_masks_and_kinds_of_attention(calls: list[str]) -> None:
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[0, 6:] = 0
    for attention in ("sdpa", "eager"):
        model = adapted(tiny())
        model.config._attn_implementation = attention
        wanted = results(model, attention_mask=mask)
        make_lean(model)
        same(results(model, attention_mask=mask), wanted)
    assert len(calls) == 4


def test_one_row_none_and_what_needs_no_gradient(calls: list[str]) -> None:
    model = adapted(tiny())
    embeddings = model.get_input_embeddings()
    for ids in (torch.ones(1, 1, dtype=torch.long), IDS):
        make_plain(model)
        x = embeddings(ids).requires_grad_()
        wanted = torch.autograd.grad(model(inputs_embeds=x).logits.sin().sum(), x)
        make_lean(model)
        calls.clear()
        same(list(torch.autograd.grad(model(inputs_embeds=x).logits.sin().sum(), x)), list(wanted))
        assert len(calls) == 2
    with torch.no_grad():
        model(input_ids=IDS)
    assert len(calls) == 2  # nothing is kept, so nothing is gained


def test_used_twice_and_back_twice(calls: list[str]) -> None:
    model = adapted(tiny())
    wanted = [2 * value for value in results(model)]
    make_lean(model)
    losses = [model(input_ids=IDS, labels=IDS, use_cache=False).loss for _ in range(2)]
    trained = [p for p in model.parameters() if p.requires_grad]
    for _ in range(2):
        got = torch.autograd.grad(sum(losses), trained, retain_graph=True)
        same([sum(losses), *got], wanted)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        sum(g.sum() for g in torch.autograd.grad(losses[0], trained, create_graph=True)).backward()
    with torch.no_grad():
        trained[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(losses[1], trained)
    assert len(calls) == 4


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool, calls: list[str]) -> None:
    model = adapted(tiny())
    wanted = results(model)
    make_lean(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    same([loss, *(p.grad for p in model.parameters() if p.requires_grad)], wanted)
    assert len(calls) == (2 if reentrant else 4)  # the first time, a reentrant one records nothing


def _hook(path: str) -> Callable[[Any], Any]:
    return lambda model: model.get_submodule(path).register_forward_hook(lambda module, args, out: None)


CHANGES: dict[str, tuple[Callable[[Any], Any], int]] = {
    "a hook on the MLP": (_hook("model.layers.0.mlp"), 1),
    "on the attention": (_hook("model.layers.0.self_attn"), 1),
    "on a norm": (_hook("model.layers.0.input_layernorm"), 1),
    "on an adapter": (_hook("model.layers.0.self_attn.o_proj"), 1),
    "on its base": (_hook("model.layers.0.mlp.up_proj.base"), 1),
    "on the activation": (_hook("model.layers.0.mlp.act_fn"), 1),
    "on the layer, which is called as ever": (_hook("model.layers.0"), 2),
    "a trained norm": (lambda model: model.model.layers[1].post_attention_layernorm.weight.requires_grad_(), 1),
    "a trained weight": (lambda model: model.model.layers[1].mlp.down_proj.base.weight.requires_grad_(), 1),
    "another activation": (lambda model: setattr(model.model.layers[1].mlp, "act_fn", nn.GELU()), 1),
    "made plain": (make_plain, 0),
}


@pytest.mark.parametrize("name", CHANGES)
def test_it_is_the_models_own_where_it_has_to_be(name: str, calls: list[str]) -> None:
    change, left = CHANGES[name]
    model = adapted(tiny())
    make_lean(model)
    change(model)
    got = results(model)
    assert len(calls) == left
    make_plain(model)
    assert not any(isinstance(module, lean_layer.LeanLayer) for module in model.modules())
    same(got, results(model))


def test_dropout_and_autocast_are_the_models_own(calls: list[str]) -> None:
    model = adapted(tiny(), LoRAConfig(r=2, dropout=0.5))
    make_lean(model)
    results(model)
    assert not calls
    results(model.eval())
    assert len(calls) == 2
    with torch.autocast("cpu", torch.bfloat16):
        results(model.float())
    assert len(calls) == 2


def test_names_copies_and_files(calls: list[str]) -> None:
    """A layer keeps its class's name, and what is copied or pickled is as lean."""
    model = adapted(tiny())
    wanted, kind = results(model), type(model.model.layers[0])
    names = list(model.state_dict())
    make_lean(model)
    layer = model.model.layers[0]
    assert isinstance(layer, kind)
    assert type(layer) is not kind
    assert (type(layer).__name__, type(layer).__module__) == (kind.__name__, kind.__module__)
    assert list(model.state_dict()) == names
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        calls.clear()
        same(results(other), wanted)
        assert len(calls) == 2
    make_plain(model)
    assert type(layer) is kind
    same(results(model), wanted)


def test_hidden_states_can_be_changed_in_place(calls: list[str]) -> None:
    model = adapted(tiny())

    def double(module: Any, args: Any, out: Tensor) -> Tensor:
        return out.mul_(2)

    model.model.layers[0].register_forward_hook(double)
    wanted = results(model)
    make_lean(model)
    same(results(model), wanted)
    assert calls


def test_attentions_are_recorded() -> None:
    """Transformers looks for the modules that it records by their class."""
    model = adapted(tiny())
    model.config._attn_implementation = "eager"
    wanted = model(input_ids=IDS, output_attentions=True, output_hidden_states=True)
    model = adapted(tiny())
    model.config._attn_implementation = "eager"
    make_lean(model)
    got = model(input_ids=IDS, output_attentions=True, output_hidden_states=True)
    assert len(got.attentions) == len(wanted.attentions) == 2
    assert len(got.hidden_states) == len(wanted.hidden_states) == 3
    same([*got.attentions, *got.hidden_states], [*wanted.attentions, *wanted.hidden_states])


def test_a_class_that_is_patched_later(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(tiny())
    make_lean(model)
    own = LlamaDecoderLayer.forward
    monkeypatch.setattr(LlamaDecoderLayer, "forward", lambda self, x, **kwargs: 2 * own(self, x, **kwargs))
    got = results(model)
    assert not calls
    make_plain(model)
    same(got, results(model))


def test_values_changed_in_place_by_an_attention(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def doubled(module: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, q, k, v.mul_(2), *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "doubled", doubled)
    model = adapted(tiny())
    model.config._attn_implementation = "doubled"
    wanted = results(model)
    make_lean(model)
    same(results(model), wanted)
    assert calls


def test_what_reaches_no_loss_gets_no_gradient(calls: list[str]) -> None:
    model = adapted(tiny(num_hidden_layers=1))
    make_lean(model)
    cache = model(input_ids=IDS, use_cache=True).past_key_values
    cache.layers[0].values.sum().backward()
    there = {name for name, p in model.named_parameters() if p.grad is not None}
    assert {name.split(".")[4] for name in there} == {"v_proj"}
    assert calls


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm, prune.identity])
def test_a_base_whose_weight_is_made_of_others(norm: Any, calls: list[str]) -> None:
    model = adapted(tiny())
    norm(model.model.layers[0].mlp.up_proj.base, "weight")
    for name, parameter in model.named_parameters():
        if "lora" not in name:
            parameter.requires_grad_(False)
    wanted = results(model)
    make_lean(model)
    same(results(model), wanted)
    assert len(calls) == 1


def test_another_function_called_silu(calls: list[str]) -> None:
    class SiLU(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    model = adapted(tiny())
    for layer in model.model.layers:
        layer.mlp.act_fn = SiLU()
    wanted = results(model)
    make_lean(model)
    same(results(model), wanted, 5e-6)
    assert not calls


class Attention(LlamaAttention):
    """Hands its input on to somebody else too."""

    def forward(self, hidden_states: Tensor, position_embeddings: Any = None, **kwargs: Any) -> Any:
        """As the model's own, but for a cache that sees the input."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q = self.q_proj(hidden_states).view(shape).transpose(1, 2)
        v = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        v = self.config.update(v, self.k_proj(hidden_states), hidden_states)
        out = q.transpose(1, 2).reshape(shape).contiguous()
        return self.o_proj(out), v


def test_a_projection_that_is_asked_for_more_answers_itself() -> None:
    """As Moshi's, which has one for every codebook."""
    model = adapted(tiny())
    make_lean(model)
    block, x = model.model.layers[0].self_attn, torch.ones(1, 1, 32, dtype=torch.float64)
    block.q_proj = Times()
    assert lean_blocks._Layer(lean_blocks._Shared(block), "q_proj")(x, 3).equal(3 * x)


class Times(nn.Module):
    """Takes more than its input."""

    def forward(self, x: Tensor, factor: int) -> Tensor:
        """Return the input times a factor."""
        return factor * x


def test_attentions_that_are_not_known() -> None:
    assert lean_layer._reads_three(LlamaAttention.forward.__code__)
    assert not lean_layer._reads_three(Attention.forward.__code__)


def _always(self: Any, q: Any, k: Any, cos: Any, sin: Any) -> Any:
    q, k = apply_rotary_pos_emb(q, k, cos, sin)
    return q, k


def _at_times(self: Any, q: Any, k: Any, cos: Any, sin: Any) -> Any:
    if self.sliding_window is not None:
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
    return q, k


def _elsewhere(self: Any, q: Any, k: Any, cos: Any, sin: Any) -> Any:
    q, k = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    return q, k


@pytest.mark.parametrize(("function", "once"), [(_always, True), (_at_times, False), (_elsewhere, False)])
def test_queries_that_are_not_always_turned(function: Any, once: bool) -> None:
    assert lean_layer._turns_once(function.__code__) is once
