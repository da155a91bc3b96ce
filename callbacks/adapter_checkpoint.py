"""Checkpoints of what was trained: best and last, written whole, resumed exactly."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lit_peft import __version__
from lit_peft.callbacks import random_states
from lit_peft.callbacks.checkpoint_io import BroadcastCheckpointIO, check, ship, unreadable


class AdapterCheckpoint(ModelCheckpoint):
    """Keep the best and the last checkpoint, such that a run that was killed goes on exactly where it was.

    What a checkpoint holds of the model, the module decides (adapters only, see `PEFT.state_dict`). Added here are the
    random states of every process, and what the run stood on: base model, chat template, versions. `last.ckpt` is
    written at the end of every epoch, after every validation and every `every_n_steps` optimizer steps, only ever
    between two optimizer steps; `best.ckpt` after a validation that improved `monitor`. Without validation there is no
    best. Files are written whole or not at all, and read with `weights_only=True`.

    Resuming needs no shared disk: `BroadcastCheckpointIO` ships the first machine's file to the others. FSDP2 bypasses
    the checkpoint IO when it loads, so the same shipping is put in front of its strategy's `load_checkpoint`.

    Args:
        dirpath: folder; None: `checkpoints` in the logger's folder.
        filename: name of the best; None: `best`, or `best-{epoch}-{step}` where several are kept.
        monitor: logged value that says what is best; None: no best.
        mode: whether low (`min`) or high (`max`) values are good.
        save_top_k: how many of the best to keep; -1: all.
        save_last: whether to keep the last.
        every_n_steps: also write the last one after so many optimizer steps.

    Raises:
        ValueError: if `every_n_steps` is below 1.

    Example:
        >>> from lit_peft.callbacks import AdapterCheckpoint
        >>> callback = AdapterCheckpoint("runs/mine/checkpoints", every_n_steps=500)
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        filename: str | None = None,
        monitor: str | None = "val_loss",
        mode: str = "min",
        save_top_k: int = 1,
        save_last: bool = True,
        every_n_steps: int | None = None,
        verbose: bool = False,
    ) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"every_n_steps is {every_n_steps}; it must be 1 or more, or left out.")
        super().__init__(
            dirpath=dirpath,
            filename=filename or ("best" if save_top_k == 1 else "best-{epoch}-{step}"),
            monitor=monitor,
            mode=mode,
            save_top_k=save_top_k if monitor is not None else 0,
            save_last=save_last,
            verbose=verbose,
            # A resumed run goes on writing its own last.ckpt, not last-v1.ckpt.
            enable_version_counter=save_top_k not in (0, 1),
        )
        self.every_n_steps = every_n_steps
        self._written = 0  # optimizer step of the newest last.ckpt
        self._owed = False
        self._random: dict[str, Any] | None = None

    # Where and how --------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Settle the folder, and install atomic writing and shared reading."""
        super().setup(trainer, pl_module, stage)
        strategy = trainer.strategy
        if type(strategy.checkpoint_io) is TorchCheckpointIO:  # a user's own stays
            strategy.checkpoint_io = BroadcastCheckpointIO()
        if isinstance(strategy, ModelParallelStrategy) and "load_checkpoint" not in vars(strategy):
            vars(strategy)["load_checkpoint"] = _shipped(strategy.load_checkpoint)
        folder = Path(str(self.dirpath))
        if trainer.is_global_zero and stage == "fit" and folder.is_dir():
            for litter in folder.glob(".*.partial"):  # left by a process that was killed while it wrote
                litter.unlink(missing_ok=True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do not write again what was just resumed, and go on at the right place in the data.

        Lightning gives a stateful loader its state only when it makes the loader after the checkpoint was read. A
        learning rate schedule that asked for the number of steps made it before.

        From a file written at an epoch's end, Lightning skips the next epoch if the run is counted in steps: it takes
        the finished epoch for one to finish. So it is told what it sees by itself in a run counted in epochs.
        """
        super().on_train_start(trainer, pl_module)
        self._written = trainer.global_step
        loop = trainer.fit_loop
        if loop.restarted_on_epoch_end:
            loop.epoch_progress.increment_completed()
            loop.reset_restart_stage()
            _Loop.restarting.fset(loop, False)  # type: ignore[attr-defined] # its own setter insists
        if loop.restarting and loop._combined_loader_states_to_load and loop._data_fetcher is not None:
            loop._load_combined_loader_states()
            iter(loop._data_fetcher)

    # When -----------------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Put the random states back when a run goes on in mid-epoch.

        Making the data iterator anew draws a random number, which the uninterrupted run did not draw at this point. At
        the start of an epoch it did, so there the states are put back before (`on_load_checkpoint`).
        """
        if self._random is not None and batch_idx > 0:
            random_states.restore(self._random)
        self._random = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the last one every `every_n_steps`, and when the run ends in mid-epoch."""
        if trainer.global_step == self._written or trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            return  # the end of the epoch writes it
        ending = trainer.should_stop or trainer.global_step == trainer.max_steps
        due = bool(self.every_n_steps) and trainer.global_step % (self.every_n_steps or 1) == 0
        if ending or due or self._owed:
            self._keep_last(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the best one if it improved, and the last one."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking or getattr(trainer, "fast_dev_run", False):
            return
        self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
        self._keep_last(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the last one, unless validation just did."""
        if trainer.global_step != self._written:
            self._keep_last(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Everything is written already."""

    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        if self.monitor in monitor_candidates:  # stock Lightning raises where validation did not log it
            super()._save_topk_checkpoint(trainer, monitor_candidates)

    def _keep_last(self, trainer: Trainer) -> None:
        if not self.save_last or getattr(trainer, "fast_dev_run", False):
            return
        progress = trainer.fit_loop.epoch_loop.batch_progress
        # Gradients that wait for the rest of their batch are not in the file, so it waits for the step.
        self._owed = progress.current.ready % trainer.accumulate_grad_batches != 0 and not progress.is_last_batch
        if not self._owed:
            self._written = trainer.global_step
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    # What -----------------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add every process's random states and what the run stands on; all processes come here."""
        states: list[Any] = [random_states.capture()]
        if dist.is_available() and dist.is_initialized():
            mine, states = states[0], [None] * dist.get_world_size()
            dist.all_gather_object(states, mine)
        checkpoint.setdefault("lit_peft", {}).update(
            random=states,
            base=_base(pl_module),
            template_hash=_template(pl_module),
            world_size=trainer.world_size,
            versions={
                "lit_peft": __version__,
                "torch": str(torch.__version__),
                "lightning": version("lightning"),
                "transformers": version("transformers"),
            },
        )

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Check that the run stands on the same ground, and put the random states back.

        Raises:
            ValueError: if the checkpoint was made on another base model.
        """
        meta = checkpoint.get("lit_peft", {})
        base, stored = _base(pl_module), meta.get("base") or {}
        if base.get("sha") and stored.get("sha") and base["sha"] != stored["sha"]:
            raise ValueError(
                f"The checkpoint was made on {stored.get('name')} ({_short(stored['sha'])}), and the model here is "
                f"{base.get('name')} ({_short(base['sha'])}). Use the same backbone and revision."
            )
        if meta.get("template_hash") and _template(pl_module) not in ("", meta["template_hash"]):
            rank_zero_warn("The tokenizer's chat template is not the one that the checkpoint was trained with.")
        if trainer.state.fn != TrainerFn.FITTING or "random" not in meta:
            return
        processes = meta.get("world_size", 1)
        if processes != trainer.world_size:
            rank_zero_info(
                f"The checkpoint was made by {processes} process{'' if processes == 1 else 'es'}, here are "
                f"{trainer.world_size}: training goes on, but not bit for bit as it would have."
            )
            return
        self._random = meta["random"][trainer.global_rank]
        random_states.restore(self._random or {})

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the random states back once more, after the strategy was set up and the optimizer made."""
        if self._random is not None:
            random_states.restore(self._random)


def _shipped(load: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Put `ship` and readable errors in front of a strategy's `load_checkpoint`."""

    def load_checkpoint(checkpoint_path: _PATH, weights_only: bool | None = True) -> dict[str, Any]:
        ship(checkpoint_path)
        check(checkpoint_path)
        try:
            return load(checkpoint_path, weights_only=True)
        except UnpicklingError as error:
            raise unreadable(checkpoint_path, error) from error

    return load_checkpoint


def _base(module: LightningModule) -> dict[str, Any]:
    identity = getattr(module, "base_identity", None)
    return {key: value if value is None else str(value) for key, value in identity().items()} if identity else {}


def _template(module: LightningModule) -> str:
    template = getattr(getattr(module, "tokenizer", None), "chat_template", None)
    return hashlib.sha256(str(template).encode()).hexdigest() if template else ""


def _short(sha: str) -> str:
    return sha.removeprefix("sha256:")[:12]
