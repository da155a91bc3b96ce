"""PEFT's rule for choosing layers by name, both ways: from layers to a short list, from a saved folder to layers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

KEYS = "tensor_keys"  # added to what is read from a configuration file, never written


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


def stored_targets(config: Mapping[str, Any], leaf: str, modules: Iterable[str]) -> list[str]:
    """Return the targets of a folder whose tensors say which layers are adapted, checked against its configuration.

    The tensors are what counts: they hold for regular expressions, `layers_to_transform` and `exclude_modules` alike.
    The configuration tells whether some are missing.

    Args:
        config: from `read_configs`.
        leaf: the tensor that each adapted layer has, such as `lora_A.weight`.
        modules: the paths of all modules of the model, without adapters.

    Raises:
        ValueError: if layers are missing in the file, in the model, or in the configuration.
    """
    modules = list(modules)
    stored = {key.removesuffix(f".{leaf}") for key in config[KEYS] if key.endswith(f".{leaf}")}
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
        raise ValueError(f"The adapter file holds no {leaf!r} for any layer. Save the adapter again.")
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
