"""What saved weights were multiplied by, or read with: noted in a checkpoint, compared before another run takes it up.

The same A and B under another alpha are another update; shapes and names cannot tell. So each layer's effective
settings are noted, patterns and calibrations applied, for every named set.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from typing import Any

from torch import nn

from lit_peft.adapter import named_adapters

# What may differ: how a run trains, how weights started, and which layers there are (that shows in the keys).
FREE = {
    "dropout",
    "encoder_dropout",
    "random_drop",
    "penalty",
    "short_prompts",
    "init",
    "init_text",
    "init_lora_weights",
    "start_at_identity",
    "rule_std",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "modules_to_save",
    "leave_out",
    "bias",
    "only_feed_forward",
    "rank_pattern",
    "alpha_pattern",
    "loraplus_lr_ratio",
    "loraplus_lr_embedding",
    "target_r",
    "orth_reg_weight",
    "beta1",
    "beta2",
    "tinit",
    "tfinal",
    "deltaT",
    "shrink",
}
KIND = "settings of"


def noted(model: nn.Module) -> dict[str, dict[str, dict[str, Any]]]:
    """Return `{path: {named set: its settings}}` for every adapter of a model, as plain values."""
    return {path: {n: _of(c) for n, c in a.configs.items() if is_dataclass(c)} for path, a in named_adapters(model)}


def _of(config: Any) -> dict[str, Any]:
    return {KIND: type(config).__name__, **{key: value for key, value in asdict(config).items() if key not in FREE}}


def difference(
    model: nn.Module, stored: Mapping[str, Mapping[str, Mapping[str, Any]]], hparams: Mapping[str, Any]
) -> str:
    """Return in words the first setting that is not in use here as a checkpoint noted it; empty if all are.

    Args:
        model: the adapted model.
        stored: from `noted`.
        hparams: the module's settings, to tell the option that a setting belongs to.
    """
    for path, adapter in named_adapters(model):
        for name, config in adapter.configs.items():
            theirs = stored.get(path, {}).get(name)
            mine = _of(config) if is_dataclass(config) else {}
            if not theirs or theirs[KIND] != mine.get(KIND):  # another method: the keys tell
                continue
            for key in [key for key in mine if key in theirs and mine[key] != theirs[key]]:
                whose = "" if name == "default" else f" in the adapter {name!r}"
                option = f"{_keyword(config, hparams)}{key}"
                return (
                    f"{option} is {mine[key]!r} here{whose} and {theirs[key]!r} in the checkpoint ({path}), whose "
                    f"weights would mean something else. Set it to {theirs[key]!r}"
                )
    return ""


def _keyword(config: Any, hparams: Mapping[str, Any]) -> str:
    names = {field.name for field in fields(config)}
    return next((f"{key}." for key, value in hparams.items() if isinstance(value, Mapping) and set(value) == names), "")
