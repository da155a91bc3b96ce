"""Files of tensors, read with errors that say what is wrong; and what HF PEFT stores beside an adapter's own."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        FileNotFoundError: if it is missing.
        ValueError: if it is cut off or no safetensors file.
    """
    shapes(path)
    tensors: dict[str, Tensor] = load_file(path)
    return tensors


def load_json(path: Path) -> dict[str, Any]:
    """Read one JSON object.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if it is no JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist. Save the adapter again.")
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON (line {error.lineno}): {error.msg}. Restore the file.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file. Restore the file.") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} must hold one JSON object, not {type(loaded).__name__}.")
    return loaded


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return `{key: shape}` of a safetensors file without reading its tensors; raises like `load_tensors`."""
    if not path.is_file():
        pickled = path.with_name("adapter_model.bin").is_file()
        way = "Only a pickled adapter_model.bin is there; convert it to safetensors first" if pickled else ""
        raise FileNotFoundError(f"{path} does not exist. {way or 'Copy or save the adapter again'}.")
    try:
        with safe_open(path, "pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or half-written ({error}). Copy or save it again.") from error


def repeats(key: str, stored: Iterable[str]) -> bool:
    """Whether a tensor is there twice: with bias=all PEFT also stores both copies of a module to save, as biases."""
    return ".original_module." in key or key.replace(".modules_to_save.", ".") in {*stored} - {key}


def check_same(file: Path, path: str, base: Tensor, copied: Tensor) -> None:
    """Compare a table of the base with the copy of it that HF PEFT stores beside an adapter.

    Raises:
        ValueError: if they differ.
    """
    same = base.shape == copied.shape
    if same and not hasattr(base, "full_tensor"):  # sharded: the base's identity must do
        # either may be the other, rounded
        coarse = min(base.dtype, copied.dtype, key=lambda dtype: dtype.itemsize)
        same = torch.equal(base.to("cpu", coarse), copied.to(coarse))
    if not same:
        raise ValueError(
            f"{file} holds a weight of its own for {path!r}, which is not this base model's. Was its vocabulary "
            "resized, or is it an adapter of another base model?"
        )


def compare_bases(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Compare two base models: by hash where both have one, else by the last piece of their names.

    Raises:
        ValueError: if they differ.
    """
    their_name, our_name = theirs.get("name"), ours.get("name")
    if theirs.get("sha") and ours.get("sha"):
        same = theirs["sha"] == ours["sha"]
    else:
        same = not their_name or not our_name or Path(their_name).name.lower() == Path(our_name).name.lower()
    if not same:
        version = " (another version of it)" if their_name == our_name else ""
        raise ValueError(
            f"This adapter was made on {their_name!r}, and the model here is {our_name!r}{version}. Load that base, or "
            "set check_base=false."
        )
