"""OLoRA's own start; what it shares with PiSSA is in `test_pissa.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from transformers.pytorch_utils import Conv1D

from lit_peft import LoRAConfig, OLoRA
from lit_peft.low_rank.residual import ResidualLinear, principal
from lit_peft.weights import dense
from lit_peft.zoo import compose
from tests.models import save_tiny, tiny


def test_starts_at_q_and_r() -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 9, dtype=torch.double)
    a, b = principal(weight, 4, "olora")
    torch.testing.assert_close(b.t() @ b, torch.eye(4, dtype=torch.double))
    # Q_r R_r is the projection of W on the span of its first r columns
    basis = torch.linalg.qr(weight[:, :4])[0]
    torch.testing.assert_close(b @ a, basis @ basis.t() @ weight)
    assert (a.diagonal() > 0).all()


def test_not_square_conv1d_is_the_base_at_the_start_and_follows_its_weight() -> None:
    torch.manual_seed(0)
    base = Conv1D(9, 6)
    made = ResidualLinear(base, LoRAConfig(r=3, init_lora_weights="olora"))
    x = torch.randn(4, 6)
    assert torch.equal(made(x), base(x))
    assert made.lora_a["default"].shape == (3, 6)
    assert made.lora_b["default"].shape == (9, 3)
    taken = made.lora_b["default"] @ made.lora_a["default"]
    torch.testing.assert_close(taken[:, :3], dense(base)[:, :3], rtol=1e-5, atol=1e-6)


def test_peft_starts_alike_on_linear_layers(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=3, lora_alpha=6, init_lora_weights="olora", target_modules=["q_proj", "down_proj"])
    theirs = peft.get_peft_model(tiny("llama"), config)
    folder = save_tiny("llama", tmp_path / "base")
    targets = ["q_proj", "down_proj"]
    ours: Any = compose("olora", "sft")(str(folder), lora=LoRAConfig(r=3, alpha=6, target_modules=targets))
    ours.configure_model()
    assert isinstance(ours, OLoRA)
    plain = dict(theirs.named_modules())
    compared = 0
    for path, adapter in ours.model.named_modules():
        if isinstance(adapter, ResidualLinear):
            other = plain[f"base_model.model.{path}"]
            product = other.lora_B["default"].weight @ other.lora_A["default"].weight
            torch.testing.assert_close(adapter.lora_b["default"] @ adapter.lora_a["default"], product)
            compared += 1
    assert compared == 4
