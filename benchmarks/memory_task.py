"""The memory task of the MoRA paper (https://arxiv.org/abs/2405.12130, section 4), small: who memorises random pairs?

A small Llama is first trained on generic hexadecimal text: lines `key relation value`, where the relation is copy,
reverse, increase, or one that means nothing. Then it is frozen, and each arm learns the same random pairs
`key:value`, 8 hexadecimal digits each, which no rule explains. All arms train as many weights, up to rounding.

    python benchmarks/memory_task.py --pairs 300 --rank 2 --steps 3000

Everything is seeded. Written to benchmarks/results: memory_task.json, .md (the table) and .png (the curves).
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from lit_peft import LoRA, MoRA

RESULTS = Path(__file__).parent / "results"
DIGITS, PAIR, RELATIONS = 16, 16, (17, 18, 19)  # tokens: 16 digits, `:`, and the three relations with a rule
LENGTH = 8


def random_digits(rows: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, DIGITS, (rows, LENGTH), generator=generator)


def generic(rows: int, generator: torch.Generator) -> Tensor:
    """Lines of generic text: (rows, 17)."""
    key, noise = random_digits(rows, generator), random_digits(rows, generator)
    relation = torch.randint(PAIR, RELATIONS[-1] + 1, (rows, 1), generator=generator)
    value = torch.where(relation == RELATIONS[0], key, noise)
    value = torch.where(relation == RELATIONS[1], key.flip(-1), value)
    value = torch.where(relation == RELATIONS[2], (key + 1) % DIGITS, value)
    return torch.cat([key, relation, value], dim=1)


def value_logits(model: Any, rows: Tensor) -> Tensor:
    """Logits of the eight digits of the value, each from what stands before it."""
    logits: Tensor = model(input_ids=rows).logits
    return logits[:, LENGTH:-1]


def pretrained(width: int, layers: int, steps: int, folder: Path) -> Path:
    """Train the base once and keep it."""
    if (folder / "config.json").is_file():
        return folder
    seed_everything(0, verbose=False)
    config = LlamaConfig(
        vocab_size=RELATIONS[-1] + 1,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.1)
    start = time.time()
    for step in range(steps):
        rows = generic(128, generator)
        loss = F.cross_entropy(value_logits(model, rows).flatten(0, 1), rows[:, LENGTH + 1 :].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"base: step {step}, loss {loss.item():.3f}, {time.time() - start:.0f} s", flush=True)
    model.save_pretrained(folder)
    return folder


class Recall(LightningModule):
    """Learns to give the value of each key."""

    def __init__(self, base: str, lr: float, warmup: int = 50) -> None:
        super().__init__()
        self.base, self.lr, self.warmup = base, lr, warmup
        self.model: Any = None

    def configure_model(self) -> None:
        if self.model is None:
            self.model = LlamaForCausalLM.from_pretrained(self.base).train()

    def training_step(self, rows: Tensor, index: int) -> Tensor:
        return F.cross_entropy(value_logits(self.model, rows).flatten(0, 1), rows[:, LENGTH + 1 :].flatten())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / self.warmup))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class LoRARecall(LoRA, Recall):
    """The arm with LoRA."""


class MoRARecall(MoRA, Recall):
    """The arms with MoRA."""


class Exam(Callback):
    """Measures at fixed steps, on all pairs, how many digits and how many whole values are right.

    A value is right if each digit is the likeliest after the right ones before it: just then greedy decoding gives it.
    """

    def __init__(self, pairs: Tensor, every: int) -> None:
        self.pairs, self.every = pairs, every
        self.marks: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step % self.every:
            return
        with torch.no_grad():
            logits = value_logits(pl_module.model, self.pairs)
        right = logits.argmax(-1) == self.pairs[:, LENGTH + 1 :]
        loss = F.cross_entropy(logits.flatten(0, 1), self.pairs[:, LENGTH + 1 :].flatten())
        mark = {
            "step": trainer.global_step,
            "characters": right.float().mean().item(),
            "exact": right.all(-1).float().mean().item(),
            "loss": loss.item(),
        }
        self.marks.append(mark)


def arm(name: str, base: Path, options: argparse.Namespace, lr: float) -> dict[str, Any]:
    seed_everything(options.seed, verbose=False)
    generator = torch.Generator().manual_seed(options.seed)
    keys, values = random_digits(options.pairs, generator), random_digits(options.pairs, generator)
    pairs = torch.cat([keys, torch.full((options.pairs, 1), PAIR), values], dim=1)
    module: LightningModule
    if name == "lora":
        module = LoRARecall(str(base), lr, lora={"r": options.rank, "alpha": 2 * options.rank})
    else:
        module = MoRARecall(str(base), lr, mora={"r": options.rank, "mora_type": int(name.removeprefix("mora"))})
    exam = Exam(pairs, options.every)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=options.steps,
        max_epochs=-1,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[exam],
    )
    loader: Any = DataLoader(pairs, batch_size=options.batch, shuffle=True)  # type: ignore[arg-type]
    start = time.time()
    trainer.fit(module, loader)
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    result = {"arm": name, "lr": lr, "weights": trained, "seconds": round(time.time() - start), "marks": exam.marks}
    print({**result, "marks": exam.marks[-1]}, flush=True)
    return result


LABELS = {"lora": "LoRA", "mora1": "MoRA type 1", "mora2": "MoRA type 2", "mora6": "MoRA type 6"}


def best(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The best learning rate of each arm: the one with the lowest loss at the end."""
    names = dict.fromkeys(result["arm"] for result in results)
    return [min((r for r in results if r["arm"] == name), key=lambda r: r["marks"][-1]["loss"]) for name in names]


def write(results: list[dict[str, Any]], options: argparse.Namespace, command: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    RESULTS.mkdir(exist_ok=True)
    settings = {key: value for key, value in vars(options).items() if key != "cache"}
    content = {"command": command, "settings": settings, "torch": torch.__version__, "results": results}
    (RESULTS / "memory_task.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    chosen = best(results)
    steps = [mark["step"] for mark in chosen[0]["marks"]]
    shown = [steps[len(steps) * i // 6 - 1] for i in range(1, 7)]
    lines = [
        f"# Memory task: {options.pairs} random pairs, rank {options.rank}",
        "",
        f"`{command}`",
        "",
        "Digits right / whole values right, in percent, at fixed steps; each arm with the best of the learning rates "
        f"that were tried on it (all are in memory_task.json). Seed {options.seed}, one CPU thread.",
        "",
        "| arm | weights | lr | of | " + " | ".join(f"step {step}" for step in shown) + " |",
        "|---|---|---|---|" + "---|" * len(shown),
    ]
    for result in chosen:
        at = {mark["step"]: mark for mark in result["marks"]}
        cells = [f"{100 * at[s]['characters']:.1f} / {100 * at[s]['exact']:.1f}" for s in shown]
        tried = ", ".join(f"{r['lr']:g}" for r in sorted(results, key=lambda r: r["lr"]) if r["arm"] == result["arm"])
        head = f"| {LABELS[result['arm']]} | {result['weights']:,} | {result['lr']:g} | {tried} "
        lines.append(f"{head}| {' | '.join(cells)} |")
    (RESULTS / "memory_task.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharex=True, sharey=True, layout="constrained")
    for axis, key, title in zip(axes, ("characters", "exact"), ("digits right", "whole values right"), strict=True):
        for colour, result in enumerate(chosen):
            for other in (r for r in results if r["arm"] == result["arm"]):
                first = other is result
                axis.plot(
                    [mark["step"] for mark in other["marks"]],
                    [100 * mark[key] for mark in other["marks"]],
                    color=f"C{colour}",
                    linewidth=2 if first else 0.8,
                    alpha=1 if first else 0.35,
                    label=f"{LABELS[other['arm']]}, lr {other['lr']:g}" if first else None,
                )
        axis.set(title=title, xlabel="step", ylim=(0, 102))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("%")
    axes[0].legend(frameon=False)
    figure.suptitle(
        f"{options.pairs} random pairs, about {chosen[0]['weights']:,} weights (thin: other learning rates)"
    )
    figure.savefig(RESULTS / "memory_task.png", dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description="Who memorises random pairs: LoRA or MoRA of equal size?")
    parser.add_argument("--pairs", type=int, default=300)
    parser.add_argument("--rank", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--every", type=int, default=100)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--base_steps", type=int, default=1500)
    parser.add_argument("--arms", nargs="+", default=["lora", "mora6", "mora1"], choices=list(LABELS))
    parser.add_argument("--lrs", nargs="+", type=float, default=[3e-3, 1e-3, 1e-2])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=Path(os.environ.get("TMPDIR", "/tmp")) / "memory_task_bases")
    options = parser.parse_args()
    torch.set_num_threads(1)
    base = pretrained(
        options.width,
        options.layers,
        options.base_steps,
        options.cache / f"{options.width}-{options.layers}-{options.base_steps}",
    )
    settings = {k: v for k, v in vars(options).items() if k != "cache" and v != parser.get_default(k)}
    shown = [f"--{k} {' '.join(map(str, v)) if isinstance(v, list) else v}" for k, v in settings.items()]
    command = " ".join(["python benchmarks/memory_task.py", *shown])
    results = []
    for lr in options.lrs:
        for name in options.arms:
            results.append(arm(name, base, options, lr))
            if lr == options.lrs[-1] or name == options.arms[-1]:
                write(results, options, command)


if __name__ == "__main__":
    main()
