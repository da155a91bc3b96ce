"""Folders of adapter-hub's `adapters`: bottlenecks, Compacter, prefixes, ReFT, and their unions (MAM, UniPELT).

`adapter_config.json` describes the adapter under `config`, a union of several as a list; the tensors lie in
`pytorch_adapter.bin` or `adapter.safetensors`, named by that library's own modules and the adapter's name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_peft.foreign.rotations import rotation, without_subtraction
from lit_peft.foreign.told import Part, Told, unpickled

WEIGHTS = ("adapter.safetensors", "pytorch_adapter.bin")
HEADS = ("model_head.safetensors", "pytorch_model_head.bin")
ANEW = "Run it in the library that wrote it, or train it anew with --method"
# before the library noted its version, `gelu` was the approximation
OLD_ACTIVATIONS = {"gelu": "gelu_new", "gelu_orig": "gelu"}
ACTIVATIONS = {"swish": "silu", "leakyrelu": "leaky_relu"}

Tensors = dict[str, Tensor]


def recognised(config: Mapping[str, Any]) -> bool:
    """Whether a folder with this `adapter_config.json` was written by `adapters`."""
    return "peft_type" not in config and "config" in config and "name" in config


def read(folder: Path, note: Mapping[str, Any]) -> Told:
    """Read a folder.

    Args:
        folder: where it is.
        note: its `adapter_config.json`.

    Raises:
        FileNotFoundError: if its tensors are missing.
        ValueError: if it holds what has no equal here, or tensors are damaged, missing or too many.
    """
    file = next((folder / name for name in WEIGHTS if (folder / name).is_file()), folder / WEIGHTS[0])
    left = unpickled(file)
    settings = note["config"]
    if not isinstance(settings, Mapping):
        raise ValueError(
            f"{folder} names its configuration {settings!r} instead of holding it. Save the adapter again."
        )
    union = settings.get("configs", []) if settings.get("architecture") == "union" else [settings]
    parts = []
    for config in union:
        kind = config.get("architecture")
        if kind not in READERS:
            known = ", ".join(str(key or "bottlenecks") for key in READERS)
            raise ValueError(f"{folder} holds {kind}; of adapters' folders {known} are read. {ANEW} of your choice.")
        parts += READERS[kind](folder, {**config, "version": note.get("version")}, left)
    if left:
        raise ValueError(
            f"{file} holds {len(left)} tensors that its configuration does not explain, such as {sorted(left)[0]!r}. "
            "Is the configuration another adapter's?"
        )
    if any(part.config["peft_type"] == "LIT_GATED_LORA" for part in parts):  # UniPELT's prefix is of a kind of its own
        for part in parts:
            part.config["peft_type"] = GATED.get(part.config["peft_type"], part.config["peft_type"])
    parts.sort(key=lambda part: OUTERMOST_LAST.index(part.config["peft_type"]))
    model_class = str(note.get("model_class") or "")
    common = {
        "base_model_name_or_path": note.get("model_name"),
        # AdapterModel classes take any head
        "auto_mapping": {"base_model_class": "" if model_class.endswith("AdapterModel") else model_class},
    }
    parts = [Part({**part.config, **common}, part.tensors, part.encoder_only) for part in parts]
    head = next((folder / name for name in HEADS if (folder / name).is_file()), None)
    notes: dict[str, Any] = {}
    if head is not None:
        tensors = unpickled(head)
        if not any(key.startswith("heads.") for key in tensors):  # those of AdapterModel classes fit no other model
            parts[-1].tensors.update(tensors)
    labels = note.get("label2id") or {}
    if labels:
        notes["labels"] = sorted(labels, key=labels.__getitem__)
    return Told(file, parts, notes)


def _bottleneck(folder: Path, config: Mapping[str, Any], left: Tensors) -> list[Part]:
    """Bottlenecks: Houlsby, Pfeiffer and parallel placement, and Compacter."""
    places = (
        bool(config.get("mh_adapter")),
        bool(config.get("output_adapter")),
        bool(config.get("is_parallel")),
        bool(config.get("is_parallel") or config.get("original_ln_before")),
    )
    kind = {
        (True, True, False, False): "LIT_HOULSBY",
        (False, True, False, True): "LIT_PFEIFFER",
        (False, True, True, True): "LIT_PARALLEL",
    }.get(places)
    phm = bool(config.get("phm_layer"))
    plain: dict[str, Any] = {
        "original_ln_after": True,
        "ln_before": False,
        "ln_after": False,
        "residual_before_ln": True,
        "inv_adapter": None,
        "cross_adapter": False,
    }
    phm_plain = {"factorized_phm_W": True, "shared_W_phm": False, "shared_phm_rule": True, "factorized_phm_rule": False}
    if phm:
        plain |= {**phm_plain, "phm_rank": 1, "phm_bias": True, "use_gating": False, "scaling": 1.0}
        kind = "LIT_COMPACTER" if kind == "LIT_HOULSBY" else None
    _refuse_others(folder, config, plain, "houlsby, pfeiffer or parallel")
    if kind is None:
        named = {key: config.get(key) for key in ("mh_adapter", "output_adapter", "is_parallel", "original_ln_before")}
        raise ValueError(
            f"{folder} places {'Compacter' if phm else 'bottlenecks'} in a way that no method here "
            f"has ({named}). {ANEW} {'compacter' if phm else 'houlsby, pfeiffer or parallel'}."
        )
    attention = "attention_output"
    output = {"LIT_PFEIFFER": "layer_sum", "LIT_PARALLEL": "feed_forward_side"}.get(kind, "feed_forward_output")
    found: Tensors = {}
    learned: dict[str, Tensor] = {}
    for key, spot, leaf in _taken(left, r"adapters"):
        role = attention if "attention" in key.partition("adapters.")[0] else output
        name = PHM.get(leaf) if phm else LINEAR.get(leaf)
        if name is None and leaf != "scaling":
            method = kind.removeprefix("LIT_").lower()
            raise ValueError(f"{folder} has a tensor {key!r}, which none here has. {ANEW} {method}.")
        if leaf == "scaling":
            learned[f"{role}.{spot}"] = left.pop(key)
        else:
            tensor = left.pop(key)
            # gates are rows (1, d); PHM's factors have a rank of 1
            found[f"{role}.{spot}.{name}"] = tensor.flatten() if "gate" in leaf else _squeezed(leaf, tensor)
    for place, scale in learned.items():  # a learned scale, one number or one a channel, is a part of U and its bias
        for leaf in ("bottleneck_up", "bottleneck_up_bias"):
            tensor = found[f"{place}.{leaf}"]
            found[f"{place}.{leaf}"] = tensor * (scale[:, None] if scale.numel() > 1 and tensor.ndim > 1 else scale)
    gate = bool(config.get("use_gating"))
    made: dict[str, Any] = {
        "peft_type": kind,
        "activation": _activation(config),
        "dropout": config.get("dropout", 0.0),
    }
    if phm:
        rule = next((key for key in left if re.search(r"shared_parameters\.[^.]+\.phm_rule$", key)), None)
        if rule is None:
            raise ValueError(f"{folder} lacks the rule that its Compacter layers share. Copy or save it again.")
        found["stack.0.compacter_rule"] = left.pop(rule)
        d, m = (_one(folder, found, f"compacter_{part}_bias") for part in ("up", "down"))
        made |= {"phm_dim": config.get("phm_dim", 4), "reduction_factor": d // m}
        if config.get("leave_out"):
            raise ValueError(f"{folder} leaves out layers, which Compacter here does not. {ANEW} compacter.")
    else:
        scale = config.get("scaling", 1.0)
        made |= {
            "bottleneck_size": _one(folder, found, "bottleneck_down_bias"),
            "scale": 1.0 if isinstance(scale, str) else scale,
            "leave_out": list(config.get("leave_out") or []) or None,
            "gate": gate,
            "reads_stream": True,  # of parallel adapters, which there read the stream before it is normalised
        }
    return [Part(made, found, MEAN_GATE if gate else "")]


def _prefix(folder: Path, config: Mapping[str, Any], left: Tensors) -> list[Part]:
    """Prefixes, and their gates."""
    plain: dict[str, Any] = {"leave_out": [], "non_linearity": "tanh"}
    gate = bool(config.get("use_gating"))
    if gate:
        plain["shared_gating"] = True
    _refuse_others(folder, config, plain, "prefix")
    found: Tensors = {}
    p = int(config.get("prefix_length", 30))
    for key in [key for key in left if ".prefix_tunings." in key]:
        group, _, leaf = key.partition(".prefix_tunings.")[2].partition(".")[2].partition(".")
        if group != "self_prefix" or leaf not in PREFIX:
            raise ValueError(f"{folder} has a tensor {key!r}, which no prefix here has. {ANEW} prefix.")
        tensor, name = left.pop(key), f"stack.0.{PREFIX[leaf]}"  # each layer repeats the one pool
        tensor = tensor.view(p, -1) if leaf == "control_trans" else tensor
        if name in found and not torch.equal(found[name], tensor):
            raise ValueError(f"{folder} has several prefixes under {key!r}, which should be one. Is it damaged?")
        found[name] = tensor
    if not config.get("flat"):  # a folder of ours holds the rows beside the network that yields them
        e, w1, b1, w2, b2 = (found.get(f"stack.0.{PREFIX[leaf]}") for leaf in [*PREFIX][:5])
        if e is None or w1 is None or b1 is None or w2 is None or b2 is None:
            raise ValueError(f"{folder} lacks a part of its prefix's network; it has {sorted(found)}. Copy it again.")
        found["stack.0.prompt_embeddings"] = torch.tanh(e @ w1.t() + b1) @ w2.t() + b2
    for key, spot, leaf in _taken(left, r"prefix_gates"):
        found[f"attention.{spot}.prefix_gate.{leaf}"] = left.pop(key).flatten()
    made = {
        "peft_type": "LIT_PREFIX",
        "num_virtual_tokens": p,
        "prefix_projection": not config.get("flat"),
        "encoder_hidden_size": config.get("bottleneck_size", 512),
        "dropout": config.get("dropout", 0.0),
        "gate": gate,
        "shift_positions": False,  # that library's text begins at position 0
    }
    return [Part(made, found, MEAN_GATE if gate else "")]


def _lora(folder: Path, config: Mapping[str, Any], left: Tensors) -> list[Part]:
    """UniPELT's LoRA: with a gate in the place of alpha / r."""
    plain = {"composition_mode": "add", "use_dora": False, "vera_d": None, "leave_out": [], "use_gating": True}
    _refuse_others(folder, config, plain, "unipelt (plain LoRA: save it with HF PEFT)")
    found: Tensors = {}
    targets: set[str] = set()
    for key in [key for key in left if ".loras." in key]:
        path, _, rest = key.partition(".loras.")
        leaf = LORA.get(rest.partition(".")[2])
        tensor = left.pop(key)
        if leaf is None or (leaf == "lora_gate.bias" and tensor.numel() > 1):
            raise ValueError(f"{folder} has LoRA for a fused layer ({key}), which has no equal here. {ANEW} unipelt.")
        targets.add(path.rpartition(".")[2])
        inside = re.sub(r"^.*?(?=\b\d+\.)", "", path)  # from the layer's number on: models differ in what is before it
        found[f"linear.{inside.replace('.', '/')}.{leaf}"] = tensor.flatten() if "gate" in leaf else tensor
    r = config.get("r", 8)
    made = {
        "peft_type": "LIT_GATED_LORA",
        "r": r,
        "alpha": r,  # so that the scale is 1: there the gate takes its place
        "dropout": config.get("dropout", 0.0),
        "target_modules": sorted(targets),
        "gate": True,
    }
    return [Part(made, found, MEAN_GATE)]


def _reft(folder: Path, config: Mapping[str, Any], left: Tensors) -> list[Part]:
    """LoReFT, NoReFT, DiReFT."""
    _refuse_others(folder, config, {"output_reft": True}, "loreft or direft")
    if config.get("non_linearity") not in (None, "linear", "identity"):
        raise ValueError(f"{folder} has a non_linearity in its edits, which none here has. {ANEW} loreft.")
    orthogonal, subtract = bool(config["orthogonality"]), config.get("subtract_projection")
    if not orthogonal and not isinstance(subtract, bool):
        raise ValueError(
            f"{folder} does not say whether it is NoReFT or DiReFT: that library forgets it. Add "
            '"subtract_projection" to "config" in its adapter_config.json: true for NoReFT, false for DiReFT.'
        )
    kind = "LIT_LOREFT" if orthogonal and subtract is not False else "LIT_DIREFT"
    units: dict[tuple[int, int], Tensors] = {}
    for key, spot, leaf in _taken(left, r"refts"):
        number, _, name = leaf.removeprefix("units.").partition(".")
        units.setdefault((int(spot), int(number)), {})[name] = left.pop(key)
    tied = bool(config.get("tied_weights"))
    found: Tensors = {}
    numbers = sorted({layer for layer, _ in units})
    for layer in numbers:
        stacked: dict[str, list[Tensor]] = {"reft_rotation": [], "reft_source": [], "reft_bias": []}
        for place in range(1 if tied else 2):
            unit = units.pop((layer, place), {})
            needed = ["learned_source.weight", "learned_source.bias"]
            if not all(name in unit for name in needed):
                raise ValueError(f"{folder} lacks {needed[0]!r} of unit {place} in layer {layer}. Copy it again.")
            source, bias = unit["learned_source.weight"], unit["learned_source.bias"]
            r = rotation(folder, unit, "projection").t()  # (d, r)
            if not orthogonal and subtract:
                source, bias = without_subtraction(source, bias, r.t())
            for name, tensor in zip(stacked, (r, source, bias), strict=True):
                stacked[name].append(tensor.float())
        found |= {f"layer.{layer}.{name}": torch.stack(tensors) for name, tensors in stacked.items()}
    if units:
        raise ValueError(f"{folder} holds more edits than its configuration says. Is the configuration another's?")
    made = {
        "peft_type": kind,
        "r": config["r"],
        "first": config["prefix_positions"],
        "last": config["suffix_positions"],
        "tied": tied,
        "dropout": config.get("dropout", 0.0),
        "layers_to_transform": None if config.get("layers", "all") == "all" else numbers,
    }
    return [Part(made, found)]


READERS: dict[str | None, Callable[[Path, Mapping[str, Any], Tensors], list[Part]]] = {
    None: _bottleneck,
    "prefix_tuning": _prefix,
    "reft": _reft,
    "lora": _lora,
}
OUTERMOST_LAST = (
    *("LIT_HOULSBY", "LIT_PFEIFFER", "LIT_PARALLEL", "LIT_COMPACTER"),
    *("LIT_PREFIX", "LIT_GATED_PREFIX", "LIT_GATED_LORA", "LIT_LOREFT", "LIT_DIREFT"),
)
GATED = {"LIT_PREFIX": "LIT_GATED_PREFIX"}
LINEAR = {
    "adapter_down.0.weight": "bottleneck_down",
    "adapter_down.0.bias": "bottleneck_down_bias",
    "adapter_up.weight": "bottleneck_up",
    "adapter_up.bias": "bottleneck_up_bias",
    "gate.weight": "bottleneck_gate.weight",
    "gate.bias": "bottleneck_gate.bias",
}
PHM = {
    f"adapter_{part}.{theirs}": f"compacter_{ours}"
    for part, side in (("down.0", "down"), ("up", "up"))
    for theirs, ours in (("W_left", f"{side}_s"), ("W_right", f"{side}_t"), ("b", f"{side}_bias"))
}
PREFIX = {
    "wte.weight": "prefix_embedding",
    "control_trans.0.weight": "prefix_hidden",
    "control_trans.0.bias": "prefix_hidden_bias",
    "control_trans.2.weight": "prefix_output",
    "control_trans.2.bias": "prefix_output_bias",
    "control_trans": "prompt_embeddings",
}
LORA = {
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "gate.weight": "lora_gate.weight",
    "gate.bias": "lora_gate.bias",
}
MEAN_GATE = (
    "its gates are averages over the whole text, so that a token sees those behind it; here a decoder has one gate a "
    "token. Train it anew with --method unipelt."
)


def _taken(left: Tensors, holder: str) -> Iterable[tuple[str, str, str]]:
    """Return (key, layer's number, rest behind the adapter's name) of the tensors that a kind of module holds."""
    pattern = re.compile(rf"(?:^|\.)(\d+)\.(?:.*?\.)?{holder}\.[^.]+\.(.*)$")
    return [(key, match[1], match[2]) for key in left if (match := pattern.search(key))]


def _squeezed(leaf: str, tensor: Tensor) -> Tensor:
    return tensor.squeeze(-1 if leaf.endswith("W_left") else 1) if ".W_" in leaf else tensor


def _activation(config: Mapping[str, Any]) -> str:
    name = str(config.get("non_linearity", "relu")).lower()
    if config.get("version") is None:
        name = OLD_ACTIVATIONS.get(name, name)
    return ACTIVATIONS.get(name, name)


def _one(folder: Path, found: Tensors, leaf: str) -> int:
    """Return the length that the vectors of one kind have in all layers."""
    sizes = sorted({len(tensor) for key, tensor in found.items() if key.endswith(f".{leaf}")})
    if len(sizes) != 1:
        what = f"widths {sizes} in its layers, and here all have one" if sizes else "no weights for any layer"
        raise ValueError(f"{folder} has {what}. {ANEW} of your choice.")
    return sizes[0]


def _refuse_others(folder: Path, config: Mapping[str, Any], plain: Mapping[str, Any], method: str) -> None:
    """Raise a ValueError for a setting that would make another function of the same tensors."""
    for key, value in plain.items():
        given = config.get(key, value)
        if given != value and not (not given and not value):
            raise ValueError(f"{folder} has {key}={given!r}, which no method here has. {ANEW} {method}.")
