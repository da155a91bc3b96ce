"""Adapter folders: `adapter_config.json` and `adapter_model.safetensors`, in HF PEFT's layout.

A method that PEFT knows is written so that PEFT loads it; the others use the same layout under a `peft_type` of our own
(`LIT_...`). A stack of methods is a folder with one such folder per method. A third file, `lit_peft.json`, holds what
PEFT has no field for: versions, labels and the hash of the base model.

Reading is strict. A key that does not fit, a layer without weights, another base model: each is an error, raised before
anything is copied. (PEFT loads a file whose keys do not match with a warning, and the adapter then has no effect.)
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
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_warn
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from lit_peft import __version__
from lit_peft.adapter import Adapter, innermost, named_adapters
from lit_peft.foreign.folders import foreign
from lit_peft.foreign.told import placed
from lit_peft.forks import kind_of, renamed
from lit_peft.targets import KEYS, OWN, bare, file_key, layer_settings, shortest_targets
from lit_peft.tensor_files import check_same, load_json, load_tensors, repeats, shapes
from lit_peft.tensor_files import compare_bases as compare_bases
from lit_peft.virtual_tokens import ENCODER, encoder_keys, inward, lengthened, outward

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
META = "lit_peft.json"
VERSION = "lit_peft_format"  # in the configuration of methods of our own
FORMAT = 1
PREFIX = "base_model.model."

# Writing --------------------------------------------------------------------------------------------------------------


def write(
    folder: str | Path,
    model: nn.Module,
    parts: Sequence[Mapping[str, Any]],
    *,
    declared: Mapping[str, Tensor],
    base: Mapping[str, Any],
    task_type: str | None = None,
    name: str = "default",
    notes: Mapping[str, Any] | None = None,
) -> Path:
    """Write one named adapter of a model.

    With several processes all must call this when tensors are sharded; the first one writes.

    Args:
        folder: where to write. It appears as a whole, only when everything is written; an adapter that lit_peft wrote
            there before is replaced.
        model: the adapted model.
        parts: each method's part of `adapter_config.json`; the `peft_type` says which adapters it owns. What it keeps
            under `lit_peft`, words that PEFT lacks, goes to `lit_peft.json` and comes back from there.
        declared: existing weights that were trained in place, by path in the model.
        base: `name`, `revision` and `sha` of the base model.
        task_type: PEFT's `CAUSAL_LM`, `SEQ_2_SEQ_LM`, `SEQ_CLS`, ...
        name: which named set.
        notes: more for `lit_peft.json`, such as the labels of a classifier.

    Returns:
        The folder.

    Raises:
        ValueError: if there is nothing to write, or two methods of one kind.
        FileExistsError: if the folder holds something that lit_peft did not write.
        OSError: if it cannot be written, as on a full disk.
    """
    if not parts:
        raise ValueError("Nothing to save: no method is placed on this model.")
    kinds = [str(part["peft_type"]) for part in parts]
    if len(set(kinds)) < len(kinds):
        raise ValueError(f"Cannot save two methods of one kind ({kinds[0]}) in one folder. Stack different methods.")
    folder = Path(folder)
    check_free(folder)
    stacked = len(parts) > 1
    # One folder carries the weights that were trained in place: in a stack, that of the method that trains in place
    # (it places no adapters), else (a task's head) one that HF PEFT reads.
    in_place = [kind for kind in kinds if not owned(model, kind, name)]
    carrier = [*in_place, *(kind for kind in kinds if not kind.startswith("LIT_")), *kinds][0]
    files: dict[str, tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]] = {}
    for kind, part in zip(kinds, parts, strict=True):
        config, tensors, encoder = outward(*_part(model, part, declared if kind == carrier else {}, name))
        config |= {
            "task_type": task_type,
            "base_model_name_or_path": base.get("name"),
            "revision": base.get("revision"),
            "inference_mode": True,
        }
        if config["peft_type"].startswith("LIT_"):
            config[VERSION] = FORMAT
        files[_short(kind) if stacked else ""] = config, tensors, encoder
    if dist.is_available() and dist.is_initialized() and dist.get_rank() > 0:
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        meta = {**(notes or {}), "lit_peft_version": __version__, "base": dict(base)}
        own = {kind: part[OWN] for kind, part in zip(kinds, parts, strict=True) if part.get(OWN)}
        if own:
            meta["settings"] = own
        if stacked:
            meta["stack"] = list(files)
        for part_name, (config, tensors, encoder) in files.items():
            target = draft / part_name
            target.mkdir(exist_ok=True)
            _write_json(target / CONFIG, config)
            for file, content in ((WEIGHTS, tensors), *([(ENCODER, encoder)] if encoder else [])):
                save_file(content, target / file, metadata={"format": "pt"})
        _write_json(draft / META, meta)
        draft.chmod(0o755)  # mkdtemp's 0700 would lock others out
        _swap(draft, folder)
    except SafetensorError as error:  # how a full disk shows itself there
        raise OSError(f"Cannot write {folder}: {error}. Nothing was changed there.") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def check_free(folder: Path) -> None:
    """Raise a FileExistsError unless an adapter may be written into the folder."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file. Choose a new folder.")
    if folder.is_dir() and not (folder / META).is_file():
        stranger = next((entry.name for entry in sorted(folder.iterdir())), None)
        if stranger is not None:
            raise FileExistsError(f"{folder} holds other files ({stranger}). Choose an empty or new folder.")


def _swap(draft: Path, folder: Path) -> None:
    """Put a finished draft in the folder's place: never a mix of old and new files, whenever it is interrupted."""
    if not folder.exists():
        draft.rename(folder)
        return
    if (folder / META).is_file():
        old = [META, CONFIG, WEIGHTS, ENCODER, *load_json(folder / META).get("stack", [])]
        for entry in [entry for entry in folder.iterdir() if entry.name not in old]:
            target = draft / entry.name  # what others keep beside the adapter (tokenizer, README) stays there
            shutil.copytree(entry, target) if entry.is_dir() else shutil.copy2(entry, target)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    os.replace(folder, aside)
    try:
        draft.rename(folder)
    except OSError:
        os.replace(aside, folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _short(kind: str) -> str:
    return kind.removeprefix("LIT_").lower()


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _part(
    model: nn.Module, part: Mapping[str, Any], declared: Mapping[str, Tensor], name: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tensors: dict[str, Tensor] = {}
    paths = []
    layers: dict[str, Mapping[str, Any]] = {}
    config = dict(part)
    for path, adapter in owned(model, part["peft_type"], name):
        paths.append(bare(path))
        settings = getattr(type(adapter), "layer_settings", None)  # of the class: an instance would ask its base too
        if settings is not None:
            layers[bare(path)] = settings(adapter, name)
        for key, entries in adapter.settings(bare(path), name).items():
            config[key] = {**(config.get(key) or {}), **entries}
        for leaf, tensor in adapter.tensors(name).items():
            tensors[f"{PREFIX}{bare(path)}.{leaf}"] = _full(tensor)
    for path, tensor in declared.items():
        tensors[f"{PREFIX}{file_key(path, paths)}"] = _full(tensor)
    config |= layer_settings(layers)
    config.pop(OWN, None)
    if paths:
        # A method of ours may keep the user's own words; what PEFT reads must name exactly the adapted layers.
        config.setdefault("target_modules", shortest_targets(paths, [bare(path) for path, _ in model.named_modules()]))
    if paths and declared:
        config["modules_to_save"] = _whole_modules(model, declared) or None
    # One copy each: safetensors refuses tensors that share memory (tied weights are trained and saved once).
    return config, {key: tensor.detach().to("cpu").contiguous().clone() for key, tensor in tensors.items()}


def _full(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor; every rank must come here together."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def _whole_modules(model: nn.Module, declared: Mapping[str, Tensor]) -> list[str]:
    """Return the paths of the largest modules whose parameters are all declared."""
    inside = {path: {f"{path}.{key}" for key, _ in module.named_parameters()} for path, module in model.named_modules()}
    whole = {path for path, names in inside.items() if path and names and declared.keys() >= names}
    return sorted(bare(path) for path in whole if path.rpartition(".")[0] not in whole)


def owned(model: nn.Module, peft_type: str, name: str) -> list[tuple[str, Adapter]]:
    """Return the adapters of one kind that hold a named set, with their paths."""
    return [(path, a) for path, a in named_adapters(model) if a.peft_type == peft_type and name in a.configs]


# Reading --------------------------------------------------------------------------------------------------------------


def read_configs(folder: str | Path) -> list[dict[str, Any]]:
    """Return the configuration of an adapter folder: one entry per method, with the names of its tensors.

    Raises:
        FileNotFoundError: if it is no adapter folder, or lacks its weights.
        ValueError: if a file cannot be read.
    """
    if (reader := foreign(folder)) is not None:
        return [{**part.config, KEYS: list(part.tensors), OWN: None} for part in reader().parts]
    configs = []
    own = read_meta(folder).get("settings", {})
    for part in part_folders(folder):
        config = load_json(part / CONFIG)
        if not config.get("peft_type"):
            raise ValueError(f"{part / CONFIG} has no peft_type, so the method is not known. Add it to the file.")
        version = config.pop(VERSION, 1)
        if version != FORMAT:
            raise ValueError(
                f"{part} has format {version!r}, and this lit_peft reads {FORMAT}. Update it: pip install -U."
            )
        keys = [_plain(lengthened(config, key), part) for key in shapes(part / WEIGHTS)] + encoder_keys(part)
        configs.append({**config, KEYS: keys, OWN: own.get(config["peft_type"])})
    return configs


def read_meta(folder: str | Path) -> dict[str, Any]:
    """Return the contents of `lit_peft.json`, or what another library notes of the same."""
    path = Path(folder) / META
    if path.is_file():
        return load_json(path)
    reader = foreign(folder)
    return {} if reader is None else reader().notes


def contents(folder: str | Path, model: nn.Module | None = None) -> list[tuple[Path, dict[str, Tensor]]]:
    """Return each part's file and tensors, by the names that they have in it, or in the model that they are for.

    Raises:
        FileNotFoundError: if it is no adapter folder, or lacks its weights.
        ValueError: if a file cannot be read, or does not go with the model.
    """
    if (reader := foreign(folder)) is not None:
        told = reader()
        return [(told.file, part.tensors if model is None else placed(told, part, model)) for part in told.parts]
    files = [part / WEIGHTS for part in part_folders(folder)]
    found = zip(files, read_configs(folder), strict=True)
    return [
        (file, {_plain(lengthened(config, key), file.parent): t for key, t in load_tensors(file).items()})
        for file, config in found
    ]


def part_folders(folder: str | Path) -> list[Path]:
    """Return the folders of a saved adapter: itself, or one per stacked method, innermost first.

    Raises:
        FileNotFoundError: if it is no adapter folder.
    """
    folder = Path(folder)
    if (folder / CONFIG).is_file():
        return [folder]
    if (folder / META).is_file():
        return [folder / part for part in load_json(folder / META).get("stack", [])]
    raise FileNotFoundError(
        f"{folder} is no adapter folder: it has no {CONFIG}. Point to the folder that holds the file."
    )


def _plain(key: str, part: Path) -> str:
    if not key.startswith(PREFIX):
        raise ValueError(f"{part / WEIGHTS} has the key {key!r}; every key must start with {PREFIX!r}.")
    return key.removeprefix(PREFIX)


def read(
    folder: str | Path,
    model: nn.Module,
    *,
    declared: Mapping[str, Tensor],
    base: Mapping[str, Any],
    name: str = "default",
    kinds: Iterable[str] = (),
    copy: bool = True,
) -> None:
    """Copy a saved adapter's weights into a model that has its adapters placed; all of them, or none.

    Args:
        folder: the saved adapter.
        model: the adapted model.
        declared: existing weights that are trained in place, by path in the model; they are filled too.
        base: `name` and `sha` of this model's base, to compare with the folder's; empty: not compared.
        name: which named set to fill.
        kinds: the `peft_type` of every method on this model, for those that place no adapters.
        copy: fill the declared weights too; otherwise they must be the same already (all named sets share them).

    Raises:
        ValueError: if the base, the methods, the layers, the keys or the shapes do not fit.
    """
    check_base(folder, base)
    here = {*kinds, *(a.peft_type for _, a in named_adapters(model) if name in a.configs)} - {""}
    configs = read_configs(folder)
    found = {kind_of(config) for config in configs}
    if found != here:
        raise ValueError(
            f"{folder} holds {' + '.join(sorted(found))}, but this model has {' + '.join(sorted(here))}. "
            "Use the method that the adapter was made with."
        )
    unfilled = dict(declared)
    fitting: list[tuple[Adapter, dict[str, Tensor]]] = []
    in_place: list[tuple[Tensor, Tensor]] = []
    for (file, tensors), config in zip(contents(folder, model), configs, strict=True):
        holders = owned(model, kind_of(config), name)
        left = inward(
            file.parent, config, renamed(config, tensors), {bare(p): a.tensors(name).keys() for p, a in holders}
        )
        left = {key: tensor for key, tensor in left.items() if not repeats(key, left)}
        wrapped = {bare(path) for path, _ in holders}
        for path, adapter in holders:
            mine = {}
            stored = {leaf: left[key] for leaf in adapter.tensors(name) if (key := f"{bare(path)}.{leaf}") in left}
            for leaf, shape in adapter.shapes(stored, name).items():
                key = f"{bare(path)}.{leaf}"
                if key not in left:
                    raise ValueError(
                        f"{file} lacks {key!r}, for a layer that is adapted here. Is it another adapter's?"
                    )
                mine[leaf] = _fit(file, key, shape, left.pop(key))
            adapter.check_tensors(mine, name)
            adapter.check_config(bare(path), config, name)
            fitting.append((adapter, mine))
            copied = left.pop(f"{bare(path)}.base_layer.weight", None)  # PEFT repeats the tables that it adapts
            if copied is not None:
                check_same(file, bare(path), innermost(adapter).get_parameter("weight").detach(), copied)
        for path in [path for path in unfilled if file_key(path, wrapped) in left]:
            target = unfilled.pop(path)
            in_place.append((target, _fit(file, path, target.shape, left.pop(file_key(path, wrapped)))))
            if not copy and not torch.equal(target.cpu(), in_place[-1][1].to(target.dtype)):
                raise ValueError(
                    f"{file} has another {path!r}, which all adapters share. Load it into a model of its own."
                )
        if left:
            raise ValueError(
                f"{file} holds {len(left)} tensors with no place in this model, such as {sorted(left)[0]!r}. "
                "Is it an adapter of another base model, or with other targets?"
            )
    if unfilled and copy and foreign(folder) is not None:  # other libraries keep heads elsewhere, or have none
        rank_zero_warn(f"{folder} holds no {sorted(unfilled)[0]!r}: what the task itself trains starts anew. Train it.")
    elif unfilled and copy:
        raise ValueError(f"{folder} lacks the weight {sorted(unfilled)[0]!r}, which is trained on this model.")
    with torch.no_grad():
        for adapter, mine in fitting:
            adapter.load_tensors(mine, name)
        for target, tensor in in_place:
            target.copy_(tensor)


def _fit(file: Path, key: str, shape: Sequence[int], tensor: Tensor) -> Tensor:
    if tuple(tensor.shape) != tuple(shape):
        shown = f"{tuple(tensor.shape)} in {file}, {tuple(shape)} in this model"
        raise ValueError(f"Shapes differ for {key!r}: {shown}. Is it an adapter of another base model?")
    return tensor


def check_base(folder: str | Path, base: Mapping[str, Any]) -> None:
    """Compare the base model that a folder names with the one at hand.

    Raises:
        ValueError: if they differ.
    """
    config = read_configs(folder)[0]
    noted = read_meta(folder).get("base", {})
    compare_bases({"name": config.get("base_model_name_or_path"), **{k: v for k, v in noted.items() if v}}, base)
