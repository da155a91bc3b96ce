"""Ctrl-C and SIGTERM: finish the step, save, say how to resume."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from lit_peft.faults import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class GracefulStop(Callback):
    """Stop between two optimizer steps when a signal comes, with everything saved.

    A checkpoint written in the middle of a step could not be resumed exactly. The first signal therefore only raises a
    flag; the step ends, the last checkpoint is written, and `Interrupted` leaves the run. A second one stops at once.

    Args:
        resume: the command that goes on, as told to the user.

    Example:
        >>> from lit_peft.callbacks import GracefulStop
        >>> callback = GracefulStop()
    """

    def __init__(self, resume: str = "fit again with the last checkpoint") -> None:
        self.resume = resume
        self.received = 0
        self._step = 0
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the signals."""
        self._step = trainer.global_step
        for number in SIGNALS:
            self._previous[number] = signal.getsignal(number)
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        before = self._previous.get(number)
        if self.received and callable(before):  # raises
            before(number, frame)
        self.received = number
        name = signal.Signals(number).name
        rank_zero_info(f"\n{name}: finishing this step, then saving. Again to stop at once.")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save and leave, at the first batch that ended an optimizer step."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            return  # the end of the epoch comes first, with its validation and checkpoint
        # Every process gets the signal at another moment; they must agree on the step.
        stop = bool(self.received)
        if trainer.world_size > 1:
            stop = trainer.strategy.reduce_boolean_decision(stop, all=False)
        if not stop:
            return
        saved = "nothing: no checkpoint callback is there"
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is not None:
                path = Path(callback.dirpath, "last.ckpt")
                trainer.save_checkpoint(path)
                saved = str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
                break
        number = self.received or signal.SIGTERM
        raise Interrupted(number, f"stopped at step {trainer.global_step}, saved {saved}. Resume: {self.resume}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave if the signal came during the last epoch's end; everything is saved by then."""
        if self.received:
            done = f"stopped after the last step, {trainer.global_step}"
            raise Interrupted(self.received, f"{done}. Resume: {self.resume}")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
