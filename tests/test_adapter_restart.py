"""Restarts: what the model computes stays, what the optimizer knows goes, and a killed run goes on exactly."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lit_peft import LoRAConfig, ReLoRA, disabled, load
from lit_peft.adapter import named_adapters
from lit_peft.callbacks.adapter_restart import AdapterRestart
from lit_peft.methods.relora import ReLoRALinear
from lit_peft.mixin import PEFT
from lit_peft.rewriting import restartable
from lit_peft.zoo import compose
from tests.models import save_tiny
from tests.test_methods import batch, outputs, quick_trainer, same, shake

SETTINGS: dict[str, dict[str, Any]] = {
    "relora": {"lora": {"r": 2}},
    "remora": {"mora": {"r": 1}},
}
both = pytest.mark.parametrize("method", SETTINGS)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("backbone") / "llama")


def build(method: str, backbone: Path, **more: Any) -> PEFT:
    torch.manual_seed(1)
    options = {"lr": 1e-2, "scheduler": "constant", "warmup": 0.0, **SETTINGS[method], **more}
    module = compose(method, "sft")(str(backbone), **options)
    module.configure_model()
    assert isinstance(module, PEFT)
    return module


def loader(length: int) -> DataLoader[Any]:
    """The same batch again and again: a plain loader does not remember where it was killed."""
    return DataLoader([batch("sft")] * length, batch_size=None)  # type: ignore[arg-type]


def run(module: LightningModule, folder: Path, steps: int, *callbacks: Callback, **options: Any) -> Trainer:
    ckpt = {"ckpt_path": options.pop("ckpt"), "weights_only": True} if "ckpt" in options else {}
    trainer = quick_trainer(folder, max_steps=steps, max_epochs=-1, callbacks=list(callbacks), **options)
    trainer.fit(module, loader(20), **ckpt)
    return trainer


class Saves(Callback):
    """Saves at some steps, after everything else that happens there."""

    def __init__(self, folder: Path, *steps: int) -> None:
        self.folder, self.steps = folder, steps

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step in self.steps:
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


class Watch(Callback):
    """Looks at the logits before and after each batch end, and at the learning rates that the optimizer really used."""

    def __init__(self) -> None:
        self.before: list[Tensor] = []
        self.after: list[Tensor] = []
        self.rates: list[float] = []
        self.moments: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        def note(optimizer: Any, args: Any, kwargs: Any) -> None:
            self.rates.append(optimizer.param_groups[0]["lr"])

        trainer.optimizers[0].register_step_pre_hook(note)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:  # before AdapterRestart's
        self.before.append(outputs(pl_module, batch("sft")))

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        if trainer.global_step:
            self.after.append(outputs(pl_module, batch("sft")))
            states = trainer.optimizers[0].state.values()
            self.moments.append(sum(float(state["exp_avg"].abs().sum()) for state in states))


@both
def test_a_restart_changes_nothing_that_is_computed(method: str, backbone: Path, tmp_path: Path) -> None:
    module, watch = build(method, backbone), Watch()
    start = outputs(module, batch("sft"))
    run(module, tmp_path, 8, watch, AdapterRestart(every=3, warmup=0))
    for before, after in zip(watch.before, watch.after, strict=False):
        assert same(after, before, 1e-5)
    assert not same(watch.after[2], start, 1e-2), "nothing was learned before the restart"
    restarted = [step for step, total in enumerate(watch.moments, 1) if total == 0]
    assert restarted == [3, 6]
    adapters = [adapter for _, adapter in named_adapters(module.model)]  # type: ignore[arg-type]
    assert {adapter.restarts for adapter in adapters} == {2}


@both
@pytest.mark.parametrize("accumulate", [1, 3])
def test_restarts_count_optimizer_steps(method: str, accumulate: int, backbone: Path, tmp_path: Path) -> None:
    module, callback = build(method, backbone), AdapterRestart(every=2, warmup=0)
    steps: list[int] = []

    class Steps(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
            if callback.count > len(steps):
                steps.append(trainer.global_step)

    run(module, tmp_path, 6, callback, Steps(), accumulate_grad_batches=accumulate)
    assert steps == [2, 4]
    assert callback.count == 2, "none at the end: the last cycle's adapters are the result"


@both
def test_the_rank_of_the_sum_grows(method: str, backbone: Path, tmp_path: Path) -> None:
    """Of W_n - W_0, for the widest layer: about one cycle's rank more with each restart."""
    own = 2 if method == "relora" else int((96 * 1) ** 0.5 + 0.5)  # down_proj is 64 -> 32
    ranks = []
    for steps in (4, 7, 10):
        module = build(method, backbone, lr=3e-2)
        run(module, tmp_path, steps, AdapterRestart(every=3, warmup=0))
        adapter = dict(named_adapters(module.model))["model.layers.0.mlp.down_proj"]  # type: ignore[arg-type]
        new = adapter.base.get_parameter("weight").detach().double()
        with disabled(module):
            change = new - adapter.base.get_parameter("weight").detach().double()
        values = torch.linalg.svdvals(change)
        ranks.append(int((values > 1e-5 * values[0]).sum()))
    assert ranks[0] == own
    assert ranks[0] < ranks[1] <= 2 * own
    if method == "relora":
        assert ranks[1] < ranks[2] <= 3 * own
    else:  # all types read and write through two maps of rank r_hat, so that 2 r_hat is the most there can be
        assert ranks[1] <= ranks[2] <= 2 * own


def test_remora_changes_the_type_and_relora_draws_anew(backbone: Path, tmp_path: Path) -> None:
    module = build("remora", backbone, mora={"r": 1, "cycle": [1, 3, 2]})
    _, adapter = next(iter(named_adapters(module.model)))  # type: ignore[arg-type]
    kinds = []
    for seed in range(4):
        kinds.append(adapter.kind("default"))
        adapter.restart("default", seed)
    assert kinds == [1, 3, 2, 1]
    assert module.hparams["mora"]["mora_type"] == 1
    layers = [ReLoRALinear(nn.Linear(8, 8), LoRAConfig(r=2)) for _ in range(2)]
    state = torch.get_rng_state()
    for layer, seed in zip(layers, (5, 5), strict=True):
        first = layer.lora_a["default"].clone()
        layer.restart("default", seed)
        assert not torch.equal(layer.lora_a["default"], first)
    assert torch.equal(layers[0].lora_a["default"], layers[1].lora_a["default"]), "alike on every process"
    assert torch.equal(torch.get_rng_state(), state), "the run's own random numbers go on"
    layers[0].restart("default", 6)
    assert not torch.equal(layers[0].lora_a["default"], layers[1].lora_a["default"])


# The learning rate ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", ["constant", "cosine", "linear"])
def test_the_learning_rate_rises_again(scheduler: str, backbone: Path, tmp_path: Path) -> None:
    """The rates that the optimizer uses are those of the schedule times the factor: nothing drifts."""
    rates = []
    for every in (100, 5):
        watch = Watch()
        module = build("relora", backbone, scheduler=scheduler)
        run(module, tmp_path, 12, AdapterRestart(every=every, warmup=3), watch)
        rates.append(watch.rates)
    factors = [1.0] * 5 + [0.25, 0.5, 0.75, 1, 1] + [0.25, 0.5]
    assert rates[1] == pytest.approx([rate * factor for rate, factor in zip(rates[0], factors, strict=True)])


class Exponential(LightningModule):
    """A user's own module, with a schedule that computes each rate from the one before."""

    def __init__(self, backbone: str) -> None:
        super().__init__()
        self.backbone = backbone
        self.model: Any = None
        self.used: list[float] = []

    def configure_model(self) -> None:
        if self.model is None:
            self.model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))

    def training_step(self, rows: Any, index: int) -> Tensor:
        ids = rows["input_ids"][:, :4].float()
        return self.model(ids / 128).square().mean()  # type: ignore[no-any-return]

    def configure_optimizers(self) -> Any:
        used = self.used

        class Noting(torch.optim.SGD):
            def step(self, closure: Any = None) -> Any:
                with torch.enable_grad():
                    loss = closure()
                used.append(self.param_groups[0]["lr"])
                super().step()
                return loss

        optimizer = Noting([p for p in self.parameters() if p.requires_grad], lr=1.0)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {
                "scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
                "interval": "step",
            },
        }


class Mine(ReLoRA, Exponential):
    """A user's module with restarts."""


def test_a_recursive_schedule_does_not_drift(tmp_path: Path) -> None:
    torch.optim.SGD([nn.Parameter(torch.ones(1))])  # from now on hooks run in its step too, inside that of `Noting`
    module = Mine("none", restart_every=2, restart_warmup=1, lora={"r": 1})
    run(module, tmp_path, 6)
    assert module.used == pytest.approx([1, 0.5, 0.25 / 2, 0.125, 0.0625 / 2, 0.03125])


# Checkpoints ----------------------------------------------------------------------------------------------------------


@both
def test_base_weights_are_in_a_checkpoint_from_the_first_restart_on(
    method: str, backbone: Path, tmp_path: Path
) -> None:
    module = build(method, backbone)
    own = {f"model.{n}" for n, p in module.model.named_parameters() if p.requires_grad}  # type: ignore[union-attr]
    weights = {f"model.{path}.base.weight" for path, _ in named_adapters(module.model)}  # type: ignore[arg-type]
    run(module, tmp_path, 5, AdapterRestart(every=3, warmup=1), Saves(tmp_path, 2, 4))
    kept = [set(torch.load(tmp_path / f"{step}.ckpt", weights_only=True)["state_dict"]) for step in (2, 4)]
    assert kept == [own, own | weights]


@both
@pytest.mark.parametrize("stop", [2, 3, 5, 6])
def test_killed_and_resumed_equals_straight(method: str, stop: int, backbone: Path, tmp_path: Path) -> None:
    """In the first cycle, right at a restart, and in mid-cycle after one."""
    options: dict[str, Any] = {"scheduler": "cosine"}
    straight = build(method, backbone, **options)
    run(straight, tmp_path, 10, AdapterRestart(every=3, warmup=1), Saves(tmp_path, stop))
    torch.manual_seed(99)
    again = build(method, backbone, **options)
    shake(again)
    run(again, tmp_path, 10, AdapterRestart(every=3, warmup=1), ckpt=tmp_path / f"{stop}.ckpt")
    other = dict(again.named_parameters())
    for name, parameter in straight.named_parameters():
        assert torch.equal(parameter, other[name]), name
    expected = [outputs(m, batch("sft")) for m in (straight, again)]
    assert torch.equal(*expected)


@both
def test_a_longer_run_makes_up_for_a_restart_at_the_end(method: str, backbone: Path, tmp_path: Path) -> None:
    straight = build(method, backbone)
    run(straight, tmp_path, 8, AdapterRestart(every=3, warmup=1))
    first = build(method, backbone)
    run(first, tmp_path, 6, AdapterRestart(every=3, warmup=1)).save_checkpoint(tmp_path / "end.ckpt")
    again = build(method, backbone)
    run(again, tmp_path, 8, AdapterRestart(every=3, warmup=1), ckpt=tmp_path / "end.ckpt")
    other = dict(again.named_parameters())
    assert all(torch.equal(parameter, other[name]) for name, parameter in straight.named_parameters())


@both
def test_disabled_gives_the_untouched_base(method: str, backbone: Path, tmp_path: Path) -> None:
    module = build(method, backbone)
    base = outputs(module, batch("sft"))
    trainer = run(module, tmp_path, 7, AdapterRestart(every=3, warmup=1))
    trained = outputs(module, batch("sft"))
    with disabled(module):
        assert torch.equal(outputs(module, batch("sft")), base)
    assert torch.equal(outputs(module, batch("sft")), trained)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    module.save_adapter(tmp_path / "saved")
    for again in (load(tmp_path / "a.ckpt"), load(tmp_path / "saved")):
        assert torch.equal(outputs(again, batch("sft")), trained)
        with disabled(again):
            assert torch.equal(outputs(again, batch("sft")), base)


@both
def test_back_to_a_state_before_the_first_restart(method: str, backbone: Path, tmp_path: Path) -> None:
    module = build(method, backbone)
    trainer = run(module, tmp_path, 7, AdapterRestart(every=3, warmup=1), Saves(tmp_path, 2))
    expected = build(method, backbone)
    run(expected, tmp_path, 2, AdapterRestart(every=3, warmup=1))
    trainer.validate(module, loader(1), ckpt_path=tmp_path / "2.ckpt", weights_only=True, verbose=False)
    assert torch.equal(outputs(module, batch("sft")), outputs(expected, batch("sft")))


# Folders --------------------------------------------------------------------------------------------------------------


@both
def test_saved_reloaded_and_merged(method: str, backbone: Path, tmp_path: Path) -> None:
    module = build(method, backbone)
    module.save_adapter(tmp_path / "fresh")
    run(module, tmp_path, 5, AdapterRestart(every=2, warmup=1))
    expected = outputs(module, batch("sft"))
    module.save_adapter(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert config["peft_type"] == f"LIT_{method.upper()}"
    assert set(config["restarts"].values()) == {2}
    small, large = ((tmp_path / name / "adapter_model.safetensors").stat().st_size for name in ("fresh", "saved"))
    assert small < large / 3
    again = build(method, backbone, adapter=str(tmp_path / "saved"))
    assert torch.equal(outputs(again, batch("sft")), expected)
    merged = copy.deepcopy(again)
    merged.merge_adapters()
    assert same(outputs(merged, batch("sft")), expected)
    again.load_adapter(tmp_path / "fresh")
    assert torch.equal(outputs(again, batch("sft")), outputs(build(method, backbone), batch("sft")))


@both
def test_a_folder_that_does_not_fit_changes_nothing(method: str, backbone: Path, tmp_path: Path) -> None:
    module = build(method, backbone)
    build(method, backbone, **{key: {**value, "r": 3} for key, value in SETTINGS[method].items()}).save_adapter(
        tmp_path / "other"
    )
    run(module, tmp_path, 5, AdapterRestart(every=2, warmup=1))
    expected = outputs(module, batch("sft"))
    base = outputs(build(method, backbone), batch("sft"))
    with pytest.raises(ValueError, match="Shapes differ"):
        module.load_adapter(tmp_path / "other")
    assert torch.equal(outputs(module, batch("sft")), expected)
    with disabled(module):
        assert torch.equal(outputs(module, batch("sft")), base)


def test_gpt2_and_half_precision(tmp_path: Path) -> None:
    """Conv1D stores W the other way round; a bfloat16 base is rounded once at each restart."""
    folder = save_tiny("gpt2", tmp_path / "gpt2")
    for dtype, tolerance in (("float32", 1e-5), ("bfloat16", 2e-2)):
        for method in SETTINGS:
            module = build(method, folder, dtype=dtype)
            shake(module)
            before = outputs(module, batch("sft")).float()
            for path, adapter in restartable(module.model):  # type: ignore[arg-type]
                adapter.restart("default", len(path))
            assert same(outputs(module, batch("sft")).float(), before, tolerance), (method, dtype)


def test_sensible_number_of_restarts(tmp_path: Path) -> None:
    module = Mine("none", lora={"r": 1})
    callback = AdapterRestart()
    run(module, tmp_path, 100, callback)
    assert callback.count == 3
    with pytest.warns(UserWarning, match="No restart will happen: the run has 10 steps"):
        run(Mine("none", lora={"r": 1}), tmp_path, 10)
