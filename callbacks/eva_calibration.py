"""EVA's calibration: where the inputs of the adapted layers vary most, found on a few training batches.

Paischer et al. 2024, https://arxiv.org/abs/2410.07170. For each layer an incremental principal component analysis of
its inputs X (tokens, in) runs until the directions stand still. A starts at the first r_i of them, and the total rank
goes to the layers where a direction explains most: r_i is how many of a layer's shares of variance are among the
largest of all.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import move_data_to_device, rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.nn import functional as F

from lit_peft.adapter import innermost
from lit_peft.callbacks.base import AdapterCallback
from lit_peft.callbacks.input_directions import Directions, redistribute
from lit_peft.module import AdaptableModule
from lit_peft.named import disabled


class Calibrates(Protocol):
    """What a method with a calibrated start offers."""

    model: nn.Module

    def uncalibrated(self) -> dict[str, int]:
        """Return the ranks of the layers that wait for a calibration, by path."""

    def calibrate(self, directions: Mapping[str, Tensor]) -> None:
        """Take directions (r_i, in) for each layer, and its new rank r_i with them."""

    def recall(self, settings: Mapping[str, Any]) -> None:
        """Take the ranks that an earlier calibration found."""


class EVACalibration(AdapterCallback):
    """Starts LoRA's A at the main directions of each layer's inputs, and shares the ranks out anew.

    Attached by the method `EVA` by itself. Runs the base on training batches before the optimizer exists, on a copy of
    the loader: training sees the same rows in the same order as without it. A resumed run takes the ranks from its
    checkpoint instead.

    Args:
        max_batches: how many batches to look at, at most.
        tau: a layer is done when the cosine between its directions before and after a batch is at least this.
        rho: a layer's rank may become rho times what it was; 1 keeps all ranks.
        run: calls the model on a batch, `run(module, batch)`; default: a dictionary's entries by name, or else the
            first entry of a tuple.

    Raises:
        ValueError: if a value is out of range.

    Example:
        >>> from lit_peft.callbacks import EVACalibration
        >>> callback = EVACalibration(max_batches=8, rho=1)
    """

    def __init__(
        self,
        max_batches: int = 32,
        tau: float = 0.99,
        rho: float = 2.0,
        run: Callable[[Any, Any], Any] | None = None,
    ) -> None:
        if max_batches < 1:
            raise ValueError(f"max_batches is {max_batches}; it must be 1 or more.")
        if not 0 <= tau <= 1:
            raise ValueError(f"tau is {tau}; it is a cosine, at least 0 and at most 1.")
        if not 1 <= rho < math.inf:
            raise ValueError(f"rho is {rho}; it must be 1 or more.")
        self.max_batches, self.tau, self.rho = max_batches, tau, rho
        self.run = run or run_model

    def on_adapters_placed(self, trainer: Trainer | None, module: AdaptableModule) -> None:
        """Calibrate on the Trainer's training data, or take the ranks from the checkpoint that a run goes on from.

        Raises:
            TypeError: if the module has no method with a calibrated start.
            ValueError: if there is no batch.
        """
        if not hasattr(module, "uncalibrated"):
            raise TypeError(f"EVACalibration is for the method EVA, which {type(module).__name__} lacks. Take it out.")
        eva = cast(Calibrates, module)
        if not eva.uncalibrated():
            return
        if trainer is None or trainer.state.fn != "fit":
            return
        checkpoint = _resumed_from(trainer)
        if checkpoint is not None:
            eva.recall(trainer.strategy.broadcast(_noted(checkpoint) if trainer.is_global_zero else {}))
            return
        with isolate_rng():
            pieces = list(islice(_undisturbed(_loader(trainer, module)), self.max_batches))
        steps = [[piece] for piece in pieces]
        if dist.is_available() and dist.is_initialized() and trainer.world_size > 1:
            gathered: list[Any] = [None] * trainer.world_size
            dist.all_gather_object(gathered, move_data_to_device(pieces, torch.device("cpu")))
            steps = [[piece for piece in step if piece is not None] for step in zip_longest(*gathered)]
        if not steps:
            raise ValueError("EVA found no training batch to calibrate on. Check the training data.")
        if not isinstance(trainer.strategy, ModelParallelStrategy):  # there the whole model may not fit one device
            eva.model.to(trainer.strategy.root_device)
        found = self.directions(module, steps) if trainer.is_global_zero else {}
        eva.calibrate(trainer.strategy.broadcast(found))

    def calibrate(self, module: AdaptableModule, batches: Iterable[Any]) -> None:
        """Calibrate a module by hand, on batches as its data loader gives them.

        Raises:
            ValueError: if there is no batch, or the module was calibrated before.
        """
        eva = cast(Calibrates, module)
        if not eva.uncalibrated():
            raise ValueError("Nothing waits for a calibration: it is done, or the weights were loaded.")
        steps = [[batch] for batch in islice(batches, self.max_batches)]
        if not steps:
            raise ValueError("EVA got no batch to calibrate on. Give at least one.")
        eva.calibrate(self.directions(module, steps))

    @torch.no_grad()
    def directions(self, module: AdaptableModule, steps: Sequence[Sequence[Any]]) -> dict[str, Tensor]:
        """Return directions (r_i, in) for each layer; a step is the batches of all processes.

        Layers that share their input (query, key, value) share the analysis.
        """
        eva = cast(Calibrates, module)
        model, ranks = eva.model, eva.uncalibrated()
        most = {path: round(self.rho * r) for path, r in ranks.items()}
        watch = _Watch(model, ranks)
        found: dict[str, Directions] = {}
        device = next(model.parameters()).device
        with isolate_rng(), _evaluating(model), disabled(model), watch:
            for step in steps:
                for batch in step:
                    batch = move_data_to_device(batch, device)
                    watch.masks = _masks(model, batch)
                    self.run(module, batch)
                for leader, inputs in watch.taken().items():
                    if leader not in found:
                        found[leader] = Directions(max(most[p] for p in ranks if watch.leaders.get(p) == leader))
                    found[leader].update(torch.cat(inputs).float(), self.tau)
                if found and all(one.still for one in found.values()):
                    break
        seen = {path: found[watch.leaders[path]] for path in ranks if watch.leaders.get(path) in found}
        shares = {path: one.shares_of(most[path]) for path, one in seen.items()}
        new = redistribute(shares, sum(ranks[path] for path in seen))
        done = sum(one.still for one in found.values())
        rank_zero_info(
            f"EVA: {len(steps)} batches, {done} of {len(found)} inputs settled; ranks {min(new.values())} to "
            f"{max(new.values())}, {sum(r == 0 for r in new.values())} layers left out."
        )
        return {path: one.first(new[path]) for path, one in seen.items()}


def run_model(module: Any, batch: Any) -> Any:
    """Call `module.model` on a batch: a dictionary's entries by name, or else the first entry of a tuple."""
    model = module.model
    if not isinstance(batch, Mapping):
        return model(batch[0] if isinstance(batch, (tuple, list)) else batch)
    names = inspect.signature(model.forward).parameters
    inputs = {key: value for key, value in batch.items() if key in names}
    labels = inputs.pop("labels", None)
    if labels is not None and labels.ndim > 1 and getattr(model.config, "is_encoder_decoder", False):
        inputs["labels"] = labels if "attention_mask" not in batch else _unlike(labels, batch["attention_mask"])
    if "use_cache" in names:
        inputs["use_cache"] = False
    return model(**inputs)


def _unlike(labels: Tensor, mask: Tensor) -> Tensor:
    """Make labels one column longer where they are as long as the encoder's input, to tell the two apart."""
    return F.pad(labels, (0, 1), value=-100) if labels.shape == mask.shape else labels


def _masks(model: nn.Module, batch: Any) -> list[Tensor]:
    """Return boolean masks, (rows, length) each, of what is no padding and counts for something."""
    if not isinstance(batch, Mapping):
        return []
    mask, labels = batch.get("attention_mask"), batch.get("labels")
    masks = [] if mask is None or mask.ndim != 2 else [mask.bool()]
    if labels is not None and labels.ndim and len(labels):
        counts = (labels != -100).view(len(labels), -1)
        whole = counts.any(1, keepdim=True)  # rows that only fill up the last batch have nothing to learn
        masks = [m & whole for m in masks if len(m) == len(whole)]
        masks.append(whole)
        if labels.ndim == 2 and getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            masks.append(_unlike(labels, mask) != -100 if mask is not None else counts)
    return masks


class _Watch:
    """Collects what goes into some layers; a layer called with the very tensor of the one before is its follower."""

    def __init__(self, model: nn.Module, paths: Iterable[str]) -> None:
        self.layers = {path: innermost(model.get_submodule(path)) for path in paths}
        self.leaders: dict[str, str] = {}
        self.masks: list[Tensor] = []
        self._inputs: dict[str, list[Tensor]] = {}
        self._last: tuple[str, Any] = ("", None)

    def __enter__(self) -> _Watch:
        self._handles = [layer.register_forward_pre_hook(self._hook(path)) for path, layer in self.layers.items()]
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, path: str) -> Callable[..., None]:
        def note(_: nn.Module, args: tuple[Any, ...]) -> None:
            before, x = self._last[1], args[0]
            self.leaders.setdefault(path, self._last[0] if x is before else path)
            if self.leaders[path] == path:
                self._last = path, x
                self._inputs.setdefault(path, []).append(self._kept(x))

        return note

    def _kept(self, x: Tensor) -> Tensor:
        for mask in self.masks:
            if mask.shape == x.shape[:-1]:
                return x[mask]
            if x.ndim == 2 and mask.shape[-1] == 1 and len(mask) == len(x):
                return x[mask[:, 0]]
        return x.reshape(-1, x.shape[-1])

    def taken(self) -> dict[str, list[Tensor]]:
        """Return what came in since the last time."""
        taken, self._inputs, self._last = self._inputs, {}, ("", None)
        return taken


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _loader(trainer: Trainer, module: AdaptableModule) -> Any:
    source = trainer.fit_loop._data_source
    if not source.is_defined():
        raise ValueError("EVA needs training data to calibrate on, and this Trainer has none. Give it some.")
    return source.dataloader()


def _undisturbed(loader: Any) -> Iterator[Any]:
    """Iterate over a loader without moving what training will draw from it.

    Raises:
        ValueError: if it can be read only once.
    """
    dataset = getattr(loader, "dataset", None)
    if iter_once(loader) or iter_once(dataset):
        raise ValueError(
            "EVA would use up rows of this training data, which can be read only once. Give a dataset that can be read "
            "again, or calibrate by hand: EVACalibration().calibrate(module, batches)."
        )
    holders = [
        loader,
        getattr(loader, "sampler", None),
        getattr(getattr(loader, "batch_sampler", None), "sampler", None),
    ]
    generators = [g for h in holders if isinstance(g := getattr(h, "generator", None), torch.Generator)]
    states = [generator.get_state() for generator in generators]
    try:
        yield from copy.copy(loader)
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def iter_once(data: Any) -> bool:
    """Whether iterating over something uses it up."""
    return isinstance(data, Iterator)


def _resumed_from(trainer: Trainer) -> Path | None:
    """Return the checkpoint that a run goes on from.

    Lightning reads it when the model stands, and under FSDP2 is sharded: too late for other shapes. Until then the path
    is only an argument of its running method, and so it is looked up there.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_locals.get("self") is trainer and frame.f_locals.get("ckpt_path"):
            return Path(frame.f_locals["ckpt_path"])
        frame = frame.f_back
    return Path(trainer.ckpt_path) if trainer.ckpt_path else None


def _noted(checkpoint: Path) -> dict[str, Any]:
    """Return LoRA's settings from a checkpoint; a folder of shards notes them in `meta.pt`."""
    file = checkpoint / "meta.pt" if checkpoint.is_dir() else checkpoint
    content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    settings: dict[str, Any] = dict(content.get("hyper_parameters", {}).get("lora", {}))
    return settings
