"""Adapter folders of PEFT's forks: they say PEFT's own `peft_type`, and mean a method that PEFT does not have.

MoRA's fork (kongds/MoRA) writes `peft_type: LORA` with `use_mora: true`. Its `lora_A` and `lora_B` are one module, so
its files hold the square matrix twice; HF PEFT itself drops `use_mora` with a warning and then meets square tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

FIRST, SECOND, OURS = ".lora_A.weight", ".lora_B.weight", ".mora_m"


def kind_of(config: Mapping[str, Any]) -> str:
    """Return the `peft_type` that a folder's configuration means."""
    return "LIT_MORA" if config["peft_type"] == "LORA" and config.get("use_mora") else str(config["peft_type"])


def renamed(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a folder's tensors under our own names.

    Raises:
        ValueError: if the two copies of a matrix differ.
    """
    if kind_of(config) == config["peft_type"]:
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
