"""Adapter folders whose `peft_type` is not the method's: those of PEFT's forks, and ours where PEFT's type falls short.

MoRA's fork (kongds/MoRA) writes `peft_type: LORA` with `use_mora: true`. Its `lora_A` and `lora_B` are one module, so
its files hold the square matrix twice; HF PEFT itself drops `use_mora` with a warning and then meets square tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# A prefix that PEFT's format cannot hold (T5's three kinds of attention, gates) is written in a layout of our own.
OURS_OF = {"LIT_PREFIX": "PREFIX_TUNING"}
FIRST, SECOND, OURS = ".lora_A.weight", ".lora_B.weight", ".mora_m"


def kind_of(config: Mapping[str, Any]) -> str:
    """Return the `peft_type` that a folder's configuration means."""
    kind = str(config["peft_type"])
    return "LIT_MORA" if kind == "LORA" and config.get("use_mora") else OURS_OF.get(kind, kind)


def renamed(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a folder's tensors under our own names.

    Raises:
        ValueError: if the two copies of a matrix differ.
    """
    if kind_of(config) != "LIT_MORA" or config["peft_type"] == "LIT_MORA":
        return dict(tensors)
    for key, tensor in tensors.items():
        twin = tensors.get(key.removesuffix(SECOND) + FIRST) if key.endswith(SECOND) else None
        if twin is not None and not torch.equal(twin, tensor):
            raise ValueError(f"{key!r} differs from its lora_A, and MoRA has one matrix only. Is the file damaged?")
    return {
        key.removesuffix(FIRST) + OURS if key.endswith(FIRST) else key: tensor
        for key, tensor in tensors.items()
        if not key.endswith(SECOND)
    }
