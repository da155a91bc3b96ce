"""A module's named sets of adapter weights: added, read, written, combined, deleted, and rebuilt in a fresh process.

Each set but the first is placed by a small module of its own methods that shares the model: the same classes as for the
first one, with another configuration and another name. What they were told is noted in the hyper-parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lit_peft import hub, named
from lit_peft.adapter import Adapter, adapter_names, check_name, named_adapters, scope_of
from lit_peft.catalogue import FACTS
from lit_peft.forks import kind_of
from lit_peft.module import AdaptableModule
from lit_peft.targets import bare

FIRST = "default"


class AdapterSets(AdaptableModule):
    """What every method knows of adapter folders and of several named adapters on one base.

    Args:
        adapter: folder of a saved adapter to start from; its configuration wins over the arguments.
        check_base: refuse an adapter that was made on another base model.
        named: further adapters by name, each with what `add_adapter` takes: the methods' settings, or
            `adapter: FOLDER`; and `train: false` to keep it as it is.
        active: names of the adapters that act together, in this order; None: the first one, `default`.
    """

    method: ClassVar[str] = ""
    placing: str = FIRST  # the name under which `place_adapters` places
    beside: AdapterSets | None = None  # the module that a further adapter is placed for
    _placed = False

    def __init__(
        self,
        *args: Any,
        adapter: str | None = None,
        check_base: bool = True,
        named: dict[str, dict[str, Any]] | None = None,
        active: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.adapter = adapter
        self.check_base = check_base
        self.named: dict[str, dict[str, Any]] = dict(named or {})
        self.active = active
        self._sets: dict[str, list[AdapterSets]] = {}
        self.save_hyperparameters({"adapter": adapter, "check_base": check_base, "named": named, "active": active})

    # What a method says -----------------------------------------------------------------------------------------------

    def adopt(self, config: Mapping[str, Any]) -> None:
        """Take over the configuration read from an adapter folder; each method takes the part that is its own."""

    def parts(self) -> list[dict[str, Any]]:
        """Return the `adapter_config.json` contents of each stacked method, outermost last."""
        return []

    def gathered(self, layers: Mapping[str, Any]) -> Any:
        """Return this method's configuration that places what a combination holds: `{module path: its settings}`.

        Raises:
            TypeError: if the method has no combinations.
        """
        raise TypeError(f"{type(self).__name__} has no combined adapters. Let the adapters act together instead.")

    def declared(self) -> dict[str, Tensor]:
        """Return the existing weights that are trained in place, by path in the model."""
        assert self.model is not None
        adapted = {id(p) for _, adapter in named_adapters(self.model) for _, p in adapter.own_parameters()}
        return {
            name: parameter.detach()
            for name, parameter in self.model.named_parameters()
            if id(parameter) not in adapted and self.is_trainable(name, parameter)
        }

    def base_identity(self) -> dict[str, Any]:
        """Return name, revision and hash of the base model, as far as the task knows them."""
        return dict(getattr(self, "backbone_identity", {}))

    # Adapter folders --------------------------------------------------------------------------------------------------

    def save_adapter(self, folder: str | Path, name: str = FIRST) -> Path:
        """Write one named adapter as a folder that HF PEFT loads (where PEFT has the method).

        Args:
            folder: where to write; must not hold another adapter's files.
            name: which named set.

        Returns:
            The folder.

        Raises:
            ValueError: if there is no such set, or more was trained than an adapter folder holds.
        """
        assert self.model is not None, "call configure_model() first"
        known = adapter_names(self.model)
        if name not in known and (known or name != FIRST):
            raise ValueError(f"No adapter is named {name!r}. This model has {known}.")
        declared = self.declared()
        own = {id(p) for _, adapter in named_adapters(self.model) for _, p in adapter.own_parameters()}
        trained = {n for n, p in self.model.named_parameters() if p.requires_grad and id(p) not in own}
        thawed = sorted(trained - declared.keys())
        if thawed:
            raise ValueError(
                f"{len(thawed)} thawed weights of the base were trained too, such as {thawed[0]!r}, and an adapter "
                "folder has no place for them. Keep the checkpoint, or merge."
            )
        labels = getattr(self, "labels", None)
        return hub.write(
            folder,
            self.model,
            self.parts_of(name),
            declared=declared,
            base=self.base_identity(),
            task_type=getattr(self, "peft_task_type", None),
            name=name,
            notes={"labels": list(labels)} if labels else None,
        )

    def parts_of(self, name: str) -> list[dict[str, Any]]:
        """Return the `adapter_config.json` contents of each method of one named set, outermost last."""
        assert self.model is not None, "call configure_model() first"
        parts = [part for placer in self._sets.get(name, [self]) for part in placer.parts()]
        return [part for part in parts if name == FIRST or hub.owned(self.model, part["peft_type"], name)]

    def load_adapter(self, folder: str | Path, name: str = FIRST) -> None:
        """Copy a saved adapter's weights into one named set; a name that is new is added first.

        Raises:
            ValueError: if keys, shapes or the base model do not fit.
        """
        assert self.model is not None, "call configure_model() first"
        if name != FIRST and name not in adapter_names(self.model):
            self.add_adapter(name, folder=folder)
            return
        base = self.base_identity() if self.check_base else {}
        kinds = [part["peft_type"] for part in self.parts()] if name == FIRST else []
        hub.read(folder, self.model, declared=self.declared(), base=base, name=name, kinds=kinds, copy=name == FIRST)

    # Named sets -------------------------------------------------------------------------------------------------------

    def add_adapter(
        self,
        name: str,
        *methods: type[AdapterSets],
        folder: str | Path | None = None,
        train: bool = True,
        **configs: Any,
    ) -> None:
        """Put another adapter on the same base, at its starting values or read from a folder.

        It may have other targets, other ranks and other methods than the first. It acts when it is chosen: `adapters`,
        `routed`, `activate`. Call it before training starts, before or after `configure_model`.

        Args:
            name: a new name.
            *methods: its methods; default: those whose settings are given, or that the folder holds, or all of this
                module's.
            folder: a saved adapter to read.
            train: whether training changes it.
            **configs: settings of its methods by keyword: `lora=LoRAConfig(r=4)`.

        Raises:
            ValueError: if the name is taken, or the folder does not fit.
            TypeError: if a keyword belongs to none of the methods, or a method trains weights in place.

        Example:
            >>> from lit_peft import LoRA, LoRAConfig, SFT
            >>> class Mine(LoRA, SFT): ...
            >>> module = Mine(backbone="Qwen/Qwen3-0.6B")
            >>> module.add_adapter("reward", lora=LoRAConfig(r=4))
            >>> sorted(module.named)
            ['reward']
        """
        check_name(name)
        if name == FIRST or name in self.named or (self.model is not None and name in adapter_names(self.model)):
            raise ValueError(f"This model already has an adapter named {name!r}. Choose another, or delete it first.")
        entry: dict[str, Any] = {**configs, "train": train}
        if folder is not None:
            entry["adapter"] = str(folder)
        if methods:
            entry["methods"] = [f"{method.__module__}.{method.__qualname__}" for method in methods]
        if self._placed:
            self._place(name, entry)
        else:
            self._note(name, entry)

    def place_named(self) -> None:
        """Place the adapters that `named` lists; called once, when the first one stands."""
        for name, entry in self.named.items():
            check_name(name)
            self._place(name, entry)
        if self.active is not None:
            assert self.model is not None
            named.activate(self.model, *self.active)

    def delete_adapter(self, name: str) -> None:
        """Remove one named adapter.

        Raises:
            ValueError: if there is none of that name, or it is the first.
        """
        if name == FIRST:
            raise ValueError(
                "The first adapter is the module's own. Choose others with activate instead of deleting it."
            )
        assert self.model is not None, "call configure_model() first"
        named.delete_adapter(self.model, name)
        self._sets.pop(name, None)
        self._note(name, None)

    def combine_adapters(
        self, names: Sequence[str], weights: Sequence[float], name: str, how: str = "linear", **options: Any
    ) -> None:
        """Add an adapter that is a weighted combination of others; see `lit_peft.combine_adapters`.

        Raises:
            ValueError: if a name is unknown or taken, or the rule does not go with these adapters.
            TypeError: if a method has no such rule.
        """
        assert self.model is not None, "call configure_model() first"
        named.combine_adapters(self.model, names, weights, name, how, **options)
        placers: dict[str, AdapterSets] = {}
        for source in names:
            for placer in self._sets.get(source) or self._placers(_methods(type(self)), {}, FIRST):
                placers.setdefault(placer.kind(), placer)
        try:
            made = []
            for kind, placer in placers.items():
                layers = {bare(path): a.configs[name] for path, a in hub.owned(self.model, kind, name)}
                if layers:
                    (keyword,) = _keywords(type(placer))
                    made += self._placers([type(placer)], {keyword: placer.gathered(layers)}, name)
        except BaseException:
            named.delete_adapter(self.model, name)
            raise
        self._sets[name] = made
        self._note(name, self._resolved(made, train=scope_of(self.model).trained is None))

    def kinds(self) -> list[str]:
        """Return the kinds of folder that hold this method: one, or one for each part of a composed method."""
        return self.kind().split(" + ")

    def kind(self) -> str:
        """Return the `peft_type` of a single method."""
        facts = FACTS.get(self.method)
        return facts.peft_type if facts else str(self.parts()[-1]["peft_type"])

    def _place(self, name: str, entry: Mapping[str, Any]) -> None:
        model, folder, train = self.model, entry.get("adapter"), entry.get("train", True)
        assert model is not None
        known = adapter_names(model)
        if name in known:
            raise ValueError(f"This model already has an adapter named {name!r}. Choose another, or delete it first.")
        settings = {key: value for key, value in entry.items() if key not in ("adapter", "train", "methods")}
        methods = [_imported(path) for path in entry.get("methods", [])] or _methods(type(self))
        wanted = [method for method in methods if settings.keys() & _keywords(method)] if settings else methods
        strange = settings.keys() - {keyword for method in wanted for keyword in _keywords(method)}
        if strange:
            takes = sorted(keyword for method in methods for keyword in _keywords(method))
            raise TypeError(f"Adapter {name!r} has no setting {sorted(strange)[0]!r}; these methods take {takes}.")
        placers = self._placers(wanted, settings, name)
        if folder is not None:
            configs = hub.read_configs(folder)
            found = {kind_of(config) for config in configs}
            placers = [placer for placer in placers if found.issuperset(placer.kinds())]
            missing = sorted(found - {kind for placer in placers for kind in placer.kinds()})
            if missing:
                raise ValueError(
                    f"{folder} holds {' + '.join(sorted(found))}, and no method here reads {missing[0]}. "
                    f"Name its class: add_adapter({name!r}, METHOD, folder=...)."
                )
            for placer in placers:
                for config in configs:
                    placer.adopt(config)
        before = {id(adapter) for _, adapter in named_adapters(model)}
        try:
            for placer in placers:
                placer.place_adapters()
                self._check_placed(placer, name)
            if folder is not None:
                base = self.base_identity() if self.check_base else {}
                hub.read(folder, model, declared=self.declared(), base=base, name=name, copy=False)
        except BaseException:
            self._withdraw(name, before)
            raise
        trained = scope_of(model).trained
        if not train or trained is not None:
            named.train_adapters(model, *(known if trained is None else trained), *([name] if train else []))
        self._sets[name] = placers
        self._note(name, self._resolved(placers, train))

    def _placers(
        self, methods: Iterable[type[AdapterSets]], configs: Mapping[str, Any], name: str
    ) -> list[AdapterSets]:
        """Return modules of one method each, innermost first, that share the model and place under a name."""
        made = []
        for method in reversed(list(methods)):
            keywords = _keywords(method)
            own = {key: self.hparams[key] for key in keywords if key in self.hparams}
            placer = method(**{**own, **{key: configs[key] for key in keywords & configs.keys()}})
            placer.placing, placer.check_base, placer.model = name, self.check_base, self.model
            placer.__dict__["beside"] = self  # not by setattr: it is no submodule
            made.append(placer)
        return made

    def trained_anyway(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether an existing weight is trained whatever an adapter folder says, as a task's new head is."""
        return self.is_trainable(name, parameter) or (
            self.beside is not None and self.beside.is_trainable(name, parameter)
        )

    def _withdraw(self, name: str, before: set[int]) -> None:
        """Leave the model as it was when these adapters were all."""
        assert self.model is not None
        found = [(path, m) for path, m in self.model.named_modules(remove_duplicate=False) if isinstance(m, Adapter)]
        for path, adapter in reversed(found):  # inner ones first
            if id(adapter) not in before:
                self.model.set_submodule(path, adapter.base)
        if name in adapter_names(self.model):
            named.delete_adapter(self.model, name)

    def _check_placed(self, placer: AdapterSets, name: str) -> None:
        assert self.model is not None
        hooks = ("configure_callbacks", "training_step", "adjusted_learning_rate")
        for hook in hooks if not isinstance(self, type(placer)) else ():
            owners = [c for c in type(placer).__mro__ if hook in c.__dict__]
            if owners and issubclass(owners[0], AdapterSets) and owners[0].__dict__.get("method"):
                raise TypeError(
                    f"{type(placer).__name__} takes part in the training by its {hook}, which a further adapter cannot "
                    f"bring along. Name it in the class: class Mine({type(placer).__name__}, ...)."
                )
        own = {id(p) for _, adapter in named_adapters(self.model) for _, p in adapter.own_parameters()}
        in_place = [key for key, p in self.model.named_parameters() if id(p) not in own and placer.is_trainable(key, p)]
        if in_place or not all(hub.owned(self.model, kind, name) for kind in placer.kinds()):
            what = f"trains existing weights such as {in_place[0]!r}" if in_place else "does not place under a name"
            kind = type(placer).__name__
            raise TypeError(f"{kind} {what}, so it cannot be the further adapter {name!r}. Use it as the first one.")

    def _resolved(self, placers: Sequence[AdapterSets], train: bool) -> dict[str, Any]:
        """Return what rebuilds a set without the folder that it was read from, as plain data."""
        configs = {key: placer.hparams[key] for placer in placers for key in _keywords(type(placer))}
        methods = [f"{type(p).__module__}.{type(p).__qualname__}" for p in reversed(placers)]
        return {**configs, "methods": methods, "train": train}

    def _note(self, name: str, entry: dict[str, Any] | None) -> None:
        self.named = {key: value for key, value in self.named.items() if key != name}
        if entry is not None:
            self.named[name] = entry
        self.save_hyperparameters({"named": self.named or None})


def is_task(cls: type) -> bool:
    """Say whether a class brings the model and the loss: a LightningModule that is no method."""
    return issubclass(cls, LightningModule) and not issubclass(cls, AdapterSets) and not issubclass(AdapterSets, cls)


def holds_task(cls: type) -> bool:
    """Say whether a class is, or derives from, a task."""
    return any(is_task(parent) for parent in cls.__mro__)


def _methods(cls: type) -> list[type[AdapterSets]]:
    """Return the methods that a module is made of, outermost first."""
    found: list[type[AdapterSets]] = []
    for parent in cls.__mro__:
        method = issubclass(parent, AdapterSets) and parent.method and not holds_task(parent)
        if method and not any(issubclass(chosen, parent) for chosen in found):
            found.append(parent)
    return found


def _keywords(method: type) -> set[str]:
    """Return the keywords of a method's own settings."""
    owners = [parent for parent in method.__mro__ if getattr(parent, "method", "") and "__init__" in parent.__dict__]
    codes = [parent.__dict__["__init__"].__code__ for parent in owners]
    return {key for code in codes for key in code.co_varnames[code.co_argcount :][: code.co_kwonlyargcount]}


def _imported(path: str) -> type[AdapterSets]:
    module, _, name = path.rpartition(".")
    found = getattr(import_module(module), name, None)
    if not (isinstance(found, type) and issubclass(found, AdapterSets)):
        raise ValueError(f"{path} is no method of lit_peft. Name a class such as lit_peft.methods.lora.LoRA.")
    return found
