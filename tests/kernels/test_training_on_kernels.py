"""Fine-tuning with all kernels gives the loss and the gradients of the plain operations."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_peft.kernels import cross_entropy
from lit_peft.zoo import compose
from tests.kernels.where import DEVICE
from tests.models import save_tiny
from tests.ops.exact import agree
from tests.test_methods import batch


def step(folder: Path) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(1)
    module: Any = compose("lora", "sft")(str(folder))
    module.configure_model()
    for name, p in module.named_parameters():
        if name.endswith("lora_b.default"):
            torch.nn.init.normal_(p, std=0.1)
    module.to(DEVICE)
    loss = module.training_step({key: value.to(DEVICE) for key, value in batch("sft").items()}, 0)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def test_loss_and_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, found, launched = save_tiny("llama", tmp_path / "llama"), [], []
    launch = cross_entropy.cross_entropy
    monkeypatch.setattr(cross_entropy, "cross_entropy", lambda *args: launched.append(len(args[0])) or launch(*args))
    for forced in ("0", "1"):
        monkeypatch.setenv("LIT_PEFT_KERNELS", forced)
        found.append(step(folder))
        assert bool(launched) == (forced == "1")
    (plain, theirs), (loss, mine) = found
    agree(loss, plain, 1e-5)
    assert theirs
    assert mine.keys() == theirs.keys()
    for name, gradient in theirs.items():
        agree(mine[name], gradient, 1e-4)
