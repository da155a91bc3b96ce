"""How large to make each method, so that all train about as many weights: counted on models without memory."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import fields as dataclass_fields
from dataclasses import is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lit_peft import backbone as backbones
from lit_peft.catalogue import LARGEST, SIZES
from lit_peft.faults import guarded
from lit_peft.module import init_parameters
from lit_peft.quiet import quiet
from lit_peft.zoo import compose

DEFAULT = 16  # of a size that is left open
TOP = 1 << 16
Settings = dict[str, dict[str, Any]]


def plan(question: str, answer: str) -> int:
    """Choose the sizes of all methods of a comparison, and see that its model and data are there.

    Args:
        question: JSON file with `methods`, `task`, `model`, `data` (class_path, init_args), `budget` and `lr`.
        answer: JSON file to write: `methods` (of each `settings`, `trained`, `note`) and `encoder_decoder`.

    Returns:
        The exit code.
    """
    with guarded() as outcome:
        quiet()
        asked = json.loads(Path(question).read_text(encoding="utf-8"))
        choice = choose(asked)
        Path(answer).write_text(json.dumps(choice, indent=1), encoding="utf-8")
    return outcome.code


def choose(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return the answer to `plan`'s question."""
    task: str = asked["task"]
    classes: dict[str, Any] = {method: compose(method, task) for method in asked["methods"]}
    options = asked["model"]
    found: dict[str, Any] = {}
    rates = asked.get("lr", {})
    made = [_made(cls, {"lr": rates[method]} if method in rates else {}, options) for method, cls in classes.items()]
    first = made[0]  # the others were made to see that their settings are right
    labels = _labels(asked["data"], first)
    skeleton = _skeleton(first, task, labels)
    for method, cls in classes.items():
        own = {"labels": labels} if task == "classification" and labels else {}

        def count(settings: Settings, cls: Any = cls, own: Mapping[str, Any] = own) -> int:
            return trained(cls, {**options, **own}, settings, skeleton)

        found[method] = size(count, _sizable(cls, options), asked["budget"])
    return {"methods": found, "encoder_decoder": first.encoder_decoder}


def size(
    count: Callable[[Settings], int], knobs: Mapping[str, Mapping[str, Any]], budget: int | None
) -> dict[str, Any]:
    """Return the settings that train as many weights as possible within a budget, or else as few as possible.

    Args:
        count: how many weights are trained at some settings.
        knobs: keyword -> field -> default, of what makes the method larger; several grow together.
        budget: the most weights to train; None: leave all as it is.

    Example:
        >>> size(lambda settings: 100 * settings["lora"]["r"], {"lora": {"r": 8}}, 350)
        {'settings': {'lora': {'r': 3}}, 'trained': 300, 'note': ''}
    """
    try:
        if budget is None or not knobs:
            number = count({})
            over = budget is not None and number > budget
            return {"settings": {}, "trained": number, "note": "has one size, above the budget" if over else ""}
        base = max(value for fields in knobs.values() for value in fields.values() if isinstance(value, int))
        limit = min((LARGEST[field] for fields in knobs.values() for field in fields if field in LARGEST), default=TOP)
        seen: dict[int, int] = {}

        def at(k: int) -> int:
            if k not in seen:
                try:
                    seen[k] = count(_scaled(knobs, k, base))
                except ValueError:  # larger than the model allows
                    if k == 1:
                        raise
                    seen[k] = 10**15
            return seen[k]

        k = _largest(at, budget, limit)
    except Exception as error:  # whatever it is, the run itself will show it as its row
        return {"settings": {}, "trained": None, "note": f"size not chosen: {' '.join(str(error).split())}"}
    number = at(k)
    note = "its smallest size, above the budget" if number > budget else ""
    if k == limit and not note:
        note = "its largest useful size"
    return {"settings": _scaled(knobs, k, base), "trained": number, "note": note}


def _largest(at: Callable[[int], int], budget: int, limit: int) -> int:
    """Return the largest k up to a limit with at(k) <= budget, 1 if there is none; at(k) rises with k."""
    low, high = 1, min(2, limit)
    if at(low) > budget:
        return low
    while at(high) <= budget:
        if high == limit:
            return high
        low, high = high, min(limit, high * 4)
    step = 0
    while high - low > 1:
        share = (budget - at(low)) / max(1, at(high) - at(low))  # most counts are straight lines
        guess = low + int(share * (high - low)) if step % 3 < 2 else (low + high) // 2
        guess = min(max(guess, low + 1), high - 1)
        low, high = (guess, high) if at(guess) <= budget else (low, guess)
        if at(low) <= budget < at(low + 1 if low + 1 <= limit else high):
            break
        step += 1
    return low


def _scaled(knobs: Mapping[str, Mapping[str, Any]], k: int, base: int) -> Settings:
    """Return the settings at size k: whole numbers in proportion, and what must stay in proportion to them exactly."""
    chosen: Settings = {}
    for keyword, fields in knobs.items():
        whole = {f: max(1, round(v * k / base)) for f, v in fields.items() if isinstance(v, int)}
        lead = next(iter(whole))
        ratio = whole[lead] / fields[lead]
        chosen[keyword] = {f: whole[f] if f in whole else v * ratio for f, v in fields.items()}
    return chosen


def _sizable(cls: type, options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return keyword -> field -> default of what makes a class larger, as the catalogue and its configurations say."""
    found = {}
    for keyword, parameter in init_parameters(cls).items():
        if keyword not in SIZES or not is_dataclass(parameter.default):
            continue
        given = options.get(keyword, {})
        default = parameter.default
        for names, needed in SIZES[keyword].items():
            values = {name: given.get(name, getattr(default, name)) for name in names if hasattr(default, name)}
            if not values or not all(given.get(name, getattr(default, name, True)) for name in needed):
                continue
            # 16 where a float is declared, such as alpha, is kept in exact proportion, not rounded
            floats = {field.name for field in dataclass_fields(default) if field.type in ("float", float)}
            found[keyword] = {
                name: float(value) if name in floats else DEFAULT if value is None else value
                for name, value in values.items()
            }
            break
    return found


def trained(cls: Any, options: Mapping[str, Any], settings: Settings, skeleton: nn.Module) -> int:
    """Return how many weights a class trains on a model, which may be on the meta device.

    Args:
        cls: methods and a task.
        options: its arguments; those of other methods are left out.
        settings: sizes, by keyword.
        skeleton: the bare model; it is copied.
    """
    module = _made(cls, {k: {**options.get(k, {}), **v} for k, v in settings.items()}, options)
    module.model = copy.deepcopy(skeleton)
    with torch.device("meta"):
        module.configure_model()
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def _made(cls: Any, *options: Mapping[str, Any]) -> Any:
    """Make a module of those arguments that it takes; earlier ones win."""
    merged = {key: value for given in reversed(options) for key, value in given.items()}
    known = init_parameters(cls)
    module = cls(**{key: value for key, value in merged.items() if key in known})
    module.announce_coverage = lambda: None
    return module


def _labels(data: Mapping[str, Any], module: Any) -> list[str] | None:
    """Prepare the data, so that all runs find it ready, and return its classes."""
    path, _, name = data["class_path"].rpartition(".")
    made = getattr(import_module(path), name)(**data.get("init_args", {}))
    if hasattr(made, "attach"):
        made.attach(module.tokenizer, encoder_decoder=module.encoder_decoder)
        made.setup("fit")
    return getattr(made, "labels", None)


def _skeleton(module: Any, task: str, labels: list[str] | None) -> nn.Module:
    config = copy.deepcopy(module.config)
    if task == "classification":
        config.num_labels = len(labels or module.labels or ())
        tokenizer = module.tokenizer
        if config.pad_token_id is None:
            config.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    backbones.resolve(module.backbone)  # says so if there is no such model
    with torch.device("meta"):
        model: nn.Module = module.auto_class().from_config(config)
    return model
