"""The picture of a comparison: score against trained weights, with the Pareto front."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from matplotlib.transforms import Bbox

from lit_peft.comparing.results import SCORES, Row, front

FRONT, OTHER, GREY = "#d1603d", "#3b6fb6", "#6b6b6b"
GAP = 5.0  # points between a dot and its label
# around a dot, near places first: directions in which a label may go, and how far
DIRECTIONS = ((1, 0), (0, 1), (0, -1), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1))
REACH = (1.0, 2.2, 3.8, 5.6, 7.6, 10.0)


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
    for row in rows:
        if row.baseline and (mean := row.mean(score)) is not None:
            axes.axhline(times * mean, color=GREY, linewidth=1, linestyle="--", zorder=1)
            name = "untouched base" if row.name == "base" else row.name
            axes.annotate(
                name,
                (0.995, times * mean),
                (0, 2),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                color=GREY,
                fontsize=8,
                ha="right",
            )
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel("trained weights")
    axes.set_ylabel(what.name)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axes.grid(alpha=0.25, linewidth=0.6, which="major")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.10)
    if not what.rises:
        axes.invert_yaxis()  # better is higher in every picture
    axes.legend(frameon=False, loc="lower left", fontsize=8)
    _label(figure, axes, spots)
    figure.savefig(path, format="png")
    return path


def _label(figure: Figure, axes: Any, spots: Sequence[tuple[float, float, str, bool]]) -> None:
    """Write names beside their dots, where they cover neither dots nor lines nor one another; far ones get a thin line."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # what is placed now, stays
    scale = figure.dpi / 72
    frame = axes.get_window_extent()
    dots = [tuple(axes.transData.transform((x, y))) for x, y, *_ in spots]
    taken = [Bbox.from_extents(x - 4 * scale, y - 4 * scale, x + 4 * scale, y + 4 * scale) for x, y in dots]
    legend = axes.get_legend()
    taken += [legend.get_window_extent()] if legend is not None else []
    taken += [text.get_window_extent() for text in axes.texts]
    lines = [axes.transData.transform(line.get_path().interpolated(1).vertices) for line in axes.lines[:1]]
    strokes = [pair for vertices in lines for pair in pairwise(_steps(vertices))]
    order = sorted(range(len(spots)), key=lambda i: (not spots[i][3], -dots[i][0]))
    for i in order:
        x, y, name, on = spots[i]
        text = axes.annotate(
            name,
            (x, y),
            (0, 0),
            textcoords="offset points",
            fontsize=8.5,
            color=FRONT if on else "#222222",
            fontweight="bold" if on else "normal",
            zorder=4,
        )
        size = text.get_window_extent()
        places = [
            _place(dots[i], size.width, size.height, direction, GAP * reach * scale)
            for reach in REACH
            for direction in DIRECTIONS
        ]
        cost = [
            sum(_overlap(place, other) for other in taken)
            + sum(4.0 * size.height * scale for stroke in strokes if _crosses(place, stroke))
            + (0 if _inside(place, frame) else 1e6)
            + 0.6 * number * size.height
            for number, place in enumerate(places)
        ]
        place = places[cost.index(min(cost))]
        text.set_position(((place.x0 - dots[i][0]) / scale, (place.y0 - dots[i][1]) / scale))
        text.set_horizontalalignment("left")
        text.set_verticalalignment("bottom")
        taken.append(place.padded(1.5 * scale))
        near_x, near_y = min(max(dots[i][0], place.x0), place.x1), min(max(dots[i][1], place.y0), place.y1)
        away = ((near_x - dots[i][0]) ** 2 + (near_y - dots[i][1]) ** 2) ** 0.5
        if away > 2 * GAP * scale:
            ends = axes.transData.inverted().transform([dots[i], (near_x, near_y)])
            axes.plot(ends[:, 0], ends[:, 1], color=GREY, linewidth=0.6, alpha=0.7, zorder=2)


def _place(dot: Any, width: float, height: float, direction: tuple[int, int], gap: float) -> Bbox:
    across, up = direction
    diagonal = 0.8 if across and up else 1.0
    x = dot[0] + across * gap * diagonal - (width if across < 0 else width / 2 if across == 0 else 0)
    y = dot[1] + up * gap * diagonal - (height if up < 0 else height / 2 if up == 0 else 0)
    return Bbox.from_bounds(x, y, width, height)


def _overlap(one: Bbox, other: Bbox) -> float:
    both = Bbox.intersection(one, other)
    return 0.0 if both is None else 10.0 * float(both.width * both.height)


def _inside(place: Bbox, frame: Bbox) -> bool:
    return bool(place.x0 >= frame.x0 and place.x1 <= frame.x1 and place.y0 >= frame.y0 and place.y1 <= frame.y1)


def _steps(vertices: Any) -> list[tuple[float, float]]:
    """Return the corners of a staircase that goes along before it goes up."""
    corners = [tuple(vertices[0])]
    for x, y in vertices[1:]:
        corners += [(x, corners[-1][1]), (x, y)]
    return corners


def _crosses(place: Bbox, stroke: tuple[tuple[float, float], tuple[float, float]]) -> bool:
    (x0, y0), (x1, y1) = stroke
    return (
        min(x0, x1) <= place.x1 and max(x0, x1) >= place.x0 and min(y0, y1) <= place.y1 and max(y0, y1) >= place.y0
    )


def _short(value: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"
