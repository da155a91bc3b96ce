"""What the user asks for, read off the command line before any parser exists.

`--method` and `--task` decide which class `--model` stands for, so they must be known before the parser is built. They
come from configuration files (left to right), then from flags. Imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

CONFIGS = Path(__file__).parents[1] / "configs"
CONFIG_FLAGS = ("-c", "--config")


@dataclass
class Request:
    """A command line, read roughly.

    Attributes:
        verb: `fit`, `validate`, `test`, `predict`, `preview`.
        arguments: what follows the verb, with names of shipped configurations replaced by their paths.
        configs: the configuration files in order.
        method: as for `--method`.
        task: as for `--task`.
        model: a class path given by `--model`, or None.
        ckpt_path: the checkpoint to start from, or None.
        flags: names of all flags that were given, without dashes.
    """

    verb: str
    arguments: list[str]
    configs: list[Path] = field(default_factory=list)
    method: str = "lora"
    task: str = "sft"
    model: str | None = None
    ckpt_path: str | None = None
    run_dir: str | None = None
    flags: set[str] = field(default_factory=set)


def read(verb: str, arguments: list[str]) -> Request:
    """Read a command line.

    Raises:
        FileNotFoundError: for a configuration file that is neither a path nor shipped.
        ValueError: if a configuration is not a YAML mapping.
    """
    request = Request(verb, [])
    given: dict[str, Any] = {}
    flags: dict[str, str] = {}
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        name, has_value, value = argument.partition("=")
        if not has_value and position + 1 < len(arguments) and not arguments[position + 1].startswith("--"):
            value = arguments[position + 1]
        if name in CONFIG_FLAGS:
            path = find_config(value)
            request.configs.append(path)
            given |= {key: inner for key, inner in load(path).items() if inner is not None}
            request.arguments += [name, str(path)]
            position += 1 if has_value else 2
            continue
        if name.startswith("--"):
            flags[name[2:]] = value
        request.arguments.append(argument)
        position += 1
    request.flags = set(flags)
    for key in ("method", "task", "model", "ckpt_path", "run_dir"):
        if key in flags:
            setattr(request, key, flags[key])
        elif isinstance(given.get(key), str):
            setattr(request, key, given[key])
        elif key == "model" and isinstance(given.get(key), dict):
            request.model = given[key].get("class_path")
    return request


def find_config(name: str) -> Path:
    """Return the path of a configuration: a file of the user's, or one that is shipped, such as `method/lora`.

    Raises:
        FileNotFoundError: naming the nearest shipped ones.
    """
    for candidate in (Path(name), CONFIGS / name, CONFIGS / f"{name}.yaml"):
        if candidate.is_file():
            return candidate
    shipped = sorted(str(path.relative_to(CONFIGS).with_suffix("")) for path in CONFIGS.rglob("*.yaml"))
    near = get_close_matches(name.removesuffix(".yaml"), shipped, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise FileNotFoundError(f"There is no configuration {name!r}.{hint} Shipped: {', '.join(shipped)}.")


def load(path: Path) -> dict[str, Any]:
    """Return a YAML file as a dict.

    Raises:
        ValueError: if it is not valid or not a mapping.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{path}{line}: not valid YAML ({error.problem}). Correct that line.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if content is None:
        raise ValueError(f"{path} is empty. Write `key: value` lines into it, or leave it out.")
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold `key: value` lines, not {type(content).__name__}.")
    return content
