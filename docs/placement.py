"""Draws where block adapters sit, docs/placement.png: `python docs/placement.py`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch

INK, LINE, BASE, FROZEN = "#2d3748", "#718096", "#edf2f7", "#a0aec0"
HOULSBY, PFEIFFER, PARALLEL = "#dd6b20", "#2b6cb0", "#2f855a"
TRUNK, SIDE, RESIDUAL = 5.4, 2.0, 8.1  # x of the main path, of what is beside it, of the residual connection
HEIGHT = 19.4


def box(axes: Any, x: float, y: float, text: str, color: str = BASE, width: float = 3.3, height: float = 0.95) -> None:
    """Draw a module, grey where it is frozen."""
    corner = (x - width / 2, y - height / 2)
    style = "round,pad=0,rounding_size=0.22"
    edge = FROZEN if color == BASE else color
    axes.add_patch(FancyBboxPatch(corner, width, height, boxstyle=style, fc=color, ec=edge, lw=1.2, zorder=3))
    ink, weight = (INK, "normal") if color == BASE else ("white", "bold")
    axes.text(x, y, text, ha="center", va="center", color=ink, fontsize=10.5, fontweight=weight, zorder=4)


def path(axes: Any, *points: tuple[float, float], color: str = LINE, arrow: bool = True) -> None:
    """Draw a line through points, with a head at its end."""
    xs, ys = zip(*points[: len(points) - arrow], strict=True)
    axes.plot(xs, ys, color=color, lw=1.5, zorder=1, solid_capstyle="round", solid_joinstyle="round")
    if arrow:
        shape = {"arrowstyle": "-|>", "mutation_scale": 12, "shrinkA": 0, "shrinkB": 0}
        axes.add_patch(FancyArrowPatch(points[-2], points[-1], color=color, lw=1.5, zorder=2, **shape))


def plus(axes: Any, x: float, y: float, color: str = INK) -> None:
    """Draw a sum."""
    axes.add_patch(Circle((x, y), 0.3, fc="white", ec=color, lw=1.4, zorder=3))
    for dx, dy in ((0.15, 0), (0, 0.15)):
        axes.plot([x - dx, x + dx], [y - dy, y + dy], color=color, lw=1.4, zorder=4)


def dot(axes: Any, x: float, y: float, color: str = LINE) -> None:
    """Draw the point where a path splits."""
    axes.add_patch(Circle((x, y), 0.09, fc=color, ec=color, zorder=3))


def note(axes: Any, x: float, y: float, text: str, color: str = INK, **options: Any) -> None:
    """Write something small."""
    axes.text(x, y, text, **{"ha": "center", "va": "center", "color": color, "fontsize": 9.5, "zorder": 5, **options})


def rise(axes: Any, *heights: float) -> None:
    """Draw arrows up the main path, from each height to the next."""
    for low, high in zip(heights[::2], heights[1::2], strict=True):
        path(axes, (TRUNK, low), (TRUNK, high))


def residual(axes: Any, low: float, high: float) -> None:
    """Draw a residual connection."""
    dot(axes, TRUNK, low)
    path(axes, (TRUNK, low), (RESIDUAL, low), (RESIDUAL, high), (TRUNK + 0.3, high))


def beside(axes: Any, low: float, middle: float, high: float) -> None:
    """Draw the parallel adapter: it reads what feed-forward reads, and is added to what that yields."""
    dot(axes, TRUNK, low, PARALLEL)
    path(axes, (TRUNK, low), (SIDE, low), (SIDE, middle - 0.5), color=PARALLEL)
    box(axes, SIDE, middle, "parallel", PARALLEL, width=2.7)
    path(axes, (SIDE, middle + 0.5), (SIDE, high), (TRUNK - 0.3, high), color=PARALLEL)
    note(axes, SIDE + 0.2, high + 0.35, r"$\times\ s$", PARALLEL, ha="left")
    plus(axes, TRUNK, high, PARALLEL)


def pre_norm(axes: Any) -> None:
    """Draw a layer that normalises in front of its parts."""
    axes.set_title("pre-LN:  x + F(LN(x))", fontsize=13, color=INK, pad=16, fontweight="bold")
    note(axes, TRUNK, HEIGHT + 0.1, "Llama, Qwen, Mistral, Mixtral, GPT-2, T5, OPT", LINE)
    note(axes, TRUNK, 0.35, "x")
    rise(axes, 0.7, 1.85, 2.8, 3.35, 4.3, 4.85, 5.8, 6.45, 7.05, 8.15, 9.1, 10.25, 11.2, 11.65)
    rise(axes, 12.25, 12.75, 13.7, 14.35, 14.95, 15.65, 16.6, 17.3)
    residual(axes, 1.15, 6.75)
    box(axes, TRUNK, 2.33, "LN")
    box(axes, TRUNK, 3.83, "attention")
    box(axes, TRUNK, 5.33, "Houlsby", HOULSBY)
    plus(axes, TRUNK, 6.75)
    residual(axes, 7.5, 14.65)
    box(axes, TRUNK, 8.63, "LN")
    beside(axes, 9.62, 10.73, 11.95)
    box(axes, TRUNK, 10.73, "feed-forward")
    box(axes, TRUNK, 13.23, "Houlsby", HOULSBY)
    plus(axes, TRUNK, 14.65)
    box(axes, TRUNK, 16.13, "Pfeiffer", PFEIFFER)


def post_norm(axes: Any) -> None:
    """Draw a layer that normalises behind its sums."""
    axes.set_title("post-LN:  LN(x + F(x))", fontsize=13, color=INK, pad=16, fontweight="bold")
    note(axes, TRUNK, HEIGHT + 0.1, "BERT, RoBERTa, BART, OPT-350m", LINE)
    note(axes, TRUNK, 0.35, "x")
    rise(axes, 0.7, 1.85, 2.8, 3.35, 4.3, 4.95, 5.55, 6.15, 7.1, 8.75, 9.7, 10.15)
    rise(axes, 10.75, 11.25, 12.2, 12.85, 13.45, 15.8, 16.4, 16.8, 17.75, 18.35)
    residual(axes, 1.15, 5.25)
    box(axes, TRUNK, 2.33, "attention")
    box(axes, TRUNK, 3.83, "Houlsby", HOULSBY)
    plus(axes, TRUNK, 5.25)
    box(axes, TRUNK, 6.63, "LN")
    residual(axes, 7.5, 13.15)
    beside(axes, 8.05, 9.23, 10.45)
    box(axes, TRUNK, 9.23, "feed-forward")
    box(axes, TRUNK, 11.73, "Houlsby", HOULSBY)
    plus(axes, TRUNK, 13.15)
    dot(axes, TRUNK, 13.75, PFEIFFER)
    path(axes, (TRUNK, 13.75), (4.25, 13.75), color=PFEIFFER)
    box(axes, 3.6, 13.75, "LN", width=1.3, height=0.8)
    path(axes, (2.95, 13.75), (2.8, 13.75), color=PFEIFFER, arrow=False)
    path(axes, (2.8, 13.75), (SIDE, 13.75), (SIDE, 14.5), color=PFEIFFER)
    box(axes, SIDE, 14.98, "Pfeiffer", PFEIFFER, width=2.7)
    path(axes, (SIDE, 15.46), (SIDE, 16.1), (TRUNK - 0.3, 16.1), color=PFEIFFER)
    plus(axes, TRUNK, 16.1, PFEIFFER)
    box(axes, TRUNK, 17.28, "LN")


def drop(axes: Any) -> None:
    """Draw a stack of layers whose first ones have no adapters."""
    axes.set_title("AdapterDrop", fontsize=13, color=INK, pad=16, fontweight="bold")
    note(axes, 5.0, HEIGHT + 0.1, "leave_out=[0, 1], or random_drop", LINE)
    note(axes, 5.0, 0.35, "tokens")
    path(axes, (5.0, 0.7), (5.0, 1.35))
    box(axes, 5.0, 1.83, "embeddings", width=4.4)
    heights = [3.83 + 2.25 * number for number in range(6)]
    for number, y in enumerate(heights):
        path(axes, (5.0, y - 1.5 if number else 2.3), (5.0, y - 0.75))
        box(axes, 5.0, y, "", width=4.4, height=1.5)
        if number < 2:
            note(axes, 5.0, y, f"layer {number}", LINE, fontsize=10.5)
        else:
            note(axes, 5.0, y + 0.34, f"layer {number}", fontsize=10.5)
            box(axes, 5.0, y - 0.3, "adapters", HOULSBY, width=2.7, height=0.6)
    top, last = heights[-1], heights[2] - 0.3
    path(axes, (5.0, top + 0.75), (5.0, 17.15))
    box(axes, 5.0, 17.63, "head and loss", width=4.4)
    red = "#c53030"
    path(axes, (7.2, 17.63), (8.5, 17.63), (8.5, last), color=red)
    axes.plot([7.9, 9.1], [last - 0.08] * 2, color=red, lw=2.6, solid_capstyle="round", zorder=3)
    note(axes, 8.95, (17.63 + last) / 2, "backward pass", red, rotation=270)
    note(axes, 8.5, heights[1] + 0.35, "below:\nno gradient,\nnothing kept", red, linespacing=1.35, va="center")
    path(axes, (1.5, 1.83), (1.5, 17.63), color=LINE)
    note(axes, 1.05, (17.63 + 1.83) / 2, "forward pass", LINE, rotation=90)


LEGEND = (
    (HOULSBY, "Houlsby", "y + f(y), two in each layer"),
    (HOULSBY, "Compacter", "in Houlsby's places; Compacter++ behind feed-forward only"),
    (PFEIFFER, "Pfeiffer", "v + f(v), on the sum; post-LN: LN(v + f(LN(v)))"),
    (PARALLEL, "parallel", "y + s f(x), x being what feed-forward reads; s = 4: scaled parallel"),
)


def draw() -> Any:
    """Return the figure."""
    plt.rcParams.update({"font.family": "DejaVu Sans"})
    figure, panels = plt.subplots(1, 3, figsize=(13.2, 9.6), facecolor="white")
    for axes, paint in zip(panels, (pre_norm, post_norm, drop), strict=True):
        axes.set_xlim(0, 10)
        axes.set_ylim(0, HEIGHT + 0.4)
        axes.axis("off")
        paint(axes)
    for axes, top in zip(panels[:2], (17.65, 18.7), strict=True):
        note(axes, TRUNK, top, "to the next layer")
    figure.subplots_adjust(left=0.01, right=0.99, top=0.93, bottom=0.13, wspace=0.04)
    for index, (color, name, text) in enumerate(LEGEND):
        x, y = 0.045 + 0.47 * (index // 2), 0.085 - 0.037 * (index % 2)
        figure.text(x, y, name, color=color, fontsize=10.5, fontweight="bold", va="center")
        figure.text(x + 0.078, y, text, color=INK, fontsize=10.5, va="center")
    figure.text(0.045, 0.012, "Grey is frozen. Every f is a bottleneck: f(h) = U act(D h).", color=LINE, fontsize=9.5)
    return figure


def main(folder: Path) -> None:
    """Write the picture."""
    figure = draw()
    figure.savefig(folder / "placement.png", dpi=110, metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parent)
