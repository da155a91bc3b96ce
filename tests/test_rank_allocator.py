"""The allocator against the paper's algorithm in float64, its budget, resumed runs, and what it must not touch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lit_peft.adapter import named_adapters
from lit_peft.callbacks import RankAllocator
from lit_peft.callbacks.rank_schedule import Schedule, plan
from lit_peft.data.loader import ResumableLoader, ShardedSampler
from lit_peft.low_rank.singular import AdaLoRALinear, penalty
from lit_peft.methods.adalora import AdaLoRA, AdaLoRAConfig
from lit_peft.module import AdaptableModule

WIDTH, DEPTH = 12, 14


class Regression(AdaptableModule):
    """Fourteen linear layers, of which few need to change to fit the targets; a mean loss, no task class."""

    def __init__(self, optimizer: str = "adamw", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.kind = optimizer

    def configure_model(self) -> None:
        super().configure_model()
        if self.model is None:
            torch.manual_seed(0)
            layers = [nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)]
            for layer in layers:
                nn.init.orthogonal_(layer.weight)
            self.model = nn.Sequential(*layers)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        assert self.model is not None
        return (self.model(batch["x"]) - batch["y"]).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", Regression.training_step(self, batch, batch_idx))

    def configure_optimizers(self) -> Any:
        trained = [p for p in self.parameters() if p.requires_grad]
        if self.kind == "sgd":
            return torch.optim.SGD(trained, lr=0.05, momentum=0.9, weight_decay=0.01)
        return torch.optim.AdamW(trained, lr=5e-3, weight_decay=0.1)


class Mine(AdaLoRA, Regression): ...


def rows(count: int) -> list[dict[str, Tensor]]:
    """The targets come from the same layers, two of them changed by rank 3."""
    generator = torch.Generator().manual_seed(3)
    plain = Regression()
    plain.configure_model()
    target: Any = plain.model
    with torch.no_grad():
        for i in (2, 9):
            change = torch.randn(WIDTH, 3, generator=generator) @ torch.randn(3, WIDTH, generator=generator)
            target[i].weight.add_(change, alpha=0.2)
        inputs = torch.randn(count, WIDTH, generator=generator)
        return [{"x": x, "y": y} for x, y in zip(inputs, target(inputs), strict=True)]


def loader(size: int = 16) -> ResumableLoader:
    data = rows(160)
    return ResumableLoader(data, batch_size=size, sampler=ShardedSampler(data, shuffle=False, seed=3))


def built(seed: int = 1, optimizer: str = "adamw", **settings: Any) -> Mine:
    module = Mine(optimizer, adalora=AdaLoRAConfig(**{"init_r": 6, "target_r": 2, **settings}))
    torch.manual_seed(seed)
    module.configure_model()
    return module


def trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": folder,
        "max_epochs": -1,
    }
    return Trainer(**{**quiet, **options}, callbacks=list(callbacks))


def fit(module: Mine, folder: Path, *callbacks: Callback, steps: int = 30, ckpt: Path | None = None, **o: Any) -> Any:
    made = trainer(folder, *callbacks, max_steps=steps, **o)
    made.fit(module, loader(), ckpt_path=ckpt, weights_only=True if ckpt else None)
    return made


def layers(module: Any) -> list[AdaLoRALinear]:
    return [a for _, a in named_adapters(module.model) if isinstance(a, AdaLoRALinear)]


def allocator(made: Trainer) -> RankAllocator:
    return next(c for c in made.callbacks if isinstance(c, RankAllocator))  # type: ignore[attr-defined]


class Watch(Callback):
    """Notes what the optimizer left and what the allocator made of it, step by step; comes after the allocator."""

    def __init__(self) -> None:
        self.weights: list[list[list[Tensor]]] = []
        self.gradients: list[list[list[Tensor]]] = []
        self.on: list[list[list[bool]]] = []
        self.seen = 0

    def note(self, pl_module: Any) -> None:
        triplets = [a.triplets("default") for a in layers(pl_module)]
        self.weights.append([[p.detach().double() for p, _ in three] for three in triplets])
        self.gradients.append([[p.grad.double() for p, _ in three] for three in triplets])  # type: ignore[union-attr]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step > self.seen:
            self.seen = trainer.global_step
            self.on.append([on.tolist() for on in allocator(trainer)._on])


class AfterStep(torch.optim.AdamW):
    """Tells a watcher of each step before the allocator hears of it."""

    def __init__(self, *args: Any, told: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.told = told

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        self.told()
        return result


class Watched(Mine):
    watch: Watch

    def configure_optimizers(self) -> Any:
        trained = [p for p in self.parameters() if p.requires_grad]
        return AfterStep(trained, lr=5e-3, told=lambda: self.watch.note(self))


# The paper's algorithm ------------------------------------------------------------------------------------------------


def reference(watch: Watch, first: int, last: int, every: int, target: int, beta1: float, beta2: float) -> Any:
    """Algorithm 1 in float64, layer by layer and element by element, on the weights and gradients of a run."""
    means: dict[Any, Tensor] = {}
    unsure: dict[Any, Tensor] = {}
    ranks = [len(three[0]) for three in watch.weights[0]]
    on = [[True] * r for r in ranks]
    history = []
    b0, b_t = sum(ranks), target * len(ranks)
    for t, (weights, gradients) in enumerate(zip(watch.weights, watch.gradients, strict=True), start=1):
        scores: list[tuple[float, int, int]] = []
        for k, (three, slopes) in enumerate(zip(weights, gradients, strict=True)):
            s = []
            for i, (w, g) in enumerate(zip(three, slopes, strict=True)):
                now = (w * g).abs()
                means[k, i] = beta1 * means.get((k, i), torch.zeros_like(now)) + (1 - beta1) * now
                spread = (now - means[k, i]).abs()
                unsure[k, i] = beta2 * unsure.get((k, i), torch.zeros_like(now)) + (1 - beta2) * spread
                s.append(means[k, i] * unsure[k, i])
            for row in range(ranks[k]):
                score = s[0][row] + s[1][:, row].mean() + s[2][row].mean()
                scores.append((float(score), k, row))
        if t >= last:
            budget = b_t
        elif t <= first:
            budget = b0
        else:
            budget = int(b_t + (b0 - b_t) * (1 - (t - first) / (last - first)) ** 3)
        if t == last or (first < t < last and t % every == 0):
            best = sorted(scores, key=lambda item: (-item[0], item[1], item[2]))[:budget]
            chosen = {(k, row) for _, k, row in best}
            on = [[(k, row) in chosen for row in range(r)] for k, r in enumerate(ranks)]
        history.append([list(flags) for flags in on])
    return history


@pytest.mark.parametrize("every", [1, 4])
def test_follows_the_papers_algorithm(every: int, tmp_path: Path) -> None:
    module = Watched(adalora=AdaLoRAConfig(init_r=6, target_r=2, tinit=3, tfinal=8, deltaT=every))
    torch.manual_seed(1)
    module.configure_model()
    watch = module.watch = Watch()
    made = fit(module, tmp_path, watch)
    assert len(watch.on) == len(watch.weights) == 30
    expected = reference(watch, 3, 22, every, 2, 0.85, 0.85)
    assert watch.on == expected
    totals = [sum(map(sum, on)) for on in watch.on]
    assert totals[:3] == [6 * DEPTH] * 3
    assert totals[21:] == [2 * DEPTH] * 9
    assert totals == sorted(totals, reverse=True)
    # some came back before the end, none after it
    flat = [[row for layer in on for row in layer] for on in watch.on]
    back = [t for t in range(1, 30) if any(now > before for before, now in zip(flat[t - 1], flat[t], strict=True))]
    assert back
    assert max(back) <= 21
    assert allocator(made).finished


def test_schedule() -> None:
    schedule = Schedule(first=10, last=110, every=1)
    assert schedule.budget(10, 168, 112) == 168
    assert schedule.budget(60, 168, 112) == 112 + 7  # (1/2)^3 of 56
    assert schedule.budget(110, 168, 112) == schedule.budget(500, 168, 112) == 112
    assert plan(1000, 100, 0.25, 7) == Schedule(100, 750, 7)
    assert plan(1, None, None, None) == Schedule(0, 1, 1)
    assert all(plan(n, None, None, None).first < plan(n, None, None, None).last for n in range(1, 50))


def test_budget_is_met_and_ranks_differ(tmp_path: Path) -> None:
    module = built(tinit=10, tfinal=40, init_r=6, target_r=2)
    before = penalty(layers(module)).item()
    made = fit(module, tmp_path, steps=160)
    ranks = list(allocator(made).ranks.values())
    assert sum(ranks) == 2 * DEPTH
    assert len(ranks) == DEPTH
    assert len(set(ranks)) > 2, ranks
    assert [len(a.adalora_lambda["default"]) for a in layers(module)] == ranks, "not cut"
    assert penalty(layers(module)).item() < 0.5 * before * 2 / 6  # a third of the matrices' rows is left


def test_ties_go_to_the_first(tmp_path: Path) -> None:
    module = built()
    made = fit(module, tmp_path, steps=1)  # nothing but equal scores once the averages are cleared
    again = allocator(made)
    again._sets, again.schedule, again._step = [], Schedule(0, 5, 1), 5
    fresh = built()
    again.finished, again._on = False, []
    again.schedule = Schedule(0, 5, 1)
    again._loaded = {}
    quick = trainer(tmp_path, max_steps=1)
    again.on_train_start(quick, fresh)
    again._step = 5
    again._choose()
    flat = [on for flags in again._on for on in flags.tolist()]
    assert flat == [True] * (2 * DEPTH) + [False] * (4 * DEPTH)


def test_same_rank_from_start_to_end(tmp_path: Path) -> None:
    made = fit(built(init_r=3, target_r=3), tmp_path, steps=6)
    assert set(allocator(made).ranks.values()) == {3}


# When it acts ---------------------------------------------------------------------------------------------------------


def test_acts_once_for_each_optimizer_step(tmp_path: Path) -> None:
    """Four micro-batches accumulated choose as one batch of all rows does."""
    found = []
    for size, accumulate in ((16, 1), (4, 4)):
        module, calls = built(shrink=False, tinit=1, tfinal=3), Counting()
        made = trainer(tmp_path, calls, max_steps=10, accumulate_grad_batches=accumulate)
        made.fit(module, loader(size))
        found.append((allocator(made)._on, module))
        assert calls.found == list(range(1, 11)), "not once a step"
    assert all(torch.equal(a, b) for a, b in zip(found[0][0], found[1][0], strict=True))


class Counting(Callback):
    """Notes the steps at which the allocator's averages moved."""

    def __init__(self) -> None:
        self.found: list[int] = []
        self.last: Tensor | None = None

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        made = allocator(trainer)
        settled = torch.tensor([float(trainer.global_step)])
        now = torch.cat([mean.flatten() for mean in made._mean]) if made._mean else settled
        if trainer.global_step and (self.last is None or not torch.equal(now, self.last)):
            self.found.append(trainer.global_step)
            self.last = now.clone()


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_what_is_off_stays_zero_with_its_moments(optimizer: str, tmp_path: Path) -> None:
    module = built(optimizer=optimizer, shrink=False, tinit=2, tfinal=10)

    class Look(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
            made = allocator(trainer)
            state = trainer.optimizers[0].state
            for adapter, on in zip(layers(pl_module), made._on, strict=True):
                parameter = adapter.adalora_lambda["default"]
                off = ~on
                assert not parameter[off].any()
                for key in ("exp_avg", "momentum_buffer", *(["exp_avg_sq"] if made.finished else [])):
                    if key in state[parameter]:
                        assert not state[parameter][key][off].any()
                if not made.finished and "exp_avg_sq" in state[parameter]:
                    assert state[parameter]["exp_avg_sq"].all()

    made = fit(module, tmp_path, Look())
    assert allocator(made).finished
    assert sum(int((a.adalora_lambda["default"] != 0).sum()) for a in layers(module)) == 2 * DEPTH


def test_an_overflow_of_the_scaler_is_left_out(tmp_path: Path) -> None:
    module = built()
    made = allocator(fit(module, tmp_path, steps=2))

    class Plugin:
        scaler = object()

    class Fake:
        precision_plugin = Plugin()

    made.finished = False
    made.schedule, made._loaded = Schedule(1, 9, 1), {}
    made._on = []
    made.on_train_start(trainer(tmp_path, max_steps=1), module)
    for parameter, _ in layers(module)[0].triplets("default"):
        parameter.grad = torch.full_like(parameter, float("inf"))
    made._average(Fake())  # type: ignore[arg-type]
    assert not any(mean.any() for mean in made._mean)
