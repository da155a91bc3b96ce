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
from uuid import uuid4

import torch
import torch.distributed as dist
import yaml
from lightning.pytorch import Trainer

from lit_peft.cli.request import Request, load
from lit_peft.saved import locate, read_checkpoint

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
HOME = Path("runs")
# settings that may differ from machine to machine
PLACES = ("backbone", "adapter", "path", "val_path", "test_path", "cache_dir", "num_workers", "default_root_dir")


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


def find_checkpoint(asked: str, method: str, task: str, *, resume: bool = False) -> Path:
    """Return the checkpoint that a path, a run folder, or the word `last` means.

    Args:
        asked: what the user gave.
        method: whose runs to look through for `last` and `best`.
        task: likewise.
        resume: training goes on, so a run folder means its last checkpoint and not its best.

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
    if resume and _last_of(path).is_file():
        return _last_of(path)
    if path.exists():
        kind, found_path = locate(path)
        if kind != "checkpoint":
            flag = "--model.adapter" if kind == "adapter" else "--model.backbone"
            raise FileNotFoundError(f"{path} holds a saved {kind}, no checkpoint. Start from it with {flag} {path}.")
        return found_path
    near = sorted(str(p) for p in path.parent.glob("*.ckpt")) if path.parent.is_dir() else []
    raise FileNotFoundError(f"There is no checkpoint {path}.{f' There is {near[0]}.' if near else ''}")


def _last_of(folder: Path) -> Path:
    return folder / CHECKPOINTS / "last.ckpt"


def further_machine() -> bool:
    """Return whether a launcher (torchrun, Lightning, SLURM) says that this machine is not the first one."""
    return any(os.environ.get(key, "0") != "0" for key in ("GROUP_RANK", "NODE_RANK", "SLURM_NODEID"))


def config_without_checkpoint(asked: str, given: bool, *, resume: bool = False) -> tuple[Path, dict[str, Any]]:
    """Return path and configuration of a checkpoint that only the first machine has.

    The file is shipped once the processes are connected, but what to build must be known before. Each machine wrote
    the run's `config.yaml` into its own run folder, so that is read; on a machine that is new to the run, the user
    gives one.

    Args:
        asked: what the user gave as the checkpoint.
        given: whether a configuration file is on the command line, which then says everything.
        resume: as for `find_checkpoint`.

    Raises:
        FileNotFoundError: if nothing here says what to build.
    """
    path = Path(asked)
    if path.suffix != ".ckpt" and resume:
        path = _last_of(path)
    home = _home_of(str(path))
    if path.suffix == ".ckpt" and home is not None and (home / CONFIG).is_file():
        return path, load(home / CONFIG)
    if path.suffix == ".ckpt" and given:
        return path, {}
    raise FileNotFoundError(
        f"There is no checkpoint {asked} on this machine, and no {CONFIG} of its run. Give the file's path as on the "
        f"first machine, which sends it, and a copy of that run's configuration: --ckpt_path FILE.ckpt -c {CONFIG}."
    )


def saved_config(checkpoint: str | Path) -> dict[str, Any]:
    """Return the configuration inside a checkpoint; of one made in Python, what its hyper-parameters say.

    Raises:
        ValueError: if the file is damaged or none of ours.
    """
    content = read_checkpoint(Path(checkpoint))
    note = content["lit_peft"]
    if "config" in note:
        return _without_folders(dict(note["config"]), content.get("hyper_parameters", {}))
    if "class_path" not in note:
        return {}
    return {"model": {"class_path": note["class_path"], "init_args": dict(content.get("hyper_parameters", {}))}}


def _without_folders(config: dict[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration that needs no folders of further adapters that are gone: their weights are stored, too."""
    model = config.get("model") or {}
    given = model.get("init_args") or {}
    fused = (given.get("fusion") or {}).get("adapters") or ()
    folders = [entry.get("adapter") for entry in (given.get("named") or {}).values()]
    folders += list(fused.values() if isinstance(fused, Mapping) else fused)
    if all(folder is None or Path(folder).is_dir() for folder in folders):
        return config
    resolved = {key: settings[key] for key in ("named", "fusion") if settings.get(key)}
    return {**config, "model": {**model, "init_args": {**given, **resolved}}}


def write_config(folder: str | Path, config: Mapping[str, Any]) -> Path:
    """Write the resolved configuration of a run, whole or not at all."""
    path = Path(folder) / CONFIG
    path.parent.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return path
    temporary = path.with_name(f".{CONFIG}.{uuid4().hex}")  # machines that share the disk write at the same time
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
    return path


def overruled(saved: Mapping[str, Any], now: Mapping[str, Any], keys: Iterable[str]) -> list[str]:
    """Return one line for each setting of a checkpoint that flags or files overrule."""
    before, after = _flat(saved, keys), _flat(now, keys)
    return [
        f"{key.replace('.init_args', '')}: {after[key]} overrules the checkpoint's {before.get(key)}"
        for key in after
        if key.rpartition(".")[0] and str(before.get(key)) != str(after[key])
    ]


def agree(config: Mapping[str, Any], keys: Iterable[str]) -> None:
    """See that all processes are about to do the same; paths may differ from machine to machine.

    Raises:
        ValueError: on all processes, with the first setting that differs.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    mine = {k: str(v) for k, v in _flat(config, keys).items() if k.rpartition(".")[2] not in PLACES}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    for rank, other in enumerate(everyone):
        for key in sorted(everyone[0].keys() | other.keys()):
            one, two = everyone[0].get(key), other.get(key)
            if one != two:
                raise ValueError(
                    f"{key.replace('.init_args', '')} is {one} on the first process and {two} on process {rank}. "
                    "Start all with the same flags and configuration files."
                )


def _flat(config: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    def leaves(value: Any, path: str) -> dict[str, Any]:
        if isinstance(value, Mapping):
            return {k: v for key, inner in value.items() for k, v in leaves(inner, f"{path}.{key}").items()}
        return {path: value}

    return {k: v for key in keys if key in config for k, v in leaves(config[key], key).items()}


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
