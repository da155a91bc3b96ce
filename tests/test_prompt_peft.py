"""Prompt tuning and P-tuning beside HF PEFT's: values, gradients, and folders both ways."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_peft import hub, load
from lit_peft.methods.p_tuning import PTuningBackbone
from lit_peft.methods.prompt_adapters import PromptBackbone
from lit_peft.virtual_tokens import ENCODER
from lit_peft.virtual_tokens import TOKENS as EMBEDDINGS
from lit_peft.zoo import compose
from tests.models import IM_END, VOCAB, save_tiny, tiny
from tests.test_methods import quick_trainer, shake

P = 4
WHERE = [
    ("llama", "sft"),
    ("gpt2", "sft"),
    ("t5", "sft"),
    ("bert", "classification"),
    ("roberta", "classification"),
    ("llama", "classification"),
    ("gpt2", "classification"),
]
TASKS = {"sft": "CAUSAL_LM", "classification": "SEQ_CLS"}
METHODS = ["prompt", "p_tuning"]


@pytest.fixture
def base(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    kind, task = request.param
    return save_tiny(kind, tmp_path / f"{kind}-{task}", task="classification" if task == "classification" else "lm")


def ours(base: Path, task: str, method: str, **more: Any) -> Any:
    torch.manual_seed(0)
    labels = {"labels": ["a", "b", "c"]} if task == "classification" else {}
    if "adapter" not in more:
        more["prompt"] = {"num_virtual_tokens": P, "after_bos": False, **more.pop("prompt", {})}
    module: Any = compose(method, task)(str(base), **labels, **more)
    module.configure_model()
    return module.eval()


def theirs(kind: str, task: str, method: str, **more: Any) -> Any:
    model: Any = tiny(kind, "classification" if task == "classification" else "lm")
    known: dict[str, Any] = {
        "task_type": "SEQ_2_SEQ_LM" if kind == "t5" else TASKS[task],
        "num_virtual_tokens": P,
        **more,
    }
    config: Any = peft.PromptTuningConfig(**known) if method == "prompt" else peft.PromptEncoderConfig(**known)
    torch.manual_seed(1)
    return peft.get_peft_model(model, config).eval()


def host(module: Any) -> Any:
    return next(m for m in module.model.modules() if isinstance(m, PromptBackbone))


def inputs(kind: str, task: str) -> dict[str, Tensor]:
    ids = torch.randint(8, VOCAB, (3, 9), generator=torch.Generator().manual_seed(1))
    ids[:, -1] = IM_END
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if kind != "bert" and task == "sft":  # one row is padded; PEFT's classifiers of decoders read the last column
        found["attention_mask"][0, 6:] = 0
    if kind == "t5":
        found["decoder_input_ids"] = ids[:, :4]
    if kind == "bert":
        found["token_type_ids"] = torch.ones_like(ids)
    return found


def same_logits(module: Any, other: Any, kind: str, task: str) -> None:
    rows = inputs(kind, task)
    with torch.no_grad():
        mine, their = module.model(**rows).logits, other(**rows).logits
    if task == "sft" and kind != "t5":
        their = their[:, P:]
    seen = rows["attention_mask"].bool() if task == "sft" and kind != "t5" else slice(None)
    assert (mine[seen] - their[seen]).abs().max() <= 1e-6 * max(1.0, float(their.abs().max()))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("base", "kind", "task"), [(w, *w) for w in WHERE], indirect=["base"])
def test_peft_reads_our_folder(base: Path, kind: str, task: str, method: str, tmp_path: Path) -> None:
    module = ours(base, task, method, prompt={} if method == "prompt" else {"init": "random"})
    shake(module)
    folder = module.save_adapter(tmp_path / "saved")
    stored = load_file(folder / hub.WEIGHTS)
    assert EMBEDDINGS in stored
    assert stored[EMBEDDINGS].shape == (P, 32)
    assert (folder / ENCODER).is_file() == (method == "p_tuning")
    config = json.loads((folder / hub.CONFIG).read_text())
    assert config["peft_type"] == {"prompt": "PROMPT_TUNING", "p_tuning": "P_TUNING"}[method]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        other = PeftModel.from_pretrained(tiny(kind, "classification" if task == "classification" else "lm"), folder)  # type: ignore[arg-type]
    same_logits(module, other.eval(), kind, task)
    again = load(folder, backbone=str(base))
    same_logits(again, other, kind, task)
    assert type(again).__name__.startswith({"prompt": "PromptTuning", "p_tuning": "PTuning"}[method])


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("prompt", {}),
        ("prompt", {"prompt_tuning_init": "SAMPLE_VOCAB"}),
        ("p_tuning", {"encoder_reparameterization_type": "MLP"}),
        ("p_tuning", {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 8}),
    ],
)
@pytest.mark.parametrize(("base", "kind", "task"), [(w, *w) for w in WHERE], indirect=["base"])
def test_we_read_pefts_folder(
    base: Path, kind: str, task: str, method: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    other = theirs(kind, task, method, **settings)
    if task == "classification":
        with torch.no_grad():  # their copy of the head is trained and stored too
            for name, parameter in other.named_parameters():
                if "modules_to_save" in name:
                    parameter.add_(0.1)
    other.save_pretrained(tmp_path / "theirs")
    module = ours(base, task, method, adapter=str(tmp_path / "theirs"))
    same_logits(module, other, kind, task)
    same_logits(load(tmp_path / "theirs", backbone=str(base)), other, kind, task)
    rows = host(module)
    assert not isinstance(rows, PTuningBackbone) or "default" not in rows.prompt_encoder
    trained = {name for name, p in module.model.named_parameters() if p.requires_grad and "prompt" in name}
    assert len(trained) == 1, "what PEFT keeps of P-tuning, its rows, can be trained on"
    again = ours(base, task, method, adapter=str(module.save_adapter(tmp_path / "back")))
    same_logits(again, other, kind, task)
    if kind != "t5":
        back = PeftModel.from_pretrained(
            tiny(kind, "classification" if task == "classification" else "lm"), tmp_path / "back"
        )  # type: ignore[arg-type]
        same_logits(again, back.eval(), kind, task)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_gradients_of_a_prompt(kind: str, tmp_path: Path) -> None:
    other = theirs(kind, "sft", "prompt").train()
    module = ours(save_tiny(kind, tmp_path / "m"), "sft", "prompt").train()
    rows = host(module).prompt_embedding["default"]
    weight = other.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        rows.copy_(weight[:P])
    batch = {key: value for key, value in inputs(kind, "sft").items() if key != "decoder_input_ids"}
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    if kind != "t5":  # theirs would learn the first token from the prompt's last output, which ours leaves out
        labels[:, 0] = -100
    loss = other(**batch, labels=labels).loss
    loss.backward()
    mine = module.model(**batch, labels=labels).loss
    mine.backward()
    assert torch.allclose(mine, loss, rtol=1e-6)
    assert torch.allclose(rows.grad, weight.grad[:P], atol=1e-6)


@pytest.mark.parametrize("encoder", ["lstm", "mlp"])
def test_the_network_of_p_tuning_is_pefts(encoder: str, tmp_path: Path) -> None:
    """Rows, loss and every gradient; their MLP has three layers, which the paper's does not."""
    kind = {"lstm": "LSTM", "mlp": "MLP"}[encoder]
    other = theirs("llama", "sft", "p_tuning", encoder_reparameterization_type=kind, encoder_hidden_size=12).train()
    settings = {"encoder": encoder, "encoder_hidden_size": 12, "encoder_num_layers": 2 if encoder == "lstm" else 3}
    module = ours(save_tiny("llama", tmp_path / "m"), "sft", "p_tuning", prompt=settings).train()
    network = other.prompt_encoder["default"]
    mine = dict(host(module).prompt_encoder["default"].named_parameters())
    mine["embedding.weight"] = host(module).prompt_embedding["default"]
    names = {"lstm_head": "lstm", "mlp_head": "mlp"}
    pairs = [
        (mine[".".join([names.get(name.partition(".")[0], name.partition(".")[0]), name.partition(".")[2]])], parameter)
        for name, parameter in network.named_parameters()
    ]
    assert len(pairs) == len(mine)
    with torch.no_grad():
        for own, parameter in pairs:
            own.copy_(parameter)
    assert torch.allclose(host(module).rows("default"), network(torch.arange(P)), atol=1e-7)
    batch = inputs("llama", "sft")
    labels = batch["input_ids"].clone()
    labels[:, 0] = -100
    losses = [model(**batch, labels=labels).loss for model in (module.model, other)]
    assert torch.allclose(*losses, rtol=1e-6)
    for loss in losses:
        loss.backward()
    for own, parameter in pairs:
        assert torch.allclose(own.grad, parameter.grad, atol=1e-6, rtol=1e-4)


@torch.no_grad()
def test_starts_are_pefts(tmp_path: Path) -> None:
    """A text is repeated or cut in the same way; random rows and words are drawn from other ranges, as in the paper."""
    folder = save_tiny("llama", tmp_path / "m")
    for text in ("hello world", "x"):
        other = theirs(
            "llama",
            "sft",
            "prompt",
            prompt_tuning_init="TEXT",
            prompt_tuning_init_text=text,
            tokenizer_name_or_path=str(folder),
        )
        module = ours(folder, "sft", "prompt", prompt={"init": "text", "init_text": text})
        expected = other.prompt_encoder["default"].embedding.weight
        assert torch.equal(host(module).prompt_embedding["default"], expected)


def test_training_goes_on_from_a_folder(tmp_path: Path) -> None:
    """The encoder lies beside PEFT's file; without it the rows themselves are trained on."""
    folder = save_tiny("llama", tmp_path / "m")
    module = ours(folder, "sft", "p_tuning", prompt={"encoder_hidden_size": 6})
    shake(module)
    saved = module.save_adapter(tmp_path / "saved")
    again = ours(folder, "sft", "p_tuning", adapter=str(saved))
    mine, found = dict(host(module).own_parameters()), dict(host(again).own_parameters())
    assert mine.keys() == found.keys()
    assert len(mine) > 10
    assert all(torch.equal(found[name], parameter) for name, parameter in mine.items())
    assert again.prompt == module.prompt
    shutil.copytree(saved, tmp_path / "bare")
    (tmp_path / "bare" / ENCODER).unlink()
    bare = ours(folder, "sft", "p_tuning", adapter=str(tmp_path / "bare"))
    rows = inputs("llama", "sft")
    assert torch.allclose(bare.model(**rows).logits, module.model(**rows).logits, atol=1e-5)
    with pytest.raises(ValueError, match="lacks"):
        module.load_adapter(tmp_path / "bare")
    module.add_adapter("second", folder=tmp_path / "bare")
    module.add_adapter("third", folder=saved)
    assert sorted(host(module).prompt_encoder) == ["default", "third"]
    # a damaged one is named before anything is copied
    tensors = load_file(saved / ENCODER)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, saved / ENCODER)
    with pytest.raises(ValueError, match="lacks"):
        ours(folder, "sft", "p_tuning", adapter=str(saved))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("settings", [{"after_bos": True}, {"after_bos": None, "template": "[P]{text}{prompt}"}])
def test_what_peft_cannot_say_it_refuses(method: str, settings: dict[str, Any], tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "m")
    module = ours(folder, "sft", method, prompt=settings)
    shake(module)
    saved = module.save_adapter(tmp_path / "saved")
    with pytest.raises(Exception, match="LIT_"):
        PeftModel.from_pretrained(tiny("llama"), saved)  # type: ignore[arg-type]
    again = load(saved, backbone=str(folder))
    assert again.prompt == module.prompt
    assert again.text_template == module.text_template
    rows = inputs("llama", "sft")
    if settings.get("template"):
        rows["input_ids"][:, [0, 3, 4, 5]] = 1 << 30
    assert torch.equal(again.model(**rows).logits, module.model(**rows).logits)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_the_base_is_trained_too(kind: str, tmp_path: Path) -> None:
    from lit_peft.named import disabled

    folder = save_tiny(kind, tmp_path / "m")
    settings = {"tune_base": True}
    module = ours(folder, "sft", "p_tuning", prompt=settings).train()
    assert all(parameter.requires_grad for parameter in module.model.parameters())
    rates = {group["lr"]: len(group["params"]) for group in module.parameter_groups()}
    assert set(rates) == {1e-5, 1e-3}
    with pytest.raises(TypeError, match="keep_base"), disabled(module):
        pass
    before = {name: p.detach().clone() for name, p in module.model.named_parameters()}
    rows = inputs(kind, "sft")
    batch: dict[str, Tensor] = {"input_ids": rows["input_ids"], "attention_mask": rows["attention_mask"]}
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    loader: Any = torch.utils.data.DataLoader([batch] * 2, batch_size=None)  # type: ignore[arg-type]
    trainer = quick_trainer(tmp_path, max_steps=2)
    trainer.fit(module, loader)
    moved = {name for name, p in module.model.named_parameters() if not torch.equal(p, before[name])}
    assert len([name for name in moved if "prompt" not in name]) > 10
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    stored = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert len([key for key in stored if key.startswith("model.")]) >= len(before)
    module.eval()
    saved = module.save_adapter(tmp_path / "saved")
    assert json.loads((saved / hub.CONFIG).read_text())["peft_type"] == "LIT_P_TUNING"
    for again in (load(tmp_path / "a.ckpt"), load(saved, backbone=str(folder))):
        assert torch.equal(again.model(**rows).logits, module.model(**rows).logits)
    kept = ours(folder, "sft", "p_tuning", prompt={**settings, "keep_base": True})
    with torch.no_grad():
        expected = tiny(kind)(**rows).logits
    shake(kept)
    assert not torch.allclose(kept.model(**rows).logits, expected, atol=1e-2)
    with disabled(kept):
        assert torch.equal(kept.model(**rows).logits, expected)
    with pytest.raises(TypeError, match="cannot be merged"):
        kept.merge_adapters()
    plain = ours(folder, "sft", "p_tuning")
    with pytest.raises(TypeError, match="further adapter"):
        plain.add_adapter("second", prompt={"num_virtual_tokens": P, "tune_base": True})
