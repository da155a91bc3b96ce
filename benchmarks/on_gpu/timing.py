"""Arms timed side by side: in every round each runs once, in an order that is drawn."""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch


class Clock:
    """Seconds of work on a device, and how many are left for the whole run.

    Args:
        device: where the work is done; on CUDA its own events tell the time.
        seconds: after how many seconds `left` is 0.
    """

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device, self.end = device, time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Return the seconds that are left."""
        return max(0.0, self.end - time.monotonic())

    def seconds(self, run: Callable[[], object], repeats: int = 1) -> float:
        """Return how long one of several calls takes."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            for _ in range(repeats):
                run()
            return (time.perf_counter() - start) / repeats
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        begin.record()
        for _ in range(repeats):
            run()
        end.record()
        torch.cuda.synchronize(self.device)
        return float(begin.elapsed_time(end)) / 1e3 / repeats

    def interleaved(
        self, runs: Mapping[str, Callable[[], object]], rounds: int, budget: float = 60.0, least: float = 2e-3
    ) -> dict[str, list[float]]:
        """Return the seconds of each arm, round by round; fewer rounds than asked for when the time is over.

        Args:
            runs: the arms.
            rounds: how often each runs; three times in any case, after two runs that do not count.
            budget: seconds after which no further round begins.
            least: an arm is repeated within a round until it takes this long.
        """
        for run in runs.values():
            run()
        once = min(self.seconds(run) for run in runs.values())
        repeats = max(1, min(200, int(least / max(once, 1e-7))))
        found: dict[str, list[float]] = {name: [] for name in runs}
        order, start = random.Random(0), time.monotonic()
        for number in range(rounds):
            if number >= 3 and (time.monotonic() - start > budget or not self.left):
                break
            for name in order.sample(list(runs), len(runs)):
                found[name].append(self.seconds(runs[name], repeats))
        return found

    def on_device(self, run: Callable[[], object]) -> tuple[float, int]:
        """Return the seconds that the device itself works in one call, without gaps, and how many kernels it runs."""
        from torch.profiler import ProfilerActivity, profile

        cuda = self.device.type == "cuda"
        with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
            run()
            if cuda:
                torch.cuda.synchronize(self.device)
        events = profiler.key_averages()
        if not cuda:
            return sum(event.self_cpu_time_total for event in events) / 1e6, sum(event.count for event in events)
        worked = [event for event in events if event.self_device_time_total > 0 and not event.key.startswith("Mem")]
        return sum(event.self_device_time_total for event in worked) / 1e6, sum(event.count for event in worked)


def ratio(found: Mapping[str, list[float]], one: str, other: str) -> dict[str, Any]:
    """Return the median, the quartiles and the worst of the ratios within rounds."""
    values = sorted(a / b for a, b in zip(found[one], found[other], strict=True))
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values[0],) * 3
    return {"median": statistics.median(values), "quartiles": [low, high], "most": values[-1], "rounds": len(values)}


@contextmanager
def kernels(way: str | None) -> Iterator[None]:
    """Set LIT_PEFT_KERNELS inside the `with` block: "1" forces the kernels, "0" plain operations, None as measured."""
    before = os.environ.pop("LIT_PEFT_KERNELS", None)
    if way is not None:
        os.environ["LIT_PEFT_KERNELS"] = way
    try:
        yield
    finally:
        os.environ.pop("LIT_PEFT_KERNELS", None)
        if before is not None:
            os.environ["LIT_PEFT_KERNELS"] = before
