"""The last screen of a training run: base against tuned, answers side by side, the next commands."""

from __future__ import annotations

import math
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback
from rich.console import Console
from rich.table import Table

from lit_peft.callbacks import RunReport
from lit_peft.callbacks.run_report import onward
from lit_peft.data.instructions import Instructions
from lit_peft.data.render import Renderer
from lit_peft.mixin import PEFT
from lit_peft.named import disabled
from lit_peft.tasks import answers
from lit_peft.tasks.sft import SFT
from lit_peft.verbs.export import beyond_peft

if TYPE_CHECKING:
    from lit_peft.cli.app import LitPEFTCLI

# logged name -> (what a reader sees, how it is written)
MEASURES = {
    "test_exact_match": ("exact match", "{:.1%}"),
    "test_choice_accuracy": ("right when choosing among the labels", "{:.1%}"),
    "test_perplexity": ("perplexity of the answers", "{:.3g}"),
    "test_accuracy": ("accuracy", "{:.1%}"),
    "test_f1": ("F1 (macro)", "{:.3f}"),
    "test_mcc": ("Matthews correlation", "{:.3f}"),
}


def finish(cli: LitPEFTCLI) -> None:
    """Measure if `--evaluate` asks for it, show and keep the results, and print how to go on."""
    rows = int(cli._get(cli.config, "evaluate", 0) or 0)
    console = Console()
    callbacks: list[Callback] = cli.trainer.callbacks  # type: ignore[attr-defined]
    report = next((callback for callback in callbacks if isinstance(callback, RunReport)), None)
    if rows > 0:
        _evaluate(cli, rows, console, report)
    if cli.trainer.is_global_zero:
        if report is not None:
            report.write(cli.trainer, cli.model)
        _next_commands(cli, console)


def _evaluate(cli: LitPEFTCLI, rows: int, console: Console, report: Callback | None) -> None:
    trainer, model, data = cli.trainer, cli.model, cli.datamodule
    base = bool(cli._get(cli.config, "evaluate_base", True))
    data.limit_test = rows
    data.batch_size = max(
        data.batch_size, 32
    )  # no gradients are kept: larger batches fit and read the weights less often
    if trainer.is_global_zero:
        console.print(f"\nmeasuring {'base and ' * base}tuned model on {rows} held-out rows ...")
    measured: dict[str, dict[str, float]] = {}
    try:
        if base:
            with disabled(model):
                measured["base"] = _test(trainer, model, data)
    except TypeError as reason:  # weights trained in place, no copy kept
        if trainer.is_global_zero:
            console.print(f"no numbers for the base: {reason}")
    measured["tuned"] = _test(trainer, model, data)
    samples = _samples(model, data) if base and isinstance(model, SFT) and isinstance(data, Instructions) else []
    if not trainer.is_global_zero:
        return
    columns = list(measured)
    lines = []
    for key, (name, style) in MEASURES.items():
        if key in measured["tuned"] and not (key == "test_accuracy" and isinstance(model, SFT)):
            lines.append([name, *(style.format(measured[column].get(key, math.nan)) for column in columns)])
    title = f"{rows} held-out rows"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right", style="bold" if column == "tuned" else "")
    for line in lines:
        table.add_row(*line)
    console.print(table)
    if samples:
        side = Table(title="three answers", title_justify="left", show_lines=True)
        for column in samples[0]:
            side.add_column(column, overflow="fold")
        for sample in samples:
            side.add_row(*sample.values())
        console.print(side)
    if isinstance(report, RunReport):
        report.add_table(title, ["", *columns], lines)
        if samples:
            report.add_samples(samples)


def _test(trainer: Any, model: Any, data: Any) -> dict[str, float]:
    results = trainer.test(model, datamodule=data, verbose=False)
    return {key: float(value) for key, value in (results[0] if results else {}).items()}


def _samples(model: SFT, data: Instructions) -> list[dict[str, str]]:
    """Answer the first three test rows with and without the adapter."""
    batch = next(iter(data.test_dataloader()))
    rows = answers.split({k: v.to(model.device) for k, v in batch.items() if hasattr(v, "to")}, model.encoder_decoder)[
        :3
    ]
    prompts = [row.prompt for row in rows]
    tuned = answers.generate(model, prompts, 24)
    try:
        with disabled(model):
            base = answers.generate(model, prompts, 24)
    except TypeError:
        base = ["(not kept)"] * len(rows)
    tokenizer = model.tokenizer
    return [
        {
            "question": _question(model, row.prompt),
            "base": before,
            "tuned": after,
            "right answer": answers.text(tokenizer, row.answer),
        }
        for row, before, after in zip(rows, base, tuned, strict=True)
    ]


def _question(model: SFT, prompt: list[int]) -> str:
    """Return the end of a prompt as text, without what the template adds to open the answer."""
    asked = [{"role": "user", "content": "?"}]
    renderer = Renderer(model.tokenizer)
    cue = 0 if model.encoder_decoder else len(renderer.ids(asked, cue=True)) - len(renderer.ids(asked))
    words = answers.text(model.tokenizer, prompt[: len(prompt) - cue]).split()
    return " ".join(words) if len(words) <= 20 else f"... {' '.join(words[-20:])}"


def _next_commands(cli: LitPEFTCLI, console: Console) -> None:
    run = shlex.quote(str(cli.run_dir))
    picture = Path(cli.run_dir) / "curves.png"
    console.print(f"\nrun folder  {cli.run_dir}" + (f"\ncurves      {picture}" if picture.exists() else ""))
    console.print("\nnext:")
    module = cli.model
    lines = list(onward(module, run).values())
    if isinstance(module, PEFT):
        own = " --to lit_peft" if beyond_peft(module) else ""
        lines.append(f"lit-peft export {run} --out {run}/adapter{own}")
    for line in lines:
        console.print(f"  {line}", highlight=False, soft_wrap=True)
