"""What `benchmarks.gpu` checks and times of each kernel: one file a module of `lit_peft/kernels`, with its `cases`."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One op at one size.

    Attributes:
        op: the op's name in `lit_peft/ops/crossovers.json`.
        sizes: what its crossover is told in, such as rows.
        make: draws fresh inputs on a device.
        run: called with `*inputs, kernels=`: True for the kernel, False for plain operations; returns all results,
            gradients among them.
        exact: returns the same results in float64, from the same inputs.
        moved: bytes that have to be read and written at least; the floor of a kernel bound by memory.
        products: floating-point operations of its matrix products; the floor of one bound by arithmetic.
        tolerance: the largest relative error (norms) of the kernel against `exact`.
        part: which of several kernels of the op, if it has several; the crossover is one that all of them pass.
    """

    op: str
    sizes: dict[str, int]
    make: Callable[[torch.device], Sequence[Any]]
    run: Callable[..., Sequence[Tensor]]
    exact: Callable[..., Sequence[Tensor]]
    moved: int
    products: int = 0
    tolerance: float = 1e-2
    part: str = ""

    @property
    def name(self) -> str:
        """Return the op with its part and sizes."""
        return (
            f"{self.op}, "
            + (f"{self.part}, " if self.part else "")
            + ", ".join(f"{key} {value}" for key, value in self.sizes.items())
        )


def all_cases(small: bool) -> list[Case]:
    """Return the cases of all kernels: those that are timed, or small ones that the interpreter can run."""
    found = []
    for module in pkgutil.iter_modules(__path__):
        found += import_module(f"{__name__}.{module.name}").cases(small)
    return found
