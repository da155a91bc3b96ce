"""Callbacks around adapters: freezing, checkpoints, merging, reports. Imported as `lit_peft.callbacks`."""

from importlib import import_module
from typing import Any

_HOME = {
    "AdapterCallback": "base",
    "AdapterFreeze": "adapter_freeze",
    "AdapterCheckpoint": "adapter_checkpoint",
    "AdapterMerge": "adapter_merge",
    "AdapterRestart": "adapter_restart",
    "RankAllocator": "rank_allocator",
    "SampleAnswers": "sample_answers",
    "RunReport": "run_report",
    "Throughput": "throughput",
    "AnswerWriter": "answer_writer",
    "Measures": "measures",
    "RunProgress": "run_progress",
    "EVACalibration": "eva_calibration",
    "GracefulStop": "graceful_stop",
    "FusionMap": "fusion_map",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lit_peft.callbacks' has no attribute {name!r}")
    return getattr(import_module(f"lit_peft.callbacks.{_HOME[name]}"), name)
