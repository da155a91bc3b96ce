"""Answers: generated and chosen as a plain, unpadded, uncached model would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lit_peft.tasks import answers
from lit_peft.zoo import compose
from tests.models import IM_END, save_tiny

PROMPTS = [[10, 11, 12, 13, 14, 15], [20, 21], [30, 31, 32, 33]]
CHOICES = [[40, IM_END], [41, 42, 43, IM_END], [IM_END]]


@pytest.fixture(params=["llama", "gpt2", "t5"])
def task(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    torch.manual_seed(0)
    task = compose("lora", "sft")(str(save_tiny(request.param, tmp_path / "base")))
    task.configure_model()
    with torch.no_grad():
        for name, parameter in task.named_parameters():
            if "lora_b" in name:
                parameter.normal_(0, 0.1)
    return task


def score(task: Any, prompt: list[int], choice: list[int]) -> float:
    """Log-probability of a choice from one plain forward pass."""
    with torch.no_grad():
        if task.encoder_decoder:
            labels = torch.tensor([choice])
            logits = task.model(input_ids=torch.tensor([prompt]), labels=labels).logits[0]
        else:
            ids = torch.tensor([prompt + choice])
            logits = task.model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
    return sum(float(row.log_softmax(-1)[token]) for row, token in zip(logits, choice, strict=True))


def test_chooses_what_is_most_probable(task: Any) -> None:
    task.eval()
    expected = []
    for prompt in PROMPTS:
        scores = [score(task, prompt, choice) for choice in CHOICES]
        expected.append(max(range(len(CHOICES)), key=scores.__getitem__))
    assert answers.choose(task, PROMPTS, CHOICES) == expected


def test_padding_and_cache_do_not_change_what_is_generated(task: Any) -> None:
    together = answers.generate(task, PROMPTS, 12)
    assert together == [answers.generate(task, [prompt], 12)[0] for prompt in PROMPTS]
    if not task.encoder_decoder:
        ids = list(PROMPTS[0])
        with torch.no_grad():
            for _ in range(12):
                token = int(task.model.eval()(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
                ids.append(token)
                if token == IM_END:
                    break
        assert together[0] == answers.text(task.tokenizer, ids[len(PROMPTS[0]) :])


def test_train_mode_is_kept(task: Any) -> None:
    task.train()
    answers.generate(task, PROMPTS[:1], 2)
    assert all(module.training for module in task.model.modules())


def test_batch_is_split_into_prompt_and_last_answer() -> None:
    labels = torch.tensor([[-100, -100, 3, 4, -100, -100, 7, 8], [-100] * 8])
    batch = {"input_ids": torch.arange(1, 9).repeat(2, 1), "labels": labels}
    assert answers.split(batch, False) == [answers.Row([1, 2, 3, 4, 5, 6], [7, 8])]
