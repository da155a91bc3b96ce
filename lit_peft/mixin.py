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
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from lit_peft import blocks, hub, rewriting
from lit_peft.adapter import Adapter, adapter_names, merge, named_adapters, scope_of
from lit_peft.callbacks.adapter_freeze import AdapterFreeze
from lit_peft.callbacks.base import AdapterCallback
from lit_peft.named import activate, train_adapters
from lit_peft.selection import keep_selection
from lit_peft.sets import AdapterSets, holds_task, is_task
from lit_peft.sites import describe_coverage, layers
from lit_peft.weights import count

Config = TypeVar("Config")


# settings without which the same weights mean another function
MEANING = frozenset({"alpha", "use_rslora", "mora_type", "init_r", "scale", "activation", "first", "last"})


class PEFT(AdapterSets):
    """The base of every method: places adapters once the task has built its model, freezes, saves and loads.

    A trainable module is *methods, then a task*: `class Mine(LoRA, SFT)`. Methods cooperate through `super()`; a class
    in the wrong order would train all weights without a word, so it is refused when it is defined.

    Args:
        adapter: folder of a saved adapter to start from; its configuration wins over the arguments.
        check_base: refuse an adapter that was made on another base model.
        named: further adapters by name, each with what `add_adapter` takes: the methods' settings, or
            `adapter: FOLDER`; and `train: false` to keep it as it is.
        active: names of the adapters that act together, in this order, or blocks such as `stack: [a, b]`; None: the
            first one, `default`.
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

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.strict_loading = False  # checkpoints hold adapters only; `on_load_checkpoint` does the checking

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
        self._placed = True
        if self.adapter is not None:
            for config in hub.read_configs(self.adapter):
                self.adopt(config)
        self.place_adapters()
        if self.adapter is not None:
            self.load_adapter(self.adapter)
        self.place_named()
        keep_selection(self.model)
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
        path, _, _ = name.rpartition(".")
        while path and self.model is not None:
            owner = self.model.get_submodule(path)
            if isinstance(owner, Adapter):
                inside = name.removeprefix(f"{path}.")
                if not inside.startswith("base."):
                    return float(next(iter(owner.configs.values())).default_lr)
            path, _, _ = path.rpartition(".")
        return super().learning_rate(name, parameter)

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
            meta["adapters"] = {
                "active": [blocks.plain(entry) for entry in scope.active],
                "trained": scope.trained and list(scope.trained),
            }
        meta["class_path"] = f"{type(self).__module__}.{type(self).__qualname__}"

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the file was made on this base, and holds every trained weight and none that this model lacks.

        Raises:
            ValueError: with the first keys that do not fit.
        """
        super().on_load_checkpoint(checkpoint)
        if not self._placed or self.model is None:
            return
        if self.check_base:
            hub.compare_bases(checkpoint.get("lit_peft", {}).get("base") or {}, self.base_identity())
        rewriting.note(self.model, checkpoint.get("lit_peft", {}).get("restarts") or {})
        for key, mine in self.hparams.items():
            theirs = checkpoint.get("hyper_parameters", {}).get(key)
            if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
                changed = sorted(name for name in MEANING & mine.keys() & theirs.keys() if mine[name] != theirs[name])
                if changed:
                    rank_zero_warn(
                        f"{key}.{changed[0]} is {mine[changed[0]]!r} here and was {theirs[changed[0]]!r} when the "
                        "checkpoint was made: its weights may mean something else now."
                    )
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
            raise ValueError(f"The checkpoint {what}. Was it made with another method, rank or base model?")
        mine = {
            f"model.{name}": parameter.shape for name, parameter in self.model.named_parameters(remove_duplicate=False)
        }
        for key, tensor in checkpoint.get("state_dict", {}).items():
            if key in mine and tensor.shape != mine[key]:
                raise ValueError(
                    f"Shapes differ for {key!r}: {tuple(tensor.shape)} in the checkpoint, {tuple(mine[key])} here. Was "
                    "it made with another rank or base model?"
                )
        self._choose_as(checkpoint.get("lit_peft", {}).get("adapters"))

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
