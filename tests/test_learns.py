"""Every method learns a toy task: an adapter that is in place, gets gradients, and does nothing, fails here.

The base is a tiny Llama that was trained for a second on random walks over an alphabet: each letter is followed, one
time in two, by the next letter or by the fifth after it: its loss is ln 2, and nothing it could know would lower that.
The task is to always take the fifth. Both steps are known to the base, so that a method that can only weigh what is
there (biases, scales) can learn it too.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lit_peft.low_rank.linear import LoRALinear
from lit_peft.methods.reft import prompt_is, prompt_of
from lit_peft.zoo import compose
from tests.models import tiny, tiny_tokenizer
from tests.test_learning_rates import usual
from tests.test_methods import CASES, Case, quick_trainer

LETTERS, FIRST, LENGTH = 24, 40, 16
STEPS = 80
FASTER = 8  # times the method's own learning rate: the model is 32 wide, and has 80 steps
FALL = 0.5  # learned: at most this much of the loss is left
PROMPT = 4  # tokens without a label: methods that edit the prompt have one to edit
# What acts through a few vectors in front of the text, or on the prompt's stream, moves a model this small less, and
# wants another rate: (learning rate, what is left at most).
SLOW = {
    "prefix": (2e-2, 0.8),
    "p_tuning_v2": (5e-2, 0.8),
    "prompt": (1e-1, 0.8),
    "p_tuning": (1e-2, 0.9),
    "fusion": (3e-2, 0.95),  # only chooses between two adapters that have learned nothing
    "parallel": (2e-3, FALL),
    "mam": (1e-2, FALL),
    "loreft": (2e-2, 0.9),
    "direft": (2e-2, 0.9),
}


def walks(share: float, rows: int, seed: int) -> Tensor:
    """Token ids (rows, length) in which a `share` of the steps goes to the next letter, the others to the fifth."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(LETTERS, (rows, 1), generator=generator)
    steps = torch.where(torch.rand(rows, LENGTH - 1, generator=generator) < share, 1, 5)
    return torch.cat([first, first + steps.cumsum(1)], 1) % LETTERS + FIRST


def batch(seed: int, rows: int = 16) -> dict[str, Tensor]:
    ids = walks(0.0, rows, 1000 + seed)
    labels = ids.clone()
    labels[:, :PROMPT] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("learns") / "base"
    model: Any = tiny("llama").train()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(100):
        ids = walks(0.5, 16, step)
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert abs(float(loss) - math.log(2)) < 0.15
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def fall(case: Case, folder: Path) -> float:
    """What is left of the loss after the training, as a share of what it was."""
    torch.manual_seed(1)
    lr = SLOW[case.method][0] if case.method in SLOW else FASTER * min(usual(part) for part in case.method.split("+"))
    module: Any = compose(case.method, "sft")(str(folder), lr=lr, scheduler="constant", **case.settings)
    module.configure_model()
    before = loss_of(module)
    quick_trainer(folder, max_steps=STEPS).fit(module, DataLoader([batch(i) for i in range(STEPS)], batch_size=None))  # type: ignore[arg-type]
    return loss_of(module) / before


def loss_of(module: Any) -> float:
    module.eval()
    rows = batch(-1, rows=64)
    with torch.no_grad(), prompt_is(prompt_of(rows)):
        loss = float(module.model(**rows).loss)
    module.train()
    return loss


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.method)
def test_a_toy_task_is_learned(case: Case, base: Path) -> None:
    assert fall(case, base) < (SLOW[case.method][1] if case.method in SLOW else FALL)


def test_a_dead_adapter_fails(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive = LoRALinear.change
    monkeypatch.setattr(LoRALinear, "change", lambda self, name, x, y: y + 0 * alive(self, name, x, y))
    assert fall(next(case for case in CASES if case.method == "lora"), base) > 0.95
