"""The cross entropy of a frozen output layer with a large vocabulary, beside its two matrix products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.bytes_held import peak_of
from benchmarks.on_gpu.timing import Clock, kernels, ratio
from lit_peft.ops.cross_entropy import linear_cross_entropy

WORDS = 128_256
PRODUCTS = "two products"


def measured(clock: Clock, small: bool) -> list[dict[str, Any]]:
    """Return seconds, ratios to two products, and peaks."""
    found = []
    for rows, width in ((24, 16),) if small else ((2048, 4096), (8192, 2048), (8192, 4096), (32768, 4096)):
        if clock.left:
            found.append(_one(clock, rows, width, 96 if small else WORDS))
    return found


def _one(clock: Clock, rows: int, width: int, words: int) -> dict[str, Any]:
    x = torch.randn(rows, width, device=clock.device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(words, width, device=clock.device, dtype=torch.bfloat16) * 0.02
    targets = torch.randint(words, (rows,), device=clock.device)
    piece = min(rows, 2048)

    def products() -> None:
        for start in range(0, rows, piece):  # in pieces: all logits would not be read from the cache either
            logits = x.detach()[start : start + piece] @ weight.t()
            logits @ weight

    def plain() -> None:
        torch.autograd.grad(F.cross_entropy(F.linear(x, weight).float(), targets, reduction="sum"), x)

    def ours(way: str | None) -> Callable[[], None]:
        def run() -> None:
            with kernels(way):
                torch.autograd.grad(linear_cross_entropy(x, weight, targets), x)

        return run

    def liger() -> None:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        torch.autograd.grad(liger_fused_linear_cross_entropy(x, weight, targets, reduction="sum"), x)

    arms: dict[str, Callable[[], None]] = {
        PRODUCTS: products,
        "F.cross_entropy in float32": plain,
        "Liger": liger,
        "lit_peft": ours(None),
        "lit_peft, kernels": ours("1"),
    }
    errors, peaks = {}, {}
    for name, run in list(arms.items()):
        try:
            run()
            peaks[name] = peak_of(run, clock.device)
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            del arms[name]
    seconds = clock.interleaved(arms, rounds=8, budget=8)
    return {
        "rows": rows,
        "width": width,
        "words": words,
        "seconds": {name: sorted(values)[len(values) // 2] for name, values in seconds.items()},
        "over_products": {name: ratio(seconds, name, PRODUCTS) for name in arms},
        "peak": peaks,
        "errors": errors,
    }


def markdown(rows: list[dict[str, Any]]) -> list[str]:
    """Return a table for each size."""
    lines: list[str] = []
    for row in rows:
        lines += ["", f"### {row['rows']} rows of {row['width']}, {row['words']} words", ""]
        lines += [f"| arm | time | over {PRODUCTS} | peak |", "|---|---|---|---|"]
        for name, seconds in row["seconds"].items():
            over = row["over_products"][name]["median"]
            lines.append(f"| {name} | {seconds * 1e3:.2f} ms | {over:.3f} | {row['peak'][name] / 2**20:.0f} MiB |")
        lines += [f"| {name} | {error} | | |" for name, error in row["errors"].items()]
    return lines
