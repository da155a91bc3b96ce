"""Fine-tuning with all kernels gives the loss and the gradients of the plain operations."""

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from lit_peft.zoo import compose
from tests.kernels.where import DEVICE
from tests.models import save_tiny
from tests.ops.exact import agree
from tests.test_methods import batch, gradients, shake

TWO = {"target_modules": ["q_proj", "down_proj"]}
# method, its settings, the module of kernels with the launcher that has to be called, part of its parameters' names
CASES: list[tuple[str, dict[str, Any], str, str]] = [
    ("lora", {}, "cross_entropy.cross_entropy", "lora_"),
    ("houlsby", {"bottleneck": {"bottleneck_size": 4}}, "bottleneck.bottleneck", "bottleneck"),
    ("unipelt", {"bottleneck": {"bottleneck_size": 4}}, "bottleneck.bottleneck", "bottleneck"),
    ("compacter", {"compacter": {"phm_dim": 2, "reduction_factor": 8}}, "bottleneck.bottleneck", "compacter"),
    ("mora", {"mora": {"r": 2, **TWO}}, "mora.mora", "mora_m"),
    ("remora", {"mora": {"r": 2, "cycle": [6], **TWO}}, "mora.mora", "mora_m"),
    ("loreft", {"reft": {"r": 2, "first": 2, "last": 2, "tied": False}}, "reft.edit", "reft_rotation"),
    ("direft", {"reft": {"r": 2, "first": 2, "last": 2, "tied": False}}, "reft.edit", "reft_rotation"),
]


@pytest.mark.parametrize(("method", "settings", "launcher", "trained"), CASES, ids=[case[0] for case in CASES])
def test_loss_and_gradients(
    method: str, settings: dict[str, Any], launcher: str, trained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module: Any = compose(method, "sft")(str(save_tiny("llama", tmp_path / "m")), **settings)
    module.configure_model()
    shake(module)
    module.to(DEVICE)
    rows = {key: value.to(DEVICE) for key, value in batch("sft", rows=2).items()}
    file, _, name = launcher.partition(".")
    kernels = import_module(f"lit_peft.kernels.{file}")
    launch, launched, found = getattr(kernels, name), [], {}
    monkeypatch.setattr(kernels, name, lambda *args, **more: launched.append(name) or launch(*args, **more))
    for forced in ("0", "1"):
        monkeypatch.setenv("LIT_PEFT_KERNELS", forced)
        loss = module.training_step(rows, 0)
        found[forced] = {"loss": loss.detach(), **gradients(module, rows)}
        assert bool(launched) == (forced == "1")
    assert found["0"].keys() == found["1"].keys()
    assert any(trained in key for key in found["1"])
    agree(found["1"].pop("loss"), found["0"].pop("loss"), 1e-5)
    for key, wanted in found["0"].items():
        agree(found["1"][key], wanted, 1e-4)
