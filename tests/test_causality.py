"""No method lets a token of a decoder see those behind it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.models import VOCAB, save_tiny
from tests.test_methods import CASES, Case, build, shake

NAMED = [pytest.param(case, id=f"{number}-{case.method}") for number, case in enumerate(CASES)]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("case", NAMED)
def test_the_future_does_not_reach_the_past(case: Case, kind: str, tmp_path: Path) -> None:
    module = build(case, save_tiny(kind, tmp_path / kind), "sft").eval()
    shake(module)
    ids = torch.randint(8, VOCAB, (2, 14), generator=torch.Generator().manual_seed(3))
    other = ids.clone()
    other[:, 9:] = (other[:, 9:] - 8 + 1) % (VOCAB - 8) + 8
    with torch.no_grad():
        one, two = (module.model(input_ids=i, attention_mask=torch.ones_like(i)).logits for i in (ids, other))  # type: ignore[misc]
    assert torch.allclose(one[:, :9], two[:, :9], atol=1e-5)
    assert (one[:, 9:] - two[:, 9:]).abs().max() > 1e-3
