"""All kernels on a GPU, checked and timed, in one command of less than nine minutes: `python -m benchmarks.gpu`.

In this order, because each part decides about the next: matrix products in the plain and in the bordered layout; every
kernel against float64 and beside plain operations; losses of a large vocabulary; whole steps on the shapes of 1B and 8B
models beside the frozen base and HF PEFT. Whatever the time does not reach is told as not run.

    python -m benchmarks.gpu                  writes results/gpu.json and results/gpu.md
    python -m benchmarks.gpu --crossovers     also lit_peft/ops/crossovers.json: from which sizes on kernels are taken
    TRITON_INTERPRET=1 python -m benchmarks.gpu --small --device cpu --out /tmp     tries the script, measures nothing
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.methods import RESULTS, machine, surroundings
from benchmarks.on_gpu import kernels, losses, products, steps
from benchmarks.on_gpu.timing import Clock
from lit_peft.ops.choice import CROSSOVERS, kernels_run
from lit_peft.quiet import quiet

PARTS: dict[str, tuple[str, Callable[..., list[dict[str, Any]]], Callable[..., list[str]]]] = {
    "products": ("Matrix products: a LoRA layer's two layouts", products.measured, products.markdown),
    "kernels": ("Every kernel", kernels.measured, kernels.markdown),
    "losses": ("Cross entropy of a frozen output layer", losses.measured, losses.markdown),
    "steps": ("Whole steps", steps.measured, steps.markdown),
}


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=8.5)
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--small", action="store_true", help="small sizes, to try the script")
    parser.add_argument("--crossovers", action="store_true", help="write lit_peft/ops/crossovers.json")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser


def clock_rate() -> str:
    """Return the clock of the GPU's multiprocessors, as the driver tells it."""
    try:
        asked = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.max.sm", "--format=csv,noheader"]
        return subprocess.run(asked, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def markdown(report: dict[str, Any]) -> str:
    """Return the report as a page."""
    about = report["about"]
    lines = ["# Kernels and steps on a GPU", "", f"    {about['command']}", "", machine(about)]
    lines += [f"Triton {report['triton']}; clock (now, most): {report['clock']}.", ""]
    lines.append(
        "Arms run in turns, in an order that is drawn for each round; ratios are within rounds, medians. *of the "
        "floor*: the time that the bytes and products need at this device's measured rates, over the time that the "
        "device works."
    )
    for name, rows in report["parts"].items():
        lines += ["", f"## {PARTS[name][0]}", "", *PARTS[name][2](rows)]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure and write.

    Raises:
        SystemExit: where kernels cannot run, or for a part that is not there.
    """
    args = options().parse_args(arguments)
    chosen = args.parts.split(",")
    if unknown := [name for name in chosen if name not in PARTS]:
        raise SystemExit(f"There is no part {unknown[0]!r}. Known: {', '.join(PARTS)}.")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("There is no GPU here. To try the script: TRITON_INTERPRET=1 ... --small --device cpu")
    device = torch.device(args.device)
    if not kernels_run(device) or find_spec("triton") is None:
        raise SystemExit(f"Triton kernels do not run on {device} here. For the CPU set TRITON_INTERPRET=1 and --small.")
    if args.crossovers and (device.type != "cuda" or args.small or "kernels" not in chosen):
        raise SystemExit("--crossovers needs a GPU, true sizes, and the part named kernels.")
    import triton

    quiet()
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")
    clock, given = Clock(device, args.minutes * 60), sys.argv[1:] if arguments is None else arguments
    report: dict[str, Any] = {
        "about": surroundings(device, shlex.join(["python", "-m", "benchmarks.gpu", *given])),
        "triton": triton.__version__,
        "clock": clock_rate() if device.type == "cuda" else "no GPU",
        "parts": {},
    }
    args.out.mkdir(parents=True, exist_ok=True)
    for name in chosen:
        report["parts"][name] = PARTS[name][1](clock, args.small)
        # after every part: a run that is cut short leaves what it has
        (args.out / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
        (args.out / "gpu.md").write_text(markdown(report))
        print(f"{name}: done, {clock.left:.0f} s left", file=sys.stderr, flush=True)
    if args.crossovers:
        known = json.loads(CROSSOVERS.read_text())
        known[report["about"]["device"]] = kernels.crossovers(report["parts"]["kernels"])
        CROSSOVERS.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    return report


if __name__ == "__main__":
    main()
