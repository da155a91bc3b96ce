"""What `--print_config` says of a run where the user said nothing: what a variant fixes, what its method chooses."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from lit_peft.mixin import PEFT
from lit_peft.module import AdaptableModule, init_parameters
from lit_peft.sets import stacked


class Shown(ArgumentParser):  # type: ignore[misc]
    """A parser whose `--print_config` shows what will be used.

    What is saved keeps the user's own words: `--config FILE --method OTHER` must not find another method's.
    """

    def dump(self, cfg: Any, *args: Any, **kwargs: Any) -> str:
        """Return a configuration as YAML; in one that is printed, say what the method fixes and chooses."""
        asked: Any = self
        while asked is not None and not hasattr(asked, "print_config"):
            asked = getattr(asked, "parent_parser", None)
        if asked is None or not isinstance(cfg.get("model"), Namespace):
            return str(super().dump(cfg, *args, **kwargs))
        cfg = cfg.clone()
        settle(cfg.model)
        return annotate(super().dump(cfg, *args, **kwargs), class_of(cfg.model))


def settle(model: Namespace) -> None:
    """Write into a parsed model what its method fixes, such as `init_lora_weights: pissa`."""
    cls, given = class_of(model), model.get("init_args")
    if given is None or not issubclass(cls, PEFT):
        return
    settings = {key: vars(value) for key, value in vars(given).items() if isinstance(value, Namespace)}
    for keyword, fixed in cls.fixes(settings).items():
        for name, value in fixed.items():
            given[keyword][name] = value


def annotate(text: str, cls: type[AdaptableModule]) -> str:
    """Say behind the model's settings that are null what is used then.

    Args:
        text: a configuration as YAML.
        cls: the model's class.
    """
    for key, value in chosen(cls).items():
        text = re.sub(rf"^(    {key}: null)$", rf"\1  # {value}", text, flags=re.MULTILINE)
    return text


def chosen(cls: type[AdaptableModule]) -> dict[str, str]:
    """Return what a class uses where dtype, quantize, optim or lr is null, in words."""
    blank = cls.__new__(cls)  # these ask for nothing that a module is given
    found = {
        "dtype": blank.preferred_dtype(),
        "quantize": blank.preferred_quantization(),
        "optim": f"{blank.preferred_optim()}{'' if blank.preferred_optim() == 'adamw' else ' on CUDA, else adamw'}",
    }
    rates = learning_rates(cls)
    if len(set(rates.values())) == 1:
        found["lr"] = f"{next(iter(rates.values())):g}"
    elif rates:
        found["lr"] = ", ".join(f"{name} {rate:g}" for name, rate in rates.items())
    return found


def learning_rates(cls: type[AdaptableModule]) -> dict[str, float]:
    """Return each stacked method's own learning rate; of a composed method, that of each of its parts."""
    found: dict[str, float] = {}
    for method in stacked(cls):
        defaults: dict[str, Any] = {key: p.default for key, p in init_parameters(method).items()}
        parts = {key: value.default_lr for key, value in defaults.items() if hasattr(value, "default_lr")}
        if len(parts) > 1:
            found |= parts
        else:
            found[method.method] = getattr(method, "default_lr", None) or next(iter(parts.values()))
    return found


def class_of(model: Mapping[str, Any] | Namespace) -> type[AdaptableModule]:
    """Return the class that a parsed model names."""
    module, _, name = str(model["class_path"]).rpartition(".")
    return getattr(import_module(module), name)  # type: ignore[no-any-return]
