"""Prompt tuning: the embeddings of a text do what the text does. P-tuning: the prompt comes out of its network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lit_peft.methods.p_tuning import PTuningBackbone, PTuningConfig
from lit_peft.methods.prompt import PromptBackbone, PromptConfig
from lit_peft.named import adapters, add_adapter, disabled, routed
from lit_peft.zoo import compose
from tests.models import VOCAB, save_tiny
from tests.test_methods import shake


def placed(kind: str, folder: Path, method: str = "prompt", **settings: Any) -> Any:
    torch.manual_seed(0)
    settings = {"num_virtual_tokens": 3, **settings}
    module: Any = compose(method, "sft")(str(save_tiny(kind, folder)), prompt=settings)
    module.configure_model()
    return module.eval()


def host(module: Any) -> PromptBackbone:
    found: PromptBackbone = next(m for m in module.model.modules() if isinstance(m, PromptBackbone))
    return found


@pytest.mark.parametrize("after_bos", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@torch.no_grad()
def test_the_embeddings_of_a_text_are_the_text(kind: str, after_bos: bool, tmp_path: Path) -> None:
    module = placed(kind, tmp_path / kind, after_bos=after_bos)
    generator = torch.Generator().manual_seed(1)
    text, ids = (
        torch.randint(8, VOCAB, (1, 3), generator=generator),
        torch.randint(8, VOCAB, (1, 9), generator=generator),
    )
    host(module).prompt_embedding["default"].copy_(host(module).embedding()(text)[0])
    at = int(after_bos)
    whole = torch.cat([ids[:, :at], text, ids[:, at:]], 1)
    with disabled(module):
        expected = module.model(input_ids=whole).logits
        said = module.model.generate(input_ids=whole, max_new_tokens=6, do_sample=False)[:, 12:]
    kept = [i for i in range(12) if not at <= i < at + 3]
    assert torch.allclose(module.model(input_ids=ids).logits, expected[:, kept], atol=1e-5)
    for use_cache in (True, False):
        out = module.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, use_cache=use_cache
        )
        assert torch.equal(out[:, 9:], said)


@torch.no_grad()
def test_an_encoder_reads_the_text(tmp_path: Path) -> None:
    module = placed("t5", tmp_path / "t5")
    generator = torch.Generator().manual_seed(1)
    text, ids = (
        torch.randint(8, VOCAB, (1, 3), generator=generator),
        torch.randint(8, VOCAB, (1, 9), generator=generator),
    )
    host(module).prompt_embedding["default"].copy_(host(module).embedding()(text)[0])
    decoder = torch.tensor([[0, 11, 12]])
    with disabled(module):
        expected = module.model(input_ids=torch.cat([text, ids], 1), decoder_input_ids=decoder).logits
    assert torch.allclose(module.model(input_ids=ids, decoder_input_ids=decoder).logits, expected, atol=1e-5)
    mask = torch.ones_like(ids)
    assert torch.allclose(
        module.model(input_ids=ids, attention_mask=mask, decoder_input_ids=decoder).logits, expected, atol=1e-5
    )


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
@torch.no_grad()
def test_sets_of_other_lengths_are_routed(kind: str, tmp_path: Path) -> None:
    module = placed(kind, tmp_path / kind)
    add_adapter(module.model, "long", PromptConfig(num_virtual_tokens=5, after_bos=False))
    shake(module)
    ids = torch.randint(8, VOCAB, (3, 9), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids[:, :4]} if kind == "t5" else {})
    with routed(module, ["default", "long", None]):
        mixed = module.model(**inputs).logits
    with adapters(module, "default"):
        assert torch.allclose(mixed[0], module.model(**inputs).logits[0], atol=1e-5)
    with adapters(module, "long"):
        assert torch.allclose(mixed[1], module.model(**inputs).logits[1], atol=1e-5)
    with disabled(module):
        assert torch.allclose(mixed[2], module.model(**inputs).logits[2], atol=1e-5)


@torch.no_grad()
def test_starts(tmp_path: Path) -> None:
    module = placed("llama", tmp_path / "a", init="text", init_text="hello world", num_virtual_tokens=40)
    table = host(module).embedding().weight
    ids = module.tokenizer("hello world", add_special_tokens=False)["input_ids"]
    rows = host(module).prompt_embedding["default"]
    assert torch.equal(rows[: len(ids)], table[ids])
    assert torch.equal(rows[len(ids)], table[ids[0]])
    module = placed("llama", tmp_path / "b", init="vocabulary")
    rows = host(module).prompt_embedding["default"]
    assert all(any(torch.equal(row, entry) for entry in table) for row in rows)
    module = placed("llama", tmp_path / "c", init="random")
    assert host(module).prompt_embedding["default"].abs().max() <= 0.5


@pytest.mark.parametrize("encoder", ["lstm", "mlp"])
@torch.no_grad()
def test_p_tunings_network(encoder: str, tmp_path: Path) -> None:
    module = placed("llama", tmp_path / "m", "p_tuning", encoder=encoder)
    backbone = host(module)
    assert isinstance(backbone, PTuningBackbone)
    parts: Any = backbone.prompt_encoder["default"]
    rows = backbone.prompt_embedding["default"].double()
    if encoder == "lstm":
        rows = by_hand(parts["lstm"], rows)
    one, _, two = parts["mlp"]
    inner = torch.clamp(rows @ one.weight.double().t() + one.bias.double(), min=0)
    expected = inner @ two.weight.double().t() + two.bias.double()
    assert torch.allclose(backbone.rows("default").double(), expected, atol=1e-5)


def by_hand(lstm: nn.LSTM, x: torch.Tensor) -> torch.Tensor:
    """Two layers in both directions, gate by gate (p, d) -> (p, d)."""
    width = lstm.hidden_size
    for layer in range(2):
        sides = []
        for end in ("", "_reverse"):
            wi, wh, bi, bh = (
                getattr(lstm, f"{kind}_l{layer}{end}").double()
                for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            )
            h = c = torch.zeros(width, dtype=torch.float64)
            out = []
            for row in x.flip(0) if end else x:
                i, f, g, o = (wi @ row + bi + wh @ h + bh).split(width)
                c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
                h = torch.sigmoid(o) * torch.tanh(c)
                out.append(h)
            sides.append(torch.stack(out[::-1] if end else out))
        x = torch.cat(sides, 1)
    return x


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (PromptConfig, {"num_virtual_tokens": 0}, "1 or more"),
        (PromptConfig, {"init": "text"}, "needs both"),
        (PromptConfig, {"init_text": "hello"}, "needs both"),
        (PTuningConfig, {"encoder_dropout": 1.0}, "below 1"),
    ],
)
def test_bad_settings(kind: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**settings)
