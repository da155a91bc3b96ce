"""Pseudo tokens inside of a text: from the template through data, training and generation; packed as unpacked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from transformers import StaticCache

from lit_peft.data.collate import Collate, CollatePacked
from lit_peft.data.instructions import Instructions
from lit_peft.data.labelled import Labelled
from lit_peft.methods.prompt import PromptConfig
from lit_peft.methods.prompt_adapters import PromptBackbone
from lit_peft.named import adapters, add_adapter, disabled, routed
from lit_peft.template import SLOT, resolved, without_slots
from lit_peft.zoo import compose
from tests.models import VOCAB, save_tiny
from tests.test_methods import quick_trainer, shake

TEMPLATE = "[P]{text} It was{prompt:2}"
ROWS = [{"instruction": f"say {word}", "output": f"{word} {word}"} for word in ("hello", "no", "one two three", "x")]


def placed(kind: str, folder: Path, method: str = "prompt", task: str = "sft", **settings: Any) -> Any:
    torch.manual_seed(0)
    more = {"labels": ["a", "b"]} if task == "classification" else {}
    base = save_tiny(kind, folder, task="classification" if more else "lm", **({"num_labels": 2} if more else {}))
    settings = {"num_virtual_tokens": 3, **settings}
    module: Any = compose(method, task)(str(base), prompt=settings, **more)
    module.configure_model()
    shake(module)
    return module.eval()


def host(module: Any) -> PromptBackbone:
    found: PromptBackbone = next(m for m in module.model.modules() if isinstance(m, PromptBackbone))
    return found


def data_file(folder: Path, rows: list[dict[str, str]]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def ids(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(8, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("method", ["prompt", "p_tuning"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@torch.no_grad()
def test_rows_stand_at_the_pseudo_tokens(kind: str, method: str, tmp_path: Path) -> None:
    """The same as handing in the embeddings oneself, with padding on either side and in generation."""
    module = placed(kind, tmp_path, method, template=TEMPLATE)
    text = ids(2, 9)
    text[0, [2, 5, 6]] = text[1, [0, 1, 8]] = SLOT
    rows = host(module).rows("default")
    embeds = host(module).embedding()(text.masked_fill(text == SLOT, 0))
    embeds[0, [2, 5, 6]], embeds[1, [0, 1, 8]] = rows, rows
    with disabled(module):
        expected = module.model(inputs_embeds=embeds).logits
        said = module.model.generate(
            inputs_embeds=embeds, attention_mask=torch.ones_like(text), max_new_tokens=5, do_sample=False
        )
    assert torch.allclose(module.model(input_ids=text).logits, expected, atol=1e-5)
    for use_cache in (True, False):
        out = module.model.generate(
            input_ids=text,
            attention_mask=torch.ones_like(text),
            max_new_tokens=5,
            do_sample=False,
            use_cache=use_cache,
        )
        assert torch.equal(out[:, 9:], said)
    fill = torch.zeros(2, 4, dtype=torch.long)
    mask = torch.cat([fill, torch.ones_like(text)], 1)
    left = module.model(
        input_ids=torch.cat([fill, text], 1), attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)
    ).logits
    assert torch.allclose(left[:, 4:], expected, atol=1e-5)
    right = module.model(input_ids=torch.cat([text, fill], 1), attention_mask=mask.flip(1)).logits
    assert torch.allclose(right[:, :9], expected, atol=1e-5)


@torch.no_grad()
def test_an_encoder_reads_pseudo_tokens(tmp_path: Path) -> None:
    module = placed("t5", tmp_path, template=TEMPLATE)
    text = ids(1, 9)
    words = ids(1, 3, seed=2)
    host(module).prompt_embedding["default"].copy_(host(module).embedding()(words)[0])
    whole = text.clone()
    whole[0, [2, 5, 6]], text[0, [2, 5, 6]] = words[0], SLOT
    decoder = torch.tensor([[0, 11, 12]])
    with disabled(module):
        expected = module.model(input_ids=whole, decoder_input_ids=decoder).logits
    assert torch.allclose(module.model(input_ids=text, decoder_input_ids=decoder).logits, expected, atol=1e-5)


@torch.no_grad()
def test_where_no_prompt_acts_pseudo_tokens_are_not_there(tmp_path: Path) -> None:
    module = placed("llama", tmp_path, template=TEMPLATE)
    text = ids(2, 9)
    plain = text[:, :6].clone()
    text[:, [2, 5, 6]] = SLOT
    plain = text[text != SLOT].view(2, 6)
    with disabled(module):
        expected = module.model(input_ids=plain).logits
        found = module.model(input_ids=text).logits
        assert torch.allclose(found[text != SLOT].view(2, 6, -1), expected, atol=1e-5)
        with pytest.raises(ValueError, match="without_slots"):
            module.model.generate(input_ids=text, attention_mask=torch.ones_like(text), max_new_tokens=2)
        assert module.text_template == ""
    with routed(module, ["default", None]):
        mixed = module.model(input_ids=text).logits
    assert torch.allclose(mixed[0], module.model(input_ids=text).logits[0], atol=1e-5)
    assert torch.allclose(mixed[1][text[1] != SLOT], expected[1], atol=1e-5)


@torch.no_grad()
def test_rows_of_sets_in_different_places(tmp_path: Path) -> None:
    """One at pseudo tokens, one in front, one behind the first token; alone, together, and row by row."""
    module = placed("llama", tmp_path, template=TEMPLATE)
    add_adapter(module.model, "front", PromptConfig(num_virtual_tokens=2, after_bos=False))
    add_adapter(module.model, "behind", PromptConfig(num_virtual_tokens=4, after_bos=True))
    shake(module)
    text = ids(4, 9)
    text[0, [2, 5, 6]] = SLOT
    text[3, [2, 5, 6]] = SLOT
    with routed(module, ["default", "front", "behind", ["default", "behind", "front"]]):
        mixed = module.model(input_ids=text).logits
    for row, names in enumerate((["default"], ["front"], ["behind"], ["default", "behind", "front"])):
        with adapters(module, *names):
            alone = module.model(input_ids=text[row : row + 1]).logits[0]
            said = module.model.generate(
                input_ids=text[row : row + 1], attention_mask=torch.ones(1, 9), max_new_tokens=3, do_sample=False
            )
        assert torch.allclose(mixed[row], alone, atol=1e-5), names
    # by hand: [front ; x1 ; behind ; x2 ...] with the prompt at its pseudo tokens
    backbone = host(module)
    embeds = backbone.embedding()(text[3:].masked_fill(text[3:] == SLOT, 0))
    embeds[0, [2, 5, 6]] = backbone.rows("default")
    front, behind = backbone.rows("front")[None], backbone.rows("behind")[None]
    with disabled(module):
        whole = torch.cat([front, embeds[:, :1], behind, embeds[:, 1:]], 1)
        expected = module.model(inputs_embeds=whole).logits[0]
        longer = module.model.generate(
            inputs_embeds=whole, attention_mask=torch.ones(1, 15), max_new_tokens=3, do_sample=False
        )
    assert torch.allclose(mixed[3], torch.cat([expected[2:3], expected[7:]]), atol=1e-5)
    assert torch.equal(said[:, 9:], longer)


PLACES: list[dict[str, Any]] = [{"after_bos": False}, {"after_bos": True}, {"template": TEMPLATE}]


def rows_with(template: str) -> list[dict[str, list[int]]]:
    made = []
    for seed, length in enumerate((7, 5, 9, 6, 4)):
        row = ids(length, seed=seed).tolist()
        if template:
            row = [SLOT, *row[:2], SLOT, SLOT, *row[2:]]
        labels = [-100 if token == SLOT or i < 2 else token for i, token in enumerate(row)]
        made.append({"input_ids": row, "labels": labels})
    return made


@pytest.mark.parametrize("settings", PLACES, ids=["front", "after_bos", "template"])
@pytest.mark.parametrize("method", ["prompt", "p_tuning"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma"])
def test_packed_rows_are_as_the_rows_alone(kind: str, method: str, settings: dict[str, Any], tmp_path: Path) -> None:
    module = placed(kind, tmp_path, method, **settings)
    rows = rows_with(settings.get("template", ""))

    def results(batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
        module.zero_grad()
        loss = module.training_step(batch, 0)
        loss.backward()
        logits, targets = module.trained_logits(batch)
        ordered = [
            logit
            for _, logit in sorted(
                zip(targets.tolist(), logits.detach(), strict=True), key=lambda p: (p[0], float(p[1][0]))
            )
        ]
        return loss.detach(), {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}, ordered

    module.train()
    loss, gradients, logits = results(Collate(pad=0)(rows))
    for bins, flat in (([rows[:3], rows[3:]], False), ([rows[:3], rows[3:]], True), ([rows[:1], rows[1:]], False)):
        packed, found, packed_logits = results(CollatePacked(pad=0, flat=flat)(bins))
        assert torch.allclose(packed, loss, rtol=1e-5)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(packed_logits, logits, strict=True))
        assert found.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert torch.allclose(found[name], gradient, atol=1e-4 * max(1.0, float(gradient.abs().max()))), name


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(("kind", "method"), [("llama", "p_tuning"), ("gpt2", "prompt"), ("t5", "p_tuning")])
def test_a_template_through_the_data(kind: str, method: str, packing: bool, tmp_path: Path) -> None:
    if kind == "t5" and packing:
        pytest.skip("encoder-decoders do not pack")
    module = placed(kind, tmp_path / "m", method, template="[P]{text} It was{prompt}")
    path = data_file(tmp_path, ROWS)
    data = Instructions(
        path, batch_size=2, max_length=80, packing=packing, val_fraction=0.25, cache_dir=str(tmp_path / "cache")
    )
    module.train()
    trainer = quick_trainer(tmp_path, max_steps=3)
    trainer.fit(module, data)
    for row in data.tables["train"]:
        assert row["input_ids"].count(SLOT) == 3
        assert SLOT not in row["labels"]
    assert ("It was" in module.tokenizer.decode(data.tables["train"][0]["input_ids"])) is True
    found: Any = trainer.predict(module, data)
    assert found[0][0]["generated"] is not None
    messages = [{"role": "user", "content": "say hello"}]
    assert isinstance(module.reply(messages, 3), str)
    with disabled(module):
        base = module.reply(messages, 3)
    plain = compose("full", "sft")(str(tmp_path / "m"))
    plain.configure_model()
    assert base == plain.eval().reply(messages, 3)  # type: ignore[attr-defined]
    trainer.test(module, data)


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2", "t5"])
def test_a_template_around_classified_texts(kind: str, tmp_path: Path) -> None:
    # BERT classifies by the first token of the text, T5 by its end: this tokenizer adds neither
    first, end = "<bos>" if kind == "bert" else "", "<|im_end|>" if kind == "t5" else ""
    template = first + "{prompt:2}{text} is it{text2}[P]?" + end
    module = placed(kind, tmp_path / "m", "p_tuning", "classification", template=template)
    rows = [{"sentence1": "one" * 3 * i, "sentence2": "two", "label": "ab"[i % 2]} for i in range(1, 9)]
    data = Labelled(
        data_file(tmp_path, rows), batch_size=2, max_length=40, val_fraction=0.2, cache_dir=str(tmp_path / "cache")
    )
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    module.train()
    trainer = quick_trainer(tmp_path, max_steps=2)
    trainer.fit(module, data)
    assert all(row["input_ids"].count(SLOT) == 3 and len(row["input_ids"]) <= 40 for row in data.tables["train"])
    assert not torch.equal(
        host(module).prompt_embedding["default"], before[next(n for n in before if "prompt_embedding" in n)]
    )
    assert trainer.predict(module, data)
    assert data.report["truncated"] > 0
    batch = next(iter(data.test_dataloader()))
    with disabled(module):
        if kind == "t5":  # its decoder would still look at where they stood
            with pytest.raises(ValueError, match="without_slots"):
                module.logits(batch)
            return
        found = module.logits(batch)[:1]
    row = batch["input_ids"][:1][batch["attention_mask"][:1].bool()]
    with disabled(module):
        assert torch.allclose(found, module.logits({"input_ids": row[row != SLOT][None]}), atol=1e-5)


@torch.no_grad()
def test_a_static_cache(tmp_path: Path) -> None:
    """It has no room for what is put in front; pseudo tokens are part of the text."""
    module = placed("llama", tmp_path / "a")
    text = ids(2, 9)
    settings: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(text)}
    with pytest.raises(TypeError, match="static cache"):
        module.model.generate(input_ids=text, cache_implementation="static", disable_compile=True, **settings)
    module = placed("llama", tmp_path / "b", template=TEMPLATE)
    text[:, [0, 3, 8]] = SLOT
    expected = module.model.generate(input_ids=text, **settings)
    static = StaticCache(config=module.model.config, max_cache_len=16)
    found = module.model.generate(input_ids=text, past_key_values=static, disable_compile=True, **settings)
    assert torch.equal(found, expected)


@torch.no_grad()
def test_beams_of_routed_rows(tmp_path: Path) -> None:
    module = placed("llama", tmp_path)
    add_adapter(module.model, "long", PromptConfig(num_virtual_tokens=5, after_bos=False))
    shake(module)
    text = ids(2, 9)
    settings: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 4, "do_sample": False}
    with routed(module, ["long", "default"]):
        mixed = module.model.generate(input_ids=text, attention_mask=torch.ones_like(text), **settings)
    for row, name in enumerate(("long", "default")):
        with adapters(module, name):
            alone = module.model.generate(
                input_ids=text[row : row + 1], attention_mask=torch.ones(1, 9, dtype=torch.long), **settings
            )
        assert torch.equal(mixed[row, : alone.shape[1]], alone[0])


def test_what_is_missing_is_said_before_training(tmp_path: Path) -> None:
    for template, message in (
        ("no place", "needs {text} once"),
        ("{text} and {text}", "needs {text} once"),
        ("{text} without", "no pseudo tokens"),
        ("[P]{text}", "has 1 pseudo tokens, and prompt.num_virtual_tokens is 3"),
        ("{prompt:3}{prompt}{text}", "stands for all that are left"),
    ):
        with pytest.raises(ValueError, match=message.replace("{", r"\{")):
            PromptConfig(num_virtual_tokens=3, template=template)
    with pytest.raises(ValueError, match="Leave one out"):
        PromptConfig(num_virtual_tokens=1, template="[P]{text}", after_bos=True)
    assert resolved("", 3) == ""
    module = placed("llama", tmp_path / "a", template=TEMPLATE)
    with pytest.raises(ValueError, match="Row 0 of a batch has 0 pseudo tokens, and its prompt 3"):
        module.model(input_ids=ids(2, 9))
    with pytest.raises(ValueError, match="300, and this model has 256 positions"):
        placed("llama", tmp_path / "b", num_virtual_tokens=300)
    gpt2 = placed("gpt2", tmp_path / "c", num_virtual_tokens=10)
    with pytest.raises(ValueError, match=r"data\.max_length to 246"):
        gpt2.model(input_ids=ids(1, 250))
    data = Instructions(
        data_file(tmp_path, [{"instruction": "a b " * 150, "output": "c"}] * 3),
        max_length=256,
        cache_dir=str(tmp_path / "cache"),
    )
    with pytest.raises(ValueError, match="The longest text has 256 tokens"):
        quick_trainer(tmp_path, max_steps=1).fit(gpt2, data)
    small = Instructions(data_file(tmp_path, ROWS), max_length=10, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="leaves no room for a text beside 3 pseudo tokens"):
        quick_trainer(tmp_path, max_steps=1).fit(placed("llama", tmp_path / "d", template=TEMPLATE), small)
    assert without_slots([1, SLOT, 2]) == [1, 2]
    assert isinstance(gpt2, LightningModule)
    assert isinstance(gpt2.model, nn.Module)


def test_the_command_line(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from lit_peft.__main__ import main

    monkeypatch.chdir(tmp_path)
    base, path = save_tiny("llama", tmp_path / "m"), data_file(tmp_path, ROWS)
    common = ["--method", "p_tuning", "--model.backbone", str(base), "--data.path", path, "--data.max_length", "80"]
    common += ["--data.cache_dir", str(tmp_path / "cache"), "--model.prompt.num_virtual_tokens", "3"]
    assert main(["preview", *common, "--model.prompt.template", "{prompt:2}{text} is{prompt}"]) == 0
    shown = capfd.readouterr().out
    assert "[P][P]say " in shown
    assert " is[P]<|im_end|>" in shown
    assert main(["fit", *common, "--model.prompt.template", "{text} was"]) != 0
    said = capfd.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("lit-peft: error: prompt.template '{text} was' has no pseudo tokens.")
