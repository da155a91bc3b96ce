"""What the model answers, epoch by epoch."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from rich.table import Table
from torch import nn

from lit_peft.callbacks import random_states

SHOWN = 300  # characters of a cell


class SampleAnswers(Callback):
    """Answer the same few prompts after every validation, show them, and add them to `samples.jsonl` in the run folder.

    Prompts of your own are answered by the module's `reply`; without any, the first validation rows by its
    `predict_step`, next to the right answer. Training is not disturbed: random states and modes are put back.

    Args:
        prompts: questions; None: the first validation rows.
        every_n_epochs: how often.
        rows: how many validation rows.

    Raises:
        ValueError: if a number is below 1 or there are no prompts in the list.

    Example:
        >>> from lit_peft.callbacks import SampleAnswers
        >>> callback = SampleAnswers(["What is the capital of France?"])
    """

    def __init__(self, prompts: Sequence[str] | None = None, every_n_epochs: int = 1, rows: int = 3) -> None:
        if prompts is not None and not prompts:
            raise ValueError("SampleAnswers has an empty list of prompts. Leave it out to answer validation rows.")
        for name, value in (("every_n_epochs", every_n_epochs), ("rows", rows)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be 1 or more.")
        self.prompts = None if prompts is None else list(prompts)
        self.every_n_epochs = every_n_epochs
        self.rows = rows

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See that the module can answer.

        Raises:
            TypeError: if it cannot.
        """
        needed = "predict_step" if self.prompts is None else "reply"
        if not callable(getattr(pl_module, needed, None)):
            name = type(pl_module).__name__
            raise TypeError(f"{name} has no {needed}, which SampleAnswers needs. Remove the callback.")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Answer on all processes (a sharded model needs them all), show and write on the first."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        if (trainer.current_epoch + 1) % self.every_n_epochs:
            return
        with undisturbed(pl_module), trainer.precision_plugin.predict_step_context():
            records = self._answers(trainer, pl_module)
        if records and trainer.is_global_zero:
            self._show(trainer, records)
            folder = Path(trainer.default_root_dir)
            folder.mkdir(parents=True, exist_ok=True)
            when = {"epoch": trainer.current_epoch, "step": trainer.global_step}
            with open(folder / "samples.jsonl", "a", encoding="utf-8") as file:
                file.writelines(json.dumps(when | record, ensure_ascii=False) + "\n" for record in records)

    def _answers(self, trainer: Trainer, module: Any) -> list[dict[str, Any]]:
        if self.prompts is not None:
            ask = [[{"role": "user", "content": prompt}] for prompt in self.prompts]
            return [
                {"prompt": prompt, "generated": module.reply(messages)}
                for prompt, messages in zip(self.prompts, ask, strict=True)
            ]
        loader: Any = trainer.val_dataloaders
        loader = loader[0] if isinstance(loader, (list, tuple)) and loader else loader
        if not hasattr(loader, "dataset") or not len(loader.dataset):
            return []
        # Not the loader's own batches: every process has other rows there.
        batch = loader.collate_fn([loader.dataset[i] for i in range(min(self.rows, len(loader.dataset)))])
        batch = module.transfer_batch_to_device(batch, module.device, 0)
        records = module.predict_step(batch, 0)
        return list(records) if isinstance(records, list) and all(isinstance(r, dict) for r in records) else []

    def _show(self, trainer: Trainer, records: Sequence[dict[str, Any]]) -> None:
        table = Table(title=f"answers after epoch {trainer.current_epoch}, step {trainer.global_step}", show_lines=True)
        for name in records[0]:
            table.add_column(name, overflow="fold", style="bold" if name == "generated" else "")
        for record in records:
            table.add_row(*(_short(record.get(name, "")) for name in records[0]))
        console = Console(file=io.StringIO(), width=Console().width)
        console.print(table)
        text = console.file.getvalue()  # type: ignore[attr-defined]
        bar: Any = trainer.progress_bar_callback
        if getattr(bar, "is_enabled", False):
            bar.print(text)  # above the bar, not through it
        else:
            print(text)


def _short(value: Any) -> str:
    text = str(value).replace("[", r"\[")  # rich would read [...] as markup
    return text if len(text) <= SHOWN else f"... {text[-SHOWN:]}"


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Evaluate inside the block without gradients; put back modes and random states after it."""
    modes = {part: part.training for part in module.modules()}
    states = random_states.capture()
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in modes.items():
            part.training = training
        random_states.restore(states)
