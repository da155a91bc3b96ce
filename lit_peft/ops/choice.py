"""Which path an op takes: plain operations, or a Triton kernel where that has been measured to be faster.

The file `crossovers.json` holds what `python -m benchmarks.gpu` measured, by name of the GPU:

    {"NVIDIA H200": {"norm": {"rows": 512, "width": 1024}}}         the kernel wins from these sizes on

An op, a GPU or a size that is not in it takes the plain path. LIT_PEFT_KERNELS=1 forces the kernels wherever they can
run, LIT_PEFT_KERNELS=0 the plain operations.
"""

from __future__ import annotations

import json
import os
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CROSSOVERS = Path(__file__).parent / "crossovers.json"


def kernels_run(device: torch.device) -> bool:
    """Return whether Triton kernels can run there: on the current CUDA device, or anywhere in Triton's interpreter.

    Launches go to the current device, which is not the tensor's where one process spreads a model over several.
    """
    # a fake tensor may name a device that is not there
    real = device.type == "cuda" and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    if real and device.index not in (None, torch.cuda.current_device()):
        return False
    return (device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1") and _installed()


@cache
def _installed() -> bool:
    return find_spec("triton") is not None


def takes_kernel(op: str, x: Tensor, kernels: bool | None = None, **sizes: int) -> bool:
    """Return whether an op is to launch its kernel.

    Args:
        op: its name in `crossovers.json`.
        x: a tensor on the device in question.
        kernels: the caller's own choice; None: the environment's, and then the measured one.
        **sizes: what the crossovers are told in.

    Raises:
        RuntimeError: if kernels are asked for where they cannot run.

    Example:
        >>> takes_kernel("norm", torch.ones(2), kernels=False)
        False
    """
    forced = os.environ.get("LIT_PEFT_KERNELS")
    if kernels is False or (kernels is None and forced == "0") or x.is_meta or not x.numel():
        return False
    if not kernels_run(x.device):
        if kernels:
            raise RuntimeError(
                f"Triton kernels run on the current CUDA device, and this tensor is on {x.device}. Leave out "
                "kernels=True, or call torch.cuda.set_device."
            )
        return False
    if kernels or forced == "1":
        return True
    if x.device.type != "cuda":
        return False
    least = measured().get(torch.cuda.get_device_name(x.device), {}).get(op)
    return least is not None and all(sizes[key] >= bound for key, bound in least.items())


@cache
def measured() -> dict[str, Any]:
    """Return the contents of `crossovers.json`."""
    found: dict[str, Any] = json.loads(CROSSOVERS.read_text())
    return found
