"""Weights of the base that LoRA trains beside its low ranks: whole modules, and biases."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from lit_peft.adapter import innermost
from lit_peft.structure import walk
from lit_peft.targets import bare


def whole_modules(model: nn.Module, entries: Sequence[str] | None) -> list[str]:
    """Return the paths of the modules that `modules_to_save` names: entries that a path equals or ends in, at a dot.

    Raises:
        ValueError: if an entry names no module, or one without weights.
    """
    found: dict[str, None] = {}
    sites = list(walk(model))
    for entry in entries or ():
        named = [site for site in sites if site.name == entry or site.name.endswith(f".{entry}")]
        full = [site.name for site in named if any(True for _ in site.base.parameters())]
        if not full:
            near = sorted({site.name.rpartition(".")[2] for site in sites if entry and entry in site.name})[:5]
            hint = f" Similar names: {near}." if near else " Name the end of a module's path."
            what = "names a module without weights" if named else "names no module of this model"
            raise ValueError(f"lora.modules_to_save has {entry!r}, which {what}.{hint}")
        found |= dict.fromkeys(full)
    return [path for path in found if not any(path.startswith(f"{other}.") for other in found)]


def inside(path: str, modules: Iterable[str]) -> bool:
    """Whether a path (without what adapters add) is one of these modules or in it."""
    return any(path == module or path.startswith(f"{module}.") for module in modules)


def parameters_of(model: nn.Module, modules: Iterable[str]) -> set[str]:
    """Return the names of all parameters in some modules."""
    modules = list(modules)
    return {name for name, _ in model.named_parameters(remove_duplicate=False) if inside(name, modules)}


def bias_names(model: nn.Module, bias: str, paths: Iterable[str]) -> set[str]:
    """Return the names of the biases that `bias` means: `all`, or `lora_only` for those of the layers at `paths`.

    Raises:
        ValueError: if there is none.
    """
    if bias == "none":
        return set()
    every = {bare(name) for name, _ in model.named_parameters(remove_duplicate=False) if name.split(".")[-1] == "bias"}
    found = every if bias == "all" else every & {f"{bare(path)}.bias" for path in paths}
    if not found:
        whose = "this model has no bias" if bias == "all" else "none of the adapted layers has a bias"
        raise ValueError(f"lora.bias is {bias!r}, but {whose}. Leave it at 'none', or stack bitfit to create biases.")
    return found


def refuse_unused(model: nn.Module, paths: Iterable[str]) -> None:
    """See that no path is a table that the model only keeps its weight in, and never calls, as T5's `shared`.

    Raises:
        ValueError: naming the tables that are called.
    """
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    for path in paths:
        if path.rpartition(".")[2] != "shared":
            continue
        others = [target.rpartition(".")[0] for target, source in tied.items() if source == f"{path}.weight"]
        modules = dict(model.named_modules(remove_duplicate=False))
        called = [name for name in others if isinstance(innermost(modules[name]), nn.Embedding)]
        if called and all(innermost(modules[name]) is not innermost(modules[path]) for name in called):
            raise ValueError(
                f"{path!r} only keeps the weight of {' and '.join(called)}, and is never called: a change there would "
                f"have no effect. Name {called[0].rpartition('.')[2]!r} instead."
            )


def untie(model: nn.Module, modules: Iterable[str]) -> None:
    """Give modules weights of their own where they share them with others, so that only they are trained."""
    holders: dict[int, int] = {}
    named = list(model.named_modules())
    for _, module in named:
        for parameter in module._parameters.values():
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    modules = list(modules)
    for path, module in named:
        if not inside(bare(path), modules):
            continue
        for key, parameter in list(module._parameters.items()):
            if parameter is not None and holders[id(parameter)] > 1:
                module._parameters[key] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
