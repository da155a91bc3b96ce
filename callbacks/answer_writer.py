"""Predictions of all processes in one JSON lines file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, cast

import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from lit_peft.callbacks.checkpoint_io import write_atomically


class AnswerWriter(BasePredictionWriter):
    """Write what `predict` returns, one JSON object a line, in the order of the data.

    For a `predict_step` that returns a list of dicts, one for each row. Records of several processes are gathered and
    put back in order (processes take rows in turn); the file appears when it is complete.

    Args:
        path: the file to write.

    Example:
        >>> from lit_peft.callbacks import AnswerWriter
        >>> writer = AnswerWriter("answers.jsonl")
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(write_interval="batch")
        self.path = Path(path)
        self._records: list[tuple[int, int, int, dict[str, Any]]] = []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an earlier prediction."""
        self._records = []

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Keep a batch's records.

        Raises:
            TypeError: if `predict_step` returned no list of dicts.
        """
        if not isinstance(prediction, list) or not all(isinstance(record, dict) for record in prediction):
            name, kind = type(pl_module).__name__, type(prediction).__name__
            raise TypeError(f"{name}.predict_step returned a {kind}; AnswerWriter needs a list of dicts, one a row.")
        for place, record in enumerate(prediction):
            self._records.append((dataloader_idx, batch_idx, place, record))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather, sort and write; all processes come here."""
        everyone: list[Any] = [self._records]
        if dist.is_available() and dist.is_initialized():
            everyone = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, self._records)
        if trainer.is_global_zero:
            # Process r of w has rows r, r + w, ...: within a batch, rows of the same place come from rank to rank.
            found = [((*where, rank), record) for rank, records in enumerate(everyone) for *where, record in records]
            ordered = sorted(found, key=lambda item: item[0])
            lines = [json.dumps(record, ensure_ascii=False, default=_plain) for _, record in ordered]
            write_atomically(self.path, lambda file: _write(file, lines))
        self._records = []


def _write(file: IO[bytes], lines: Sequence[str]) -> None:
    for line in lines:
        file.write(f"{line}\n".encode())


def _plain(value: Any) -> Any:
    return cast(Any, value).tolist() if hasattr(value, "tolist") else str(value)
