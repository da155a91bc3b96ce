"""The one line that matters in what jsonargparse says about a command line."""

from __future__ import annotations

import re
from difflib import get_close_matches

from jsonargparse import ArgumentParser


def one_line(message: str, parser: ArgumentParser) -> str:
    """Return what is wrong, the value and the way out.

    Args:
        message: the parser's message, with its lines of union and nesting noise.
        parser: the parser, for the names of its options.
    """
    text = re.sub(r"[ \t]+", " ", message.strip())
    unknown = re.search(r"[Uu]nrecognized arguments: (\S+)", text)
    if unknown:
        return _did_you_mean(unknown.group(1).split("=")[0], _options(parser))
    for pattern in (
        r"Key '([\w.]+)' is not expected",
        r"No action for key \"?([\w.]+)\"?",
        r"Option '([\w.]+)' is not accepted",
        r"[Uu]nexpected keyword argument '(\w+)'",
    ):
        found = re.search(pattern, text)
        if found:
            return _did_you_mean(found.group(1), _options(parser))
    lines = [line.strip(" -") for line in text.splitlines() if line.strip(" -")]
    # Errors of our own configs and classes are whole sentences; the parser only adds layers around them.
    ours = [
        line for line in lines if re.search(r"; it |; the |must be| is not | has no |Did you mean|There is no", line)
    ]
    where = re.search(r'(?:Parser key|key) "([\w.]+)"', text)
    best = (ours or lines or [text])[-1]
    best = re.sub(r"^(?:Parser key|Validation failed:|Problem with given class_path)\s*", "", best).strip()
    if where and where.group(1).rsplit(".", 1)[-1] not in best:
        return f"{where.group(1).replace('.init_args', '')}: {best}"
    return best


def _options(parser: ArgumentParser) -> list[str]:
    names = {option for option in parser._option_string_actions if option.startswith("--")}
    for action in parser._actions:
        for inner in (getattr(action, "_name_parser_map", None) or {}).values():
            names |= set(_options(inner))
        default = getattr(action, "default", None)
        path = default.get("class_path") if default is not None and hasattr(default, "get") else None
        if isinstance(path, str):
            names |= {f"--{action.dest}.{key}" for key in _arguments_of(path)}
    return sorted(names)


def _arguments_of(path: str) -> list[str]:
    from dataclasses import fields, is_dataclass
    from importlib import import_module

    from lit_peft.module import AdaptableModule, init_parameters

    module, _, name = path.rpartition(".")
    cls = getattr(import_module(module), name)
    if not issubclass(cls, AdaptableModule):
        from inspect import signature

        return list(signature(cls).parameters)
    keys = []
    for key, parameter in init_parameters(cls).items():
        keys.append(key)
        if is_dataclass(parameter.default):
            keys += [f"{key}.{field.name}" for field in fields(parameter.default)]
    return keys


def _did_you_mean(name: str, known: list[str]) -> str:
    dashed = name if name.startswith("--") else f"--{name}"
    near = get_close_matches(dashed, known, n=1, cutoff=0.5)
    if not near:
        leaf = name.lstrip("-").rsplit(".", 1)[-1]
        near = [option for option in known if option.rsplit(".", 1)[-1] == leaf][:1]
    hint = f" Did you mean {near[0]}?" if near else " See --help."
    return f"there is no option {dashed}.{hint}"
