"""The picture of a comparison: score against trained weights, with the Pareto front."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from lit_peft.comparing.labels import place_labels
from lit_peft.comparing.results import SCORES, Row, front

FRONT, OTHER, GREY = "#d1603d", "#3b6fb6", "#6b6b6b"
BASELINES = {"base": "untouched base"}


def draw(path: Path, title: str, rows: Sequence[Row], score: str) -> Path | None:
    """Draw a PNG; None if no method has a score.

    Args:
        path: the file to write.
        title: what stands above.
        rows: the lines of the table.
        score: name of the score.
    """
    what = SCORES[score]
    methods = [row for row in rows if not row.baseline and row.mean(score) is not None and row.trained]
    if not methods:
        return None
    times = 100 if what.percent else 1
    figure = Figure(figsize=(9, 5.6), dpi=150, layout="constrained")
    axes = figure.subplots()
    best = front(rows, score)
    xs = [float(row.trained or 1) for row in best]
    ys = [times * (row.mean(score) or 0.0) for row in best]
    axes.step(xs, ys, where="post", color=FRONT, linewidth=1.5, alpha=0.8, zorder=2, label="Pareto front")
    spots = []
    for row in methods:
        on = row in best
        x, y = float(row.trained or 1), times * (row.mean(score) or 0.0)
        spread = row.spread(score)
        if spread:
            axes.errorbar(x, y, yerr=times * spread, color=FRONT if on else OTHER, alpha=0.5, linewidth=1, zorder=2)
        axes.scatter(x, y, s=42, color=FRONT if on else OTHER, edgecolor="white", linewidth=0.8, zorder=3)
        spots.append((x, y, row.name, on))
    axes.set_xscale("log")
    low, high = min(x for x, *_ in spots), max(x for x, *_ in spots)
    axes.set_xlim(low / (high / low) ** 0.06 / 1.15, high * (high / low) ** 0.10 * 1.25)
    lines = sorted((times * mean, row.name) for row in rows if row.baseline and (mean := row.mean(score)) is not None)
    for i, (level, name) in enumerate(lines):
        axes.axhline(level, color=GREY, linewidth=1, linestyle="--", zorder=1)
        above = (i == len(lines) - 1) == what.rises  # the outer side of each line: two may lie close together
        axes.annotate(
            BASELINES.get(name, f"{name} prompting"),
            (0.995, level),
            (0, 3 if above else -3),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            color=GREY,
            fontsize=8,
            ha="right",
            va="bottom" if above else "top",
        )
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel("trained weights")
    axes.set_ylabel(what.name)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if high > 30 * low else (1.0, 2.0, 5.0), numticks=20))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.25, linewidth=0.6, which="major")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.10)
    if not what.rises:
        axes.invert_yaxis()  # better is higher in every picture
    axes.legend(frameon=False, loc="lower left", fontsize=8)
    place_labels(figure, axes, spots, FRONT)
    figure.savefig(path, format="png")
    return path


def _short(value: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"
