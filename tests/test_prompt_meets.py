"""A prompt beside adapters of other kinds, as named sets of one base."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from lit_peft import DiReFT, LoReFT, PromptTuning, adapters, routed
from lit_peft.__main__ import main
from lit_peft.methods.reft import prompt_is
from lit_peft.zoo import compose
from tests.models import save_tiny

WORDS, TEXT = "one two", "say what 12 is or so"
EDITS = {"first": 2, "last": 1, "start_at_identity": False}


def pair(folder: Path, first: str, kind: str) -> tuple[Any, str, str]:
    """Return a module with a prompt and an edit, and their names; the one that is not the first is added later."""
    p = len(AutoTokenizer.from_pretrained(folder)(WORDS, add_special_tokens=False)["input_ids"])
    prompt = {"num_virtual_tokens": p, "init": "text", "init_text": WORDS}
    settings: dict[str, Any] = {"prompt": {"prompt": prompt}, kind: {"reft": EDITS}}
    task: dict[str, Any] = {"train": False} if first == "prompt" else {}
    module: Any = compose(first, "sft")(str(folder), **settings[first])
    module.configure_model()
    other = {"prompt": PromptTuning, "loreft": LoReFT, "direft": DiReFT}[kind if first == "prompt" else "prompt"]
    module.add_adapter("further", other, **settings[kind if first == "prompt" else "prompt"], **task)
    for name, parameter in module.model.named_parameters():
        if ".reft_" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(3))
    return module.eval(), *(("default", "further") if first == "prompt" else ("further", "default"))


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("known", [False, True], ids=["all", "prompt"])
@pytest.mark.parametrize("first", ["prompt", "loreft", "direft"])
@torch.no_grad()
def test_reft_edits_the_tokens_of_the_text(first: str, known: bool, padding: int, tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    words, text = (tokenizer(t, add_special_tokens=False, return_tensors="pt")["input_ids"] for t in (WORDS, TEXT))
    n, p = text.shape[1], words.shape[1]
    module, prompt, edit = pair(folder, first, "direft" if first == "direft" else "loreft")
    asked = torch.ones(1, n, dtype=torch.long)
    if known:
        asked[:, -4:] = 0  # the answer
    blank = torch.zeros(1, padding, dtype=torch.long)
    padded, mask = torch.cat([blank, text], 1), torch.cat([blank, torch.ones(1, n, dtype=torch.long)], 1)
    with adapters(module, edit), prompt_is(torch.cat([torch.zeros(1, p, dtype=torch.long), asked], 1)):
        wanted = module.model(input_ids=torch.cat([words, text], 1)).logits[:, p:]
    with adapters(module, prompt, edit), prompt_is(torch.cat([blank, asked], 1) if known else None):
        found = module.model(input_ids=padded, attention_mask=mask).logits[:, padding:]
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    # row by row: the row without the prompt is edited as it is alone
    with adapters(module, edit), prompt_is(asked if known else None):
        alone = module.model(input_ids=text).logits
    both = {"input_ids": padded.repeat(2, 1), "attention_mask": mask.repeat(2, 1)}
    with routed(module, [prompt, edit]), prompt_is(torch.cat([blank, asked], 1).repeat(2, 1) if known else None):
        rows = module.model(**both).logits[:, padding:]
    torch.testing.assert_close(rows[1:], alone, atol=1e-4, rtol=0)


def test_a_text_starts_a_further_prompt(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "llama")
    module = pair(folder, "loreft", "loreft")[0]
    rows = next(p for name, p in module.model.named_parameters() if "prompt_embedding" in name)
    ids = AutoTokenizer.from_pretrained(folder)(WORDS, add_special_tokens=False)["input_ids"]
    assert torch.equal(rows, module.model.get_input_embeddings().weight[ids])
    module.save_adapter(tmp_path / "saved", "further")
    again: Any = compose("lora", "sft")(str(folder))
    again.add_adapter("other", PromptTuning, folder=tmp_path / "saved")
    again.configure_model()
    assert torch.equal(next(p for n, p in again.model.named_parameters() if "prompt_embedding" in n), rows)


def test_positions_are_shared_by_all_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny("gpt2", "base")
    rows = [{"prompt": "say it", "completion": "so" * (1 + 20 * (i == 11))} for i in range(12)]
    Path("data.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    fit = "fit --model.backbone base --data.path data.jsonl --data.max_length 96 --trainer.max_steps 1 --method prompt "
    fit += "--trainer.accelerator cpu --trainer.precision 32-true --trainer.enable_progress_bar false --run_dir run "
    further = {"further": {"methods": ["lit_peft.methods.p_tuning.PTuning"], "prompt": {"num_virtual_tokens": 190}}}
    more = ["--model.named", json.dumps(further), "--model.active", "[default, further]"]
    assert main([*fit.split(), *more]) == 2
    assert (
        "beside a prompt of 210 this model has positions for 46. Set data.max_length to 46" in capsys.readouterr().err
    )
    packed = ["--model.prompt.num_virtual_tokens", "200", "--data.packing", "true"]
    assert main([*fit.split(), *packed]) == 2
    assert "beside a prompt of 200 this model has positions for 56." in capsys.readouterr().err
    assert not Path("run").exists()
