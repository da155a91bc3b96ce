"""What other libraries say while a command runs, cut down to what a reader needs."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import Any

from transformers.utils.logging import disable_progress_bar, set_verbosity_error

NOISE = (
    "litlogger",
    "TPU available",
    "Loading `train_dataloader` to estimate",
    "`Trainer.fit` stopped",
    "Using bfloat16 Automatic Mixed Precision",
    "Restoring states from",
    "Restored all states",
    "Loaded model weights",
)
HARMLESS = (
    ".*does not have many workers.*",
    ".*smaller than the logging interval.*",
    ".*in eval mode at the start.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*Experiment logs directory.*",
    ".*but have no `val_dataloader`.*",
    ".*is not supported by the model summary.*",
    ".*contains `None` val.*",
    ".*isinstance.treespec, LeafSpec.*",
    ".*callbacks used to create the checkpoint need to be provided.*",
    ".*sync_dist=True.*",  # metrics are summed over processes before they are logged
)


def quiet() -> None:
    """Silence what would bury the run's own lines."""
    log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    log.addFilter(lambda record: not any(text in record.getMessage() for text in NOISE))
    for text in HARMLESS:
        warnings.filterwarnings("ignore", text)
    warnings.showwarning = _plainly
    disable_progress_bar()
    set_verbosity_error()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _plainly(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
    print(f"warning: {' '.join(str(message).split())}", file=file or sys.stderr)
