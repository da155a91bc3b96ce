"""PEFT's rule for choosing layers by name, both ways: from layers to a short list, from a saved folder to layers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

Value = TypeVar("Value", int, float)

# Added to what is read from a configuration file, never written there: its tensors, and what `lit_peft.json` says.
KEYS = "tensor_keys"
OWN = "lit_peft"
# PEFT's settings that may differ between layers, and where it says so.
_PATTERNS = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}


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


def bare(path: str) -> str:
    """Drop what adapters add to a path: the saved name is the module's name in the plain model.

    Example:
        >>> bare("model.layers.0.base.self_attn.q_proj.base.bias")
        'model.layers.0.self_attn.q_proj.bias'
    """
    return ".".join(piece for piece in path.split(".") if piece != "base")


def find(patterns: Mapping[str, Value], path: str, default: Value) -> Value:
    """Return what the first pattern that fits the end of a path says."""
    return next((value for key, value in patterns.items() if fits(key, path)), default)


def fits(pattern: str, path: str) -> bool:
    """Whether a regular expression fits a whole path, or its end behind a dot."""
    return re.fullmatch(rf"(.*\.)?({pattern})", path) is not None


def patterns(values: Mapping[str, Value], default: Value) -> dict[str, Value]:
    """Return patterns that give each path its value, anchored and such that none overlap; the default needs none.

    Overlapping ones would depend on their order, and HF PEFT sorts them when it writes a file.

    Example:
        >>> list(patterns({"0.q": 4, "1.q": 4, "0.k": 8}, 8).values())
        [4]
    """
    found: dict[str, Value] = {}
    for value in sorted({value for value in values.values() if value != default}):
        mine = [path for path, other in values.items() if other == value]
        endings = shortest_targets(mine, values)
        start = "^" if set(endings) == set(mine) else r"^(.*\.)?"
        found |= {start + re.escape(ending): value for ending in endings}
    return found


def layer_settings(layers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the settings that all layers of a method share, and what differs in PEFT's form: a default and patterns.

    Raises:
        ValueError: if layers differ in something that PEFT can only say of all.
    """
    merged: dict[str, Any] = {}
    for key in next(iter(layers.values()), {}):
        values = {path: settings[key] for path, settings in layers.items()}
        found = list(values.values())
        merged[key] = max(dict.fromkeys(found), key=found.count)  # the most frequent one
        if key in _PATTERNS:
            merged[_PATTERNS[key]] = patterns(values, merged[key])
        elif len(set(found)) > 1:
            raise ValueError(f"This adapter has layers with {key} {sorted(map(str, set(found)))}; a folder holds one.")
    return merged


def file_key(path: str, wrapped: Iterable[str]) -> str:
    """Return the name in a file of a weight of the base: PEFT keeps those of a layer it adapts under `base_layer`."""
    layer, _, leaf = path.rpartition(".")
    return f"{bare(layer)}.base_layer.{leaf}" if bare(layer) in wrapped else bare(path)


def saved_modules(config: Mapping[str, Any], modules: Iterable[str]) -> list[str]:
    """Return the modules that a folder holds whole: those that its modules_to_save name, by its tensors.

    HF PEFT's rule knows no boundary at a dot (`head` means `lm_head` too), so the tensors are what counts.
    """
    asked = tuple(config.get("modules_to_save") or ())
    keys = config[KEYS]
    named = [path for path in modules if path and path.endswith(asked)] if asked else []
    return [path for path in named if any(key.startswith(f"{path}.") for key in keys)]


def stored_layers(config: Mapping[str, Any], leaves: Sequence[str]) -> set[str]:
    """Return the layers for which a folder has one of these tensors, such as `lora_A.weight`."""
    ends = tuple(f".{leaf}" for leaf in leaves)
    return {key[: -len(end)] for key in config[KEYS] for end in ends if key.endswith(end)}


def stored_targets(config: Mapping[str, Any], leaf: str | Sequence[str], modules: Iterable[str]) -> list[str]:
    """Return the targets of a folder whose tensors say which layers are adapted, checked against its configuration.

    The tensors are what counts: they hold for regular expressions, `layers_to_transform` and `exclude_modules` alike.
    The configuration tells whether some are missing.

    Args:
        config: from `read_configs`.
        leaf: the tensor that each adapted layer has, such as `lora_A.weight`, or several that may be it.
        modules: the paths of all modules of the model, without adapters.

    Raises:
        ValueError: if layers are missing in the file, in the model, or in the configuration.
    """
    modules = list(modules)
    leaves = [leaf] if isinstance(leaf, str) else leaf
    stored = stored_layers(config, leaves)
    asked = _asked(config, modules)
    for surplus, what in (
        (stored - set(modules), "this model has no such module. Is it an adapter of another base model?"),
        (stored - asked if asked is not None else set(), "its own target_modules do not name that layer."),
    ):
        if surplus:
            raise ValueError(f"The adapter holds weights for {sorted(surplus)[0]!r} ({len(surplus)} such), but {what}")
    missing = sorted((asked or set()) - stored)
    if missing:
        raise ValueError(
            f"The adapter's target_modules name {len(asked or ())} layers of this model, but its file lacks weights "
            f"for {len(missing)} of them, such as {missing[0]!r}. Is the file damaged, or made on another base model?"
        )
    if not stored:
        raise ValueError(
            f"The adapter file holds no {' or '.join(map(repr, leaves))} for any layer. Save the adapter again."
        )
    return shortest_targets(stored, modules)


def _asked(config: Mapping[str, Any], modules: Sequence[str]) -> set[str] | None:
    """Return the modules that PEFT's rule selects; None for `all-linear`, which paths alone cannot tell."""
    targets = config.get("target_modules")
    if isinstance(targets, str) and targets.lower() == "all-linear":
        return None
    whole = [re.compile(rf"(^|\.){re.escape(module)}(\.|$)") for module in config.get("modules_to_save") or []]

    def asked(path: str) -> bool:
        if _matches(path, config.get("exclude_modules")) or any(module.search(path) for module in whole):
            return False
        if isinstance(targets, list) and path in targets:
            return True
        return _matches(path, targets) and _in_layers(path, config)

    return {path for path in modules if path and asked(path)}


def _matches(path: str, targets: Any) -> bool:
    if not targets:
        return False
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    return any(path == target or path.endswith(f".{target}") for target in targets)


def _in_layers(path: str, config: Mapping[str, Any]) -> bool:
    chosen, pattern = config.get("layers_to_transform"), config.get("layers_pattern")
    if chosen is None or chosen == []:
        return True
    names = [pattern] if isinstance(pattern, str) else list(pattern or [])
    rules = [rf".*\.{name}\.(\d+)\." for name in names] or [r".*?\.[^.]*\.(\d+)\."]
    found = next((match for rule in rules if (match := re.match(rule, path))), None)
    return found is not None and int(found[1]) in ([chosen] if isinstance(chosen, int) else chosen)
