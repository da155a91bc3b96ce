"""`<Method><Task>` classes, made on first use: `lit_peft.zoo.LoRASFT` is `class LoRASFT(LoRA, SFT)`.

Each is importable by that path, so that YAML, checkpoints and a fresh process agree on it.
"""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module
from typing import Any

from lit_peft.catalogue import METHODS, TASKS
from lit_peft.mixin import refuse_stack
from lit_peft.module import AdaptableModule

_MADE: dict[str, type[AdaptableModule]] = {}


def compose(method: str, task: str) -> type[AdaptableModule]:
    """Return the class of a method, or a stack like `lora+bitfit`, and a task.

    Args:
        method: names as for `--method`, joined by `+`, outermost first.
        task: name as for `--task`.

    Raises:
        ValueError: for an unknown or doubled name.

    Example:
        >>> [c.__name__ for c in compose("lora+bitfit", "sft").__mro__[:4]]
        ['LoRABitFitSFT', 'LoRA', 'BitFit', 'PEFT']
    """
    names = [name.strip() for name in method.split("+")]
    for name in names:
        check(name, METHODS, "method")
    if len(set(names)) < len(names):
        raise ValueError(f"--method {method} names a method twice.")
    check(task, TASKS, "task")
    refuse_stack([_load(METHODS[name]) for name in names])
    paths = [METHODS[name] for name in names] + [TASKS[task]]
    return _made("".join(path.rpartition(".")[2] for path in paths), paths)


def task_class(task: str) -> type[AdaptableModule]:
    """Return the class of a task alone, which trains nothing by itself.

    Raises:
        ValueError: for an unknown name.
    """
    check(task, TASKS, "task")
    return _load(TASKS[task])


def check(name: str, known: dict[str, str], kind: str) -> None:
    """Raise a ValueError with the nearest known name if this one is unknown."""
    if name not in known:
        near = get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ValueError(f"There is no {kind} {name!r}.{hint} Known: {', '.join(known)}.")


def _made(name: str, paths: list[str]) -> type[AdaptableModule]:
    if name not in _MADE:
        bases = tuple(_load(path) for path in paths)
        doc = f"{' and '.join(base.__name__ for base in bases[:-1])} on {bases[-1].__name__}."
        _MADE[name] = type(name, bases, {"__module__": __name__, "__doc__": doc})
    return _MADE[name]


def _load(path: str) -> type:
    module, _, name = path.rpartition(".")
    return getattr(import_module(f"lit_peft.{module}"), name)  # type: ignore[no-any-return]


def __getattr__(name: str) -> Any:
    """Make `LoRABitFitSFT` from its name: method class names, then a task's."""
    rest, paths = name, []
    by_class = {path.rpartition(".")[2]: path for path in [*METHODS.values(), *TASKS.values()]}
    tasks = {path.rpartition(".")[2] for path in TASKS.values()}
    while rest:
        found = max((cls for cls in by_class if rest.startswith(cls)), key=len, default=None)
        if found is None:
            break
        paths.append(by_class[found])
        rest = rest.removeprefix(found)
        if found in tasks:
            break
    if rest or len(paths) < 2 or paths[-1].rpartition(".")[2] not in tasks:
        raise AttributeError(f"module 'lit_peft.zoo' has no attribute {name!r}")
    return _made(name, paths)
