"""Small training runs for the callbacks' tests: a tiny Llama, random rows, quiet Trainers."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_peft.data.loader import ResumableLoader, ShardedSampler
from lit_peft.zoo import compose
from tests.models import VOCAB

LENGTH = 9


def make_module(base: Path, method: str = "lora", dropout: float = 0.1, **options: Any) -> Any:
    """A module with an adapter that is not zero at the start, so that merging and restoring have something to do."""
    if "lora" in method:
        options.setdefault("lora", {"r": 2, "dropout": dropout})
    return compose(method, "sft")(backbone=str(base), **{"lr": 1e-3, "max_new_tokens": 4, **options})


def make_rows(count: int = 12, seed: int = 1) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        ids = torch.randint(5, VOCAB, (LENGTH,), generator=generator)
        labels = ids.clone()
        labels[:4] = -100
        rows.append({"input_ids": ids, "labels": labels, "attention_mask": torch.ones(LENGTH, dtype=torch.long)})
    return rows


def make_loader(count: int = 12, batch_size: int = 2, shuffle: bool = True, seed: int = 1) -> ResumableLoader:
    rows = make_rows(count, seed)
    return ResumableLoader(rows, batch_size=batch_size, sampler=ShardedSampler(rows, shuffle=shuffle, seed=3))


def make_trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(hasattr(c, "best_model_path") for c in callbacks),
    }
    return Trainer(
        **{"max_epochs": 2, "accelerator": "cpu", **quiet, **options},
        default_root_dir=folder,
        callbacks=list(callbacks),
    )


class Killed(Exception):
    """Stands for SIGKILL: nothing is saved after it."""


class Losses(Callback):
    """Writes down every training loss by (epoch, batch), and dies before a batch if asked to."""

    def __init__(self, die_at: tuple[int, int] | None = None) -> None:
        self.die_at = die_at
        self.seen: dict[tuple[int, int], float] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx) == self.die_at:
            raise Killed

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.seen[trainer.current_epoch, batch_idx] = float(outputs["loss"])
