"""The picture of ranks: layers along one side, the kinds of modules along the other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lit_peft.callbacks.checkpoint_io import write_atomically

FEW = 900  # cells that are numbered; more would not be readable


def table(ranks: Mapping[str, int]) -> dict[str, dict[str, dict[int, int]]]:
    """Sort ranks by stack of layers, kind of module and number of the layer.

    Args:
        ranks: `{path of the module: rank}`.

    Returns:
        `{stack: {kind: {layer: rank}}}`; a module outside of all layers is a kind of its own, in layer 0 of stack "".

    Example:
        >>> table({"model.layers.0.mlp.up_proj": 3, "model.layers.1.mlp.up_proj": 1})
        {'model.layers': {'up_proj': {0: 3, 1: 1}}}
    """
    found: dict[str, dict[str, dict[int, int]]] = {}
    for path, rank in ranks.items():
        pieces = path.split(".")
        at = next((i for i, piece in enumerate(pieces) if piece.isdigit()), None)
        # several "layer.0", "layer.1" inside one layer (T5) belong to the kind
        stack, layer, kind = ("", 0, path) if at is None else (".".join(pieces[:at]), int(pieces[at]), pieces[at + 1 :])
        name = ".".join(kind) if isinstance(kind, list) else kind
        found.setdefault(stack, {}).setdefault(name, {})[layer] = rank
    return {stack: _shortened(kinds) if stack else kinds for stack, kinds in found.items()}


def _shortened(kinds: dict[str, dict[int, int]]) -> dict[str, dict[int, int]]:
    """Name each kind by the shortest end of its path that no other kind has; bare numbers say nothing."""
    ends: dict[str, str] = {}
    for kind in kinds:
        pieces = kind.split(".")
        tails = [".".join(pieces[-n:]) for n in range(1, len(pieces) + 1)]
        ends[kind] = next((t for t in tails if sum(f".{other}".endswith(f".{t}") for other in kinds) == 1), kind)
    return {ends[kind]: cells for kind, cells in kinds.items()}


def draw(path: Path, title: str, ranks: Mapping[str, int]) -> Path:
    """Draw ranks as a PNG: one map for each stack of layers, dark where the rank is high.

    Args:
        path: the file to write.
        title: what stands above.
        ranks: `{path of the module: rank}`.

    Returns:
        The path.
    """
    stacks = table(ranks)
    columns = {stack: max(max(cells) for cells in kinds.values()) + 1 for stack, kinds in stacks.items()}
    rows = [len(kinds) for kinds in stacks.values()]
    highest = max(1, *ranks.values()) if ranks else 1
    width = min(18.0, max(6.0, 2.6 + 0.36 * max(columns.values(), default=1)))
    height = 1.1 + sum(0.34 * count + 0.75 for count in rows)
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    panels = figure.subplots(max(1, len(stacks)), 1, squeeze=False, height_ratios=rows or [1])[:, 0]
    shades = BoundaryNorm([step - 0.5 for step in range(highest + 2)], 256)
    image = None
    for axes, (stack, kinds) in zip(panels, stacks.items(), strict=False):
        grid = [[float(cells.get(i, "nan")) for i in range(columns[stack])] for cells in kinds.values()]
        image = axes.imshow(grid, cmap="Blues", norm=shades, aspect="auto")
        axes.set_yticks(range(len(kinds)), list(kinds), fontsize=8)
        axes.set_xticks([x - 0.5 for x in range(1, columns[stack])], minor=True)
        axes.set_yticks([y - 0.5 for y in range(1, len(kinds))], minor=True)
        axes.grid(which="minor", color="white", linewidth=1.2)
        axes.tick_params(which="both", length=0)
        axes.spines[:].set_visible(False)
        if stack:
            axes.set_xlabel(f"layer ({stack})", fontsize=8)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=min(columns[stack], 30), min_n_ticks=1))
        else:
            axes.set_xticks([])
        axes.tick_params(axis="x", labelsize=8)
        if len(ranks) <= FEW:
            size = 8 if width / columns[stack] > 0.3 else 6
            for y, cells in enumerate(kinds.values()):
                for x, rank in cells.items():
                    dark = rank > 0.5 * highest
                    colour = "white" if dark else "#333333"
                    axes.text(x, y, str(rank), ha="center", va="center", fontsize=size, color=colour)
    if image is not None:
        bar = figure.colorbar(image, ax=list(panels), label="rank", pad=0.015, fraction=0.05, aspect=12)
        bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=min(highest + 1, 8)))
        bar.ax.tick_params(labelsize=8, length=0, which="both")
        bar.outline.set_visible(False)  # type: ignore[operator]
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    write_atomically(path, lambda file: figure.savefig(file, format="png"))
    return path
