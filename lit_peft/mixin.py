"""`PEFT`: what every method mixin adds around a task, hook by hook."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from inspect import Parameter, signature
from itertools import combinations
from typing import Any, ClassVar, TypeVar

import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lit_peft import blocks, hub, meaning, rewriting
from lit_peft.adapter import Adapter, adapter_names, merge, named_adapters, scope_of
from lit_peft.callbacks.adapter_freeze import AdapterFreeze
from lit_peft.callbacks.base import AdapterCallback
from lit_peft.module import AdaptableModule
from lit_peft.named import activate, train_adapters
from lit_peft.ops.lean import make_lean
from lit_peft.quantised.foreign import own_layers
from lit_peft.selection import keep_selection
from lit_peft.sets import AdapterSets, holds_task, is_task
from lit_peft.sites import describe_coverage, layers
from lit_peft.weights import count

Config = TypeVar("Config")


class PEFT(AdapterSets):
    """The base of every method: places adapters once the task has built its model, freezes, saves and loads.

    A trainable module is *methods, then a task*: `class Mine(LoRA, SFT)`. Methods cooperate through `super()`; a class
    in the wrong order would train all weights without a word, so it is refused when it is defined.

    Its arguments are those of `AdapterSets`, and one more.

    Args:
        lean: let gated MLPs and RMS norms keep less for the backward pass; values and checkpoints stay as they are.
    """

    config_types: ClassVar[dict[str, type[Any]]] = {}  # settings with other defaults, where a method composes others
    conflicts: ClassVar[tuple[str, ...]] = ()  # methods that this one cannot be stacked with

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        refuse_stack([base for base in cls.__bases__ if issubclass(base, PEFT) and not holds_task(base)])
        order = cls.__mro__
        methods = [c for c in order if issubclass(c, PEFT) and not holds_task(c)]
        tasks = [c for c in order if is_task(c)]
        if methods and tasks and order.index(tasks[0]) < max(order.index(c) for c in methods):
            parts = [base.__name__ for base in sorted(cls.__bases__, key=lambda b: not issubclass(b, PEFT))]
            raise TypeError(
                f"class {cls.__name__}({', '.join(b.__name__ for b in cls.__bases__)}) would train all weights: the "
                f"task hides the method's hooks. Methods come first: class {cls.__name__}({', '.join(parts)})."
            )

    def __init__(self, *args: Any, lean: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lean = lean
        self.save_hyperparameters({"lean": lean})
        self.strict_loading = False  # checkpoints hold adapters only; `on_load_checkpoint` does the checking

    @classmethod
    def fixes(cls, given: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
        """Return what this variant of a method fixes in its settings, whatever else is given, by keyword."""
        return {}

    def configured(self, kind: type[Config], key: str, value: Config | Mapping[str, Any], **preset: Any) -> Config:
        """Return a method's configuration as its dataclass and note it as a plain dict in the hyper-parameters.

        Args:
            kind: the dataclass.
            key: the method's keyword, such as `lora`.
            value: an instance, or a mapping as it comes from YAML or a checkpoint.
            **preset: settings that the method's variant fixes.

        Raises:
            TypeError: if the mapping has a key that the dataclass lacks.
        """
        kind = self.config_types.get(key, kind)
        if isinstance(value, Mapping):
            known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
            unknown = [name for name in value if name not in known]
            if unknown:
                raise TypeError(f"{key} has no setting {unknown[0]!r}; it takes {', '.join(known)}.")
            value = kind(**value)
        if not isinstance(value, kind):
            raise TypeError(f"{key} must be a {kind.__name__} or a dict of its settings, not {value!r}.")
        value = replace(value, **preset)  # type: ignore[type-var]
        self.save_hyperparameters({key: asdict(value)})  # type: ignore[call-overload]
        return value

    def configure_model(self) -> None:
        """Let the task build its model, then place, load, freeze and shard; does nothing the second time."""
        if self._placed:
            return
        super().configure_model()
        if self.model is None:
            raise TypeError(
                f"{type(self).__name__} has no model to adapt. Combine methods with a task, class Mine(LoRA, SFT), or "
                "set self.model in your configure_model."
            )
        own_layers(self.model)
        self._placed = True
        if self.adapter is not None:
            for config in hub.read_configs(self.adapter):
                self.adopt(config)
        self.place_adapters()
        if self.adapter is not None:
            self.load_adapter(self.adapter)
        self.place_named()
        keep_selection(self.model)
        if self.lean:
            make_lean(self.model)
        trainer = self._trainer
        callbacks = [cb for cb in getattr(trainer, "callbacks", []) if isinstance(cb, AdapterCallback)]
        if not any(isinstance(cb, AdapterFreeze) for cb in callbacks):
            callbacks.insert(0, AdapterFreeze())
        for callback in callbacks:
            callback.on_adapters_placed(trainer, self)
        self.announce_coverage()
        if trainer is not None and isinstance(trainer.strategy, ModelParallelStrategy):
            self.shard()

    def announce_coverage(self) -> None:
        """Say how much is trained, and which layers the adapters cover."""
        assert self.model is not None
        trained, total = count(self.model, trained=True), count(self.model)
        paths = [path for path, _ in named_adapters(self.model)]
        where = f": {describe_coverage(paths, self.model)}" if paths else ""
        rank_zero_info(f"{trained:,} of {total:,} parameters are trained ({trained / total:.2%}){where}")

    def configure_callbacks(self) -> list[Callback]:
        """Bring `AdapterFreeze`, unless the Trainer has one."""
        given = super().configure_callbacks()
        callbacks = [given] if isinstance(given, Callback) else list(given)
        if not any(isinstance(callback, AdapterFreeze) for callback in self.trainer.callbacks):  # type: ignore[attr-defined]
            callbacks.append(AdapterFreeze())
        return callbacks

    def shard(self) -> None:
        """Shard the model for FSDP2: every layer, then the rest.

        Raises:
            TypeError: under tensor parallelism.
        """
        from torch.distributed.fsdp import fully_shard

        assert self.model is not None
        mesh = self.device_mesh
        assert mesh is not None
        if mesh["tensor_parallel"].size() > 1:
            raise TypeError("Adapters are not tensor-parallel. Use strategy fsdp2, or set tensor_parallel_size=1.")
        for path in layers(self.model):
            fully_shard(self.model.get_submodule(path), mesh=mesh["data_parallel"])
        fully_shard(self.model, mesh=mesh["data_parallel"])

    def learning_rate(self, name: str, parameter: nn.Parameter) -> float | None:
        """Return what the method that owns the parameter prefers."""
        owner, chosen = self.owner(name)
        if owner is None:
            return super().learning_rate(name, parameter)
        return float(owner.configs.get(chosen, next(iter(owner.configs.values()))).default_lr)

    def rated_by(self, name: str) -> AdaptableModule:
        """Return the method that placed the named set, where it is a further one."""
        owner, chosen = self.owner(name)
        placers = [] if owner is None else self._sets.get(chosen, [])
        placer = next((placer for placer in placers if owner and owner.peft_type in placer.kinds()), None)
        if placer is not None:
            self.refuse_hooks(placer)
        return placer or self

    def owner(self, name: str) -> tuple[Adapter | None, str]:
        """Return the adapter whose own a parameter is, and its named set; None for weights of the base.

        Args:
            name: the parameter's path in `self.model`.
        """
        path, _, _ = name.rpartition(".")
        while path and self.model is not None:
            owner = self.model.get_submodule(path)
            inside = name.removeprefix(f"{path}.")
            if isinstance(owner, Adapter) and not inside.startswith("base."):
                return owner, next((piece for piece in inside.split(".")[:0:-1] if piece in owner.configs), "")
            path, _, _ = path.rpartition(".")
        return None, ""

    # Checkpoints -----------------------------------------------------------------------------------------------------

    def trained_keys(self) -> set[str]:
        """Return the names, as in `state_dict`, of what a checkpoint must hold: adapters and declared weights."""
        if not self._placed or self.model is None:
            return set()
        keys = {
            f"model.{path}.{key}" for path, adapter in named_adapters(self.model) for key, _ in adapter.own_parameters()
        }
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if parameter.requires_grad or self.is_trainable(name, parameter):
                keys.add(f"model.{name}")
        return keys | {f"model.{path}.base.weight" for path in rewriting.rewritten(self.model)}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return what was trained: adapters, declared weights, and the task's own state outside of the model.

        Overriding this, not filtering in `on_save_checkpoint`, is what makes FSDP2 resume work and one file serve one
        process, DDP and FSDP2 alike. Under FSDP1, which matches keys itself, it returns everything.
        """
        state: dict[str, Any] = super().state_dict(*args, **kwargs)
        nested = args or kwargs.get("destination") is not None or kwargs.get("prefix")
        fsdp1 = self._trainer is not None and isinstance(self._trainer.strategy, FSDPStrategy)
        if nested or fsdp1 or not self._placed:
            return state
        keep = self.trained_keys()
        for key in [key for key in state if key.startswith("model.") and key not in keep]:
            del state[key]
        return state

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note which keys the file holds, so that a load can be checked under every strategy."""
        super().on_save_checkpoint(checkpoint)
        meta = checkpoint.setdefault("lit_peft", {})
        meta["keys"] = sorted(key for key in checkpoint.get("state_dict", {}) if key.startswith("model."))
        meta.setdefault("base", self.base_identity())
        if self.model is not None and (restarts := rewriting.rewritten(self.model)):
            meta["restarts"] = restarts
        if self._placed and self.model is not None:
            scope = scope_of(self.model)
            meta["settings"] = meaning.noted(self.model)
            meta["adapters"] = {
                "active": [blocks.plain(entry) for entry in scope.active],
                "trained": scope.trained and list(scope.trained),
            }
        meta["class_path"] = f"{type(self).__module__}.{type(self).__qualname__}"

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the file fits: same base, same settings, every trained weight and none that this model lacks.

        Raises:
            ValueError: with the first keys, or the first setting, that do not fit.
        """
        super().on_load_checkpoint(checkpoint)
        if not self._placed or self.model is None:
            return
        if self.check_base:
            hub.compare_bases(checkpoint.get("lit_peft", {}).get("base") or {}, self.base_identity())
        rewriting.note(self.model, checkpoint.get("lit_peft", {}).get("restarts") or {})
        misfit = self._misfit(checkpoint)
        if changed := self.changed_settings(checkpoint):
            way = ", or check_settings to false if you mean the change" if not misfit else ""
            raise ValueError(f"{changed}{way}.")
        if misfit:
            raise ValueError(misfit)
        self._choose_as(checkpoint.get("lit_peft", {}).get("adapters"))

    def changed_settings(self, checkpoint: Mapping[str, Any]) -> str:
        """Return in words which setting gives a checkpoint's weights another meaning here, empty if none does."""
        assert self.model is not None
        stored = checkpoint.get("lit_peft", {}).get("settings") or {}
        return meaning.difference(self.model, stored, self.hparams) if self.check_settings else ""

    def _misfit(self, checkpoint: Mapping[str, Any]) -> str:
        """Return what keys or shapes do not fit this model, empty if all do."""
        assert self.model is not None
        stored = set(checkpoint.get("lit_peft", {}).get("keys") or checkpoint.get("state_dict", {}))
        stored = {key for key in stored if key.startswith("model.")}
        present = {f"model.{name}" for name, _ in self.model.named_parameters(remove_duplicate=False)}
        missing = sorted(self.trained_keys() - stored)
        surplus = sorted(stored - present)
        if missing or surplus:
            what = (
                f"lacks {len(missing)} of the weights that are trained here, such as {missing[0]!r}"
                if missing
                else (f"holds {len(surplus)} weights that this model lacks, such as {surplus[0]!r}")
            )
            return f"The checkpoint {what}. Was it made with another method, rank or base model?"
        mine = {
            f"model.{name}": parameter.shape for name, parameter in self.model.named_parameters(remove_duplicate=False)
        }
        for key, tensor in checkpoint.get("state_dict", {}).items():
            if key in mine and tensor.shape != mine[key]:
                return (
                    f"Shapes differ for {key!r}: {tuple(tensor.shape)} in the checkpoint, {tuple(mine[key])} here. Was "
                    "it made with another rank or base model?"
                )
        return ""

    def _choose_as(self, noted: Mapping[str, Any] | None) -> None:
        """Let the adapters act and train as in the run that wrote a checkpoint."""
        assert self.model is not None
        if noted and adapter_names(self.model):
            activate(self.model, *[blocks.read(entry) for entry in noted["active"]])
            if noted["trained"] is not None:
                train_adapters(self.model, *noted["trained"])

    def merge_adapters(self, *names: str) -> nn.Module:
        """Fold some adapters into the base, in place, and return the plain model.

        Args:
            *names: which; default: those that act.

        Raises:
            TypeError: if a method cannot be folded.
        """
        if self.model is None:
            self.configure_model()
        assert self.model is not None
        with torch.no_grad():
            return merge(self.model, names or None)


def refuse_stack(methods: Sequence[type[PEFT]]) -> None:
    """See that methods can be stacked.

    Raises:
        TypeError: if two of them take the same settings, so that one would be lost, or do not go together.
    """
    for one, other in combinations([method for method in methods if method.method], 2):
        if one is not other and issubclass(other, one):
            raise TypeError(f"{other.method} is {one.method} already, with more. Leave {one.method} out of the stack.")
        shared = sorted(_settings(one) & _settings(other))
        # variants of one method (dora+loraplus) are one method with the presets of both
        variants = all(hasattr(method, "preset") and not method.config_types for method in (one, other))
        if shared and not variants:
            raise TypeError(
                f"{one.method} and {other.method} both take {shared[0]!r} and would fight for one place. Use one of "
                f"them, or add the other as a named adapter: module.add_adapter(NAME, {other.__name__})."
            )
        if other.method in one.conflicts or one.method in other.conflicts:
            raise TypeError(
                f"{one.method} does not go with {other.method}: virtual tokens move the positions that the other one "
                "reads. Use one of them."
            )


def _settings(method: type[PEFT]) -> set[str]:
    own = signature(method.__init__).parameters
    return {key for key, parameter in own.items() if parameter.kind is Parameter.KEYWORD_ONLY}
