"""What was saved, read as plain data: no model is built and nothing heavy but torch is imported."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from lit_peft import hub
from lit_peft.catalogue import FACTS
from lit_peft.foreign.folders import foreign


def locate(path: str | Path) -> tuple[str, Path]:
    """Say what a path holds: `checkpoint`, `adapter` or `model`, and where.

    Raises:
        FileNotFoundError: if it holds none of them.
    """
    path = Path(path).expanduser()
    if path.is_file():
        return "checkpoint", path
    if not path.is_dir():
        raise FileNotFoundError(f"There is nothing at {path}. Name a checkpoint, a run folder or an adapter folder.")
    if (path / hub.CONFIG).is_file() or (path / hub.META).is_file() or foreign(path) is not None:
        return "adapter", path
    if (path / "config.json").is_file():
        return "model", path
    if any(path.glob("*.distcp")) or (path / ".metadata").is_file():
        raise FileNotFoundError(
            f"{path} is a sharded checkpoint. Save with save_distributed_checkpoint=False to load it."
        )
    files = [
        file for pattern in ("*.ckpt", "checkpoints/*.ckpt", "*/checkpoints/*.ckpt") for file in path.glob(pattern)
    ]
    if not files:
        raise FileNotFoundError(f"{path} holds no checkpoint, adapter or model. Name a folder that does.")
    return "checkpoint", _best(files)


def _best(files: list[Path]) -> Path:
    newest_first = sorted(files, key=lambda file: file.stat().st_mtime, reverse=True)
    for file in newest_first:
        if file.name.startswith("best"):
            return file
    last = next((file for file in newest_first if file.stem.startswith("last")), newest_first[0])
    if len(files) > 1:  # the last one knows which was the best
        for state in read_checkpoint(last).get("callbacks", {}).values():
            best = state.get("best_model_path") if isinstance(state, dict) else None
            if best and (sibling := last.with_name(Path(best).name)) in files:  # by name: the run may have moved
                return sibling
    return last


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a Lightning checkpoint as plain data (`weights_only=True`).

    Raises:
        ValueError: if it is damaged, holds code, or is no checkpoint of lit_peft.
    """
    try:
        loaded: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        if "Unsupported operand" not in str(error):  # that is what random bytes give
            reason = "it holds Python objects, which could run code"
        else:
            reason = "it is damaged or no checkpoint"
        raise ValueError(f"Cannot load {path}: {reason}. Load another checkpoint.") from error
    except Exception as error:  # on arbitrary bytes the unpickler fails in any way
        raise ValueError(f"Cannot load {path}: it is damaged or half-written. Load another checkpoint.") from error
    note = loaded.get("lit_peft") if isinstance(loaded, dict) else None
    if not isinstance(note, dict) or "class_path" not in note or "state_dict" not in loaded:
        raise ValueError(f"{path} is no checkpoint of lit_peft. Name one that a run with a method of it wrote.")
    return loaded


def method_of(peft_type: str, folder: Path) -> str:
    """Return the `--method` that reads a `peft_type`.

    Raises:
        ValueError: for a type that is not known here.
    """
    for name, facts in FACTS.items():
        if facts.peft_type == peft_type:
            return name
    known = ", ".join(sorted({kind for facts in FACTS.values() for kind in facts.peft_type.split(" + ")}))
    raise ValueError(f"{folder} holds an adapter of type {peft_type}, which is not known here. Known: {known}.")


def methods_of(peft_types: Sequence[str], folder: Path) -> list[str]:
    """Return the methods that read a folder's parts, outermost first: one where a method is composed of just these.

    Raises:
        ValueError: for a type that is not known here.
    """
    outermost_first = list(reversed(peft_types))
    together = " + ".join(outermost_first)
    composed = [name for name, facts in FACTS.items() if facts.peft_type == together and len(peft_types) > 1]
    noted = hub.read_meta(folder).get("settings", {})  # which of several methods of one type, where it was written here

    def chosen(kind: str) -> str:
        method = noted.get(kind, {}).get("method")
        return str(method) if method in FACTS and FACTS[method].peft_type == kind else method_of(kind, folder)

    return composed[:1] or [chosen(kind) for kind in outermost_first]


def merge_summary(report: dict[str, Any]) -> str:
    """Return a merge report in one line."""
    kinds = " + ".join(report["merged"]) or "weights trained in place"
    largest = f"largest logit {report['largest_logit']:.3g}"
    differences = ", ".join(f"{value:.2g} in {dtype}" for dtype, value in report["differences"].items())
    again = report.get("requantised")  # only after a 4-bit base
    bits = (
        f" In four bits again, its weights would be {again['mean']:.1%} off ({again['max']:.1%} at most)."
        if again
        else ""
    )
    return f"{report['dtype']}, {kinds} folded; logits differ by {differences} ({largest}).{bits}"
