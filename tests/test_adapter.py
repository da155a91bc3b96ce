"""Adapters by name: placing, choosing per call, gradient checkpointing, compiling, stepping aside."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lit_peft import BitFitConfig, LoRAConfig, activate, adapters, add_adapter, disabled, place
from lit_peft.adapter import Adapter, adapter_names, merge, named_adapters, remember
from lit_peft.methods.bitfit import BitFitBias
from lit_peft.methods.lora import LoRALinear
from lit_peft.selection import capturing, keep_selection
from tests.models import tiny


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def lora(model: nn.Module, *paths: str) -> nn.Module:
    place(model, list(paths), lambda base: LoRALinear(base, LoRAConfig(r=2)))
    return shaken(model)


def shaken(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, adapter in named_adapters(model):
            for _, parameter in adapter.own_parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


X = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))


def test_places_on_a_plain_module_and_equals_the_formula() -> None:
    model = lora(small(), "0", "2")
    first = model[0]
    delta = 16 / 2 * first.lora_b["default"] @ first.lora_a["default"]
    expected = X @ (first.base.weight + delta).T + first.base.bias
    torch.testing.assert_close(first(X), expected)
    torch.testing.assert_close(first(X[0]), expected[0])  # a single vector works too
    assert first(X[:0]).shape == (0, 8)


def test_unknown_path_and_no_match_are_errors() -> None:
    with pytest.raises(ValueError, match="No module at 'nope' in Sequential"):
        lora(small(), "nope")
    with pytest.raises(ValueError, match="no module matched"):
        place(small(), lambda path, module: False, lambda base: LoRALinear(base, LoRAConfig()))


def test_a_module_at_two_paths_gets_one_adapter() -> None:
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": shared})
    lora(model, "a", "b")
    assert model["a"] is model["b"]
    merge(model)
    assert model["a"] is model["b"] is shared


def test_names_act_alone_together_and_not_at_all() -> None:
    model = lora(small(), "0")
    add_adapter(model, "two", LoRAConfig(r=3, alpha=6))
    shaken(model)
    base = small()(X)
    assert adapter_names(model) == ["default", "two"]
    outputs = {}
    for names in ((), ("default",), ("two",), ("default", "two")):
        with adapters(model, *names):
            outputs[names] = model[0](X)
    assert torch.equal(outputs[()], small()[0](X))
    together = outputs["default",] + outputs["two",] - outputs[()]
    torch.testing.assert_close(outputs["default", "two"], together)
    assert torch.equal(model[0](X), outputs["default",])
    activate(model, "two")
    assert torch.equal(model[0](X), outputs["two",])
    with disabled(model), disabled(model):
        assert torch.equal(model(X), base)
    with pytest.raises(ValueError, match=r"No adapter is named 'three'. This model has \['default', 'two'\]"):
        adapters(model, "three")
    with pytest.raises(ValueError, match="already has an adapter named 'two'"):
        add_adapter(model, "two")
    with pytest.raises(ValueError, match="takes a BitFitConfig"):
        add_adapter(model, "new", BitFitConfig())


def test_choosing_for_one_model_leaves_another_alone() -> None:
    one, other = lora(small(), "0"), lora(small(), "0")
    expected = other(X)
    with disabled(one):
        assert torch.equal(one(X), small()(X))
        assert torch.equal(other(X), expected)
    twin = copy.deepcopy(one)
    with disabled(one):
        assert torch.equal(twin(X), expected)


def test_stacked_adapters_add_up_and_merge() -> None:
    model = small()
    place(model, ["0"], lambda base: BitFitBias(base, BitFitConfig()))
    lora(model, "0")
    assert isinstance(model[0].base, BitFitBias)
    assert model[0].in_features == 4, "what the adapter lacks is looked up on its base"
    expected = model(X)
    merged = merge(copy.deepcopy(model))
    assert not any(isinstance(module, Adapter) for module in merged.modules())
    torch.testing.assert_close(merged(X), expected)


class Checkpointed(nn.Module):
    """Two linear layers, each recomputed in the backward pass."""

    def __init__(self, run: Any) -> None:
        super().__init__()
        self.layers = small()
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.run(layer, x, use_reentrant=False)
        return x


def plainly(function: Any, *args: Any, **kwargs: Any) -> Any:
    return function(*args)


def two_names(model: Any) -> dict[str, Tensor]:
    """One backward pass through two forward passes under different adapters."""
    lora(model, "layers.0", "layers.2")
    add_adapter(model, "value")
    shaken(model)
    with adapters(model, "default"):
        policy = model(X).square().mean()
    with adapters(model, "value"):
        value = model(X).sin().sum()
    (policy + value).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if "lora" in n and p.grad is not None}


def test_replay_uses_the_adapters_of_the_call() -> None:
    expected = two_names(Checkpointed(plainly))
    found = two_names(Checkpointed(capturing(checkpoint)))
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


def test_without_the_capture_the_gradients_go_wrong() -> None:
    """The hazard is real: the same with a plain checkpoint gives other gradients, and no error."""
    expected = two_names(Checkpointed(plainly))
    found = two_names(Checkpointed(checkpoint))
    assert any(n not in found or not torch.allclose(found[n], g, rtol=1e-2) for n, g in expected.items())


def test_transformers_checkpointing_is_captured() -> None:
    grads = []
    for checkpointing in (False, True):
        model: Any = tiny("llama")
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
            model.train()
        lora(model, "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj")
        keep_selection(model)
        add_adapter(model, "value")
        shaken(model)
        ids = torch.arange(10, 22)[None]
        with adapters(model, "default"):
            policy = model(input_ids=ids, use_cache=False).logits.square().mean()
        with adapters(model, "value"):
            value = model(input_ids=ids, use_cache=False).logits.sin().sum()
        (policy + value).backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if "lora" in n and p.grad is not None})
    assert len(grads[0]) == 8
    for name, gradient in grads[0].items():
        torch.testing.assert_close(grads[1][name], gradient, msg=name)


def test_compiles_in_one_graph_and_follows_the_choice() -> None:
    model = lora(small(), "0", "2")
    place(model, ["2"], lambda base: BitFitBias(base, BitFitConfig()))
    shaken(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), model(X))
    with disabled(model):
        assert torch.equal(compiled(X), small()(X))
    torch.testing.assert_close(compiled(X), model(X))
    torch._dynamo.reset()


def test_weights_trained_in_place_are_given_back_for_a_moment() -> None:
    model = small()
    remember(model, model.named_parameters())
    with torch.no_grad():
        model[0].weight.add_(1.0)
    tuned = model(X)
    with disabled(model):
        output = model(X)
        with disabled(model):
            assert torch.equal(model(X), small()(X))
        assert not output.requires_grad
    assert torch.equal(output, small()(X))
    assert torch.equal(model(X), tuned)


def test_half_precision_base_keeps_float32_adapters() -> None:
    model = lora(small().bfloat16(), "0")
    assert {p.dtype for n, p in model.named_parameters() if "lora" in n} == {torch.float32}
    output = model(X.bfloat16())
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert model[0].lora_b["default"].grad.dtype == torch.float32
