"""How fast a run is and what it takes: tokens per second, peak memory, trainable share."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lit_peft.weights import count


class Throughput(Callback):
    """Show tokens per second, peak memory and the trainable share in the progress bar, and keep them for reports.

    Tokens are those of the input without padding, over all processes. The clock runs while training, waiting for data
    included, and stops during validation. The device is asked every `every_n_steps` batches, not at each.

    Args:
        every_n_steps: after how many batches the shown numbers are renewed.

    Attributes:
        tokens: tokens trained on, all processes together.
        seconds: time they took.
        peak_memory: bytes: allocated on the CUDA device, else resident in this process.
        trainable: number of trained weights.
        total: number of all weights of the module.

    Example:
        >>> from lit_peft.callbacks import Throughput
        >>> callback = Throughput(every_n_steps=20)
    """

    def __init__(self, every_n_steps: int = 10) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps is {every_n_steps}; it must be 1 or more.")
        self.every_n_steps = every_n_steps
        self.tokens = 0
        self.seconds = 0.0
        self.peak_memory = 0
        self.trainable = 0
        self.total = 0
        self._since: float | None = None
        self._waiting: Tensor | int = 0  # counted, but not yet fetched from the device
        self._processes = 1
        self._last = (0, 0.0)
        self._shown: dict[str, float] = {}

    @property
    def tokens_per_second(self) -> float:
        """Mean over the run so far."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def trainable_share(self) -> float:
        """Trained weights as a share of all."""
        return self.trainable / self.total if self.total else 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the weights and start the clock."""
        self.total, self.trainable = count(pl_module), count(pl_module, trained=True)
        self._waiting, self._shown = 0, {}
        self._processes = trainer.world_size
        self._last = (self.tokens, self.seconds)
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        self._since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch; renew the numbers now and then."""
        self._waiting = self._waiting + tokens_in(batch)
        if (batch_idx + 1) % self.every_n_steps == 0 or not self._shown:
            self._renew(pl_module)
        for name, value in self._shown.items():
            pl_module.log(name, value, prog_bar=True, logger=False)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._stop()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on, if this was inside of training."""
        if trainer.training or (trainer.state.fn == "fit" and not trainer.sanity_checking):
            self._since = time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the last batches in; processes that shared the work take the largest peak of all."""
        self._renew(pl_module)
        self._stop()
        if dist.is_available() and dist.is_initialized():
            peak = torch.tensor(self.peak_memory, device=pl_module.device)
            dist.all_reduce(peak, op=dist.ReduceOp.MAX)
            self.peak_memory = int(peak)

    def settle(self) -> None:
        """Take in what was counted but not fetched yet, so that the attributes are up to date."""
        # Processes hold about equally many tokens: this one's stand for all, which costs no communication.
        self.tokens += int(self._waiting) * self._processes
        self._waiting = 0
        if self._since is not None:
            now = time.perf_counter()
            self.seconds += now - self._since
            self._since = now

    def _stop(self) -> None:
        self.settle()
        self._since = None

    def _renew(self, pl_module: LightningModule) -> None:
        tokens, seconds = self._last
        self.settle()
        self._last = (self.tokens, self.seconds)
        self.peak_memory = max(self.peak_memory, peak_memory(pl_module.device))
        self._shown = {"GB": round(self.peak_memory / 1e9, 2), "trained%": round(100 * self.trainable_share, 3)}
        if self.tokens > tokens and self.seconds > seconds:
            rate = (self.tokens - tokens) / (self.seconds - seconds)
            self._shown = {"tokens/s": float(f"{rate:.3g}"), **self._shown}

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run adds to."""
        self.settle()
        return {"tokens": self.tokens, "seconds": self.seconds, "peak_memory": self.peak_memory}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.tokens, self.seconds = state_dict["tokens"], state_dict["seconds"]
        self.peak_memory = state_dict["peak_memory"]


def tokens_in(batch: Any) -> Tensor | int:
    """Return the number of input tokens of a batch that are no padding; 0 for a batch without tokens."""
    if not hasattr(batch, "get"):
        return 0
    mask, ids = batch.get("attention_mask"), batch.get("input_ids")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return mask.sum()
    return ids.numel() if isinstance(ids, Tensor) else 0


def peak_memory(device: torch.device) -> int:
    """Return the most memory taken so far, in bytes: on the CUDA device, else by this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # Windows
        return 0
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024
