"""Matrix products in the two layouts of a LoRA layer: plain, and with A and B in borders around the weight.

The bordered layout multiplies [x | z] (T, d + R) by [W | C] (k, d + R), with rows that lie d + R apart. Should the
library's product be much slower there than in the plain layout, the border cannot pay: this is measured first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.on_gpu.timing import Clock, ratio

R, PADDED = 16, 64
LAYERS = {"4096 -> 4096": (4096, 4096), "4096 -> 1024": (4096, 1024), "4096 -> 14336": (4096, 14336)}
LAYERS |= {"14336 -> 4096": (14336, 4096), "2048 -> 2048": (2048, 2048), "2048 -> 8192": (2048, 8192)}


def measured(clock: Clock, small: bool) -> list[dict[str, Any]]:
    """Return, for each layer and number of tokens, what bordering costs and what it saves."""
    layers = {"64 -> 96": (64, 96)} if small else LAYERS
    rows = []
    for tokens in (32,) if small else (2048, 8192):
        for name, (d, k) in layers.items():
            if clock.left:
                rows.append({"layer": name, "tokens": tokens, **_one(clock, tokens, d, k)})
    return rows


def _one(clock: Clock, tokens: int, d: int, k: int) -> dict[str, Any]:
    def draw(*shape: int) -> torch.Tensor:  # never zeros: those need less power, and run faster
        return torch.randn(*shape, device=clock.device, dtype=torch.bfloat16) * 0.02

    weight, buffer = draw(k, d), draw(k + PADDED, d + PADDED)
    x, padded, a, b, z = draw(tokens, d), draw(tokens, d + PADDED), draw(R, d), draw(k, R), draw(tokens, R)
    arms: dict[str, Callable[[], object]] = {
        "plain": lambda: x @ weight.t(),
        "weight in the buffer's corner": lambda: x @ buffer[:k, :d].t(),
        "bordered": lambda: padded @ buffer[:k].t(),
        "plain, update added": lambda: (x @ weight.t()).addmm_(x @ a.t(), b.t()),
        "plain, update of a known z added": lambda: (x @ weight.t()).addmm_(z, b.t()),
    }
    seconds = clock.interleaved(arms, rounds=12, budget=4)
    return {
        "seconds": {name: sorted(values)[len(values) // 2] for name, values in seconds.items()},
        "over_plain": {name: ratio(seconds, name, "plain") for name in arms if name != "plain"},
    }


def markdown(rows: list[dict[str, Any]]) -> list[str]:
    """Return the table's lines."""
    names = list(rows[0]["over_plain"]) if rows else []
    lines = [f"| layer | tokens | plain | {' | '.join(names)} |", f"|{'---|' * (3 + len(names))}"]
    for row in rows:
        cells = [row["layer"], f"{row['tokens']}", f"{row['seconds']['plain'] * 1e6:.0f} us"]
        cells += [f"{row['over_plain'][name]['median']:.3f}" for name in names]
        lines.append(f"| {' | '.join(cells)} |")
    return lines
