"""Freezing: only adapters, and what a method or task declares, are trained."""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch.optim import Optimizer

from lit_peft.adapter import named_adapters, remember
from lit_peft.callbacks.base import AdapterCallback
from lit_peft.module import AdaptableModule


class AdapterFreeze(AdapterCallback):
    """Freeze everything but the adapters and what the method or task declares trainable; optionally thaw later.

    Attached by every method by itself: forgetting it is impossible. Give your own to thaw parts of the base.

    Args:
        thaw_epoch: the epoch at whose start the named weights begin to train as well; None: never.
        thaw_modules: regular expression over parameter paths in the model, such as `layers\\.(10|11)\\.`.
        thaw_lr: learning rate of the thawed weights.

    Raises:
        ValueError: if `thaw_epoch` is negative or nothing matches `thaw_modules`.

    Example:
        >>> from lit_peft.callbacks import AdapterFreeze
        >>> callback = AdapterFreeze(thaw_epoch=2, thaw_modules=r"layers\\.1\\.", thaw_lr=1e-5)
    """

    def __init__(self, thaw_epoch: int | None = None, thaw_modules: str = ".*", thaw_lr: float = 1e-5) -> None:
        if thaw_epoch is not None and thaw_epoch < 0:
            raise ValueError(f"thaw_epoch is {thaw_epoch}; it must be 0 or more.")
        self.thaw_epoch = thaw_epoch
        self.thaw_modules = re.compile(thaw_modules)
        self.thaw_lr = thaw_lr
        self.thawed = False
        self._names: list[str] = []

    def on_adapters_placed(self, trainer: Trainer | None, module: AdaptableModule) -> None:
        """Set `requires_grad` on every parameter of the model."""
        model = module.model
        assert model is not None
        own = {id(parameter) for _, adapter in named_adapters(model) for _, parameter in adapter.trained_parameters()}
        for name, parameter in model.named_parameters():
            trains = id(parameter) in own or module.is_trainable(name, parameter)
            if trains:
                _check_real(name, parameter)
            parameter.requires_grad_(trains)
        if self.thaw_epoch is None:
            return
        if trainer is not None and isinstance(trainer.strategy, ModelParallelStrategy):
            raise TypeError("Thawing is not possible under FSDP2 (shards are laid out once). Use strategy ddp.")
        self._names = [
            name for name, p in model.named_parameters() if not p.requires_grad and self.thaw_modules.search(name)
        ]
        if not self._names:
            raise ValueError(f"thaw_modules {self.thaw_modules.pattern!r} matches no frozen parameter of this model.")
        for name, parameter in model.named_parameters():
            if name in set(self._names):
                _check_real(name, parameter)
        remember(model, ((name, p) for name, p in model.named_parameters() if name in set(self._names)))
        # The optimizer gets them as a group of its own from the start: without gradients it leaves them alone, and
        # schedulers and resumed runs see the same groups before and after the thaw.
        module.thaws = dict.fromkeys(self._names, self.thaw_lr)  # type: ignore[assignment]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Thaw at once when a run is resumed behind the epoch (Lightning skips the epoch hook in mid-epoch)."""
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Thaw when the epoch has come."""
        if self.thaw_epoch is None or self.thawed or trainer.current_epoch < self.thaw_epoch:
            return
        parameters = dict(pl_module.model.named_parameters())  # type: ignore[operator, union-attr]
        for name in self._names:
            parameters[name].requires_grad_(True)
        self.thawed = True
        rank_zero_info(f"Thawed {len(self._names)} weights at epoch {trainer.current_epoch}, lr {self.thaw_lr:g}.")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Average the thawed weights' gradients over processes: DDP only knows what trained when it was set up."""
        if not self.thawed or trainer.world_size == 1 or not dist.is_initialized():
            return
        parameters = dict(pl_module.model.named_parameters())  # type: ignore[operator, union-attr]
        for name in self._names:
            gradient = parameters[name].grad
            if gradient is None:
                gradient = parameters[name].grad = torch.zeros_like(parameters[name])
            dist.all_reduce(gradient)
            gradient.div_(trainer.world_size)

    def state_dict(self) -> dict[str, Any]:
        """Return whether the thaw has happened."""
        return {"thawed": self.thawed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Forget the thaw on purpose: `on_train_start` does it again on the fresh model."""
        self.thawed = False


def _check_real(name: str, parameter: torch.nn.Parameter) -> None:
    if not parameter.is_floating_point():
        raise TypeError(
            f"{name.rpartition('.')[0]} is stored in four bits and cannot be trained in place. Set quantize='none', or "
            "use a method that leaves the base frozen (lora, bitfit)."
        )
