"""What a run cost and what it reached, as numbers in a file: for comparing runs with each other."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_peft.callbacks.checkpoint_io import write_atomically
from lit_peft.callbacks.throughput import peak_memory
from lit_peft.tensor_files import shapes

WARM_UP = 2  # steps that are not timed where there are more: the first ones allocate and compile


class Measures(Callback):
    """Write `measures.json`, and the adapter as it is when training ends into `adapter/`.

    The file holds `trained` (weights), `stored` (`parameters` and `bytes` of the adapter folder), `steps`, the median
    `step_seconds` (an optimizer step's forward, backward and update, without data and validation), `peak_memory` in
    bytes with what was measured in `memory_of`, `final_loss`, and under `test` what a test logged, the last one.

    Args:
        folder: where to write; None: the Trainer's `default_root_dir`.

    Example:
        >>> from lit_peft.callbacks import Measures
        >>> callback = Measures()
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = None if folder is None else Path(folder)
        self.measured: dict[str, Any] = {}
        self._before = resident()  # the model is not loaded yet
        self._step = 0
        self._begun: float | None = None
        self._seconds: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the weights."""
        self._step = trainer.global_step
        self.measured["trained"] = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock at the first batch of an optimizer step."""
        if self._begun is None:
            self._seconds.append(0.0)
        self._begun = _now(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the batch's time to its step."""
        if self._begun is not None:
            self._seconds[-1] += _now(pl_module) - self._begun
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            self._begun = None  # the next batch begins a step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the peak before anything else is done with the model."""
        on_gpu = pl_module.device.type == "cuda"
        peak = peak_memory(pl_module.device)
        timed = self._seconds[WARM_UP:] if len(self._seconds) > 2 * WARM_UP else self._seconds
        loss = trainer.callback_metrics.get("train_loss")
        self.measured |= {
            "steps": trainer.global_step,
            "step_seconds": median(timed) if timed else None,
            "peak_memory": peak if on_gpu else max(0, peak - self._before),
            "memory_of": "allocated on the GPU"
            if on_gpu
            else "process, above what it held before the model was loaded",
            "final_loss": None if loss is None else float(loss),
        }

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the adapter and see how much it holds."""
        folder = self._home(trainer)
        save: Any = getattr(pl_module, "save_adapter", None)
        if save is not None:
            if trainer.is_global_zero:
                shutil.rmtree(folder / "adapter", ignore_errors=True)
            trainer.strategy.barrier()
            save(folder / "adapter")
            self.measured["stored"] = stored(folder / "adapter")
        self._write(trainer)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note what the test logged."""
        found = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("test_")}
        self.measured["test"] = found
        self._write(trainer)

    def _home(self, trainer: Trainer) -> Path:
        return self.folder or Path(trainer.default_root_dir)

    def _write(self, trainer: Trainer) -> None:
        if trainer.is_global_zero:
            text = json.dumps(self.measured, indent=1)
            write_atomically(self._home(trainer) / "measures.json", lambda file: file.write(text.encode()))


def stored(folder: Path) -> dict[str, int]:
    """Return how many parameters and bytes the weights of an adapter folder are."""
    files = sorted(folder.rglob("*.safetensors"))
    sizes = [torch.Size(shape).numel() for file in files for shape in shapes(file).values()]
    return {"parameters": sum(sizes), "bytes": sum(file.stat().st_size for file in files)}


def resident() -> int:
    """Return the bytes of memory that this process holds now; 0 where that cannot be told."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    except OSError:
        return 0
    import resource

    return pages * resource.getpagesize()


def _now(module: LightningModule) -> float:
    if module.device.type == "cuda":
        torch.cuda.synchronize(module.device)
    return time.perf_counter()
