"""How A and B start: the random ways, beside HF PEFT's; the others are in `test_pissa`, `test_olora`, `test_eva`."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import nn

from lit_peft import LoRAConfig
from lit_peft.low_rank.linear import LoRALinear


def ours(start: Any, r: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    made = LoRALinear(nn.Linear(300, 200), LoRAConfig(r=r, init_lora_weights=start))
    return made.lora_a["default"].detach(), made.lora_b["default"].detach()


def theirs(start: Any, r: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=r, init_lora_weights=start, target_modules=["0"])
    layer: Any = peft.get_peft_model(nn.Sequential(nn.Linear(300, 200)), config).base_model.model[0]
    return layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()


@pytest.mark.parametrize("start", ["default", "loaded", "gaussian", "orthogonal"])
def test_is_spread_as_in_peft_and_changes_nothing(start: str) -> None:
    a, b = ours(start)
    other_a, other_b = theirs(True if start in ("default", "loaded") else start)
    assert float(a.std() / other_a.std()) == pytest.approx(1, rel=0.1)
    assert float(a.mean()) == pytest.approx(0, abs=0.1 * float(a.std()))
    assert float(a.abs().max() / other_a.abs().max()) == pytest.approx(1, rel=0.4)
    if start == "orthogonal":
        assert float(b.std() / other_b.std()) == pytest.approx(1, rel=0.1)
        torch.testing.assert_close(b @ a, torch.zeros(200, 300), rtol=0, atol=1e-6)
        assert torch.linalg.matrix_rank(a) == torch.linalg.matrix_rank(b) == 4
        assert torch.linalg.matrix_rank(other_a) == 4
    else:
        assert not b.any()


def test_orthogonal_start_needs_an_even_rank() -> None:
    with pytest.raises(ValueError, match=r"lora\.r is 7, and an orthogonal start halves it"):
        ours("orthogonal", 7)
