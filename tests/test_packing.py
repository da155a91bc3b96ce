"""Texts packed into one row give every method the loss and the gradients of the texts alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_peft.data.collate import Collate, CollatePacked
from lit_peft.data.pack import cannot_pack
from tests.models import VOCAB, save_tiny
from tests.test_methods import CASES, Case, build, shake

NAMED = [pytest.param(case, id=f"{number}-{case.method}") for number, case in enumerate(CASES)]


def gradients(module: Any, batch: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    module.zero_grad()
    loss = module.training_step(batch, 0)
    loss.backward()
    return float(loss.detach()), {k: p.grad.clone() for k, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("case", NAMED)
def test_packed_equals_unpacked(case: Case, kind: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(2)
    rows = []
    for length, prompt in ((9, 4), (6, 4), (12, 7), (7, 4), (8, 6)):
        ids = torch.randint(8, VOCAB, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    module: Any = build(case, save_tiny(kind, tmp_path / kind), "sft").double()
    assert cannot_pack(module.model) is None
    shake(module)
    module.eval()  # no dropout; gradients all the same
    loss, expected = gradients(module, Collate(pad=0)(rows))
    assert max(float(gradient.abs().max()) for gradient in expected.values()) > 0
    for batch in (
        CollatePacked(pad=0)([rows[:2], rows[2:3], rows[3:]]),
        CollatePacked(pad=0, flat=True)([rows[:2], rows[2:]]),
    ):
        packed, found = gradients(module, batch)
        assert packed == pytest.approx(loss, rel=1e-6)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            scale = float(gradient.abs().max())
            assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-5 * scale + 1e-9), name
