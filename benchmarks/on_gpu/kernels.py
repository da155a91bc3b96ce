"""Every kernel: right against float64 on this device, then timed beside the plain operations and its floor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.kernel_cases import Case, all_cases
from benchmarks.on_gpu.timing import Clock, ratio

WAYS = {"kernel": True, "plain": False}


def bandwidth(clock: Clock, small: bool) -> float:
    """Return the bytes a second that a large copy reads and writes: what bounds a kernel without products."""
    source = torch.randn(2**16 if small else 2**28, device=clock.device)
    target = torch.empty_like(source)
    seconds = clock.interleaved({"copy": lambda: target.copy_(source)}, rounds=10, budget=3)["copy"]
    return 2 * source.numel() * 4 / min(seconds)


def arithmetic(clock: Clock, small: bool) -> float:
    """Return the floating-point operations a second of a large product in bfloat16."""
    size = 64 if small else 8192
    a, b = (torch.randn(size, size, device=clock.device, dtype=torch.bfloat16) for _ in range(2))
    seconds = clock.interleaved({"product": lambda: a @ b}, rounds=10, budget=3)["product"]
    return 2.0 * size**3 / min(seconds)


def measured(clock: Clock, small: bool) -> list[dict[str, Any]]:
    """Return errors and seconds of every case; one that fails gives its error."""
    rate, power, rows = bandwidth(clock, small), arithmetic(clock, small), []
    for case in all_cases(small):
        row: dict[str, Any] = {"op": case.op, "sizes": case.sizes, "case": case.name}
        if not clock.left:
            row["error"] = "not run: the time was over"
        else:
            try:
                row |= _one(clock, case, rate, power)
            except Exception as error:
                row["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
        rows.append(row)
    return rows


def _one(clock: Clock, case: Case, rate: float, power: float) -> dict[str, Any]:
    inputs = case.make(clock.device)
    errors = _errors(case, inputs)
    # as many sets of inputs as do not fit into the cache together
    size = max(1, sum(value.nbytes for value in inputs if isinstance(value, Tensor)))
    sets = [inputs, *(case.make(clock.device) for _ in range(min(7, int(128 * 2**20 // size))))]
    turn = iter(range(10**9))
    arms = {name: (lambda way=way: case.run(*sets[next(turn) % len(sets)], kernels=way)) for name, way in WAYS.items()}
    seconds = clock.interleaved(arms, rounds=12, budget=3)
    worked = {name: clock.on_device(run) for name, run in arms.items()}
    floor = max(case.moved / rate, case.products / power)
    return {
        "errors": errors,
        "right": errors["kernel"] <= case.tolerance,
        "over_plain": ratio(seconds, "kernel", "plain"),
        "device": {name: found[0] for name, found in worked.items()},
        "launches": {name: found[1] for name, found in worked.items()},
        "floor": floor,
        "of_floor": floor / max(worked["kernel"][0], 1e-9),
    }


def _errors(case: Case, inputs: Any) -> dict[str, float]:
    wanted, errors = case.exact(*inputs), {}
    for name, way in WAYS.items():
        found = case.run(*inputs, kernels=way)
        errors[name] = max(
            float((got.double() - exact).norm() / exact.norm().clamp_min(1e-9))
            for got, exact in zip(found, wanted, strict=True)
        )
    return errors


def crossovers(rows: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Return, for each op, the sizes from which its kernel is right and faster than plain operations.

    No case that is as large in every size may lose; an op without such sizes among its cases is left out.
    """
    found = {}
    for op in sorted({row["op"] for row in rows}):
        mine = [row for row in rows if row["op"] == op]
        if any("error" in row or not row["right"] for row in mine):
            continue
        lost = [row["sizes"] for row in mine if row["over_plain"]["median"] >= 1]
        for row in sorted(mine, key=lambda row: sorted(row["sizes"].items())):
            bound = row["sizes"]
            if not any(all(sizes[key] >= bound[key] for key in bound) for sizes in lost):
                found[op] = bound
                break
    return found


def markdown(rows: list[dict[str, Any]]) -> list[str]:
    """Return the table's lines."""
    lines = [
        "| case | error | plain's | over plain | device | of the floor | launches | plain's |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['case']} | {row['error']} | | | | | | |")
            continue
        cells = [row["case"], f"{row['errors']['kernel']:.1e}", f"{row['errors']['plain']:.1e}"]
        cells += [f"{row['over_plain']['median']:.3f}", f"{row['device']['kernel'] * 1e6:.1f} us"]
        cells += [f"{row['of_floor']:.0%}", *(f"{row['launches'][name]}" for name in WAYS)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines
