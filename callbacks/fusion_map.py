"""The picture of AdapterFusion: how much attention each adapter gets in each layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from lit_peft.callbacks.checkpoint_io import write_atomically
from lit_peft.callbacks.rank_map import FEW, table

PICTURE = "fusion.png"
Found = dict[str, tuple[Tensor, Tensor]]  # by layer: the sum of the weights (n,) over tokens, and how many there were


class FusionMap(Callback):
    """Draws the mean attention of each layer on each adapter, as `fusion.png` in the run's folder.

    It shows the last validation, or the last epoch of training where nothing is validated.

    Args:
        folder: where the picture goes; None: the Trainer's `default_root_dir`.

    Example:
        >>> from lit_peft.callbacks import FusionMap
        >>> callback = FusionMap()
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = None if folder is None else Path(folder)
        self.names: dict[str, list[str]] = {}
        self._sums: dict[str, dict[str, Found]] = {"train": {}, "val": {}}

    def add(self, stage: str, fusion: str, names: Sequence[str], layers: Found) -> None:
        """Take in one step.

        Args:
            stage: `train` or `val`.
            fusion: name of the fusion.
            names: the adapters that it fuses.
            layers: by layer, the sum of the weights (n,) over tokens, and the number of tokens.
        """
        self.names[fusion] = list(names)
        sums = self._sums[stage].setdefault(fusion, {})
        for path, (total, count) in layers.items():
            before, number = sums.get(path, (0.0, 0.0))
            sums[path] = (before + total, number + count)

    def shares(self, trainer: Trainer | None = None) -> dict[str, dict[str, list[float]]]:
        """Return `{fusion: {layer: mean weight of each adapter}}`, over all processes if there is a Trainer."""
        found: dict[str, dict[str, list[float]]] = {}
        for fusion, layers in (self._sums["val"] or self._sums["train"]).items():
            for path, (total, count) in layers.items():
                if trainer is not None:
                    total = trainer.strategy.reduce(total.clone(), reduce_op="sum")
                    count = trainer.strategy.reduce(count.clone(), reduce_op="sum")
                found.setdefault(fusion, {})[path] = (total / count.clamp(min=1)).tolist()
        return found

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the training's sums anew."""
        self._sums["train"] = {}

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the validation's sums anew."""
        self._sums["val"] = {}

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log `val_fusion_NAME`, the mean over all tokens of all processes and over the layers."""
        for fusion, layers in self.shares(trainer).items() if self._sums["val"] else ():
            for number, name in enumerate(self.names[fusion]):
                share = sum(found[number] for found in layers.values()) / len(layers)
                pl_module.log(metric("val", fusion, name), share)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw."""
        for fusion, layers in self.shares(trainer).items():
            if trainer.is_global_zero and not getattr(trainer, "fast_dev_run", False):
                name = PICTURE if fusion == "default" else f"fusion_{fusion}.png"
                path = (self.folder or Path(trainer.default_root_dir)) / name
                title = "Mean attention of each layer on each adapter"
                rank_zero_info(f"{title}: {draw(path, title, self.names[fusion], layers)}")


def metric(stage: str, fusion: str, name: str) -> str:
    """Return what one adapter's share of the attention is logged as.

    Example:
        >>> metric("val", "default", "news")
        'val_fusion_news'
    """
    return f"{stage}_fusion_{name}" if fusion == "default" else f"{stage}_fusion_{fusion}_{name}"


def draw(path: Path, title: str, names: Sequence[str], layers: Mapping[str, Sequence[float]]) -> Path:
    """Draw shares as a PNG: a map for each stack of layers, adapters along one side, dark where the share is high.

    Args:
        path: the file to write.
        title: what stands above.
        names: the adapters.
        layers: `{path of the layer: share of each adapter}`.

    Returns:
        The path.
    """
    flat = {f"{_bare(layer)}.{name}": i for layer in layers for i, name in enumerate(names)}
    values = {f"{_bare(layer)}.{name}": shares[i] for layer, shares in layers.items() for i, name in enumerate(names)}
    # `table` sorts paths; what it holds are numbers of the cells
    cells = list(flat)
    stacks: Any = table({key: number for number, key in enumerate(cells)})
    columns = {stack: max(max(row) for row in kinds.values()) + 1 for stack, kinds in stacks.items()}
    rows = [len(kinds) for kinds in stacks.values()]
    width = min(18.0, max(6.0, 3.0 + 0.42 * max(columns.values(), default=1)))
    figure = Figure(figsize=(width, 1.1 + sum(0.36 * count + 0.75 for count in rows)), dpi=150, layout="constrained")
    panels = figure.subplots(max(1, len(stacks)), 1, squeeze=False, height_ratios=rows or [1])[:, 0]
    image = None
    for axes, (stack, kinds) in zip(panels, stacks.items(), strict=False):
        shown = {kind: {x: values[cells[number]] for x, number in row.items()} for kind, row in kinds.items()}
        grid = [[row.get(x, float("nan")) for x in range(columns[stack])] for row in shown.values()]
        image = axes.imshow(grid, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        axes.set_yticks(range(len(shown)), list(shown), fontsize=8)
        axes.set_xticks([x - 0.5 for x in range(1, columns[stack])], minor=True)
        axes.set_yticks([y - 0.5 for y in range(1, len(shown))], minor=True)
        axes.grid(which="minor", color="white", linewidth=1.2)
        axes.tick_params(which="both", length=0)
        axes.spines[:].set_visible(False)
        axes.set_xlabel(f"layer ({stack})" if stack else "layer", fontsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=min(columns[stack], 30), min_n_ticks=1))
        axes.tick_params(axis="x", labelsize=8)
        for y, row in enumerate(shown.values()) if len(cells) <= FEW else ():
            for x, share in row.items():
                colour = "white" if share > 0.6 else "#333333"
                axes.text(x, y, f"{share:.2f}".lstrip("0"), ha="center", va="center", fontsize=6, color=colour)
    if image is not None:
        bar = figure.colorbar(
            image, ax=list(panels), label="share of the attention", pad=0.015, fraction=0.05, aspect=12
        )
        bar.ax.tick_params(labelsize=8, length=0, which="both")
        bar.outline.set_visible(False)  # type: ignore[operator]
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    write_atomically(path, lambda file: figure.savefig(file, format="png"))
    return path


def _bare(path: str) -> str:
    return ".".join(piece for piece in path.split(".") if piece != "base")
