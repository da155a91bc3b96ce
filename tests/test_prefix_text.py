"""A prefix that starts from a text does what the text in front would do."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import AutoTokenizer

from lit_peft import PrefixConfig, PrefixTuning, load
from lit_peft.__main__ import main
from lit_peft.adapter import adapter_names
from lit_peft.named import add_adapter, disabled
from lit_peft.zoo import compose
from tests.models import BOS, VOCAB, save_tiny, tiny
from tests.test_prefix import host

TEXT = "the tin hat"


def tokenizer_of(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def with_bos(folder: Path) -> Path:
    """Let the saved tokenizer put BOS in front of every text, as Llama's does."""
    tokenizer = tokenizer_of(folder)
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    tokenizer.save_pretrained(folder)
    return folder


def started(kind: str, folder: Path, p: int, bos: bool = False, **settings: Any) -> Any:
    save_tiny(kind, folder, task="classification" if kind == "bert" else "lm")
    if bos:
        with_bos(folder)
    torch.manual_seed(0)
    prefix = {"num_virtual_tokens": p, "init_text": TEXT, "encoder_hidden_size": 32, **settings}
    task: dict[str, Any] = {"labels": ["a", "b", "c"]} if kind == "bert" else {}
    module: Any = compose("prefix", "classification" if task else "sft")(str(folder), prefix=prefix, **task)
    module.configure_model()
    return module.eval()


@pytest.mark.parametrize("bos", [False, True], ids=["plain", "bos"])
@pytest.mark.parametrize("projection", [False, True], ids=["rows", "network"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "qwen2"])
@torch.no_grad()
def test_equals_the_text_in_front(kind: str, projection: bool, bos: bool, tmp_path: Path) -> None:
    folder = save_tiny(kind, tmp_path / "tokens")
    words = list(tokenizer_of(folder)(TEXT)["input_ids"])
    said = torch.tensor([[BOS] * bos + words])
    p = said.shape[1]
    module = started(kind, tmp_path / "m", p, bos, prefix_projection=projection)
    rest = torch.randint(8, VOCAB, (1, 8), generator=torch.Generator().manual_seed(1))
    with disabled(module):
        whole = module.model(input_ids=torch.cat([said, rest], 1)).logits[:, p:]
        written = module.model.generate(
            input_ids=torch.cat([said, rest], 1), max_new_tokens=5, do_sample=False, attention_mask=torch.ones(1, p + 8)
        )[:, p + 8 :]
    assert torch.allclose(module.model(input_ids=rest).logits, whole, atol=1e-5)
    out = module.model.generate(input_ids=rest, max_new_tokens=5, do_sample=False, attention_mask=torch.ones(1, 8))
    assert torch.equal(out[:, 8:], written)
    for left in (True, False):
        ids, mask = padded(rest, left)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = module.model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        assert torch.allclose(logits[mask.bool()], whole[0], atol=1e-5)


def padded(ids: Tensor, left: bool) -> tuple[Tensor, Tensor]:
    nothing, ones = torch.zeros(1, 3, dtype=torch.long), torch.ones_like(ids)
    parts = ([nothing, ids], [nothing, ones]) if left else ([ids, nothing], [ones, nothing])
    return torch.cat(parts[0], 1), torch.cat(parts[1], 1)


@torch.no_grad()
def test_repeated_and_cut(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):  # the command line makes it quiet
        caplog.set_level(logging.INFO, logger=name)
    folder = save_tiny("llama", tmp_path / "tokens")
    words = list(tokenizer_of(folder)(TEXT)["input_ids"])
    n = len(words)
    for p, expected in ((n + 3, [BOS, *words, *words][: n + 3]), (3, [BOS, *words[:2]])):
        module = started("llama", tmp_path / str(p), p, bos=True)
        assert module._text_ids() == expected
        rest = torch.randint(8, VOCAB, (1, 8), generator=torch.Generator().manual_seed(1))
        with disabled(module):
            whole = module.model(input_ids=torch.cat([torch.tensor([expected]), rest], 1)).logits[:, p:]
        assert torch.allclose(module.model(input_ids=rest).logits, whole, atol=1e-5)
    assert f"has {n + 1} tokens" in caplog.text


@pytest.mark.parametrize("kind", ["t5", "bert"])
@torch.no_grad()
def test_rows_are_the_keys_and_values_of_every_attention(kind: str, tmp_path: Path) -> None:
    """Where what follows changes how a text is read (encoders), the start is the text on its own."""
    module = started(kind, tmp_path / "m", 4, prefix_projection=False)
    assert len(tables(module)) == (2 if kind == "t5" else 1)
    ids = torch.tensor([module._text_ids()])
    linear = {
        "t5": (
            "encoder.block.0.layer.0.SelfAttention.v",
            "decoder.block.0.layer.0.SelfAttention.v",
            "decoder.block.0.layer.1.EncDecAttention.v",
        ),
        "bert": ("encoder.layer.0.attention.self.value",),
    }
    for path in linear[kind]:
        found: list[Tensor] = []
        base: Any = next(m for name, m in module.model.named_modules() if bare(name).endswith(path))
        handle = base.register_forward_hook(lambda m, args, out: found.append(out))  # noqa: B023
        with disabled(module):
            module.model(input_ids=ids, **({"decoder_input_ids": ids} if kind == "t5" else {}))
        handle.remove()
        rows = tables(module)["decoder" in path]
        place = 3 if "EncDec" in path else 1  # K_1 V_1 of the layer's own attention, then of that over the encoder
        assert torch.allclose(rows[:, 32 * place : 32 * (place + 1)], found[0][0], atol=1e-5), path


def bare(name: str) -> str:
    return ".".join(piece for piece in name.split(".") if piece != "base")


def tables(module: Any) -> list[Tensor]:
    return [p for name, p in module.named_parameters() if "prefix_table" in name]


@torch.no_grad()
def test_a_network_yields_more_rows_than_it_reads_numbers(tmp_path: Path) -> None:
    """100 rows out of embeddings of width 32, through a layer just as wide as there are rows."""
    rows = host(started("llama", tmp_path / "a", 100, prefix_projection=False)).rows("default")
    for width in (100, 512):
        module = started("llama", tmp_path / "b", 100, encoder_hidden_size=width)
        assert (host(module).rows("default") - rows).abs().max() < 1e-4 * rows.abs().max(), width


def test_further_sets_start_from_a_text(tmp_path: Path) -> None:
    module = started("llama", tmp_path / "m", 5, prefix_projection=False)
    module.add_adapter("b", prefix={"num_virtual_tokens": 5, "init_text": TEXT, "prefix_projection": False})
    table = host(module).prefix_table
    assert torch.allclose(table["b"], table["default"], atol=1e-6)


def test_a_text_is_read_by_the_base_alone(tmp_path: Path) -> None:
    plain = started("llama", tmp_path / "a", 5, prefix_projection=False)
    torch.manual_seed(0)
    prefix = {"num_virtual_tokens": 5, "init_text": TEXT, "prefix_projection": False}
    module: Any = compose("prefix+dora", "sft")(str(tmp_path / "a"), prefix=prefix, lora={"r": 2, "dropout": 0.5})
    module.configure_model()
    assert all(m.training for m in module.model.modules())
    assert torch.allclose(host(module).prefix_table["default"], host(plain).prefix_table["default"], atol=1e-6)


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    placed = started("llama", tmp_path / "c", 5)
    with pytest.raises(TypeError, match="Let the module add the adapter"):
        add_adapter(placed.model, "b", PrefixConfig(num_virtual_tokens=3, prefix_projection=False, init_text=TEXT))
    assert adapter_names(placed.model) == ["default"]
    with pytest.raises(ValueError, match="too narrow to yield the rows of a text of 40 tokens"):
        started("llama", tmp_path / "a", 40)

    class Theirs(LightningModule):
        def configure_model(self) -> None:
            self.model = tiny("llama")

    class Mine(PrefixTuning, Theirs):  # type: ignore[misc]
        pass

    module = Mine(prefix={"init_text": TEXT, "prefix_projection": False})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="needs a tokenizer, and Mine has no attribute `tokenizer`"):
        module.configure_model()
    module = Mine(prefix={"init_text": TEXT, "prefix_projection": False})  # type: ignore[arg-type]
    module.tokenizer = lambda text, **options: {"input_ids": []}  # type: ignore[assignment]
    with pytest.raises(ValueError, match="has no tokens"):
        module.configure_model()


def test_from_the_command_line(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "m")
    rows = "".join(json.dumps({"prompt": f"say {n}", "completion": str(n)}) + "\n" for n in range(6))
    (tmp_path / "rows.jsonl").write_text(rows)
    given = {
        "method": "prefix",
        "task": "sft",
        "run_dir": tmp_path / "run",
        "data.path": tmp_path / "rows.jsonl",
        "trainer.max_steps": 1,
        "trainer.accelerator": "cpu",
        "model.backbone": folder,
        "model.lr": 1e-8,
        "model.prefix.init_text": TEXT,
        "model.prefix.num_virtual_tokens": 6,
    }
    assert main(["fit", *(piece for key, value in given.items() for piece in (f"--{key}", str(value)))]) == 0
    trained = load(tmp_path / "run", device="cpu")
    expected = started("llama", tmp_path / "again", 6, prefix_projection=False)
    assert trained.prefix.init_text == TEXT
    assert torch.allclose(host(trained).rows("default"), host(expected).rows("default"), atol=1e-4)
