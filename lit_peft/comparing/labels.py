"""Names beside the dots of a picture, where they cover neither dots nor lines nor one another."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox

GREY, DARK = "#6b6b6b", "#222222"
GAP = 5.0  # points between a dot and its label
# where a label may go: directions around the dot, and how far, near places first
DIRECTIONS = ((1, 0), (0, 1), (0, -1), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1))
REACH = (1.0, 2.2, 3.8, 5.6, 7.6, 10.0)
CLOSE, CROWD = 16.0, 5  # dots less than so many points apart, sideways, are a group; labels of large ones form a column
COLUMN = 22.0  # points between a group and its column

Spot = tuple[float, float, str, bool]
Point = tuple[float, float]


def place_labels(figure: Figure, axes: Any, spots: Sequence[Spot], accent: str) -> None:
    """Write each spot's name near it; names that end up farther away get a thin line to their dot.

    Methods of one budget lie above one another: the names of such a group stand in a column beside it.

    Args:
        figure: the figure, complete but for the names.
        axes: its axes; the first line is the front.
        spots: x, y, name, and whether the name stands out.
        accent: the colour of those that do.
    """
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # what is placed now, stays
    scale = figure.dpi / 72
    frame = axes.get_window_extent()
    dots: list[Point] = [tuple(axes.transData.transform((x, y))) for x, y, *_ in spots]
    texts = [_text(axes, spot, accent) for spot in spots]
    sizes = [text.get_window_extent() for text in texts]
    taken = [Bbox.from_extents(x - 4 * scale, y - 4 * scale, x + 4 * scale, y + 4 * scale) for x, y in dots]
    taken += [axes.get_legend().get_window_extent()] if axes.get_legend() is not None else []
    taken += [text.get_window_extent() for text in axes.texts if text not in texts]
    strokes = _strokes(axes, frame)
    placed: dict[int, Bbox] = {}
    for group in _crowds(dots, CLOSE * scale):
        left = max(dots[i][0] for i in group) + COLUMN * scale
        width = max(sizes[i].width for i in group)
        if left + width > frame.x1:
            left = min(dots[i][0] for i in group) - COLUMN * scale - width
        for i, y in zip(group, _spread([(dots[i][1], sizes[i].height) for i in group], frame), strict=True):
            placed[i] = Bbox.from_bounds(left, y - sizes[i].height / 2, sizes[i].width, sizes[i].height)
    taken += [place.padded(1.5 * scale) for place in placed.values()]
    for i in sorted(set(range(len(spots))) - placed.keys(), key=lambda i: (not spots[i][3], -dots[i][0])):
        placed[i] = _best(dots[i], sizes[i], taken, strokes, frame, scale)
        taken.append(placed[i].padded(1.5 * scale))
    for i, place in placed.items():
        texts[i].set_position(((place.x0 - dots[i][0]) / scale, (place.y0 - dots[i][1]) / scale))
        _leader(axes, dots[i], place, scale)


def _text(axes: Any, spot: Spot, accent: str) -> Any:
    x, y, name, stands_out = spot
    return axes.annotate(
        name,
        (x, y),
        (0, 0),
        textcoords="offset points",
        fontsize=8.5,
        color=accent if stands_out else DARK,
        fontweight="bold" if stands_out else "normal",
        ha="left",
        va="bottom",
        zorder=4,
        path_effects=[withStroke(linewidth=3, foreground="white")],  # a line behind a name does not strike it out
    )


def _crowds(dots: Sequence[Point], close: float) -> list[list[int]]:
    """Return groups of dots that lie above one another, each from bottom to top."""
    order = sorted(range(len(dots)), key=lambda i: dots[i][0])
    groups: list[list[int]] = []
    for i in order:
        if groups and dots[i][0] - dots[groups[-1][-1]][0] < close:
            groups[-1].append(i)
        else:
            groups.append([i])
    return [sorted(group, key=lambda i: dots[i][1]) for group in groups if len(group) >= CROWD]


def _spread(wanted: Sequence[tuple[float, float]], frame: Bbox) -> list[float]:
    """Return heights near the wanted ones, in the same order, that keep labels apart and inside the frame.

    Neighbours that would touch are pooled and stand around their common mean.
    """
    pools: list[list[tuple[float, float]]] = []
    for one in wanted:
        pools.append([one])
        while len(pools) > 1 and _centre(pools[-2]) + _tall(pools[-2]) / 2 > _centre(pools[-1]) - _tall(pools[-1]) / 2:
            pools[-2:] = [pools[-2] + pools[-1]]
    heights = []
    for pool in pools:
        y = min(max(_centre(pool) - _tall(pool) / 2, frame.y0), frame.y1 - _tall(pool))
        for _, tall in pool:
            heights.append(y + tall / 2)
            y += tall
    return heights


def _centre(pool: Sequence[tuple[float, float]]) -> float:
    return sum(y for y, _ in pool) / len(pool)


def _tall(pool: Sequence[tuple[float, float]]) -> float:
    return sum(tall for _, tall in pool)


def _best(dot: Point, size: Bbox, taken: Sequence[Bbox], strokes: Sequence[Any], frame: Bbox, scale: float) -> Bbox:
    """Return the place around a dot that covers least, near ones preferred."""
    places = [
        _beside(dot, size.width, size.height, direction, GAP * reach * scale)
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
    return places[cost.index(min(cost))]


def _beside(dot: Point, width: float, height: float, direction: tuple[int, int], gap: float) -> Bbox:
    across, up = direction
    gap *= 0.8 if across and up else 1.0
    x = dot[0] + across * gap - (width if across < 0 else width / 2 if across == 0 else 0)
    y = dot[1] + up * gap - (height if up < 0 else height / 2 if up == 0 else 0)
    return Bbox.from_bounds(x, y, width, height)


def _leader(axes: Any, dot: Point, place: Bbox, scale: float) -> None:
    """Draw a thin line from a dot to its name, where they are apart."""
    beside = place.x0 > dot[0]
    x = min(max(dot[0], place.x0), place.x1)
    y = (place.y0 + place.y1) / 2 if beside else min(max(dot[1], place.y0), place.y1)
    if ((x - dot[0]) ** 2 + (y - dot[1]) ** 2) ** 0.5 > 2 * GAP * scale:
        ends = axes.transData.inverted().transform([dot, (x - beside * 2 * scale, y)])
        axes.plot(ends[:, 0], ends[:, 1], color=GREY, linewidth=0.5, alpha=0.6, zorder=2)


def _overlap(one: Bbox, other: Bbox) -> float:
    both = Bbox.intersection(one, other)
    return 0.0 if both is None else 10.0 * float(both.width * both.height)


def _inside(place: Bbox, frame: Bbox) -> bool:
    return bool(place.x0 >= frame.x0 and place.x1 <= frame.x1 and place.y0 >= frame.y0 and place.y1 <= frame.y1)


def _strokes(axes: Any, frame: Bbox) -> list[tuple[Point, Point]]:
    """Return the pieces of the front, a staircase that goes along before it goes up, and of dashed lines."""
    corners: list[Point] = []
    for x, y in axes.transData.transform(axes.lines[0].get_xydata()):
        corners += [(x, corners[-1][1]), (x, y)] if corners else [(x, y)]
    levels = [
        axes.transData.transform((axes.get_xlim()[0], line.get_ydata()[0]))[1]
        for line in axes.lines
        if line.get_linestyle() == "--"
    ]
    return [*pairwise(corners), *(((frame.x0, level), (frame.x1, level)) for level in levels)]


def _crosses(place: Bbox, stroke: tuple[Point, Point]) -> bool:
    (x0, y0), (x1, y1) = stroke
    across = min(x0, x1) <= place.x1 and max(x0, x1) >= place.x0
    return bool(across and min(y0, y1) <= place.y1 and max(y0, y1) >= place.y0)
