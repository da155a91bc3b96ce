"""A callback for runs that are to be killed: says who runs and how far it is, and stands still where it is told to."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer


class Watched(Callback):
    """Write process ids and steps into the folder `$WATCH`; without that variable, do nothing.

    `$WATCH_PAUSE` seconds pass before every batch, so that a kill from outside hits any place in a step. `$WATCH_HOLD`,
    such as `on_train_epoch_start:6`, names a hook and an optimizer step at which to wait for the kill.
    """

    def __init__(self) -> None:
        self.folder = os.environ.get("WATCH")
        self.pause = float(os.environ.get("WATCH_PAUSE", "0"))
        self.hold = os.environ.get("WATCH_HOLD", "")

    def at(self, hook: str, trainer: Trainer) -> None:
        if self.folder is None or trainer.sanity_checking:
            return
        folder = Path(self.folder)
        (folder / f"pid-{os.getpid()}").touch()
        (folder / f"step-{trainer.global_step}").touch()
        if f"{hook}:{trainer.global_step}" == self.hold:
            (folder / f"held-{trainer.global_rank}").touch()
            time.sleep(600)

    def on_train_batch_start(self, trainer: Trainer, *rest: Any) -> None:
        self.at("on_train_batch_start", trainer)
        time.sleep(self.pause)

    def on_train_epoch_start(self, trainer: Trainer, *rest: Any) -> None:
        self.at("on_train_epoch_start", trainer)

    def on_validation_end(self, trainer: Trainer, *rest: Any) -> None:
        self.at("on_validation_end", trainer)

    def on_train_epoch_end(self, trainer: Trainer, *rest: Any) -> None:
        self.at("on_train_epoch_end", trainer)
