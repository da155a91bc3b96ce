"""When ranks are dropped, and how many may stay: AdaLoRA's schedule, in optimizer steps of the run at hand."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """When triplets are switched off, in optimizer steps, and how many may stay on.

    Attributes:
        first: up to this step nothing happens.
        last: at this step the choice becomes final.
        every: a choice is made every so many steps.
    """

    first: int
    last: int
    every: int

    def budget(self, step: int, initial: int, final: int) -> int:
        """Return b(t), how many triplets are on after optimizer step t (AdaLoRA, equation 9).

        b0 up to `first`, then bT + (b0 - bT) (1 - (t - first) / (last - first))^3, and bT from `last` on.
        """
        if step <= self.first:
            return initial
        if step >= self.last:
            return final
        left = 1 - (step - self.first) / (self.last - self.first)
        return int(final + (initial - final) * left**3)


def plan(total: int | float, tinit: int | float | None, tfinal: int | float | None, every: int | None) -> Schedule:
    """Return the schedule of a run.

    Args:
        total: optimizer steps of the run; infinite where nothing limits it.
        tinit: steps before the first choice; a float is a share of the run; None: a tenth.
        tfinal: steps after the last choice, written like tinit; None: four tenths.
        every: steps from one choice to the next; None: a thousandth of the run.

    Raises:
        ValueError: if the run has no known length, or is too short for tinit and tfinal.

    Example:
        >>> plan(1000, None, None, None)
        Schedule(first=100, last=600, every=1)
    """
    if math.isinf(total):
        raise ValueError("This run has no end to share the ranks out by. Set max_steps or max_epochs.")
    total = max(1, int(total))
    first, tail = _steps(tinit, total, 0.1), _steps(tfinal, total, 0.4)
    if first >= total - tail:
        raise ValueError(
            f"tinit ({first}) and tfinal ({tail}) leave no step in between: the run has {total} optimizer steps. "
            "Lower them, give them as shares such as 0.1, or train longer."
        )
    return Schedule(first, total - tail, every or max(1, total // 1000))


def _steps(asked: int | float | None, total: int, share: float) -> int:
    if isinstance(asked, int):
        return asked
    return int((share if asked is None else asked) * total)
