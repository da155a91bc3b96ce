"""`lit-peft export`: write an adapter, or a merged model, for other libraries."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape

from lit_peft import hub
from lit_peft.merging import is_mergeable
from lit_peft.mixin import PEFT
from lit_peft.quiet import quiet
from lit_peft.restore import load
from lit_peft.verbs.readers import READERS, Exported
from lit_peft.virtual_tokens import STORED


def run(
    path: str,
    out: str,
    to: Literal["peft", "lit_peft", "vllm", "sglang", "llama.cpp", "hf"] = "peft",
    backbone: str | None = None,
    name: str = "default",
) -> None:
    """Write what was trained in a form that other libraries load, with the tokenizer and its chat template.

    Args:
        path: a checkpoint, a run folder, or an adapter folder.
        out: a new or empty folder.
        to: `peft` for an adapter folder of HF PEFT; `lit_peft` for one of any method, which lit_peft loads; `vllm`,
            `sglang` or `llama.cpp` for PEFT's, refused if that one cannot load it; `hf` for a whole merged model.
        backbone: base model to use instead of the one that was noted.
        name: which of several named adapters.

    Raises:
        ValueError: if HF PEFT, or the server asked for, cannot load it.
        FileExistsError: if the folder is not empty.
    """
    if to == "hf":
        from lit_peft.verbs import merge

        if name != "default":
            raise ValueError(f"--to hf merges the adapters that act in {path}. Leave --name {name} out.")
        merge.run(path, out, backbone=backbone)
        return
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{out} is not empty. Choose a new folder.")
    quiet()
    module = load(path, backbone=backbone, device="cpu")
    if not isinstance(module, PEFT):
        raise ValueError(f"{path} is a whole model, which transformers loads as it is. There is no adapter to export.")
    if to != "lit_peft":
        _check(module, name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as place:
        draft = Path(place) / "adapter"
        module.save_adapter(draft, name)
        exported = None if to == "lit_peft" else described(module, draft, str(folder))
        obstacle = READERS[to].obstacle(exported) if exported is not None else ""
        if obstacle:
            way = "Write the merged model: --to hf." if is_mergeable(module) else "For lit_peft: --to lit_peft."
            raise ValueError(f"{READERS[to].title} cannot load this: {obstacle}. {way}")
        tokenizer: Any = getattr(module, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save_pretrained(draft)
        if folder.is_dir():
            folder.rmdir()  # empty
        draft.rename(folder)  # as a whole: nothing half-written
    console = Console(highlight=False)
    console.print(f"Wrote {escape(out)}. It loads in:")
    refused = []
    for reader in READERS.values():
        if exported is None:
            break
        obstacle = reader.obstacle(exported)
        if obstacle:
            refused.append(f"{reader.title}: {obstacle}")
        else:
            console.print(f"  {escape(f'{reader.title}: {reader.how(exported)}')}", soft_wrap=True)
    console.print(f"  {escape(f'lit_peft: load({out!r}), or --model.adapter {out}')}", soft_wrap=True)
    if refused:
        console.print(f"Not in{' (the merged model does: --to hf)' * is_mergeable(module)}:")
        for line in refused:
            console.print(f"  {escape(line)}", soft_wrap=True)


def _check(module: PEFT, name: str) -> None:
    if why := beyond_peft(module, name):
        other = " Or merged: --to hf." if is_mergeable(module) else ""
        raise ValueError(f"{why}, so it cannot load this. For lit_peft: --to lit_peft.{other}")


def beyond_peft(module: PEFT, name: str = "default") -> str:
    """Return what of an adapter HF PEFT has no folder for; empty where it has one."""
    parts = module.parts_of(name)
    own = [part["peft_type"] for part in parts if part["peft_type"].startswith("LIT_")]
    if own:
        return f"HF PEFT has no {own[0].removeprefix('LIT_').lower()}"
    if len(parts) > 1:
        return f"HF PEFT holds one method in a folder, and this is {' + '.join(part['peft_type'] for part in parts)}"
    if parts and parts[0].get(STORED, parts[0]["peft_type"]).startswith("LIT_"):
        return f"HF PEFT has no word for some settings of this {parts[0]['peft_type']}"
    return ""


def described(module: Any, draft: Path, folder: str) -> Exported:
    """Return what is known of an adapter that lies in `draft` and will be in `folder`."""
    config = hub.read_configs(draft)[0]
    base = str(config["base_model_name_or_path"])
    if base.startswith("package:"):
        from lit_peft.backbone import resolve

        base = str(resolve(base))  # other libraries do not know packages
    return Exported(config, folder, base, len(getattr(module, "labels", None) or []))
