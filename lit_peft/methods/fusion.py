"""AdapterFusion (Pfeiffer et al. 2021, https://arxiv.org/abs/2005.00247): attention over trained adapters.

The second of two stages. In the first, bottleneck adapters are trained one by one, each on its own task
(`--method pfeiffer`). Here they are frozen, and each layer learns which of them to use for which token:

    s_n = softmax_n((Q h) . (K f_n(h))),    f(h) = V sum_n s_n f_n(h),    loss + penalty * sum ||V - I||^2

Q, K and V are (d, d). How much attention each adapter gets is logged and drawn (callback `FusionMap`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from torch import Tensor, nn

from lit_peft import hub
from lit_peft.adapter import adapter_names, named_adapters, scope_of
from lit_peft.callbacks.fusion_map import FusionMap, metric
from lit_peft.methods.bottleneck import Bottleneck, Bottlenecks
from lit_peft.methods.fusion_site import Attention, FusionBottleneck, FusionConfig, watched
from lit_peft.methods.houlsby import Houlsby
from lit_peft.methods.parallel import ParallelAdapter
from lit_peft.methods.pfeiffer import Pfeiffer
from lit_peft.mixin import PEFT
from lit_peft.placing import join
from lit_peft.sites import geometry

# what can be fused: adapters that add a function of the same h to the residual stream
FUSABLE: dict[str, type[Bottlenecks]] = {cls.peft_type: cls for cls in (Houlsby, Pfeiffer, ParallelAdapter)}


class AdapterFusion(PEFT):
    """AdapterFusion on the task's model: trained bottleneck adapters, frozen, and attention over them.

    Args:
        fusion: which adapters, and the penalty.

    Example:
        >>> from lit_peft import AdapterFusion, SFT
        >>> class Mine(AdapterFusion, SFT): ...
        >>> # Mine("Qwen/Qwen3-0.6B", fusion={"adapters": {"news": "runs/news/adapter", "law": "runs/law/adapter"}})
    """

    method = "fusion"

    def __init__(self, *args: Any, fusion: FusionConfig = FusionConfig(), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fusion = self.configured(FusionConfig, "fusion", fusion)

    # Placing ----------------------------------------------------------------------------------------------------------

    def place_adapters(self) -> None:
        """Put the adapters on the model, frozen, and Q, K and V inside each of them."""
        super().place_adapters()
        model = self.model
        assert model is not None
        settled = frozenset(adapter_names(model))
        names = self._bring()
        if not isinstance(self.fusion.adapters, Mapping):  # folders without names, which may be gone next time
            self.fusion = self.configured(FusionConfig, "fusion", replace(self.fusion, adapters=names))
        sites = fusable(model, names)
        config = replace(self.fusion, adapters=names, hidden_size=geometry(model).hidden)
        join(model, {f"{path}.base": config for path in sites}, lambda base: FusionBottleneck, self.placing)
        for bottleneck in sites.values():
            site = bottleneck.base
            assert isinstance(site, FusionBottleneck)
            site.__dict__["around"] = bottleneck  # not by setattr: it is no submodule
            site.settled[self.placing] = settled & set(names)
        if self.beside is not None and not isinstance(self.beside, AdapterFusion):
            return  # kept as it is, beside another method: nothing here is trained
        scope = scope_of(model)
        trained = adapter_names(model) if scope.trained is None else scope.trained
        scope.trained = tuple(dict.fromkeys([*(name for name in trained if name not in names), self.placing]))

    def _bring(self) -> list[str]:
        """See that the adapters are there, place those that are not on the model yet, and return their names."""
        root, model = self.beside or self, self.model
        assert model is not None
        known = {*adapter_names(model), *root.named}
        wanted = by_name(self.fusion.adapters or {}, known)
        if len(wanted) < 2:
            found = f"only {next(iter(wanted))!r}" if wanted else "no adapters"
            raise ValueError(
                f"fusion.adapters names {found}, and attention needs two or more to choose between. Give trained ones: "
                '--model.fusion.adapters \'{"a": FOLDER, "b": FOLDER}\'.'
            )
        if self.placing in wanted:
            raise ValueError(f"{self.placing!r} is the fusion's own name. Give the adapter another in fusion.adapters.")
        entries: dict[str, dict[str, Any]] = {}
        for name, folder in wanted.items():
            if name in root.named:
                entries[name] = {**root.named[name], "train": False}
            elif name not in known:
                if folder is None:
                    raise ValueError(
                        f"There is no adapter {name!r} to fuse: this model has {sorted(known)}, and it is no folder. "
                        "Train it first (--method pfeiffer), and give its folder in fusion.adapters."
                    )
                entries[name] = {"adapter": folder, "methods": [_path(_fusable_in(folder))], "train": False}
        for name, entry in entries.items():
            if name not in adapter_names(model):
                root._place(name, entry)
        return list(wanted)

    def configure_callbacks(self) -> list[Callback]:
        """Bring a `FusionMap`, unless the Trainer has one."""
        callbacks = super().configure_callbacks()
        if not any(isinstance(callback, FusionMap) for callback in self.trainer.callbacks):  # type: ignore[attr-defined]
            callbacks.append(FusionMap())
        return callbacks

    # Steps ------------------------------------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Add the penalty on V to the loss that the task returns, and log the attention."""
        self.counted = None
        with watched(self._counting(args)) as seen:
            output = super().training_step(*args, **kwargs)
        self._note_attention(seen, "train")
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor) or not self.fusion.penalty:
            return output
        added, sharded = self._penalty()
        added = self.fusion.penalty * added
        if self.counted is not None:
            count = self.counted.clone()
            if sharded:  # FSDP2: all compute the same penalty, and nobody adds up the shards' gradients
                dist.all_reduce(count)
                count = count / dist.get_world_size()
            added = added * count.to(added.dtype)
        loss = loss + added.to(loss.device, loss.dtype)
        return {**output, "loss": loss} if isinstance(output, Mapping) else loss

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the task's step, and hand the attention to `FusionMap`, which logs it."""
        with watched(self._counting(args)) as seen:
            output = super().validation_step(*args, **kwargs)
        self._note_attention(seen, "val")
        return output

    def _penalty(self) -> tuple[Tensor, bool]:
        """Return the sum of ||V - I||^2 over the layers, for the fusions that act; and whether they are sharded."""
        values = [site.fusion_value[name] for _, site in self._sites() for name in site.acting_fusions()]
        values = [value for value in values if value.requires_grad]
        whole = [value.full_tensor() if hasattr(value, "full_tensor") else value for value in values]
        sharded = any(hasattr(value, "full_tensor") for value in values)
        return (torch.stack([v.float().square().sum() for v in whole]).sum() if whole else torch.zeros(())), sharded

    def _sites(self) -> list[tuple[str, FusionBottleneck]]:
        assert self.model is not None
        return [(path, found) for path, found in named_adapters(self.model) if isinstance(found, FusionBottleneck)]

    def _counting(self, args: tuple[Any, ...]) -> Tensor | None:
        """Return which tokens of a batch count: no padding, and no rows that only fill a batch up (without labels)."""
        batch = args[0] if args else None
        if not isinstance(batch, Mapping):
            return None
        padding, labels, mask = batch.get("attention_mask"), batch.get("labels"), None
        # an encoder and its decoder have texts of two lengths: there all tokens of a row count
        both = getattr(getattr(self.model, "config", None), "is_encoder_decoder", False)
        if isinstance(padding, Tensor) and padding.ndim == 2 and not both:
            mask = padding != 0
        if isinstance(labels, Tensor) and not labels.is_floating_point():
            real = (labels.flatten(1) != -100).any(1, keepdim=True) if labels.ndim > 1 else labels[:, None] != -100
            mask = real if mask is None else mask & real
        return mask

    def _note_attention(self, seen: Attention, stage: str) -> None:
        """Log the attention of one training step, and hand that of any step to the pictures."""
        if self._trainer is None or not seen.found:
            return
        shares: dict[str, list[Tensor]] = {}
        layers: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
        for path, site in self._sites():
            for name, config in site.configs.items():
                if (id(site), name) in seen.found:
                    total, count = seen.found[id(site), name]
                    layers.setdefault(name, {})[path] = (total, count)
                    for other, share in zip(config.names, total / count.clamp(min=1), strict=True):
                        shares.setdefault(metric(stage, name, other), []).append(share)
        if stage == "train":
            self.log_dict({key: torch.stack(found).mean() for key, found in shares.items()})
        for callback in self._trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, FusionMap):
                for name, found in layers.items():
                    names = next(site.configs[name].names for _, site in self._sites() if name in site.configs)
                    callback.add(stage, name, names, found)

    # Folders ----------------------------------------------------------------------------------------------------------

    def adopt(self, config: Mapping[str, Any]) -> None:
        """Take the adapters' settings from a fusion's folder, which holds their weights too."""
        super().adopt(config)
        if config.get("peft_type") != FusionBottleneck.peft_type:
            return
        root = self.beside or self
        assert self.model is not None
        for name, part in config["adapters"].items():
            cls = _class_of(part.get("peft_type"), name)
            kind = type(signature(cls.__init__).parameters["bottleneck"].default)
            own = {f.name: part[f.name] for f in fields(kind) if f.name in part and f.name != "peft_type"}
            if name not in root.named and name not in adapter_names(self.model):
                root.named[name] = {"methods": [_path(cls)], "bottleneck": own, "train": False}
        stored = FusionConfig(adapters=list(config["adapters"]), penalty=config["penalty"])
        self.fusion = self.configured(FusionConfig, "fusion", stored)

    def parts(self) -> list[dict[str, Any]]:
        """Return the settings for `adapter_config.json`, with those of the fused adapters."""
        root = self.beside or self
        sites = [site for _, site in self._sites() if self.placing in site.configs] if self.model is not None else []
        names = sites[0].configs[self.placing].names if sites else []
        adapters = {name: root.parts_of(name)[0] for name in names}
        own = {"peft_type": FusionBottleneck.peft_type, "adapters": adapters, "penalty": self.fusion.penalty}
        return [*super().parts(), own]


def fusable(model: nn.Module, names: Iterable[str]) -> dict[str, Bottleneck]:
    """Return the bottleneck adapters, by path, that hold all of the named sets.

    Raises:
        TypeError: if one of them is of a method that cannot be fused.
        ValueError: if they do not sit at the same places.
    """
    names = list(names)
    places: dict[str, dict[str, Bottleneck]] = {name: {} for name in names}
    for path, adapter in named_adapters(model):
        for name in names:
            if name not in adapter.configs:
                continue
            if not isinstance(adapter, Bottleneck):
                raise TypeError(
                    f"The adapter {name!r} has a {type(adapter).__name__}, which cannot be fused: only the bottlenecks "
                    "of houlsby, pfeiffer and parallel can. Train it without, or combine: combine_adapters, Average."
                )
            places[name][path] = adapter
    first = names[0]
    for name in names[1:]:
        if places[name].keys() != places[first].keys():
            only = sorted(places[name].keys() ^ places[first].keys())[0]
            raise ValueError(
                f"The adapters {first!r} and {name!r} sit at different places: only one of them is at {only!r}. Fuse "
                "adapters of one method that leave out the same layers."
            )
    return places[first]


def by_name(given: Mapping[str, str] | Iterable[str], known: Iterable[str]) -> dict[str, str | None]:
    """Return `{name: folder}` of what `fusion.adapters` lists; None for the name of an adapter that is no folder.

    Folders are named by what tells them apart: `runs/news/adapter` and `runs/law/adapter` are `news` and `law`.

    Raises:
        ValueError: if two would have the same name.

    Example:
        >>> by_name(["here", "also"], ["here", "also"])
        {'here': None, 'also': None}
    """
    if isinstance(given, Mapping):
        return {name: str(folder) for name, folder in given.items()}
    listed = [str(entry) for entry in given]
    folders = [Path(entry) for entry in listed if entry not in known and Path(entry).is_dir()]
    paths = [folder.parts[::-1] for folder in folders]
    shortest = min(map(len, paths), default=1)
    # the last piece that is not the same in all
    at = next((i for i in range(shortest) if len({path[i] for path in paths}) > 1), 0) if len(paths) > 1 else 0
    own = {str(folder): path[at].replace(".", "_") for folder, path in zip(folders, paths, strict=True)}
    found: dict[str, str | None] = {}
    for entry in listed:
        folder = str(Path(entry)) if str(Path(entry)) in own and entry not in known else None
        name = entry if folder is None else own[folder]
        if name in found:
            raise ValueError(f"fusion.adapters has {name!r} twice. Give names: {{name: folder, ...}}.")
        found[name] = folder
    return found


def _fusable_in(folder: str) -> type[Bottlenecks]:
    """Return the method of a saved adapter."""
    configs = hub.read_configs(folder)
    if len(configs) > 1:
        kinds = " + ".join(config["peft_type"] for config in configs)
        raise TypeError(f"{folder} holds a stack ({kinds}), which cannot be fused. Fuse houlsby, pfeiffer or parallel.")
    return _class_of(configs[0]["peft_type"], folder)


def _class_of(kind: Any, where: str) -> type[Bottlenecks]:
    if kind not in FUSABLE:
        raise TypeError(
            f"{where} holds a {kind} adapter, which cannot be fused: only bottleneck adapters (houlsby, pfeiffer, "
            "parallel) can. To combine others: combine_adapters, or Average."
        )
    return FUSABLE[kind]


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
