from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from lit_peft.callbacks import AdapterCheckpoint, AdapterFreeze
from lit_peft.strategies import FSDP2Strategy
from tests.callbacks.tiny_runs import Killed, Losses, make_loader, make_module, make_trainer

THAWED = r"layers\.1\.(mlp\.|input_layernorm)"
NAMES = {
    # LoRA stands around the linears, so their own weights are one level deeper in the model
    "model.model.layers.1.mlp.gate_proj.base.weight",
    "model.model.layers.1.mlp.up_proj.base.weight",
    "model.model.layers.1.mlp.down_proj.base.weight",
    "model.model.layers.1.input_layernorm.weight",
}


class Weights(Callback):
    """Copies all weights at the start of every epoch and at the end, and the checkpoint's keys of each epoch."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []
        self.groups: list[list[int]] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seen.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})
        (optimizer,) = trainer.optimizers
        self.groups.append([len(group["params"]) for group in optimizer.param_groups])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_train_epoch_start(trainer, pl_module)


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def run(
    base: Path, folder: Path, die_at: tuple[int, int] | None = None, resume: bool = False, **options: Any
) -> tuple[Losses, Weights, Any, Trainer]:
    losses, weights = Losses(die_at), Weights()
    module = make_module(base)
    thaw = AdapterFreeze(thaw_epoch=1, thaw_modules=THAWED, thaw_lr=1e-3)
    checkpoint = AdapterCheckpoint(folder, every_n_steps=2)
    trainer = make_trainer(folder, checkpoint, thaw, losses, weights, **{"max_epochs": 3, **options})
    try:
        trainer.fit(module, make_loader(), ckpt_path=str(folder / "last.ckpt") if resume else None)
    except Killed:
        assert die_at is not None
    return losses, weights, module, trainer


def stored(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "last.ckpt", weights_only=True)  # type: ignore[no-any-return]


def test_named_weights_train_from_their_epoch_on(base: Path, tmp_path: Path) -> None:
    _, weights, module, trainer = run(base, tmp_path)
    first, second, third = (changed(a, b) for a, b in zip(weights.seen, weights.seen[1:], strict=False))
    assert first == {name for name in first if "lora" in name} != set()
    assert second == third == first | NAMES
    assert module.trained_keys() == first | NAMES
    # a group of its own, with its own rate, before and after the thaw
    assert weights.groups == [weights.groups[0]] * 4
    groups = {group["name"]: group for group in trainer.optimizers[0].param_groups}
    assert len(groups["thawed lr 0.001"]["params"]) == len(NAMES)
    assert groups["thawed lr 0.001"]["initial_lr"] == 1e-3
    assert sum(len(group["params"]) for group in groups.values()) == len(first | NAMES)


def test_they_are_in_checkpoints_from_then_on(base: Path, tmp_path: Path) -> None:
    run(base, tmp_path / "before", die_at=(1, 0))
    run(base, tmp_path / "after", die_at=(1, 3))
    before, after = stored(tmp_path / "before"), stored(tmp_path / "after")
    assert (before["global_step"], after["global_step"]) == (6, 8)
    assert not NAMES & before["state_dict"].keys()
    assert after["state_dict"].keys() - before["state_dict"].keys() == NAMES
    states = [len(content["optimizer_states"][0]["state"]) for content in (before, after)]
    assert states[1] - states[0] == len(NAMES)


@pytest.mark.parametrize("die_at", [(0, 4), (1, 0), (1, 3), (2, 0), (2, 5)])
def test_resumes_exactly_before_at_and_after_the_thaw(die_at: tuple[int, int], base: Path, tmp_path: Path) -> None:
    seed_everything(5)
    whole, _, module, _ = run(base, tmp_path / "whole")
    seed_everything(5)
    run(base, tmp_path / "run", die_at=die_at)
    seed_everything(99)
    resumed, _, again, _ = run(base, tmp_path / "run", resume=True)
    assert resumed.seen
    assert {key: whole.seen[key] for key in resumed.seen} == resumed.seen
    assert changed(dict(module.named_parameters()), dict(again.named_parameters())) == set()
    assert stored(tmp_path / "run")["state_dict"].keys() == stored(tmp_path / "whole")["state_dict"].keys()


def test_thaw_in_the_first_epoch_is_training_from_the_start(base: Path, tmp_path: Path) -> None:
    module = make_module(base)
    weights = Weights()
    trainer = make_trainer(tmp_path, AdapterFreeze(thaw_epoch=0, thaw_modules=THAWED), weights, max_epochs=1)
    trainer.fit(module, make_loader())
    assert changed(*weights.seen) >= NAMES


def test_mistakes(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"thaw_epoch is -1; it must be 0 or more"):
        AdapterFreeze(thaw_epoch=-1)
    trainer = make_trainer(tmp_path, AdapterFreeze(thaw_epoch=1, thaw_modules="layers.7"))
    with pytest.raises(ValueError, match=r"thaw_modules 'layers\.7' matches no frozen parameter"):
        trainer.fit(make_module(base), make_loader())


def test_fsdp2_refuses(base: Path) -> None:
    module = make_module(base)
    module.configure_model()
    trainer: Any = SimpleNamespace(strategy=FSDP2Strategy())
    with pytest.raises(TypeError, match=r"Thawing is not possible under FSDP2 .* Use strategy ddp"):
        AdapterFreeze(thaw_epoch=1).on_adapters_placed(trainer, module)
