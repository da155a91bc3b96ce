"""Models attend to prefix and text apart: what they compute is what one softmax over both computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.bytes_held import Saved
from lit_peft import prefixed
from lit_peft.kernels import prefix
from lit_peft.named import adapters, routed
from lit_peft.zoo import compose
from tests.models import PAD, VOCAB, save_tiny
from tests.test_methods import gradients, same, shake

PREFIX = {"num_virtual_tokens": 3, "encoder_hidden_size": 8}
IDS = torch.randint(8, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))


class Merged:
    """Counts how often prefix and text were attended to apart."""

    number = 0


@pytest.fixture
def merged(monkeypatch: pytest.MonkeyPatch) -> type[Merged]:
    op = prefixed.prefix_attention

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        Merged.number += 1
        return op(*args, **kwargs)

    monkeypatch.setattr(prefixed, "prefix_attention", counted)
    Merged.number = 0
    return Merged


def built(method: str, kind: str, folder: Path, task: str = "sft", **settings: Any) -> Any:
    save_tiny(kind, folder, **({"task": "classification"} if task == "classification" else {}))
    labels = {"labels": ["a", "b", "c"]} if task == "classification" else {}
    torch.manual_seed(0)
    module: Any = compose(method, task)(str(folder), **{"prefix": PREFIX, **labels, **settings})
    module.configure_model()
    shake(module)
    return module


def texts(padding: str) -> dict[str, Tensor]:
    """Two texts of 9 and 6 tokens, or of 9 both, or rows in which two texts of 4 and 5 tokens are packed."""
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    if padding == "packed":
        positions = torch.cat([torch.arange(4), torch.arange(5)]).expand(2, -1)
        return {"input_ids": ids, "labels": ids, "position_ids": positions}
    if padding != "none":
        empty = slice(6, None) if padding == "right" else slice(0, 3)
        ids[1, empty], mask[1, empty] = PAD, 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def agree(module: Any, inputs: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, forced: str | None = None) -> None:
    """Compares the loss and every gradient with those of LIT_PEFT_KERNELS=0."""

    def both() -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            loss: Tensor = module.model(**inputs).loss
        return loss, gradients(module, inputs)

    if forced:
        monkeypatch.setenv("LIT_PEFT_KERNELS", forced)
    loss, found = both()
    monkeypatch.setenv("LIT_PEFT_KERNELS", "0")
    plain, wanted = both()
    monkeypatch.delenv("LIT_PEFT_KERNELS")
    assert torch.allclose(loss, plain, atol=1e-5)
    assert found.keys() == wanted.keys()
    assert any(float(gradient.abs().max()) > 1e-6 for gradient in wanted.values())
    for name, gradient in wanted.items():
        assert same(found[name], gradient), name


@pytest.mark.parametrize("padding", ["none", "left", "right", "packed"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "gemma"])
def test_decoders(
    kind: str, padding: str, tmp_path: Path, merged: type[Merged], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = built("prefix", kind, tmp_path / "m", attn_implementation="sdpa")
    agree(module, texts(padding), monkeypatch)
    assert merged.number == 4, "two layers, twice; not with LIT_PEFT_KERNELS=0"


@pytest.mark.parametrize("method", ["p_tuning_v2", "mam", "unipelt"])
def test_methods(method: str, tmp_path: Path, merged: type[Merged], monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"num_virtual_tokens": 3} if method == "p_tuning_v2" else {**PREFIX, "gate": False}
    narrow = {} if method == "p_tuning_v2" else {"bottleneck": {"bottleneck_size": 4}}
    module = built(method, "llama", tmp_path / "m", prefix=settings, attn_implementation="sdpa", **narrow)
    agree(module, texts("left"), monkeypatch)
    assert merged.number == 4


@pytest.mark.parametrize("gate", [False, 0.5, True])
def test_encoders_and_their_gates(
    gate: bool | float, tmp_path: Path, merged: type[Merged], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An encoder has one gate for a text, which scales keys and values before they are attended to."""
    module = built("prefix", "bert", tmp_path / "m", "classification", prefix={**PREFIX, "gate": gate})
    inputs = {**texts("right"), "labels": torch.tensor([0, 2])}

    agree(module, inputs, monkeypatch)
    assert merged.number == 4


def test_gates_of_each_token_are_computed_openly(tmp_path: Path, merged: type[Merged]) -> None:
    module = built("prefix", "llama", tmp_path / "m", prefix={**PREFIX, "gate": True}, attn_implementation="sdpa")
    module.model(input_ids=IDS)
    assert merged.number == 0


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_where_it_does_not_apply(kind: str, tmp_path: Path, merged: type[Merged]) -> None:
    """Eager attention, T5's relative positions, and rows of a batch with prefixes of their own."""
    module = built("prefix", kind, tmp_path / "m", attn_implementation="eager" if kind == "llama" else "sdpa")
    inputs = {"input_ids": IDS} | ({"decoder_input_ids": IDS} if kind == "t5" else {})
    module.model(**inputs)
    assert merged.number == 0
    if kind == "llama":
        module = built("prefix", kind, tmp_path / "s", attn_implementation="sdpa")
        with routed(module, ["default", None]):
            module.model(**inputs)
        assert merged.number == 0


@torch.no_grad()
def test_two_sets_at_once(tmp_path: Path, merged: type[Merged], monkeypatch: pytest.MonkeyPatch) -> None:
    module = built("prefix", "llama", tmp_path / "m", attn_implementation="sdpa").eval()
    module.add_adapter("b", prefix={"num_virtual_tokens": 2, "prefix_projection": False})
    with adapters(module, "default", "b"):
        mine = module.model(input_ids=IDS).logits
        assert merged.number == 2
        monkeypatch.setenv("LIT_PEFT_KERNELS", "0")
        assert same(mine, module.model(input_ids=IDS).logits)


@pytest.mark.parametrize("padding", ["none", "left"])
@torch.no_grad()
def test_generation(padding: str, tmp_path: Path, merged: type[Merged], monkeypatch: pytest.MonkeyPatch) -> None:
    """With a cache a text of several tokens meets one of other length, and then single tokens."""
    module = built("prefix", "llama", tmp_path / "m", attn_implementation="sdpa").eval()
    rows = texts(padding)
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "attention_mask": rows["attention_mask"]}
    module.model.generation_config.eos_token_id = None
    cached, again = (
        module.model.generate(input_ids=rows["input_ids"], use_cache=use, **settings) for use in (True, False)
    )
    assert torch.equal(cached, again)
    assert merged.number == 2 * 2 * 6
    halves = module.model(input_ids=IDS[:, :4], use_cache=True)
    late = module.model(input_ids=IDS[:, 4:], past_key_values=halves.past_key_values).logits
    assert same(late, module.model(input_ids=IDS).logits[:, 4:])
    monkeypatch.setenv("LIT_PEFT_KERNELS", "0")
    plain = module.model.generate(input_ids=rows["input_ids"], use_cache=True, **settings)
    assert torch.equal(cached, plain)


def test_checkpointed(tmp_path: Path, merged: type[Merged], monkeypatch: pytest.MonkeyPatch) -> None:
    module = built("prefix", "llama", tmp_path / "m", gradient_checkpointing=True, attn_implementation="sdpa")
    module.train()
    agree(module, texts("left"), monkeypatch)
    assert merged.number >= 4


@pytest.mark.parametrize("padding", ["none", "left"])
def test_kernels(padding: str, tmp_path: Path, merged: type[Merged], monkeypatch: pytest.MonkeyPatch) -> None:
    """In Triton's interpreter where there is no GPU."""
    launched, merge = [], prefix.merge
    monkeypatch.setattr(prefix, "merge", lambda *args: launched.append(merge(*args)))
    module = built("prefix", "llama", tmp_path / "m", attn_implementation="sdpa")
    agree(module, texts(padding), monkeypatch, forced="1")
    assert merged.number == len(launched) == 4


@pytest.mark.parametrize("padding", ["none", "right"])
def test_less_is_kept(padding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No scores or masks of a layer's own, and keys and values once for the heads that share them."""
    module = built("prefix", "llama", tmp_path / "m", attn_implementation="sdpa")

    def kept() -> int:
        saved = Saved(module.model.parameters())
        with saved.recorded():
            module.model(**texts(padding), use_cache=False)
        return saved.bytes

    apart = kept()
    monkeypatch.setenv("LIT_PEFT_KERNELS", "0")
    assert apart < kept()
