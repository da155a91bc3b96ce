"""Prefix tuning: a prefix made of a text's keys and values does what the text does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lit_peft.methods.prefix import PrefixBackbone, PrefixConfig
from lit_peft.named import adapters, add_adapter, disabled, routed
from lit_peft.zoo import compose
from tests.models import VOCAB, save_tiny
from tests.test_methods import shake


def placed(kind: str, folder: Path, p: int = 5, impl: str | None = None, **settings: Any) -> Any:
    torch.manual_seed(0)
    settings = {"num_virtual_tokens": p, "prefix_projection": False, **settings}
    module: Any = compose("prefix", "sft")(str(save_tiny(kind, folder)), prefix=settings, attn_implementation=impl)
    module.configure_model()
    return module.eval()


def host(module: Any) -> PrefixBackbone:
    found: PrefixBackbone = next(m for m in module.model.modules() if isinstance(m, PrefixBackbone))
    return found


@pytest.mark.parametrize("impl", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@torch.no_grad()
def test_the_keys_and_values_of_a_text_are_the_text(kind: str, impl: str, tmp_path: Path) -> None:
    module = placed(kind, tmp_path / kind, impl=impl)
    ids = torch.randint(8, VOCAB, (1, 17), generator=torch.Generator().manual_seed(1))
    with disabled(module):
        whole = module.model(input_ids=ids).logits
        cache = module.model(input_ids=ids[:, :5], use_cache=True).past_key_values
        said = module.model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)[:, 17:]
    parts = [t[0].transpose(0, 1).flatten(1) for layer in cache.layers for t in (layer.keys, layer.values)]
    host(module).prefix_table["default"].copy_(torch.cat(parts, 1))
    rest = ids[:, 5:]
    assert torch.allclose(module.model(input_ids=rest).logits, whole[:, 5:], atol=1e-5)
    for use_cache in (True, False):
        mask = torch.ones_like(rest)
        out = module.model.generate(
            input_ids=rest, attention_mask=mask, max_new_tokens=6, do_sample=False, use_cache=use_cache
        )
        assert torch.equal(out[:, 12:], said)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), rest], 1)
    mask = (torch.arange(15) >= 3).long()[None]
    left = module.model(input_ids=padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    assert torch.allclose(left[:, 3:], whole[:, 5:], atol=1e-5)
    right = module.model(
        input_ids=torch.cat([rest, padded[:, :3]], 1), attention_mask=torch.cat([mask[:, 3:], mask[:, :3]], 1)
    )
    assert torch.allclose(right.logits[:, :12], whole[:, 5:], atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "t5", "gpt2"])
@torch.no_grad()
def test_sets_of_other_lengths_are_routed(kind: str, tmp_path: Path) -> None:
    module = placed(kind, tmp_path / kind, p=3)
    add_adapter(module.model, "long", PrefixConfig(num_virtual_tokens=6, prefix_projection=False))
    ids = torch.randint(8, VOCAB, (3, 9), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids[:, :4]} if kind == "t5" else {})

    def logits() -> torch.Tensor:
        found: torch.Tensor = module.model(**inputs).logits
        return found

    with routed(module, ["default", "long", None]):
        mixed = logits()
    with adapters(module, "default"):
        assert torch.allclose(mixed[0], logits()[0], atol=1e-5)
    with adapters(module, "long"):
        assert torch.allclose(mixed[1], logits()[1], atol=1e-5)
    with disabled(module):
        assert torch.allclose(mixed[2], logits()[2], atol=1e-5)
    assert (mixed[0] - mixed[1]).abs().max() > 1e-3


@torch.no_grad()
def test_the_network_yields_the_rows(tmp_path: Path) -> None:
    module = placed("llama", tmp_path / "m", p=4, prefix_projection=True, encoder_hidden_size=8)
    a = host(module)
    e, w1, b1 = a.prefix_embedding["default"], a.prefix_hidden["default"], a.prefix_hidden_bias["default"]
    w2, b2 = a.prefix_output["default"], a.prefix_output_bias["default"]
    expected = torch.tanh(e.double() @ w1.double().t() + b1.double()) @ w2.double().t() + b2.double()
    assert torch.allclose(a.rows("default").double(), expected, atol=1e-5)


def test_a_model_that_ignores_the_prefix_is_refused(tmp_path: Path) -> None:
    module = placed("llama", tmp_path / "m")
    core = module.model.model.layers[1].self_attn
    forward = core.forward
    core.forward = lambda *args, attention_prefix=None, **kwargs: forward(*args, **kwargs)
    with pytest.raises(TypeError, match="does not pass keyword arguments down"):
        module.model(input_ids=torch.ones(1, 3, dtype=torch.long))


def test_another_attention_function_is_refused(tmp_path: Path) -> None:
    module: Any = compose("prefix", "sft")(str(save_tiny("llama", tmp_path / "m")))
    module.model = module.build_model()
    module.model.config._attn_implementation = "flex_attention"
    with pytest.raises(TypeError, match="sdpa or eager"):
        module.configure_model()


@pytest.mark.parametrize("value", [0.5, 1.0])
@torch.no_grad()
def test_a_fixed_gate_scales_keys_and_values(value: float, tmp_path: Path) -> None:
    plain = placed("llama", tmp_path / "a")
    gated = placed("llama", tmp_path / "b", gate=value)
    ids = torch.randint(8, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
    table = host(gated).prefix_table["default"]
    host(plain).prefix_table["default"].copy_(table * value)
    assert torch.allclose(plain.model(input_ids=ids).logits, gated.model(input_ids=ids).logits, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
@torch.no_grad()
def test_a_gate_at_zero_leaves_the_prefix_out(kind: str, tmp_path: Path) -> None:
    """Keys of zero would still take their share of the softmax, and the text would still begin at position p."""
    module = placed(kind, tmp_path / "m", gate=0.0)
    ids = torch.randint(8, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if kind == "t5" else {})
    found = module.model(**inputs).logits
    with disabled(module):
        assert torch.equal(found, module.model(**inputs).logits)


@torch.no_grad()
def test_learned_gates_with_and_without_cache(tmp_path: Path) -> None:
    module = placed("llama", tmp_path / "m", gate=True)
    shake(module)
    ids = torch.randint(8, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    cached, plain = (module.model.generate(input_ids=ids, use_cache=use, **settings) for use in (True, False))
    assert torch.equal(cached, plain)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"num_virtual_tokens": 0}, "1 or more"), ({"encoder_hidden_size": 0}, "1 or more"), ({"dropout": -1}, "below 1")],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrefixConfig(**settings)
