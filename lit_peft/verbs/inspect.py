"""`lit-peft inspect`: what is inside a checkpoint, an adapter or a run. Reads the files only, never the base model."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from lit_peft import hub
from lit_peft.blocks import read
from lit_peft.catalogue import FACTS
from lit_peft.forks import kind_of
from lit_peft.saved import locate, merge_summary, methods_of, read_checkpoint
from lit_peft.targets import KEYS, OWN, bare
from lit_peft.tensor_files import shapes
from lit_peft.virtual_tokens import TOKENS

COLUMNS = 7  # norms beside each other that 80 characters hold
# Adapters' own tensors are named method-first: lora_a, lora_A.weight, bitfit_bias, ...
_WORDS = "|".join(sorted({facts.keyword for facts in FACTS.values()} - {""}))
_OWN = re.compile(rf"\.(?:(?P<method>{_WORDS})_\w+|(?P<norm>norm)_(?:weight|bias)\b)")  # norms: of bottleneck methods
# from a layer's path and rank to the factor in front of its B A
Scale = Callable[[str, int], float]
_LAYER = re.compile(r"^(?P<stack>.*?\.\w+)\.(?P<index>\d+)(?:\.(?P<rest>.+))?$")


@dataclass
class Contents:
    """What a file or folder holds."""

    title: str
    facts: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    scales: dict[str, Scale] = field(default_factory=dict)
    names: tuple[str, ...] = ()  # of the sets in a checkpoint; adapter folders hold one set


def run(path: str) -> None:
    """Say what is inside a checkpoint, an adapter folder or a run folder: base, method, coverage, size, norms.

    Args:
        path: a checkpoint, a run folder, an adapter folder of lit_peft or HF PEFT, or a merged model's folder.

    Raises:
        FileNotFoundError: if there is nothing to inspect.
        ValueError: if a file is damaged.
    """
    kind, found = locate(path)
    console = Console(highlight=False)
    if kind == "model":
        _model(console, found)
        return
    contents = _checkpoint(found) if kind == "checkpoint" else _adapter(found)
    layers = _grouped(contents.tensors, contents.names)
    rest = {key: t for key, t in contents.tensors.items() if key != TOKENS and not _OWN.search(key)}
    contents.facts["weights"] = _size(contents.tensors, layers, rest)
    console.print(f"[bold]{escape(str(found))}[/bold]  {contents.title}")
    grid = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for key, value in contents.facts.items():
        if value:
            grid.add_row(f"[dim]{key}", escape(value))
    console.print(grid)
    for method, own in layers.items():
        _coverage(console, method, own, contents)
    _in_place(console, rest)


# Reading --------------------------------------------------------------------------------------------------------------


def _checkpoint(path: Path) -> Contents:
    stored = read_checkpoint(path)
    meta, settings = stored["lit_peft"], stored.get("hyper_parameters", {})
    versions = meta.get("versions") or {"lightning": stored.get("pytorch-lightning_version")}
    state = {k.removeprefix("model."): t for k, t in stored["state_dict"].items() if k.startswith("model.")}
    named = settings.get("named") or {}
    configs: dict[str, Any] = {k: v for k, v in settings.items() if isinstance(v, dict) and k != "named"}
    scales = {key: _scale(value) for key, value in configs.items()}
    for name, entry in named.items():
        own = {key: value for key, value in entry.items() if isinstance(value, dict)}
        scales |= {f"{key} {name}": _scale(value) for key, value in own.items()}
        shown = [f"{key}: {_shown(value)}" for key, value in own.items()]
        configs[f"adapter {name}"] = "; ".join([*shown, *([] if entry.get("train", True) else ["not trained"])])
    active = (meta.get("adapters") or {}).get("active", [])
    facts = {
        "base": _base({"name": settings.get("backbone"), "revision": settings.get("revision"), **meta.get("base", {})}),
        "class": str(meta.get("class_path", "")),
        **{key: value if isinstance(value, str) else _shown(value) for key, value in configs.items()},
        "acts": ", ".join(map(str, map(read, active))) if named else "",
        "progress": f"epoch {stored.get('epoch')}, step {stored.get('global_step')}",
        "optimizer": "in the file" if stored.get("optimizer_states") else "not in the file: cannot be resumed",
        "versions": ", ".join(f"{key} {value}" for key, value in versions.items() if value),
    }
    size = f"checkpoint, {path.stat().st_size / 1e6:.1f} MB"
    return Contents(size, facts, {bare(key): tensor for key, tensor in state.items()}, scales, ("default", *named))


def _adapter(folder: Path) -> Contents:
    meta, contents = hub.read_meta(folder), Contents("adapter")
    try:
        methods_of([kind_of(config) for config in hub.read_configs(folder)], folder)
    except ValueError as error:
        contents.facts["note"] = str(error)
    for (_, tensors), config in zip(hub.contents(folder), hub.read_configs(folder), strict=True):
        name = kind_of(config).removeprefix("LIT_").lower()
        noted = {"name": config.get("base_model_name_or_path"), "revision": config.get("revision")}
        contents.facts["base"] = _base({**noted, **{k: v for k, v in meta.get("base", {}).items() if v}})
        contents.facts[name] = _shown({k: v for k, v in config.items() if k not in _NOT_SETTINGS})
        contents.facts["task"] = str(
            config.get("task_type") or (config.get("auto_mapping") or {}).get("base_model_class")
        )
        contents.scales["lora" if name == "adalora" else name] = _scale(config)
        contents.tensors.update(tensors)
    contents.facts["labels"] = ", ".join(meta.get("labels", []))
    wrote = {"lit_peft": meta.get("lit_peft_version"), "peft": config.get("peft_version")}
    contents.facts["versions"] = ", ".join(f"{key} {value}" for key, value in wrote.items() if value)
    return contents


_NOT_SETTINGS = {
    *(
        "peft_type",
        "task_type",
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "peft_version",
    ),
    *("megatron_core", "qalora_group_size", "fan_in_fan_out", KEYS, OWN),
}


def _scale(config: Mapping[str, Any]) -> Scale:
    """Return LoRA's scale of each layer from its settings, ours or HF PEFT's; 1 for methods without one."""
    alpha, first = config.get("alpha", config.get("lora_alpha")), config.get("init_r")

    def scale(path: str, r: int) -> float:
        if alpha is None:
            return 1.0
        patterns = (config.get("alpha_pattern") or {}).items()
        own = next((value for key, value in patterns if re.fullmatch(rf"(.*\.)?({key})", path)), alpha)
        # AdaLoRA divides by the rank that it began with, whatever is left of it
        return float(own / (first or (math.sqrt(r) if config.get("use_rslora") else r)))

    return scale


def _base(base: Mapping[str, Any]) -> str:
    parts = [str(base.get("name") or "unknown")]
    if base.get("revision"):
        parts.append(f"revision {base['revision']}")
    if base.get("sha"):
        parts.append(f"sha {str(base['sha']).removeprefix('sha256:')[:12]}")
    return ", ".join(parts)


def _shown(settings: Mapping[str, Any]) -> str:
    pieces = []
    for key, value in settings.items():
        if value is None or value is False or value in ("none", [], {}):
            continue
        if isinstance(value, list) and len(value) > 12:
            value = f"{len(value)} of them"
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
        pieces.append(f"{key} {value}")
    return "; ".join(pieces) or "no settings"


# Measuring ------------------------------------------------------------------------------------------------------------


def _grouped(tensors: Mapping[str, Tensor], names: Collection[str]) -> dict[str, dict[str, dict[str, Tensor]]]:
    """Return `{method: {module path: {name: tensor}}}`; sets but the first are `method name`."""
    found: dict[str, dict[str, dict[str, Tensor]]] = {}
    for key in sorted(tensors):
        path, _, leaf = key.rpartition(".")
        if leaf == TOKENS:  # in HF PEFT's layout without a path
            found.setdefault("virtual tokens", {})[path or "rows"] = {TOKENS: tensors[key]}
            continue
        own = _OWN.search(key)
        if own is not None:
            pieces = [piece for piece in key[own.end() :].split(".") if piece]
            name = next((piece for piece in pieces if piece in names and piece != "default"), "")
            label = f"{own['method'] or own['norm']} {name}".rstrip()
            inner = [piece for piece in pieces if piece not in names]
            leaf = own.group().removeprefix(".").lower()
            leaf += "" if inner == ["weight"] else "_bias" if inner == ["bias"] else "".join(f".{p}" for p in inner)
            found.setdefault(label, {}).setdefault(key[: own.start()], {})[leaf] = tensors[key]
    return found


def _size(tensors: Mapping[str, Tensor], layers: Mapping[str, Any], rest: Mapping[str, Tensor]) -> str:
    number = sum(t.numel() for t in tensors.values())
    where = [f"{method}: {len(own)} layers" for method, own in layers.items()]
    if rest:
        where.append(f"in place: {sum(t.numel() for t in rest.values()):,}")
    kinds = ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()}))
    return f"{number:,} parameters ({kinds}); {'; '.join(where)}"


# Names of A, B and the diagonal between them, in files of LoRA and AdaLoRA and in checkpoints
_FACTORS = (("lora_a", "lora_embedding_a", "adalora_q"), ("lora_b", "lora_embedding_b", "adalora_p"))
_DIAGONAL = ("lora_e", "adalora_lambda")


def _norm(path: str, tensors: Mapping[str, Tensor], scale: Scale | None) -> float:
    """Return the Frobenius norm of what is added to the layer; of s B A without multiplying it out, of l - 1."""
    pair = [next((tensors[name].double() for name in names if name in tensors), None) for names in _FACTORS]
    a, b = pair
    if a is not None and b is not None and a.ndim == b.ndim == 2:
        for name in _DIAGONAL:
            a = a * tensors[name].double().view(-1, 1) if name in tensors else a
        factor = scale(path, a.shape[0]) if scale is not None and len(a) else 1.0
        return float(abs(factor) * ((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt())
    if "ia3_l" in tensors:
        return float((tensors["ia3_l"].double() - 1).norm())
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors.values()))


def _coverage(console: Console, method: str, own: Mapping[str, Mapping[str, Tensor]], contents: Contents) -> None:
    stacks: dict[str, dict[str, dict[int, float]]] = {}
    for path, norm in _norms(method, own, contents.scales):
        match = _LAYER.match(path)
        stack, name, index = (match["stack"], match["rest"] or "layer", int(match["index"])) if match else ("", path, 0)
        stacks.setdefault(stack, {}).setdefault(name, {})[index] = norm
    for stack, names in stacks.items():
        depth = 1 + max(index for norms in names.values() for index in norms) if stack else 1
        short = _short(list(names))
        if stack:
            counts = ", ".join(f"{short[name]} {len(norms)}/{depth}" for name, norms in names.items())
            console.print(f"\n[bold]{method}[/bold] in {stack}: {counts}. Norms of what it adds:")
        else:
            console.print(f"\n[bold]{method}[/bold] outside of the layers:")
        columns = list(names)
        for start in range(0, len(columns), COLUMNS):
            _norm_table(console, {short[name]: names[name] for name in columns[start : start + COLUMNS]}, depth)


def _norms(
    method: str, own: Mapping[str, Mapping[str, Tensor]], scales: Mapping[str, Scale]
) -> Iterator[tuple[str, float]]:
    for path, tensors in own.items():
        yield path, _norm(path, tensors, scales.get(method))


def _short(names: list[str]) -> dict[str, str]:
    """Return each name's last piece, or more of it where that is not unique."""
    leaves = [name.rpartition(".")[2] for name in names]
    return {name: leaf if leaves.count(leaf) == 1 else name for name, leaf in zip(names, leaves, strict=True)}


def _norm_table(console: Console, columns: Mapping[str, Mapping[int, float]], depth: int) -> None:
    """Print one row a layer; runs of rows that say the same are one row."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("layer" if depth > 1 else "", justify="right", style="dim")
    for name in columns:
        table.add_column(name, justify="right", overflow="fold")
    rows = [[f"{column[i]:.3g}" if i in column else "-" for column in columns.values()] for i in range(depth)]
    start = 0
    for i in range(1, depth + 1):
        if i == depth or rows[i] != rows[start]:
            label = str(start) if i - start == 1 else f"{start}-{i - 1}"
            table.add_row(label if depth > 1 else "norm", *rows[start])
            start = i
    console.print(table)


def _in_place(console: Console, rest: Mapping[str, Tensor]) -> None:
    groups: dict[str, int] = {}
    for key, tensor in rest.items():
        match = _LAYER.match(key)
        group = f"{match['stack']}.{match['index']}" if match else key.rpartition(".")[0] or key
        groups[group] = groups.get(group, 0) + tensor.numel()
    if groups:
        console.print("\n[bold]trained in place[/bold]")
        for group, number in groups.items():
            console.print(f"  {group}  {number:,}")


def _model(console: Console, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    files = [shapes(file) for file in sorted(folder.glob("*.safetensors"))]
    number = sum(math.prod(shape) for file in files for shape in file.values())
    console.print(f"[bold]{escape(str(folder))}[/bold]  whole model")
    console.print(f"{', '.join(config.get('architectures') or ['unknown'])}, {number:,} parameters, no adapter")
    report = folder / "merge_report.json"
    if report.is_file():
        measured = json.loads(report.read_text(encoding="utf-8"))
        console.print(f"base: {_base(measured.get('base') or {})}", markup=False)
        console.print(f"merge: {merge_summary(measured)}", markup=False)
