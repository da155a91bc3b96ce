"""Restarts: updates of low rank, folded in again and again, add up to one of high rank (ReLoRA, arXiv 2307.05695)."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lit_peft.adapter import Adapter
from lit_peft.callbacks.base import AdapterCallback
from lit_peft.module import AdaptableModule
from lit_peft.rewriting import keep_base, restartable, seed_of

CYCLES = 4  # where no `every` is given: so many parts of a run, with a restart between two
SHORTEST = 20  # optimizer steps; less than that teaches an adapter nothing worth folding


class AdapterRestart(AdapterCallback):
    """Every so many optimizer steps, fold the adapters into the base weights and start them anew.

    What the model computes stays the same across a restart (in bfloat16 up to one rounding of the base weight). The
    optimizer forgets its moments of the restarted weights, and the learning rate rises again over `warmup` steps,
    whatever schedule the task has. From the first restart on, checkpoints hold the rewritten base weights too.

    Args:
        every: optimizer steps between two restarts; None: a quarter of the run, at least 20.
        warmup: steps in which the learning rate rises again after a restart; None: a tenth of `every`, at most 100.
        seed: for the starting values of the new adapters.

    Attributes:
        count: restarts so far.

    Raises:
        ValueError: if a number is too small.

    Example:
        >>> from lit_peft.callbacks import AdapterRestart
        >>> callback = AdapterRestart(every=500, warmup=50)
    """

    def __init__(self, every: int | None = None, warmup: int | None = None, seed: int = 0) -> None:
        if every is not None and every < 1:
            raise ValueError(f"AdapterRestart's every is {every}; it must be 1 or more, or left out.")
        if warmup is not None and warmup < 0:
            raise ValueError(f"AdapterRestart's warmup is {warmup}; it must be 0 or more, or left out.")
        if every is not None and warmup is not None and warmup >= every:
            raise ValueError(f"AdapterRestart's warmup is {warmup}; it must be below every, which is {every}.")
        self.every = every
        self.warmup = warmup
        self.seed = seed
        self.count = 0
        self._period: int | None = every
        self._at = 0  # optimizer step of the newest restart
        self._seen = 0
        self._end = math.inf
        self._hooks: list[RemovableHandle] = []
        self._held: dict[int, float] = {}

    def on_adapters_placed(self, trainer: Trainer | None, module: AdaptableModule) -> None:
        """Find out before training that a restart cannot work.

        Raises:
            TypeError: naming the layer, or that no adapter can be restarted.
        """
        assert module.model is not None
        restartable(module.model)
        if trainer is not None and isinstance(trainer.strategy, FSDPStrategy):
            raise TypeError("A restart cannot rewrite weights that FSDP1 has flattened. Use strategy fsdp2 or ddp.")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Settle the period, and make up for a restart that fell on the step at which a finished run was saved.

        Raises:
            ValueError: if the run has no end and no `every` was given, or the warm-up is as long as a cycle.
        """
        self._end = trainer.estimated_stepping_batches
        if self._period is None:
            if math.isinf(self._end):
                raise ValueError("AdapterRestart cannot tell when: this run has no end. Set every, or max_steps.")
            self._period = max(SHORTEST, math.ceil(self._end / CYCLES))
        if self.warmup is not None and self.warmup >= self._period:
            raise ValueError(
                f"AdapterRestart's warmup is {self.warmup}; it must be below the {self._period} steps between restarts."
            )
        if self._period >= self._end:
            rank_zero_warn(
                f"No restart will happen: the run has {int(self._end)} steps, one comes every {self._period}."
            )
        self._seen = trainer.global_step
        self._remove_hooks()
        for optimizer in trainer.optimizers:
            self._watch(optimizer, trainer, pl_module)
        self._restart_if_due(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Restart after an optimizer step, never between two batches of one."""
        if trainer.global_step > self._seen:
            self._seen = trainer.global_step
            self._restart_if_due(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let go of the optimizers."""
        self._remove_hooks()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the optimizers, also after an exception."""
        self._remove_hooks()

    # The restart -----------------------------------------------------------------------------------------------------

    def _restart_if_due(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step = trainer.global_step
        assert self._period is not None
        # not at the very end: the last cycle's adapters are the result, and a longer run catches up in on_train_start
        if step == 0 or step % self._period or step == self._at or step >= self._end:
            return
        model = pl_module.model
        assert isinstance(model, nn.Module)
        found = restartable(model)
        fresh: list[Tensor] = []
        for path, adapter in found:
            for name in adapter.active():
                if not adapter.restarts:
                    keep_base(model, path, adapter)
                adapter.restart(name, seed_of(path, adapter.restarts, self.seed))
            fresh += _trained(adapter)
        for optimizer in trainer.optimizers:
            _forget(optimizer, fresh)
        self.count, self._at = self.count + 1, step
        rank_zero_info(f"Restart {self.count} at step {step}: {len(found)} adapters folded into the base weights.")

    # The learning rate -----------------------------------------------------------------------------------------------

    def factor(self, step: int) -> float:
        """Return what the learning rate of an optimizer step (counted from 0) is multiplied by."""
        if not self.count or self._period is None:
            return 1.0
        warmup = self.warmup if self.warmup is not None else min(100, self._period // 10)
        return min(1.0, (step - self._at + 1) / (warmup + 1))

    def _watch(self, optimizer: Optimizer, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lower the learning rate within `optimizer.step` only: schedulers never see it, so nothing can drift."""
        model = pl_module.model
        assert isinstance(model, nn.Module)
        own = {id(parameter) for _, adapter in restartable(model) for parameter in _trained(adapter)}

        def lower(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            factor = self.factor(trainer.global_step)
            for index, group in enumerate(optimizer.param_groups):
                # an optimizer that extends another's step runs these hooks twice, one inside the other: lower once
                wanted = factor < 1 and index not in self._held
                if wanted and any(id(parameter) in own for parameter in group["params"]):
                    self._held[index] = group["lr"]
                    group["lr"] = group["lr"] * factor

        def give_back(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            for index, lr in self._held.items():
                optimizer.param_groups[index]["lr"] = lr
            self._held.clear()

        self._hooks += [optimizer.register_step_pre_hook(lower), optimizer.register_step_post_hook(give_back)]

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    # Resuming --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the number and time of restarts, and the period in use."""
        return {"count": self.count, "at": self._at, "period": self._period, "seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on in mid-cycle; a period that the user gives now wins over the saved one."""
        self.count, self._at, self.seed = state_dict["count"], state_dict["at"], state_dict["seed"]
        self._period = self.every or state_dict["period"]


def _trained(adapter: Adapter) -> list[Tensor]:
    return [parameter for _, parameter in adapter.trained_parameters()]


def _forget(optimizer: Optimizer, parameters: list[Tensor]) -> None:
    """Zero what an optimizer knows of some parameters.

    The step count goes back to zero with the moments: Adam's bias correction would else take three times too large a
    first step. In place, because sharded optimizers expect the state of every parameter; states that are no plain
    numbers (8-bit) are dropped, and the optimizer makes them anew.
    """
    for parameter in parameters:
        state: dict[str, Any] = optimizer.state.get(parameter, {})
        tensors = [value for value in state.values() if isinstance(value, Tensor)]
        if any(not value.is_floating_point() for value in tensors):
            state.clear()
        for key, value in state.items():
            if isinstance(value, Tensor):
                value.zero_()
            elif key == "step":
                state[key] = 0
