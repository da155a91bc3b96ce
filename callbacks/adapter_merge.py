"""Merging at the end of training, into a folder that plain transformers loads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lit_peft.merging import PROBES, check_folder, check_mergeable, write_merged


class AdapterMerge(Callback):
    """Write the merged model at the end of training, with a report of how far its answers are from the adapter's.

    The module itself is not merged: it can be trained on, and its checkpoints stay adapters.

    Args:
        out: folder to write; must not hold anything but an earlier merge.
        prompts: texts on which merged and adapted model are compared.
        dtype: `float32` or `bfloat16`; None: that of the base.
        atol: largest accepted logit difference in float32, relative to the largest logit where that is above 1.

    Attributes:
        report: what `write_merged` returned; empty before, and on all but the first process.

    Example:
        >>> from lit_peft.callbacks import AdapterMerge
        >>> callback = AdapterMerge("runs/mine/merged")
    """

    def __init__(
        self, out: str | Path, prompts: Sequence[str] = PROBES, dtype: str | None = None, atol: float = 1e-4
    ) -> None:
        if not prompts:
            raise ValueError("AdapterMerge has no prompts to compare on. Leave prompts out for the built-in ones.")
        self.out = Path(out)
        self.prompts = list(prompts)
        self.dtype = dtype
        self.atol = atol
        self.report: dict[str, Any] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find out now, not after training, that it cannot work.

        Raises:
            FileExistsError: if the folder holds something else.
            TypeError: if a method cannot be folded.
        """
        check_folder(self.out)
        check_mergeable(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the folder, on the first process; the others wait."""
        if getattr(trainer, "fast_dev_run", False):
            return
        self.report = write_merged(pl_module, self.out, prompts=self.prompts, dtype=self.dtype, atol=self.atol)
        trainer.strategy.barrier("AdapterMerge")
        if self.report:
            worst = ", ".join(f"{value:.1e} in {dtype}" for dtype, value in self.report["differences"].items())
            rank_zero_info(f"merged model in {self.out}: its logits differ by at most {worst}")
