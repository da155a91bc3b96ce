"""Prefixes on models of every kind: encoders, encoder-decoders, learned positions, packed rows; and those without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from lit_peft.named import routed
from lit_peft.positions import own_positions, position_table, positions_of
from lit_peft.prefixed import GATE, INDEX, KEYWORD, Prefix, attend
from lit_peft.structure import walk
from lit_peft.zoo import compose
from tests.models import PAD, VOCAB, save_tiny, tiny
from tests.test_methods import gradients, outputs, same, shake
from tests.test_prefix import host, placed


def classifier(method: str, folder: Path, kind: str = "roberta", **config: Any) -> Any:
    save_tiny(kind, folder, task="classification", **config)
    torch.manual_seed(0)
    settings = {"num_virtual_tokens": 5} | ({"prefix_projection": False} if method == "prefix" else {"init": "random"})
    key = "prefix" if method == "prefix" else "prompt"
    module: Any = compose(method, "classification")(str(folder), labels=["a", "b", "c"], **{key: settings})
    module.configure_model()
    return module.eval()


def ragged(n: int = 9) -> dict[str, Tensor]:
    ids = torch.randint(8, VOCAB, (2, n), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[1, 6:], mask[1, 6:] = PAD, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("kind", ["roberta", "bert"])
@torch.no_grad()
def test_positions_of_encoders(kind: str, tmp_path: Path) -> None:
    """RoBERTa's first token has the position behind padding's; behind a prefix of 5 it has the sixth such one."""
    module = classifier("prefix", tmp_path / "m", kind)
    seen: list[Tensor] = []
    table = next(site.base for site in walk(module.model) if site.name.endswith("position_embeddings"))
    table.register_forward_pre_hook(lambda m, args: seen.append(args[0].clone()))
    module.model(**ragged())
    first = PAD + 1 if kind == "roberta" else 0
    assert torch.equal(seen[0][0], torch.arange(9) + 5 + first)
    assert torch.equal(seen[0][-1, :6], torch.arange(6) + 5 + first)


@torch.no_grad()
def test_padding_changes_nothing_for_roberta(tmp_path: Path) -> None:
    module = classifier("prefix", tmp_path / "m")
    rows = ragged()
    alone = module.model(input_ids=rows["input_ids"][1:, :6]).logits
    assert torch.allclose(module.model(**rows).logits[1:], alone, atol=1e-5)


@pytest.mark.parametrize("kind", ["roberta", "bert", "gpt2", "gpt_neox", "llama", "t5"])
@torch.no_grad()
def test_own_positions_are_the_models(kind: str) -> None:
    model: Any = tiny(kind, "base")
    table = position_table(model)
    assert (table is not None) == (kind in ("roberta", "bert", "gpt2"))
    assert positions_of(model, table) == {"roberta": 256 - PAD - 1, "t5": 0}.get(kind, 256)
    if kind == "t5":
        return
    rows = ragged()
    positions = own_positions(table, rows["input_ids"], 0)
    assert torch.equal(model(**rows)[0], model(**rows, position_ids=positions)[0])


def sized(kind: str, most: int) -> dict[str, int]:
    return {"n_positions" if kind == "gpt2" else "max_position_embeddings": most}


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("method", ["prefix", "p_tuning_v2"])
def test_more_prefix_than_positions(method: str, kind: str, tmp_path: Path) -> None:
    folder = save_tiny(kind, tmp_path / "m", **sized(kind, 16))
    for p in (16, 40):
        module: Any = compose(method, "sft")(str(folder), prefix={"num_virtual_tokens": p, "encoder_hidden_size": 8})
        with pytest.raises(ValueError, match=rf"num_virtual_tokens is {p}, and \w+ has 16 positions: none is left"):
            module.configure_model()
        assert "lit" not in module.model.config._attn_implementation


def test_a_text_too_long_for_the_positions_that_are_left(tmp_path: Path) -> None:
    folder = save_tiny("gpt2", tmp_path / "m", n_positions=16)
    module: Any = compose("p_tuning_v2", "sft")(str(folder), prefix={"num_virtual_tokens": 8})
    module.configure_model()
    ids = torch.full((1, 9), 9)
    module.model(input_ids=ids[:, :8])
    with pytest.raises(ValueError, match="text of 9 tokens behind a prefix of 8 is longer than the 16 positions"):
        module.model(input_ids=ids)


@pytest.mark.parametrize("method", ["prefix", "p_tuning_v2", "mam", "unipelt"])
def test_a_model_without_the_attention_interface(method: str, tmp_path: Path) -> None:
    config = AutoConfig.for_model("bloom", hidden_size=32, n_layer=2, n_head=4, vocab_size=VOCAB)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "m")
    module: Any = compose(method, "sft")(str(tmp_path / "m"))
    with pytest.raises(TypeError, match=r"attention interface, so prefixes cannot enter\. Use another method") as error:
        module.configure_model()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("method", ["prefix", "p_tuning_v2"])
@torch.no_grad()
def test_packed_rows_are_the_rows(method: str, tmp_path: Path) -> None:
    for kind in ("llama", "gpt2", "gpt_neox", "qwen2"):
        folder = save_tiny(kind, tmp_path / kind)
        for impl in ("sdpa", "eager"):
            prefix = {"num_virtual_tokens": 4, "encoder_hidden_size": 8}
            module: Any = compose(method, "sft")(str(folder), prefix=prefix, attn_implementation=impl)
            module.configure_model()
            shake(module)
            module.eval()
            lengths = [[5, 3, 4], [7, 5]]
            ids = torch.randint(8, VOCAB, (2, 12), generator=torch.Generator().manual_seed(2))
            positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
            packed = module.model(input_ids=ids, position_ids=positions, use_cache=False).logits
            for row, parts in enumerate(lengths):
                start = 0
                for n in parts:
                    alone = module.model(input_ids=ids[row : row + 1, start : start + n]).logits[0]
                    assert same(packed[row, start : start + n], alone), (kind, impl, row, start)
                    start += n


def test_gradients_of_packed_rows(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "m")
    prefix = {"num_virtual_tokens": 4, "encoder_hidden_size": 8}
    module: Any = compose("prefix", "sft")(str(folder), prefix=prefix, gradient_checkpointing=True)
    module.configure_model()
    shake(module)
    ids = torch.randint(8, VOCAB, (1, 12), generator=torch.Generator().manual_seed(2))
    labels = ids.clone()
    labels[:, [0, 5]] = -100
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    packed = gradients(module, {"input_ids": ids, "labels": labels, "position_ids": positions})
    rows = {key: value.new_zeros(2, 7) for key, value in (("input_ids", ids), ("attention_mask", ids))}
    rows["labels"] = torch.full((2, 7), -100)
    for row, (start, end) in enumerate(((0, 5), (5, 12))):
        rows["input_ids"][row, : end - start] = ids[0, start:end]
        rows["labels"][row, : end - start] = labels[0, start:end]
        rows["attention_mask"][row, : end - start] = 1
    apart = gradients(module, rows)
    for name, gradient in apart.items():
        assert same(packed[name], gradient), name


def seq2seq() -> dict[str, Tensor]:
    rows = ragged()
    labels = rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)
    return {**rows, "labels": labels}


@pytest.mark.parametrize("method", ["prefix", "p_tuning_v2"])
def test_every_row_of_seq2seq_gets_a_gradient(method: str, tmp_path: Path) -> None:
    """Those of the encoder, the decoder and what it reads of the encoder, keys and values, each of the p rows."""
    folder = save_tiny("t5", tmp_path / "t5")
    module: Any = compose(method, "sft")(str(folder), prefix={"num_virtual_tokens": 3, "prefix_projection": False})
    module.configure_model()
    module.model.train()
    found = {n: g for n, g in gradients(module, seq2seq()).items() if "prefix_table" in n}
    assert [gradient.shape for gradient in found.values()] == [(3, 2 * 2 * 32), (3, 2 * 4 * 32)]
    for gradient in found.values():
        parts = gradient.view(3, -1, 32).abs().amax(-1)  # row, K_1 V_1 K_2 V_2 ...
        assert bool((parts > 1e-6).all()), parts


@torch.no_grad()
def test_sdpa_is_eager(tmp_path: Path) -> None:
    for kind in ("t5", "llama", "gpt2", "gemma"):
        inputs: dict[str, Tensor] = ragged()
        if kind == "t5":
            inputs |= {"decoder_input_ids": inputs["input_ids"][:, :5]}
        one, two = (placed(kind, tmp_path / kind, impl=impl).model(**inputs).logits for impl in ("sdpa", "eager"))
        there = inputs["attention_mask"].bool() if kind != "t5" else torch.ones(2, 5, dtype=torch.bool)
        assert same(one[there], two[there]), kind


@pytest.mark.parametrize("kind", ["t5", "llama"])
@pytest.mark.parametrize("impl", ["sdpa", "eager"])
@torch.no_grad()
def test_beams_with_and_without_cache(kind: str, impl: str, tmp_path: Path) -> None:
    module = placed(kind, tmp_path / kind, impl=impl)
    rows = ragged()
    if kind == "llama":
        rows = {key: torch.stack([value[0], value[1].roll(3)]) for key, value in rows.items()}  # padding on the left
    settings: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False, "num_return_sequences": 2}
    module.model.generation_config.eos_token_id = None
    cached, plain = (module.model.generate(**rows, use_cache=use, **settings) for use in (True, False))
    assert torch.equal(cached, plain)


@torch.no_grad()
def test_beams_of_rows_with_other_prefixes(tmp_path: Path) -> None:
    module = placed("t5", tmp_path / "t5")
    module.add_adapter("b", prefix={"num_virtual_tokens": 2, "prefix_projection": False})
    module.model.generation_config.eos_token_id = None
    rows = ragged()
    settings: dict[str, Any] = {"num_beams": 2, "max_new_tokens": 5, "do_sample": False}
    with routed(module, ["default", "b"]):
        together = module.model.generate(**rows, **settings)
    for row, name in enumerate(("default", "b")):
        with routed(module, [name]):
            alone = module.model.generate(**{key: value[row : row + 1] for key, value in rows.items()}, **settings)
        assert torch.equal(together[row], alone[0])


@pytest.mark.parametrize("pooled", [True, False])
@torch.no_grad()
def test_gated_attention_is_the_papers(pooled: bool) -> None:
    """softmax(q [g P_K ; K]^T / sqrt(d)) [g P_V ; V] in float64, with a gate for each query or one for the text."""
    torch.manual_seed(0)
    b, heads, kv, n, d, p = 2, 4, 2, 5, 8, 3
    q, k, v = torch.randn(b, heads, n, d), torch.randn(b, kv, n, d), torch.randn(b, kv, n, d)
    pk, pv = torch.randn(1, kv, p, d), torch.randn(1, kv, p, d)
    gate = torch.rand(b, 1 if pooled else n, 1).expand(-1, -1, p)
    model: Any = tiny("llama")
    module = model.model.layers[0].self_attn
    module.__dict__[INDEX] = 0

    def inner(m: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
        return out.transpose(1, 2), None

    found, _ = attend(module, q, k, v, None, inner, **{KEYWORD: Prefix([pk], [pv]), GATE: gate})
    for row in range(b):
        for head in range(heads):
            for i in range(n):
                g = gate[row, 0 if pooled else i, 0].double()
                keys = torch.cat([g * pk[0, head // 2].double(), k[row, head // 2, : i + 1].double()])
                values = torch.cat([g * pv[0, head // 2].double(), v[row, head // 2, : i + 1].double()])
                weights = torch.softmax(keys @ q[row, head, i].double() / d**0.5, 0)
                assert torch.allclose(found[row, i, head].double(), weights @ values, atol=1e-5)


def test_output_of_a_network_does_not_depend_on_the_mode(tmp_path: Path) -> None:
    module = placed("llama", tmp_path / "m", dropout=0.5)
    rows = {**ragged(), "labels": ragged()["input_ids"]}
    assert torch.equal(outputs(module, rows), outputs(module, rows))
    torch.manual_seed(0)
    module.train()
    assert not torch.equal(*(host(module).prefix([("default", None)], 1)[0].keys[0] for _ in range(2)))
