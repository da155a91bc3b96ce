"""Rank allocation: a shrinking budget of ranks, shared out over all layers by what each one contributes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lit_peft.callbacks.prunable import PrunableSet, prunable_sets
from lit_peft.callbacks.rank_map import draw
from lit_peft.callbacks.rank_schedule import Schedule, plan
from lit_peft.callbacks.shards import begin_of, own_part, part_of, whole_of

PICTURE = "ranks.png"
SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq", "state2")


class RankAllocator(Callback):
    """Give each adapted layer its own rank, within one budget for all of them (AdaLoRA, section 3.2 and 3.3).

    After each optimizer step the sensitivity I = |w dw| of every element is averaged, and so is its uncertainty:

        J <- beta1 J + (1 - beta1) I,    U <- beta2 U + (1 - beta2) |I - J|,    s = J U

    A triplet (column of P, entry of Lambda, row of Q) scores s(lambda) plus the mean s of its column and of its row.
    The b(t) best of all layers stay on, equal scores in the order of layers and rows; the Lambda of the others is set
    to zero, with its momentum. They still get gradients, and may come back until the schedule's last step. After that
    nothing changes any more, and when the fit ends they are cut off.

    The pair (w, dw) is read when the optimizer has stepped: the new weight, and the gradient of the step, as it went
    into the optimizer (unscaled, averaged over accumulation and processes, clipped). So do the authors' code and HF
    PEFT; equation 8 takes the weight before the step. Under FSDP2 each process keeps the averages of its own shard, and
    scores are added up over processes. The first process's scores decide for all.

    Knows no method: it works on every adapter that is `Prunable`. Numbers of steps may be given as a share of the run;
    how long that is, the Trainer knows.

    Args:
        target_r: mean rank of a layer in the end; None: what the settings of each named set say.
        tinit: steps before the first triplet is switched off; a float is a share of the run; None: a tenth.
        tfinal: steps at the end with settled ranks, written like tinit; None: four tenths.
        deltaT: steps from one choice to the next; None: a thousandth of the run.
        beta1: how slowly the mean sensitivity follows.
        beta2: how slowly the uncertainty follows.
        shrink: cut off what was switched off when the fit ends. Sharded weights (FSDP2) stay as they are; saved
            adapters are cut always.
        folder: where the picture of the ranks goes; None: the Trainer's `default_root_dir`.

    Attributes:
        ranks: the rank of each layer by its path, as of the last choice.

    Raises:
        ValueError: if a value is out of range.

    Example:
        >>> from lit_peft.callbacks import RankAllocator
        >>> callback = RankAllocator(target_r=4, tinit=200, tfinal=0.5)
    """

    def __init__(
        self,
        target_r: int | None = None,
        tinit: int | float | None = None,
        tfinal: int | float | None = None,
        deltaT: int | None = None,  # HF PEFT's name
        beta1: float = 0.85,
        beta2: float = 0.85,
        shrink: bool = True,
        folder: str | Path | None = None,
    ) -> None:
        if target_r is not None and target_r < 1:
            raise ValueError(f"target_r is {target_r}; the mean rank in the end must be 1 or more.")
        for name, value in (("tinit", tinit), ("tfinal", tfinal)):
            if isinstance(value, float) and not 0 <= value < 1:
                raise ValueError(
                    f"{name} is {value}; a share is at least 0 and below 1. Write steps as a whole number."
                )
            if isinstance(value, int) and value < 0:
                raise ValueError(f"{name} is {value}; it must be 0 or more steps, or a share of the run such as 0.1.")
        if deltaT is not None and deltaT < 1:
            raise ValueError(f"deltaT is {deltaT}; it must be 1 step or more, or left out.")
        for name, value in (("beta1", beta1), ("beta2", beta2)):
            if not 0 <= value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 0 and below 1.")
        self.target_r = target_r
        self.tinit, self.tfinal, self.deltaT = tinit, tfinal, deltaT
        self.beta1, self.beta2 = beta1, beta2
        self.shrink = shrink
        self.folder = None if folder is None else Path(folder)
        self.schedule: Schedule | None = None
        self.ranks: dict[str, int] = {}
        self.finished = False
        self._step = 0
        self._sets: list[PrunableSet] = []
        self._on: list[Tensor] = []  # which triplets are on, (r,) of bool for each set, on the CPU
        self._acting: set[str] = set()  # names of the sets that have had gradients in this run
        self._mean: list[Tensor] = []  # J and U of every parameter of every set: this process's shard
        self._uncertainty: list[Tensor] = []
        self._loaded: dict[str, Any] = {}

    # Before ----------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Go to the front: what others save after a step must already have the step's choice in it."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if self in callbacks:
            callbacks.remove(self)
            callbacks.insert(0, self)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Work out the schedule, find the adapters, and go on with the averages of a checkpoint.

        Raises:
            ValueError: if the run has no known length, or is too short for tinit and tfinal.
        """
        # not earlier: to count the steps, the Trainer makes the data loader, which would miss its place in the data
        self.schedule = plan(trainer.estimated_stepping_batches, self.tinit, self.tfinal, self.deltaT)
        self._step = trainer.global_step
        self._sets = prunable_sets(pl_module)
        stored, self._loaded = self._loaded, {}
        if stored:
            self.finished = stored["finished"]
        elif not self.finished and self._step > self.schedule.first:
            rank_zero_warn(
                f"Rank allocation starts anew at step {self._step}: the checkpoint has no averages of it. Ranks will "
                "differ from those of an uninterrupted run."
            )
        on, mean, uncertainty = (stored.get(key, {}) for key in ("on", "mean", "uncertainty"))
        before = dict(zip((piece.key for piece in self._sets), self._on, strict=False))
        self._on, self._mean, self._uncertainty = [], [], []
        for piece in self._sets:
            flags = torch.tensor(on[piece.key]) if piece.key in on else before.get(piece.key)
            fits = flags is not None and len(flags) == piece.rank  # not if the weights were cut since
            self._on.append(flags if fits and flags is not None else torch.ones(piece.rank, dtype=torch.bool))
            for number, (parameter, _) in enumerate(piece.triplets):
                key = f"{piece.key}.{number}"
                for averages, kept in ((self._mean, mean), (self._uncertainty, uncertainty)):
                    averages.append(
                        part_of(kept[key], parameter) if key in kept else torch.zeros_like(own_part(parameter))
                    )
        self._note()
        if self.finished:
            self._settle()

    # After each step -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Average, and choose when it is time; micro-batches that end no optimizer step change nothing."""
        assert self.schedule is not None
        if trainer.global_step == self._step or not self._sets:
            return
        self._step = trainer.global_step
        if not self.finished:
            self._average(trainer)
            last = self._step >= self.schedule.last
            if not last and (self._step <= self.schedule.first or self._step % self.schedule.every):
                return
            self._choose()
            self.finished = last
            if last:
                self._settle()
                self._draw(trainer)
        self._switch_off(trainer.optimizers)

    def _average(self, trainer: Trainer) -> None:
        """Follow the sensitivities of one optimizer step."""
        self._acting |= {p.name for p in self._sets if any(q.grad is not None for q, _ in p.triplets)}
        parameters = [parameter for piece in self._sets for parameter, _ in piece.triplets]
        weights = [own_part(parameter) for parameter in parameters]
        gradients = [
            torch.zeros_like(w) if p.grad is None else own_part(p.grad).to(w.dtype)
            for p, w in zip(parameters, weights, strict=True)
        ]
        now = list(torch._foreach_mul(weights, gradients))
        torch._foreach_abs_(now)
        if getattr(trainer.precision_plugin, "scaler", None) is not None and not _finite(now):
            return  # the scaler found an overflow, and the optimizer has not stepped
        torch._foreach_lerp_(self._mean, now, 1 - self.beta1)
        torch._foreach_sub_(now, self._mean)
        torch._foreach_abs_(now)
        torch._foreach_lerp_(self._uncertainty, now, 1 - self.beta2)

    def _choose(self) -> None:
        """Keep the best b(t) triplets of each named set on."""
        assert self.schedule is not None
        scores = self._scores().cpu()
        parts = torch.split(scores, [piece.rank for piece in self._sets])
        for name in dict.fromkeys(piece.name for piece in self._sets):
            numbers = [i for i, piece in enumerate(self._sets) if piece.name == name]
            together = torch.cat([parts[i] for i in numbers])
            if self._acting and name not in self._acting:
                continue  # a set that does not act in this run has no importances: its ranks stay as they are
            wanted = [self.target_r or self._sets[i].adapter.target(name) for i in numbers]
            final = min(len(together), sum(wanted))
            budget = self.schedule.budget(self._step, len(together), final)
            on = torch.zeros(len(together), dtype=torch.bool)
            # stable: of equal scores the first ones, by layer and row, on every process
            on[together.sort(descending=True, stable=True).indices[:budget]] = True
            for i, flags in zip(numbers, torch.split(on, [self._sets[i].rank for i in numbers]), strict=True):
                self._on[i] = flags.clone()
        self._note()

    def _scores(self) -> Tensor:
        """Return the score of every triplet of every set, in a row, equal on all processes."""
        products = iter(torch._foreach_mul(self._mean, self._uncertainty))
        found = []
        group: Any = None
        for piece in self._sets:
            lead = piece.triplets[0][0]
            scores = torch.zeros(piece.rank, device=lead.device, dtype=torch.float32)
            for parameter, dim in piece.triplets:
                product, begin = next(products).float(), begin_of(parameter, dim)
                others = [other for other in range(product.ndim) if other != dim]
                count = math.prod(parameter.shape[other] for other in others)
                own = product.sum(others) / count if others else product
                scores[begin : begin + len(own)] += own
            if hasattr(lead, "device_mesh"):
                group = lead.device_mesh.get_group()
            found.append(scores)
        together = torch.cat(found).nan_to_num(0.0)
        if group is not None:
            dist.all_reduce(together, group=group)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.broadcast(together, src=0)
        return together

    def _switch_off(self, optimizers: Sequence[Optimizer]) -> None:
        """Zero the Lambda of what is off, and the optimizer's momentum with it.

        Its second moment stays until the choice is final: it tells how large the gradients are. Without it the steps of
        one that comes back would be several times too long, because Adam corrects for a fresh average only once, at the
        beginning of the run.
        """
        for piece, on in zip(self._sets, self._on, strict=True):
            if bool(on.all()):
                continue
            parameter = piece.triplets[0][0]
            begin = begin_of(parameter, 0)
            own = own_part(parameter)
            off = ~on[begin : begin + len(own)].to(own.device)
            own.masked_fill_(off, 0.0)
            for state in (optimizer.state.get(parameter, {}) for optimizer in optimizers):
                for key, value in state.items():
                    moment = isinstance(value, Tensor) and value.shape == parameter.shape
                    if moment and (self.finished or key not in SECOND_MOMENTS):
                        own_part(value).masked_fill_(off, 0)

    def _settle(self) -> None:
        """Tell the adapters what is left for good, so that what is saved from now on is cut."""
        for piece, on in zip(self._sets, self._on, strict=True):
            if not bool(on.all()):
                piece.adapter.kept[piece.name] = on
        self._mean, self._uncertainty = [], []

    def _note(self) -> None:
        self.ranks = {
            piece.path if piece.name == "default" else f"{piece.path} ({piece.name})": int(on.sum())
            for piece, on in zip(self._sets, self._on, strict=True)
        }

    # At the end ------------------------------------------------------------------------------------------------------

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the ranks, and say so if the run ended before they were settled."""
        if not self._sets:
            return
        if not self.finished and self.schedule is not None:
            rank_zero_warn(
                f"Training ended at step {self._step}, before the ranks are settled at step {self.schedule.last}: "
                f"{sum(self.ranks.values())} triplets are on. Resume the run, or plan with a shorter one."
            )
        self._draw(trainer)

    @torch.no_grad()
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Cut off what is off, in the weights and in the optimizer, after everyone has saved, merged and reported."""
        sharded = any(hasattr(piece.triplets[0][0], "full_tensor") for piece in self._sets)
        if not (self.finished and self.shrink) or sharded:
            return
        for i, piece in enumerate(self._sets):
            if bool(self._on[i].all()):
                continue
            kept = self._on[i].nonzero()[:, 0]
            for parameter, dim in piece.triplets:
                for state in (optimizer.state.get(parameter, {}) for optimizer in trainer.optimizers):
                    for key, value in state.items():
                        if isinstance(value, Tensor) and value.shape == parameter.shape:
                            state[key] = value.index_select(dim, kept.to(value.device))
            piece.adapter.shrink(piece.name)
            self._on[i] = torch.ones(len(kept), dtype=torch.bool)

    def _draw(self, trainer: Trainer) -> None:
        if trainer.is_global_zero and not getattr(trainer, "fast_dev_run", False):
            folder = self.folder or Path(trainer.default_root_dir)
            state = "" if self.finished else f", not settled at step {self._step}"
            title = (
                f"Rank of each layer: {sum(self.ranks.values()):,} in all, {self._mean_rank():.3g} on average{state}"
            )
            rank_zero_info(f"{title}: {draw(folder / PICTURE, title, self.ranks)}")

    def _mean_rank(self) -> float:
        return sum(self.ranks.values()) / max(1, len(self.ranks))

    # Checkpoints -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the step, which triplets are on and, until that is settled, the averages, gathered where sharded."""
        if not self._sets:
            return self._loaded
        state: dict[str, Any] = {
            "step": self._step,
            "finished": self.finished,
            "on": {piece.key: on.tolist() for piece, on in zip(self._sets, self._on, strict=True)},
        }
        if not self.finished:
            parameters = [(f"{s.key}.{i}", p) for s in self._sets for i, (p, _) in enumerate(s.triplets)]
            for word, averages in (("mean", self._mean), ("uncertainty", self._uncertainty)):
                pairs = zip(parameters, averages, strict=True)
                state[word] = {key: whole_of(average, parameter) for (key, parameter), average in pairs}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what a checkpoint holds until the adapters are there."""
        self._loaded = dict(state_dict)


def _finite(tensors: Sequence[Tensor]) -> bool:
    bad = sum((~torch.isfinite(tensor)).any().float() for tensor in tensors)
    if isinstance(bad, Tensor) and dist.is_available() and dist.is_initialized():
        dist.all_reduce(bad)
    return not bool(bad)
