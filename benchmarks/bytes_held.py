"""Bytes that a training step holds: its peak beyond the base's weights, and what it saves for the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

MEASURED = "measured step"


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the storages that some tensors lie in, each storage once."""
    found = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def peak_of(step: Callable[[], object], device: torch.device) -> int:
    """Return how many bytes more than before are allocated at the highest point of one step, made twice.

    On the CPU every allocation and release that PyTorch's profiler sees is added up, temporaries inside of operators
    too: exact, and the same in every run. On CUDA it is the allocator's own record.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()  # what this one leaves behind and the next one releases has a size that the profiler knows
        with record_function(MEASURED):
            step()
    events = profiler.profiler.kineto_results.events()
    begin = next(event.start_ns() for event in events if event.name() == MEASURED)
    records = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    live = highest = 0
    for _, change in sorted((record for record in records if record[0] >= begin), key=lambda record: record[0]):
        live += change
        highest = max(highest, live)
    return highest


class Saved:
    """What autograd keeps for the backward pass; `bytes` counts every storage once, and weights not at all."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        self._weights = {weight.untyped_storage().data_ptr() for weight in weights}
        self._kept: list[Tensor] = []  # held until counted, so that no address is given out twice

    @property
    def bytes(self) -> int:
        return bytes_of(tensor for tensor in self._kept if tensor.untyped_storage().data_ptr() not in self._weights)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Note what is saved inside the `with` block."""

        def pack(tensor: Tensor) -> Tensor:
            self._kept.append(tensor.detach())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield
