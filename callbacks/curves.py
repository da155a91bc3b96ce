"""The picture of a run: training and validation loss, and the learning rate below."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lit_peft.callbacks.checkpoint_io import write_atomically

TRAIN, VALIDATION, GREY = "#3b6fb6", "#d1603d", "#6b6b6b"
Points = Sequence[tuple[int, float]]


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Return the mean of the values around each one, up to `window` // 2 on either side.

    Example:
        >>> smooth([1.0, 3.0, 5.0, 9.0], 2)
        [2.0, 3.0, 5.666666666666667, 7.0]
    """
    side = window // 2
    around = [values[max(0, i - side) : i + side + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in around]


def draw(path: Path, title: str, train: Points, validation: Points, rate: Points) -> Path:
    """Draw the curves of a run as a PNG.

    Args:
        path: the file to write.
        title: what stands above.
        train: (optimizer step, loss).
        validation: (optimizer step, loss).
        rate: (optimizer step, learning rate).

    Returns:
        The path.
    """
    figure = Figure(figsize=(8, 4.8), dpi=150, layout="constrained")
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    if train:
        steps, values = [step for step, _ in train], [value for _, value in train]
        window = max(1, len(values) // 25)
        crowded = window > 1
        losses.plot(
            steps,
            values,
            color=TRAIN,
            alpha=0.25 if crowded else 1,
            linewidth=1 if crowded else 2,
            label="_" if crowded else "training",
        )
        if crowded:
            losses.plot(steps, smooth(values, window), color=TRAIN, linewidth=2, label="training, smoothed")
        # The first steps may lie far above the rest and would press it flat.
        seen = sorted([*values, *(value for _, value in validation)])
        top, low = seen[min(len(seen) - 1, int(0.995 * len(seen)))], seen[0]
        losses.set_ylim(max(0.0, low - 0.06 * (top - low)) if low >= 0 else None, top + 0.06 * (top - low or 1))
    if validation:
        steps, values = [step for step, _ in validation], [value for _, value in validation]
        losses.plot(steps, values, color=VALIDATION, linewidth=2, marker="o", markersize=5, label="validation")
        losses.annotate(
            f"{values[-1]:.3g}",
            (steps[-1], values[-1]),
            (6, 4),
            textcoords="offset points",
            color=VALIDATION,
            fontsize=9,
        )
    losses.set_title(title, loc="left", fontsize=11)
    losses.set_ylabel("loss")
    if train or validation:
        losses.legend(frameon=False, loc="upper right")
    rates.plot([step for step, _ in rate], [value for _, value in rate], color=GREY, linewidth=1.5)
    rates.set_ylabel("learning\nrate")
    highest = max((value for _, value in rate), default=0.0)
    rates.set_ylim(0, 1.15 * highest or 1)
    rates.set_yticks([0, highest], ["0", f"{highest:.2g}"])
    rates.set_xlabel("optimizer step")
    rates.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (losses, rates):
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.02)
    write_atomically(path, lambda file: figure.savefig(file, format="png"))
    return path
