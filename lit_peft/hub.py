"""Adapter folders: `adapter_config.json` and `adapter_model.safetensors`, in HF PEFT's layout.

A method that PEFT knows is written so that PEFT loads it; the others use the same layout under a `peft_type` of our own
(`LIT_...`). A stack of methods is a folder with one such folder per method. A third file, `lit_peft.json`, holds what
PEFT has no field for: versions and the hash of the base model.

Reading is strict. A key that does not fit, a layer without weights, another base model: each is an error. (PEFT loads a
file whose keys do not match with a warning, and the adapter then has no effect.)
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lit_peft import __version__
from lit_peft.adapter import Adapter, named_adapters

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
META = "lit_peft.json"
PREFIX = "base_model.model."
FILES = (CONFIG, WEIGHTS, META)


def read_configs(folder: str | Path) -> list[dict[str, Any]]:
    """Return the configuration of an adapter folder: one entry per method.

    Raises:
        FileNotFoundError: if it is no adapter folder.
        ValueError: if a file cannot be read.
    """
    return [_read_json(part / CONFIG) for part in part_folders(folder)]


def part_folders(folder: str | Path) -> list[Path]:
    """Return the folders of a saved adapter: itself, or one per stacked method."""
    folder = Path(folder)
    if (folder / CONFIG).is_file():
        return [folder]
    if (folder / META).is_file():
        return [folder / part for part in _read_json(folder / META)["stack"]]
    raise FileNotFoundError(f"{folder} is no adapter folder: it has no {CONFIG}. Point to the folder that holds the file.")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON (line {error.lineno}): {error.msg}. Restore the file.") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} must hold one JSON object, not {type(loaded).__name__}.")
    return loaded


def write(
    folder: str | Path,
    model: nn.Module,
    parts: Sequence[Mapping[str, Any]],
    *,
    declared: Mapping[str, Tensor],
    base: Mapping[str, Any],
    task_type: str | None = None,
    name: str = "default",
) -> Path:
    """Write one named adapter of a model.

    Args:
        folder: where to write; replaced as a whole and only when everything is written.
        model: the adapted model.
        parts: each method's part of `adapter_config.json`; the `peft_type` says which adapters it owns.
        declared: existing weights that were trained in place, by path in the model.
        base: `name`, `revision` and `sha` of the base model.
        task_type: PEFT's `CAUSAL_LM`, `SEQ_2_SEQ_LM`, `SEQ_CLS`, ...
        name: which named set.

    Returns:
        The folder.

    Raises:
        ValueError: if there is nothing to write.
        FileExistsError: if the folder exists and holds something that is no adapter.
    """
    if not parts:
        raise ValueError("Nothing to save: no method is placed on this model.")
    folder = Path(folder)
    if folder.exists() and any(entry.name not in FILES and not entry.is_dir() for entry in folder.iterdir()):
        stranger = next(e.name for e in folder.iterdir() if e.name not in FILES and not e.is_dir())
        if not (folder / CONFIG).exists() and not (folder / META).exists():
            raise FileExistsError(f"{folder} holds other files ({stranger}). Choose an empty or new folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        meta: dict[str, Any] = {"lit_peft_version": __version__, "base": dict(base)}
        if len(parts) > 1:
            meta["stack"] = [part["peft_type"].removeprefix("LIT_").lower() for part in parts]
        rest = dict(declared)
        for part in parts:
            target = temporary / part["peft_type"].removeprefix("LIT_").lower() if len(parts) > 1 else temporary
            target.mkdir(exist_ok=True)
            config, tensors = _part(model, part, rest, name)
            rest = {}  # in a stack, the first method's folder carries the weights that were trained in place
            config |= {
                "task_type": task_type,
                "base_model_name_or_path": base.get("name"),
                "revision": base.get("revision"),
                "inference_mode": True,
            }
            (target / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            save_file(tensors, target / WEIGHTS, metadata={"format": "pt"})
        (temporary / META).write_text(json.dumps(meta, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        folder.mkdir(exist_ok=True)
        for entry in temporary.iterdir():
            if entry.is_dir():
                shutil.rmtree(folder / entry.name, ignore_errors=True)
            os.replace(entry, folder / entry.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _part(
    model: nn.Module, part: Mapping[str, Any], declared: Mapping[str, Tensor], name: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tensors: dict[str, Tensor] = {}
    paths = []
    for path, adapter in _owned(model, part["peft_type"]):
        paths.append(_bare(path))
        for leaf, tensor in adapter.tensors(name).items():
            tensors[f"{PREFIX}{_bare(path)}.{leaf}"] = _full(tensor)
    for path, tensor in declared.items():
        tensors[f"{PREFIX}{_bare(path)}"] = _full(tensor)
    config = dict(part)
    if paths:
        config["target_modules"] = shortest_targets(paths, [_bare(path) for path, _ in model.named_modules()])
    if paths and declared:
        config["modules_to_save"] = sorted({_bare(path).split(".")[0] for path in declared})
    # One copy each: safetensors refuses tensors that share memory (tied weights are trained and saved once).
    return config, {key: tensor.detach().to("cpu").contiguous().clone() for key, tensor in tensors.items()}


def _full(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor; every rank must come here together."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()  # type: ignore[no-any-return]


def _bare(path: str) -> str:
    """Drop what adapters add to a path: the saved name is the module's name in the plain model."""
    return ".".join(piece for piece in path.split(".") if piece != "base")


def _owned(model: nn.Module, peft_type: str) -> list[tuple[str, Adapter]]:
    return [(path, a) for path, a in named_adapters(model) if getattr(type(a), "peft_type", None) == peft_type]


def shortest_targets(paths: Iterable[str], modules: Iterable[str]) -> list[str]:
    """Return the shortest sorted list of path endings that selects exactly these modules by PEFT's rule.

    Example:
        >>> shortest_targets(["layers.0.q", "layers.1.q"], ["layers.0.q", "layers.1.q", "layers.0.k"])
        ['q']
    """
    wanted = set(paths)
    leaves = sorted({path.rpartition(".")[2] for path in wanted})
    chosen = {path for path in modules for leaf in leaves if path == leaf or path.endswith(f".{leaf}")}
    return leaves if chosen == wanted else sorted(wanted)


def read(
    folder: str | Path,
    model: nn.Module,
    *,
    declared: Mapping[str, Tensor],
    base: Mapping[str, Any],
    name: str = "default",
) -> None:
    """Copy a saved adapter's weights into a model that has its adapters placed.

    Args:
        folder: the saved adapter.
        model: the adapted model.
        declared: existing weights that are trained in place, by path in the model; they are filled too.
        base: `name` and `sha` of this model's base, to compare with the folder's; empty: not compared.
        name: which named set to fill.

    Raises:
        ValueError: if the base, the methods, the layers, the keys or the shapes do not fit.
    """
    parts = part_folders(folder)
    check_base(folder, base)
    unfilled = dict(declared)
    seen = set()
    for part in parts:
        config = _read_json(part / CONFIG)
        peft_type = config.get("peft_type", "LORA")
        seen.add(peft_type)
        tensors = load_tensors(part / WEIGHTS)
        stray = [key for key in tensors if not key.startswith(PREFIX)]
        if stray:
            raise ValueError(f"{part / WEIGHTS} has the key {stray[0]!r}; every key must start with {PREFIX!r}.")
        left = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
        owned = _owned(model, peft_type)
        if not owned and not peft_type.startswith("LIT_"):
            raise ValueError(f"{part} holds a {peft_type} adapter, and no such method is placed on this model.")
        with torch.no_grad():
            for path, adapter in owned:
                start = f"{_bare(path)}."
                mine = {key.removeprefix(start): left.pop(key) for key in list(left) if key.startswith(start)}
                mine, others = _split(mine, adapter.tensors(name))
                left |= {start + key: tensor for key, tensor in others.items()}
                if not mine:
                    raise ValueError(f"{part} holds nothing for the layer {_bare(path)!r}, which is adapted here.")
                adapter.load_tensors(mine, name)
            for path in list(unfilled):
                if _bare(path) in left:
                    unfilled.pop(path).copy_(left.pop(_bare(path)))
        if left:
            raise ValueError(
                f"{part / WEIGHTS} holds {len(left)} tensors with no place in this model, such as {sorted(left)[0]!r}. "
                "Is it an adapter of another base model, or with other targets?"
            )
    placed = {getattr(type(adapter), "peft_type", "") for _, adapter in named_adapters(model)}
    if placed - seen:
        raise ValueError(f"{folder} holds no weights for {sorted(placed - seen)[0]}, which is placed on this model.")
    if unfilled:
        raise ValueError(f"{folder} lacks the weight {sorted(unfilled)[0]!r}, which is trained on this model.")


def _split(found: dict[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Separate an adapter's own tensors from those of adapters below the same path."""
    return {k: v for k, v in found.items() if k in expected}, {k: v for k, v in found.items() if k not in expected}


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        FileNotFoundError: if it is missing.
        ValueError: if it is cut off or no safetensors file.
    """
    if not path.is_file():
        pickled = path.with_name("adapter_model.bin").is_file()
        hint = " Only a pickled adapter_model.bin is there; convert it to safetensors first." if pickled else ""
        raise FileNotFoundError(f"{path} does not exist.{hint}")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or half-written ({error}). Copy or save it again.") from error


def check_base(folder: str | Path, base: Mapping[str, Any]) -> None:
    """Compare the base model that a folder names with the one at hand.

    Raises:
        ValueError: if they differ.
    """
    folder = Path(folder)
    meta = _read_json(folder / META).get("base", {}) if (folder / META).is_file() else {}
    config = _read_json(part_folders(folder)[0] / CONFIG)
    theirs, ours = meta.get("name") or config.get("base_model_name_or_path"), base.get("name")
    if meta.get("sha") and base.get("sha"):
        same = meta["sha"] == base["sha"]
    else:
        same = not theirs or not ours or Path(theirs).name.lower() == Path(str(ours)).name.lower()
    if not same:
        raise ValueError(
            f"This adapter was made on {theirs!r}, and the model here is {ours!r}"
            f"{' (another version of it)' if theirs == ours else ''}. Load that base, or set check_base=false."
        )
