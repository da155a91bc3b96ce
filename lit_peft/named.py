"""Named adapters: several sets of weights on one base, added, chosen, routed row by row, switched off, deleted.

Which set acts is chosen by the *call*: `with adapters(model, "reward"):`, `with routed(model, names):`,
`with disabled(model):`. The choice travels with the call, through gradient checkpointing too (see `selection`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lit_peft.adapter import Adapter, adapter_names, check_name, check_once, named_adapters, scopes_of
from lit_peft.blocks import Block, Entry, Stack, names_in
from lit_peft.combining import check_how
from lit_peft.selection import Rows, choose, keep_selection, originals_restored


def add_adapter(model: nn.Module, name: str, config: Any = None) -> None:
    """Give every adapter of a model another named set of weights, at its starting values.

    Args:
        model: the adapted model.
        name: the new name; it acts when chosen with `adapters` or `activate`.
        config: the new set's configuration, for the adapters of its method; None: that of each adapter's first set.

    Raises:
        ValueError: if the name is taken or no adapter takes this kind of configuration.
    """
    check_name(name)
    found = [adapter for _, adapter in named_adapters(model)]
    if config is not None:
        found = [adapter for adapter in found if type(next(iter(adapter.configs.values()))) is type(config)]
    if not found:
        raise ValueError(f"No adapter of this model takes a {type(config).__name__}. Place one first.")
    _check_free(model, name)
    for adapter in found:
        first = next(iter(adapter.configs.values()))
        sited = {key: getattr(first, key) for key in adapter.site}
        adapter.add(name, first if config is None else replace(config, **sited) if sited else config)
    if any(scope.trained is not None for scope in scopes_of(model)):
        _freeze(model)


def _check_free(model: nn.Module, name: str) -> None:
    if name in adapter_names(model):
        raise ValueError(f"This model already has an adapter named {name!r}. Choose another, or delete it first.")


def train_adapters(model: nn.Module, *names: str) -> None:
    """Choose which named adapters training changes; the others are kept as they are.

    With `activate(module, "sft", "default")` and `train_adapters(module, "default")` a frozen adapter acts under a
    trained one. Call it before training starts: the optimizer is made of what trains then.

    Args:
        model: the adapted model, or a LightningModule that holds it.
        *names: one or several names.

    Raises:
        ValueError: if a name is unknown.
    """
    _check_known(model, names)
    for scope in scopes_of(model):
        scope.trained = names
    _freeze(model)


def _freeze(model: nn.Module) -> None:
    for _, adapter in named_adapters(model):
        trained = {id(parameter) for _, parameter in adapter.trained_parameters()}
        for _, parameter in adapter.own_parameters():
            parameter.requires_grad_(id(parameter) in trained)


def combine_adapters(
    model: nn.Module,
    names: Sequence[str],
    weights: Sequence[float],
    name: str,
    how: str = "linear",
    *,
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
) -> None:
    """Add an adapter that is a weighted combination of others: sum_i w_i (adapter i), exactly or by another rule.

    Args:
        model: the adapted model.
        names: the adapters to combine.
        weights: one for each; negative ones subtract.
        name: the new name.
        how: `cat` (LoRA: exact, ranks add up), `svd` (LoRA: the closest of a rank), `linear` (a sum of the weights
            themselves: exact for BitFit and (IA)3, for LoRA a sum of A and of B as in HF PEFT), `ties`, `dare_linear`,
            `dare_ties`; for LoRA also `ties_svd`, `dare_linear_svd` and `dare_ties_svd`, which apply the rule to B A.
        rank: of the result of `svd`; None: the largest rank of the adapters.
        density: for `ties` and `dare`: the share of entries that is kept.
        seed: for `dare`: of its random choice.

    Raises:
        ValueError: if a name is unknown or taken, a weight is not finite, or the rule does not go with these adapters.
        TypeError: if a method has no such rule.

    Example:
        >>> import torch
        >>> from lit_peft import LoRAConfig, place
        >>> from lit_peft.methods.lora import LoRALinear
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> _ = place(model, ["0"], lambda base: LoRALinear(base, LoRAConfig(r=2)))
        >>> add_adapter(model, "two", LoRAConfig(r=3))
        >>> combine_adapters(model, ["default", "two"], [0.7, 0.3], "both", "cat")
        >>> model[0].configs["both"].r
        5
    """
    check_name(name)
    check_how(how, density)
    if not names or len(names) != len(weights):
        raise ValueError(
            f"{len(names)} adapters and {len(weights)} weights were given. Give one weight for each adapter."
        )
    endless = [weight for weight in weights if not math.isfinite(weight)]
    if endless:
        raise ValueError(f"A weight is {endless[0]}; each must be a finite number.")
    _check_known(model, names)
    _check_free(model, name)
    generator = torch.Generator().manual_seed(seed)
    made: list[tuple[Adapter, Any, dict[str, torch.Tensor]]] = []
    for _, adapter in named_adapters(model):
        here = [(other, weight) for other, weight in zip(names, weights, strict=True) if other in adapter.configs]
        if here:
            present, factors = zip(*here, strict=True)
            options = {"rank": rank, "density": density, "generator": generator, "absent": sum(weights) - sum(factors)}
            config, tensors = adapter.combined(present, factors, how, **options)
            made.append((adapter, config, tensors))
    with torch.no_grad():  # everything could be computed: only now is the model changed
        for adapter, config, tensors in made:
            adapter.add(name, config)
            adapter.load_tensors(tensors, name)
    if any(scope.trained is not None for scope in scopes_of(model)):
        _freeze(model)


def adapters(model: nn.Module, *names: Entry) -> AbstractContextManager[None]:
    """Choose which named adapters act in the calls made inside the `with` block.

    Args:
        model: the adapted model, or a LightningModule that holds it.
        *names: one or several names, or blocks of them (`Stack`, `Average`, `Fuse`); they act together, in this order.
            None at all: the base alone.

    Raises:
        ValueError: if a name is unknown, or comes twice.
        TypeError: if an adapter cannot apply a block; or there are no names, and weights of the base are trained in
            place.

    Example:
        >>> from lit_peft import adapters
        >>> # with adapters(model, "reward"):
        >>> #     scores = model(**batch)
    """
    check_entries(model, names)
    check_once(names)
    if not names:
        _check_untouched(model)
    keep_selection(model)  # gradient checkpointing may have been switched on since the adapters were placed
    return choose(dict.fromkeys(scopes_of(model), names))


def routed(model: nn.Module, names: Sequence[Entry | Sequence[Entry] | None]) -> AbstractContextManager[None]:
    """Choose for each row of the batch which named adapter acts on it, in the calls made inside the `with` block.

    The base runs once on the whole batch. Works in training too: each set gets gradients from its own rows only.

    Args:
        model: the adapted model, or a LightningModule that holds it.
        names: one entry a row: a name or a block, several that act together, or None for the base alone.

    Raises:
        ValueError: if a name is unknown, or there are none; in the call, if the batch has another number of rows.
        TypeError: if an adapter cannot apply a block; or a row asks for the base and weights of the base are trained in
            place.

    Example:
        >>> from lit_peft import routed
        >>> # with routed(model, ["policy", "policy", "reward", None]):
        >>> #     logits = model(**batch).logits
    """
    if not names:
        raise ValueError("routed needs one name for each row of the batch; it got none.")
    rows = Rows(names)
    check_entries(model, rows.entries)
    for entry in names:
        check_once(entry if isinstance(entry, Sequence) and not isinstance(entry, str) else ())
    if not all(names):
        _check_untouched(model)
    keep_selection(model)
    return choose(dict.fromkeys(scopes_of(model), rows))


def _check_untouched(model: nn.Module) -> None:
    """See that the base without its adapters is the base: its own weights are as they were."""
    if any(scope.originals or scope.irreversible for scope in scopes_of(model)):
        raise TypeError(
            "A batch or row cannot be answered by the base alone: weights of the base itself are trained here (biases, "
            "modules to save, layers), for all rows. Use `disabled` for a batch of such rows."
        )


def delete_adapter(model: nn.Module, name: str) -> None:
    """Remove one named set of weights from a model; adapters that held no other go, and the base takes their place.

    Raises:
        ValueError: if no adapter has the name, or a block or a fusion needs it.
    """
    _check_known(model, (name,))
    held = [entry for scope in scopes_of(model) for entry in scope.active if isinstance(entry, Block)]
    needed = [str(block) for block in held if name in block.names]
    needed += [f"the fusion {who!r}" for _, adapter in named_adapters(model) for who in adapter.needing(name)]
    if needed:
        raise ValueError(f"{name!r} is part of {needed[0]}. Activate or delete that first.")
    found = [(path, m) for path, m in model.named_modules(remove_duplicate=False) if isinstance(m, Adapter)]
    for adapter in {id(adapter): adapter for _, adapter in found}.values():
        if name in adapter.configs:
            adapter.remove(name)
    for path, adapter in reversed(found):  # inner ones first
        if not adapter.configs:
            model.set_submodule(path, adapter.base)
    for scope in scopes_of(model):
        scope.active = tuple(other for other in scope.active if other != name)
        scope.current = scope.active
        scope.trained = scope.trained and tuple(other for other in scope.trained if other != name)


def _check_known(model: nn.Module, names: Iterable[str]) -> None:
    known = adapter_names(model)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"No adapter is named {unknown[0]!r}. This model has {known}.")


def check_entries(model: nn.Module, entries: Sequence[Entry]) -> None:
    """See that names and blocks can act on a model.

    Raises:
        ValueError: if a name is unknown.
        TypeError: if an adapter cannot apply a block, or no layer has two of the adapters that are stacked.
    """
    _check_known(model, names_in(entries))
    for block in (entry for entry in entries if isinstance(entry, Block)):
        found = [adapter for _, adapter in named_adapters(model)]
        for reason in (adapter.refusal(block) for adapter in found):
            if reason:
                raise TypeError(reason)
        for inner in block.inside():
            if isinstance(inner, Stack) and not any(adapter.meets(inner) for adapter in found):
                together = ", ".join(map(repr, inner.names))
                raise TypeError(
                    f"{inner} has no layer with two of its adapters, so their order is the model's own. Let them act "
                    f"together: adapters(model, {together})."
                )


def activate(model: nn.Module, *names: Entry) -> None:
    """Choose which named adapters, or blocks of them, act by default, until chosen otherwise.

    Raises:
        ValueError: if a name is unknown.
        TypeError: if an adapter cannot apply a block.
    """
    with adapters(model, *names):  # validates
        for scope in scopes_of(model):
            scope.active = names
    for scope in scopes_of(model):
        scope.current = names


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Run the untouched base model inside the `with` block.

    Exact for adapters: they step aside. Methods that train existing weights in place (`Freeze`, `Full` with
    `keep_base`) have the original values put back for the duration, with gradients off: a value swapped in for a moment
    cannot be what a later backward pass sees.

    Args:
        model: the adapted model, or a LightningModule that holds it.

    Raises:
        TypeError: if weights were trained in place and no copy of the base was kept.

    Example:
        >>> from lit_peft import disabled
        >>> # with disabled(model):
        >>> #     reference = model(**batch).logits
    """
    scopes = scopes_of(model)
    reasons = [scope.irreversible for scope in scopes if scope.irreversible]
    if reasons:
        raise TypeError(reasons[0])
    keep_selection(model)
    with ExitStack() as stack:
        stack.enter_context(choose(dict.fromkeys(scopes, ())))
        for scope in scopes:
            if scope.originals:
                stack.enter_context(torch.no_grad())
                stack.enter_context(originals_restored(scope))
        yield
