"""`lit-peft`: answers what needs no model at once, hands the rest to the command line proper."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

from lit_peft import __version__

# verb -> what it does. The first five are LightningCLI's, built on the Trainer; the others are plain functions.
TRAINER_VERBS = {
    "fit": "train a model: --method, --task, --model.backbone, --data.path",
    "validate": "measure on the validation rows; with --ckpt_path alone everything is restored",
    "test": "measure on the test rows: answers generated, chosen, and their perplexity",
    "predict": "write answers for every row to a JSONL file",
    "preview": "show three rows with what the loss sees in colour",
}
VERBS = {
    "chat": "talk to a trained model, --vs base side by side",
    "merge": "fold an adapter into its base and write a Hugging Face folder",
    "export": "write an adapter or a merged model for other libraries",
    "inspect": "say what is inside a checkpoint, an adapter or a run",
    "compare": "train one job with many methods: one table, one picture, the winner",
    "methods": "list all methods, or explain one",
}


def help_text() -> str:
    """Return the first screen."""
    lines = [
        "usage: lit-peft VERB [options]",
        "",
        "Every parameter-efficient fine-tuning method as a Lightning mixin. No telemetry.",
        "",
        "verbs:",
    ]
    lines += [f"  {verb:<10}{what}" for verb, what in {**TRAINER_VERBS, **VERBS}.items()]
    lines += [
        "",
        "examples:",
        "  lit-peft fit --method lora --task sft --model.backbone Qwen/Qwen3-0.6B --data.path chats.jsonl",
        "  lit-peft preview --model.backbone Qwen/Qwen3-0.6B --data.path chats.jsonl",
        "  lit-peft chat runs/2026-01-31-lora-sft --vs base",
        "  lit-peft compare -c recipe/compare_trec --methods lora,bitfit,prefix --budget 1m",
        "",
        "`lit-peft VERB --help` lists a verb's options, `lit-peft methods NAME` explains a method.",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0; 2 for the user's mistakes; 1 for what fails while running; 130 and 143 for signals.
    """
    argv = list(sys.argv[1:] if arguments is None else arguments)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"lit-peft {__version__}")
        return 0
    verb, rest = argv[0], argv[1:]
    if verb not in TRAINER_VERBS and verb not in VERBS:
        from difflib import get_close_matches

        near = get_close_matches(verb, [*TRAINER_VERBS, *VERBS], n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        print(f"lit-peft: error: there is no verb {verb!r}.{hint} See lit-peft --help.", file=sys.stderr)
        return 2
    # Idle OpenMP threads that spin make two processes on one machine 10 to 20 times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # bitsandbytes says at import that an optional package of kernels is absent.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from lit_peft.faults import guarded

    with guarded() as outcome:
        if verb in TRAINER_VERBS:
            from lit_peft.cli.app import LitPEFTCLI

            LitPEFTCLI.start(verb, rest)
        else:
            from importlib import import_module
            from inspect import signature

            from jsonargparse import auto_cli

            from lit_peft.cli.complaints import OneLine

            module = import_module(f"lit_peft.verbs.{verb}")
            if hasattr(module, "shorthand"):
                rest = module.shorthand(rest)
            if rest and not rest[0].startswith("-"):  # lit-peft merge RUN --out FOLDER
                rest = [f"--{next(iter(signature(module.run).parameters))}={rest[0]}", *rest[1:]]
            options: dict[str, Any] = {"as_positional": False, "parser_class": OneLine}
            outcome.code = auto_cli(module.run, args=rest, prog=f"lit-peft {verb}", **options) or 0
    return outcome.code


if __name__ == "__main__":
    sys.exit(main())
