"""The one line that matters in what jsonargparse says about a command line."""

from __future__ import annotations

import re
from difflib import SequenceMatcher
from typing import Any

from jsonargparse import ArgumentParser

UNKNOWN = (
    r"[Uu]nrecognized arguments: (\S+)",
    r"Group '(?P<group>[\w.]+)' does not accept option '([\w.]+)'",
    r"Subcommand '\w+' does not accept option '([\w.]+)'",
    r"Option '([\w.]+)' is not accepted",
    r"Key '([\w.]+)' is not expected",
    r"No action for key \"?([\w.]+)\"?",
)
NEAR = 0.7


class OneLine(ArgumentParser):
    """A parser whose complaints are one readable line, raised as ValueError, and which takes no abbreviated options."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Leave with the line that matters; a parser inside another leaves that to the outer one."""
        if not self.exit_on_error:
            return super().error(message, ex)
        raise ValueError(one_line(message, self))


def one_line(message: str, parser: ArgumentParser) -> str:
    """Return what is wrong, the value and the way out.

    The message is a tree: each parser inside another puts `Parser key "model":` and a list of all types it tried around
    what the inner one said. The keys give the option's full name, the innermost lines the reason.

    Args:
        message: the parser's message.
        parser: the parser, for the names of its options.
    """
    keys = re.findall(r'Parser key "([\w.]+)"', message)
    keys = [key for i, key in enumerate(keys) if i == 0 or key != keys[i - 1]]
    name = ".".join(keys)
    for pattern in UNKNOWN:
        if found := re.search(pattern, message):
            below = [*keys, found.groupdict().get("group"), found.groups()[-1].split("=")[0].lstrip("-")]
            if "nrecognized" in pattern and not found.group(1).startswith("--"):
                return f"{found.group(1)!r} stands alone; options are written --name value. See --help."
            return _did_you_mean(".".join(part for part in below if part), _options(parser))
    if found := re.search(r"arguments are required: ([\w., ]+)", message):
        missing = f"{name}.{found.group(1)}" if name else found.group(1)
        return f"--{missing} is missing; give it as a flag or in a configuration file."
    if found := re.search(r"argument (--[\w.]+): expected one argument", message):
        return f"{found.group(1)} or an option below it has no value: write --name value."
    reason = message.rpartition(f'Parser key "{keys[-1]}"')[2] if keys else message
    if found := re.search(r"Problem with given class_path '([^']+)':\s+(.+)", reason):
        return f"{name} is {found.group(1)}: {found.group(2)}. Give a path that can be imported."
    if found := re.search(r"Unable to load config ['\"](.+?)['\"]", reason):
        return f"{name} is {found.group(1)!r}; it takes settings, such as --{name}.NAME VALUE, or a YAML file of them."
    expected = re.search(r"Expected an? (.+?)\. Got value|Subtypes: \[(.+)\]", reason)
    given = re.search(r"(?:Given|Got) value: (.*)", reason)  # the first is the innermost, as it was written
    if expected and given:
        return f"{name} is {given.group(1)!r}; it must be {_types(expected.group(1) or expected.group(2))}."
    lines = [line.strip(" -:") for line in reason.splitlines() if line.strip(" -:")]
    return f"{name}: {lines[-1]}" if name else (lines or [message])[-1]


def innermost(error: Exception) -> BaseException:
    """Return the error that the others were wrapped around: each layer quotes the one below."""
    found: BaseException = error
    while found.__cause__ is not None and str(found.__cause__) in str(found):
        found = found.__cause__
    return found


def _types(shown: str) -> str:
    """Write `<class 'float'>, <class 'NoneType'>` as `float or null`."""
    values: list[str] = []
    kinds: list[str] = []
    for literal, path, plain in re.findall(r"(?:typing\.)?Literal\[(.+?)\]|<class '([\w.]+)'>|([\w.]+\[.+?\])", shown):
        if literal:
            values += [value.strip("' ") for value in literal.split(",")]
            continue
        module, _, leaf = path.rpartition(".")
        kinds.append(f"the path of a class of {leaf}" if module else plain or {"NoneType": "null"}.get(leaf, leaf))
    if values:
        kinds.insert(0, "one of " + ", ".join(dict.fromkeys(values)))
    return " or ".join(kinds)


def _options(parser: ArgumentParser) -> list[str]:
    names = {option.lstrip("-") for option in parser._option_string_actions if option.startswith("--")}
    for action in parser._actions:
        for inner in (getattr(action, "_name_parser_map", None) or {}).values():
            names |= set(_options(inner))
        default = getattr(action, "default", None)
        path = default.get("class_path") if default is not None and hasattr(default, "get") else None
        if isinstance(path, str):
            names |= {f"{action.dest}.{key}" for key in _arguments_of(path)}
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
    leaf = name.rpartition(".")[2]
    words = set(leaf.split("_"))

    def closeness(option: str) -> float:
        own = option.rpartition(".")[2]
        # `--lr` and `--learning_rate` both mean --model.lr; `lr_rate` shares a word with it.
        same = own in (leaf, "".join(word[:1] for word in leaf.split("_")))
        return SequenceMatcher(None, name, option).ratio() + 0.5 * same + 0.2 * bool(words & set(own.split("_")))

    best = max(known, key=closeness, default="")
    hint = f"Did you mean --{best}?" if best and closeness(best) >= NEAR else "See --help."
    return f"there is no option --{name}. {hint}"
