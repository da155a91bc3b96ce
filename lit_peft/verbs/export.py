"""`lit-peft export`: write an adapter, or a merged model, for other libraries."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape

from lit_peft import hub
from lit_peft.mixin import PEFT
from lit_peft.restore import load
from lit_peft.runs import quiet


def run(path: str, out: str, to: Literal["peft", "hf"] = "peft", backbone: str | None = None) -> None:
    """Write what was trained in a form that other libraries load, with the tokenizer and its chat template.

    Args:
        path: a checkpoint, a run folder, or an adapter folder.
        out: a new or empty folder.
        to: `peft` for an adapter folder of HF PEFT, `hf` for a whole merged model.
        backbone: base model to use instead of the one that was noted.

    Raises:
        ValueError: if HF PEFT has no such method.
        FileExistsError: if the folder is not empty.
    """
    if to == "hf":
        from lit_peft.verbs import merge

        merge.run(path, out, backbone=backbone)
        return
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{out} is not empty. Choose a new folder.")
    quiet()
    module = load(path, backbone=backbone, device="cpu")
    if not isinstance(module, PEFT):
        raise ValueError(f"{path} is a whole model, which transformers loads as it is. There is no adapter to export.")
    _check(module)
    module.save_adapter(folder)
    try:
        tokenizer: Any = getattr(module, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)  # nothing half-written
        raise
    console = Console(highlight=False)
    console.print(f"Wrote {escape(out)}. It loads in:")
    for line in readers(module, folder):
        console.print(f"  {escape(line)}", soft_wrap=True)


def _check(module: PEFT) -> None:
    parts = module.parts()
    own = [part["peft_type"].removeprefix("LIT_").lower() for part in parts if part["peft_type"].startswith("LIT_")]
    if own:
        raise ValueError(f"HF PEFT has no {own[0]}, so it cannot load this. Write the merged model instead: --to hf.")
    if len(parts) > 1:
        names = " + ".join(part["peft_type"] for part in parts)
        raise ValueError(f"HF PEFT holds one method in a folder, and this is {names}. Use --to hf.")


def readers(module: Any, folder: Path) -> list[str]:
    """Return, one line each, what loads an exported adapter and how."""
    config = hub.read_configs(folder)[0]
    kind, base = config["task_type"], config["base_model_name_or_path"]
    auto = {"CAUSAL_LM": "CausalLM", "SEQ_2_SEQ_LM": "Seq2SeqLM", "SEQ_CLS": "SequenceClassification"}.get(kind)
    head = f", num_labels={len(module.labels)}" if kind == "SEQ_CLS" else ""
    name = repr(base)
    if str(base).startswith("package:"):
        from lit_peft.backbone import resolve

        name = repr(resolve(base))  # other libraries do not know packages
    lines = []
    if auto:
        model = f"AutoModelFor{auto}.from_pretrained({name}{head})"
        lines.append(f"transformers + peft: PeftModel.from_pretrained({model}, {str(folder)!r})")
    # vLLM refuses whole modules beside LoRA, and ranks above its setting, 16 unless told otherwise
    if kind == "CAUSAL_LM" and config["peft_type"] == "LORA" and not config.get("modules_to_save"):
        rank = f" --max-lora-rank {config['r']}" if config["r"] > 16 else ""
        lines.append(f"vLLM, for architectures that it adapts: --enable-lora{rank} --lora-modules NAME={folder}")
    lines.append(f"lit_peft: load({str(folder)!r}), or --model.adapter {folder}")
    return lines
