"""The one verb: `place` puts an adapter around a module of a model; `join` adds a named set of weights to a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from lit_peft.adapter import Adapter, check_name, innermost, scope_of, taken

Where = Iterable[str] | Mapping[str, Any] | Callable[[str, nn.Module], bool]


def place(model: nn.Module, where: Where, make: Callable[..., Adapter]) -> list[str]:
    """Swap every matching module of a model for an adapter around it.

    Works on any `nn.Module`, with or without a Trainer. A module that sits at several paths (a tied embedding) gets one
    adapter, which then sits at all of them.

    Args:
        model: the model to change, in place.
        where: module paths, or a predicate over (path, module), or `{path: config}`.
        make: builds the adapter around one module, such as `lambda base: LoRALinear(base, LoRAConfig())`; with
            `{path: config}` it is called with the base and the config.

    Returns:
        The paths that were adapted.

    Raises:
        ValueError: if a path does not exist or nothing matches.

    Example:
        >>> import torch
        >>> from lit_peft import LoRAConfig, place
        >>> from lit_peft.methods.lora import LoRALinear
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> place(model, ["0", "2"], lambda base: LoRALinear(base, LoRAConfig(r=2)))
        ['0', '2']
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    if callable(where):
        paths = [path for path, module in modules.items() if path and where(path, module)]
    else:
        paths = list(where)
    if not paths:
        raise ValueError("Nothing to adapt: no module matched. Check the method's targets.")
    unknown = [path for path in paths if path not in modules]
    if unknown:
        raise ValueError(f"No module at {unknown[0]!r} in {type(model).__name__}.")
    scope = scope_of(model)
    made: dict[int, Adapter] = {}
    for path in paths:
        base = modules[path]
        adapter = made.get(id(base))
        if adapter is None:
            adapter = make(base, where[path]) if isinstance(where, Mapping) else make(base)
            made[id(base)] = adapter
            adapter.scope = scope
            adapter.train(base.training)
            # The parent is looked up afresh: an adapter placed a moment ago may have become the parent.
            for alias in [alias for alias, module in modules.items() if module is base]:
                model.set_submodule(alias, adapter)
    return paths


def join(
    model: nn.Module, where: Mapping[str, Any], kind: Callable[[nn.Module], type[Adapter]], name: str = "default"
) -> list[str]:
    """Give the modules at some paths one more named set each, in an adapter that stands there or in a new one.

    Args:
        model: the model to change, in place.
        where: `{path: config}`.
        kind: tells the adapter's class from the innermost module at a path.
        name: the set's name.

    Returns:
        The paths.

    Raises:
        ValueError: if the name is taken at one of them, or a path does not exist. Nothing is changed then.
    """
    check_name(name)
    standing: dict[str, Adapter] = {}
    for path in where:
        module = model.get_submodule(path)
        wanted = kind(innermost(module))
        while isinstance(module, Adapter):
            if type(module) is wanted:
                standing[path] = module
                if name in module.configs:
                    raise taken(name)
            if name in module.configs:
                break  # placed before, for the same set: what comes later goes around it, as in every other stack
            module = module.base
    fresh = {path: config for path, config in where.items() if path not in standing}
    if fresh:
        place(model, fresh, lambda base, config: kind(innermost(base))(base, config, name))
    for path, adapter in standing.items():
        if name not in adapter.configs:  # one that sits at two paths (a tied embedding) is given its set once
            adapter.add(name, where[path])
    return list(where)
