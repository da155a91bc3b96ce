"""The card of a run: a README of measured numbers, with the curves."""

from __future__ import annotations

import platform
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lit_peft import __version__
from lit_peft.adapter import scopes_of
from lit_peft.callbacks.checkpoint_io import write_atomically
from lit_peft.callbacks.curves import draw
from lit_peft.callbacks.throughput import Throughput, peak_memory
from lit_peft.merging import is_mergeable
from lit_peft.weights import count

POINTS = 4000  # kept for the curves; a longer run keeps every second, fourth, ... step
FETCH = 100  # losses stay on the device this long, so that no step waits for it


class RunReport(Callback):
    """Write the run folder's `README.md` and `curves.png` when training ends: what was measured and how to go on.

    What comes after training (an evaluation, sample answers) is handed over, then the card is written again.

    Args:
        folder: where to write; None: the Trainer's `default_root_dir`.

    Example:
        >>> from lit_peft.callbacks import RunReport
        >>> report = RunReport()
        >>> report.add_table("held-out rows", ["", "base", "tuned"], [["exact match", "12 %", "81 %"]])
        >>> # trainer.fit(...); report.write(trainer, module)
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = None if folder is None else Path(folder)
        self.train: list[tuple[int, float]] = []
        self.rate: list[tuple[int, float]] = []
        self.validation: list[dict[str, float]] = []
        self.seconds = 0.0
        self.facts: dict[str, str] = {}
        self._stride = 1
        self._step = 0
        self._waiting: list[tuple[int, Tensor | float]] = []
        self._begun = 0.0
        self._tables: dict[str, tuple[list[str], list[list[str]]]] = {}
        self._samples: list[dict[str, Any]] = []

    # Watching -------------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._begun = time.monotonic()
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note loss and learning rate of each optimizer step."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        if self._step % self._stride:
            return
        own = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        loss = trainer.callback_metrics.get("train_loss", own)
        if isinstance(loss, Tensor):
            self._waiting.append((self._step, loss.detach().clone()))
        if trainer.optimizers:
            self.rate.append((self._step, float(max(group["lr"] for group in trainer.optimizers[0].param_groups))))
        if len(self._waiting) >= FETCH:
            self._fetch()

    def _fetch(self) -> None:
        self.train += [(step, float(loss)) for step, loss in self._waiting]
        self._waiting = []
        while len(self.train) > POINTS:
            self._stride *= 2
            self.train = [point for point in self.train if point[0] % self._stride == 0]
            self.rate = [point for point in self.rate if point[0] % self._stride == 0]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note what validation logged."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        found = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val") and v.numel() == 1}
        if found:
            self.validation.append({"step": trainer.global_step, **found})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather the facts and write the card, on the first process."""
        self._fetch()
        self.seconds += time.monotonic() - self._begun
        self._begun = time.monotonic()
        if trainer.is_global_zero and not getattr(trainer, "fast_dev_run", False):
            self.facts = self._gather(trainer, pl_module)
            self.write(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return the curves, so that a resumed run shows all of them."""
        self._fetch()
        passed = time.monotonic() - self._begun if self._begun else 0.0
        return {
            "train": [list(point) for point in self.train],
            "rate": [list(point) for point in self.rate],
            "validation": [dict(row) for row in self.validation],
            "stride": self._stride,
            "seconds": self.seconds + passed,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the curves."""
        self.train = [(int(step), float(value)) for step, value in state_dict["train"]]
        self.rate = [(int(step), float(value)) for step, value in state_dict["rate"]]
        self.validation = [dict(row) for row in state_dict["validation"]]
        self._stride, self.seconds = state_dict["stride"], state_dict["seconds"]

    # Handing over ---------------------------------------------------------------------------------------------------

    def add_table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Put a table into the card, such as base against tuned; one of the same title is replaced.

        Raises:
            ValueError: if a row is longer or shorter than the header.
        """
        for row in rows:
            if len(row) != len(columns):
                raise ValueError(f"A row of {title!r} has {len(row)} cells, the header {len(columns)}: {list(row)}.")
        self._tables[title] = (list(columns), [[str(cell) for cell in row] for row in rows])

    def add_samples(self, samples: Sequence[Mapping[str, Any]]) -> None:
        """Put sample answers into the card, instead of those that were there."""
        self._samples = [dict(sample) for sample in samples]

    # Writing --------------------------------------------------------------------------------------------------------

    def write(self, trainer: Trainer, module: LightningModule) -> Path:
        """Write `README.md` and `curves.png` and return the README's path; call it on the first process only."""
        folder = self.folder or Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        facts = self.facts or self._gather(trainer, module)
        name = folder.resolve().name
        losses = [(int(row["step"]), row["val_loss"]) for row in self.validation if "val_loss" in row]
        if self.train or losses:
            title = f"{facts['method']} on {facts['base'].split(',')[0]}"
            draw(folder / "curves.png", title, self.train, losses, self.rate)
        parts = [f"# {name}\n", _table(["", ""], [[key, value] for key, value in facts.items()])]
        if self.train or losses:
            parts.append("![loss and learning rate over the run](curves.png)\n")
        for picture in sorted(folder.glob("*.png")):  # of other callbacks
            if picture.name != "curves.png":
                parts.append(f"![{picture.stem}]({picture.name})\n")
        if self.validation:
            parts.append("## Validation\n\n" + self._validation())
        for title, (columns, rows) in self._tables.items():
            parts.append(f"## {title[:1].upper()}{title[1:]}\n\n" + _table(columns, rows))
        if self._samples:
            columns = list(self._samples[0])
            rows = [[str(sample.get(column, "")) for column in columns] for sample in self._samples]
            parts.append("## Sample answers\n\n" + _table(columns, rows))
        parts.append(_next(trainer, folder, module))
        text = "\n".join(parts)
        write_atomically(folder / "README.md", lambda file: file.write(text.encode()))
        return folder / "README.md"

    def _validation(self) -> str:
        rows = self.validation
        if len(rows) > 12:  # first, best, last few
            best = min(rows, key=lambda row: row.get("val_loss", 0.0))
            rows = [row for row in rows if row is rows[0] or row is best or row in rows[-4:]]
        columns = list(rows[-1])
        return _table(columns, [[_number(row[key]) if key in row else "" for key in columns] for row in rows])

    def _gather(self, trainer: Trainer, module: LightningModule) -> dict[str, str]:
        base: dict[str, Any] = getattr(module, "base_identity", dict)()
        named = base.get("name") or type(getattr(module, "model", module)).__name__
        ground = [str(named)]
        ground += [f"revision {base['revision']}"] if base.get("revision") else []
        ground += [f"sha {base['sha'].removeprefix('sha256:')[:12]}"] if base.get("sha") else []
        settings = {k: v for k, v in module.hparams.items() if isinstance(v, Mapping) and not k.startswith("_")}
        facts = {
            "base": ", ".join(ground),
            "method": type(module).__name__,
            **{f"`{key}`": ", ".join(f"{k} {v}" for k, v in value.items()) for key, value in settings.items()},
            **self._sizes(trainer, module),
            **_data(trainer),
            "steps": f"{trainer.global_step} optimizer steps, {trainer.current_epoch} epochs",
        }
        if self.train:
            few = max(1, min(10, len(self.train) // 10))
            ends = [sum(v for _, v in part) / few for part in (self.train[:few], self.train[-few:])]
            facts["training loss"] = f"{ends[0]:.4g} at the start, {ends[1]:.4g} at the end"
        best = getattr(trainer.checkpoint_callback, "best_model_score", None)
        if isinstance(best, Tensor):
            facts["best validation"] = f"{trainer.checkpoint_callback.monitor} {float(best):.4g}"  # type: ignore[union-attr]
        processes = f"{trainer.world_size} process{'' if trainer.world_size == 1 else 'es'}"
        on_gpu = module.device.type == "cuda"
        device = torch.cuda.get_device_name(module.device) if on_gpu else f"CPU ({platform.machine()})"
        return {
            **facts,
            "duration": _duration(self.seconds),
            "machine": f"{processes} on {device}, precision {trainer.precision}",
            "versions": ", ".join(f"{name} {number}" for name, number in _versions().items()),
            "date": datetime.now().strftime("%Y-%m-%d %H:%M"),
        }

    def _sizes(self, trainer: Trainer, module: LightningModule) -> dict[str, str]:
        speed = next((callback for callback in trainer.callbacks if isinstance(callback, Throughput)), None)  # type: ignore[attr-defined]
        total, trained = count(module), count(module, trained=True)
        facts = {"trained": f"{trained:,} of {total:,} weights ({100 * trained / max(1, total):.3g} %)"}
        if speed is not None:
            speed.settle()
        if speed is not None and speed.tokens:
            facts["throughput"] = f"{speed.tokens_per_second:,.0f} tokens/s, {speed.tokens:,} tokens"
        peak = speed.peak_memory if speed is not None else peak_memory(module.device)
        facts["peak memory"] = (
            f"{peak / 1e9:.2f} GB {'on the GPU' if module.device.type == 'cuda' else 'of the process'}"
        )
        return facts


def _versions() -> dict[str, str]:
    return {"lit_peft": __version__, **{name: version(name) for name in ("torch", "lightning", "transformers")}}


def _data(trainer: Trainer) -> dict[str, str]:
    data: Any = getattr(trainer, "datamodule", None)
    facts = {}
    if getattr(data, "path", None) is not None:
        facts["data"] = str(data.path)
    sizes = []
    for name, loader in (("training", trainer.train_dataloader), ("validation", trainer.val_dataloaders)):
        rows: Any = getattr(loader, "dataset", None)
        if hasattr(rows, "__len__"):
            sizes.append(f"{len(rows):,} {name}")
    if sizes:
        facts["rows"] = ", ".join(sizes)
    counts = getattr(data, "report", None)
    if isinstance(counts, Mapping) and counts:
        facts["reading"] = ", ".join(f"{key.replace('_', ' ')} {_number(value)}" for key, value in counts.items())
    return facts


def onward(module: LightningModule, run: str) -> dict[str, str]:
    """Return what can be done with a run: what for -> command.

    Args:
        module: what was trained.
        run: its folder, quoted for a shell.
    """
    lines = {"look into it": f"lit-peft inspect {run}"}
    model: Any = getattr(module, "model", None)
    if hasattr(module, "reply"):
        whole = any(scope.irreversible for scope in scopes_of(model))
        lines = {"talk to it": f"lit-peft chat {run}{'' if whole else ' --vs base'}"}
    if model is not None and is_mergeable(module):
        lines["fold it into the base"] = f"lit-peft merge {run} --out {run}/merged"
    return lines


def _next(trainer: Trainer, folder: Path, module: LightningModule) -> str:
    program, *arguments = sys.argv
    own = Path(program).name in ("lit-peft", "__main__.py")
    command = shlex.join([*(["lit-peft"] if own else ["python", program]), *arguments])
    run = shlex.quote(str(folder))
    last = getattr(trainer.checkpoint_callback, "last_model_path", "") or folder / "checkpoints" / "last.ckpt"
    lines = {
        "this run": command,
        "go on with it": f"lit-peft fit --ckpt_path {shlex.quote(str(last))}",
        **onward(module, run),
    }
    width = max(map(len, lines.values()))
    listed = "\n".join(f"{line:{min(width, 90)}}  # {why}" for why, line in lines.items())
    return f"## Commands\n\n```sh\n{listed}\n```\n"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(str(text).replace("|", r"\|").replace("<", "&lt;").split())


def _number(value: Any) -> str:
    if isinstance(value, float) and not value.is_integer():
        return f"{value:.4g}"
    return f"{int(value):,}" if isinstance(value, (int, float)) else str(value)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
