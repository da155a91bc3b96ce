"""Run folders and their checkpoints: where a run goes, what it holds, how to find it again.

A run folder: `config.yaml` (everything resolved), `checkpoints/` (best and last), `logs/` (CSV), `tensorboard/`,
`curves.png`, `README.md` (the measured numbers).
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Trainer

from lit_peft.cli.request import Request
from lit_peft.saved import locate, read_checkpoint

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
HOME = Path("runs")


def choose(request: Request, asked: str | None) -> Path:
    """Return the folder of this run, the same on every process.

    A run that goes on stays in its folder. A new one gets `runs/DATE-METHOD-TASK`, with a number if that is taken.

    Raises:
        FileExistsError: if the folder asked for holds another run.
    """
    inherited = os.environ.get("LIT_PEFT_RUN_DIR")  # DDP's launcher starts this same command again for other ranks
    if inherited and os.environ.get("LOCAL_RANK", "0") != "0":
        return Path(inherited)
    own = _home_of(request.ckpt_path)
    if asked is not None:
        folder = Path(asked)
        taken = (folder / CONFIG).exists() and request.verb == "fit"
        if taken and (own is None or own.resolve() != folder.resolve()) and os.environ.get("RANK", "0") == "0":
            last = folder / CHECKPOINTS / "last.ckpt"
            way = f"resume it with --ckpt_path {last}" if last.exists() else "remove it"
            raise FileExistsError(f"{folder} already holds a run. Choose another --run_dir, or {way}.")
    elif own is not None:
        folder = own
    else:
        stem = f"{date.today().isoformat()}-{request.method}-{request.task}"
        folder, number = HOME / stem, 2
        while (folder / CONFIG).exists() and request.verb == "fit":
            folder, number = HOME / f"{stem}-{number}", number + 1
    os.environ["LIT_PEFT_RUN_DIR"] = str(folder)
    return folder


def _home_of(checkpoint: str | None) -> Path | None:
    """Return the run folder that a checkpoint lies in, None if it lies elsewhere."""
    if checkpoint is None:
        return None
    parent = Path(checkpoint).parent
    return parent.parent if parent.name == CHECKPOINTS else None


def find_checkpoint(asked: str, method: str, task: str) -> Path:
    """Return the checkpoint that a path, a run folder, or the word `last` means.

    Raises:
        FileNotFoundError: if there is none.
    """
    if asked in ("last", "best"):
        found = sorted(HOME.glob(f"*-{method}-{task}*/{CHECKPOINTS}/*.ckpt"), key=lambda path: path.stat().st_mtime)
        wanted = [path for path in found if asked == "best" or path.stem == "last"]
        wanted = [path for path in wanted if asked == "last" or path.stem != "last"]
        if not wanted:
            raise FileNotFoundError(f"There is no {asked} checkpoint under {HOME}/*-{method}-{task}. Give its path.")
        return wanted[-1]
    path = Path(asked)
    if path.exists():
        kind, found_path = locate(path)
        if kind != "checkpoint":
            flag = "--model.adapter" if kind == "adapter" else "--model.backbone"
            raise FileNotFoundError(f"{path} holds a saved {kind}, no checkpoint. Start from it with {flag} {path}.")
        return found_path
    near = sorted(str(p) for p in path.parent.glob("*.ckpt")) if path.parent.is_dir() else []
    raise FileNotFoundError(f"There is no checkpoint {path}.{f' There is {near[0]}.' if near else ''}")


def saved_config(checkpoint: str | Path) -> dict[str, Any]:
    """Return the configuration inside a checkpoint; of one made in Python, what its hyper-parameters say.

    Raises:
        ValueError: if the file is damaged or none of ours.
    """
    content = read_checkpoint(Path(checkpoint))
    note = content["lit_peft"]
    if "config" in note:
        return dict(note["config"])
    if "class_path" not in note:
        return {}
    return {"model": {"class_path": note["class_path"], "init_args": dict(content.get("hyper_parameters", {}))}}


def write_config(folder: str | Path, config: Mapping[str, Any]) -> Path:
    """Write the resolved configuration of a run, whole or not at all."""
    path = Path(folder) / CONFIG
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True), encoding="utf-8")
    os.replace(temporary, path)
    return path


def overruled(saved: Mapping[str, Any], now: Mapping[str, Any], keys: Iterable[str]) -> list[str]:
    """Return one line for each setting of a checkpoint that flags or files overrule."""

    def leaves(value: Any, path: str) -> dict[str, Any]:
        if isinstance(value, Mapping):
            return {k: v for key, inner in value.items() for k, v in leaves(inner, f"{path}.{key}").items()}
        return {path: value}

    def flat(config: Mapping[str, Any]) -> dict[str, Any]:
        return {k: v for key in keys if key in config for k, v in leaves(config[key], key).items()}

    before, after = flat(saved), flat(now)
    return [
        f"{key.replace('.init_args', '')}: {after[key]} overrules the checkpoint's {before.get(key)}"
        for key in after
        if key.rpartition(".")[0] and str(before.get(key)) != str(after[key])
    ]


def session(folder: Path) -> str:
    """Return the name of this session's logs, so that a resumed run keeps the earlier ones."""
    earlier = len(list((folder / "logs").glob("session_*"))) if (folder / "logs").is_dir() else 0
    return f"session_{earlier}"


def precision() -> tuple[str, str]:
    """Return the precision that suits this device, and why."""
    if torch.cuda.is_available():
        if torch.cuda.is_bf16_supported():
            return "bf16-mixed", f"{torch.cuda.get_device_name()} computes in bfloat16"
        return "16-mixed", f"{torch.cuda.get_device_name()} has no bfloat16"
    if torch.backends.mps.is_available():
        return "32-true", "Apple's GPU"
    if platform.machine() in ("x86_64", "AMD64") and _cpu_has("avx512_bf16", "amx_bf16"):
        return "bf16-mixed", "this CPU multiplies bfloat16 matrices natively"
    return "32-true", "this CPU has no bfloat16 matrix instructions"


def _cpu_has(*flags: str) -> bool:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return any(flag in text for flag in flags)


def resumed_step(trainer: Trainer) -> int:
    """Return the optimizer step at which this process began: 0, or the checkpoint's."""
    if not trainer.ckpt_path or not Path(trainer.ckpt_path).is_file():
        return 0
    return int(torch.load(trainer.ckpt_path, map_location="cpu", weights_only=True, mmap=True).get("global_step", 0))
