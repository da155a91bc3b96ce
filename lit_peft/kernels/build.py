"""What of a kernel is compiled ahead of time, so that its registers can be counted on a machine without a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Build:
    """One kernel in one configuration.

    Attributes:
        name: what the budget file calls it, such as "bf16, r 16".
        kernel: the function, decorated with `triton.jit`.
        arguments: all its arguments by name: a dtype of `triton.language` stands for a tensor that begins at a multiple
            of 16 bytes; numbers for themselves.
        options: num_warps, num_stages.
        products: whether it has to use the target's tensor cores.
    """

    name: str
    kernel: Any
    arguments: Mapping[str, Any]
    options: Mapping[str, int] = field(default_factory=dict)
    products: bool = False
