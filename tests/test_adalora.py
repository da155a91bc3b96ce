"""AdaLoRA: its formula and penalty in float64, HF PEFT's folders both ways, cut and uncut checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

import lit_peft
from lit_peft import hub
from lit_peft.adapter import Adapter, named_adapters
from lit_peft.callbacks import AdapterCheckpoint, AdapterMerge, RankAllocator, RunReport
from lit_peft.low_rank.singular import AdaLoRALinear, penalty
from lit_peft.methods.adalora import AdaLoRA, AdaLoRAConfig
from lit_peft.methods.bitfit import BitFit
from lit_peft.named import adapters, add_adapter, routed
from lit_peft.zoo import compose
from tests.callbacks.tiny_runs import make_loader, make_rows, make_trainer
from tests.models import save_tiny
from tests.tiny_adapted import KINDS, Tiny, check_equal, logits, placed, shake


class AdaLoRATiny(AdaLoRA, Tiny): ...


class AdaLoRABitFitTiny(AdaLoRA, BitFit, Tiny): ...


def found(model: nn.Module) -> list[AdaLoRALinear]:
    return [a for _, a in named_adapters(model) if isinstance(a, AdaLoRALinear)]


def prune(module: Any, empty: int = 1) -> None:
    """Settle ranks as an allocator would: different ones, and none in some layers."""
    generator = torch.Generator().manual_seed(5)
    for i, adapter in enumerate(found(module.model)):
        scale = adapter.adalora_lambda["default"]
        kept = torch.rand(len(scale), generator=generator) < 0.6
        if i < empty:
            kept[:] = False
        adapter.kept["default"] = kept
        with torch.no_grad():
            scale[~kept] = 0


# The formula ----------------------------------------------------------------------------------------------------------


def test_formula_and_gradients_in_float64() -> None:
    """y = W x + b + s P diag(lambda) Q x and the sum of both penalties, differentiated by autograd and by hand."""
    base = nn.Linear(7, 5)
    layer = AdaLoRALinear(base, AdaLoRAConfig(init_r=3, target_r=2, alpha=4.5)).double()
    shake(layer)
    p, e, q = (layer.triplets("default")[i][0] for i in (1, 0, 2))
    x = torch.randn(4, 6, 7, dtype=torch.float64, requires_grad=True)
    up = torch.randn(4, 6, 5, dtype=torch.float64)
    y = layer(x)
    s = 4.5 / 3
    assert torch.allclose(y, x @ base.weight.T + base.bias + s * x @ (p @ e.diag() @ q).T, atol=1e-12)
    (y * up).sum().backward()
    flat_x, flat_up = x.detach().reshape(-1, 7), up.reshape(-1, 5)
    big = s * flat_up.T @ flat_x  # the gradient of the whole update, (out, in)
    assert torch.allclose(p.grad, big @ q.T * e, atol=1e-12)  # type: ignore[arg-type]
    assert torch.allclose(q.grad, (p * e).T @ big, atol=1e-12)  # type: ignore[arg-type]
    assert torch.allclose(e.grad, torch.einsum("or,oi,ri->r", p, big, q), atol=1e-12)  # type: ignore[arg-type]
    assert torch.allclose(layer.delta("default").double(), s * p @ e.diag() @ q, atol=1e-6)


def test_penalty_is_the_papers() -> None:
    sizes = [(6, 6, 3), (9, 6, 4), (6, 9, 3)]
    layers = [AdaLoRALinear(nn.Linear(wide, tall), AdaLoRAConfig(init_r=r, target_r=1)) for wide, tall, r in sizes]
    for layer in layers:
        shake(layer, size=0.5)
    value = penalty(layers)
    value.backward()
    expected = 0.0
    for layer in layers:
        p, q = layer.adalora_p["default"].detach().double(), layer.adalora_q["default"].detach().double()
        one = torch.eye(len(q), dtype=torch.float64)
        left, right = p.T @ p - one, q @ q.T - one
        expected += float(left.norm() ** 2 + right.norm() ** 2)
        assert torch.allclose(layer.adalora_p["default"].grad.double(), 4 * p @ left, atol=1e-4)  # type: ignore[union-attr]
        assert torch.allclose(layer.adalora_q["default"].grad.double(), 4 * right @ q, atol=1e-4)  # type: ignore[union-attr]
        assert layer.adalora_lambda["default"].grad is None
    assert value.item() == pytest.approx(expected, rel=1e-5)


class Returns(Tiny):
    """A task whose training_step returns what it is told to."""

    form = "tensor"

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        loss = self.model(input_ids=batch).logits.square().sum()  # type: ignore[misc]
        if self.form == "counted":
            self.counted = torch.tensor(7.0, dtype=torch.float64)
        if self.form == "dict":
            return {"loss": loss, "more": 1}
        return None if self.form == "none" else loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.model(input_ids=batch).logits.square().sum()  # type: ignore[misc, no-any-return]


class AdaLoRAReturns(AdaLoRA, Returns): ...


@pytest.mark.parametrize(("form", "times"), [("tensor", 1), ("dict", 1), ("counted", 7)])
def test_penalty_joins_any_tasks_loss_in_training_only(form: str, times: int) -> None:
    module = placed(AdaLoRAReturns, "llama", adalora=AdaLoRAConfig(init_r=3, target_r=2, orth_reg_weight=0.3))
    shake(module)
    module.form = form
    module.counted = torch.tensor(99.0)  # left over from an earlier step
    batch = torch.arange(8)[None]
    value = float(penalty(found(module.model)))
    plain = float(module.validation_step(batch, 0))
    output = module.training_step(batch, 0)
    loss = output["loss"] if form == "dict" else output
    assert float(loss) == pytest.approx(plain + 0.3 * times * value, rel=1e-6)
    assert form != "dict" or output["more"] == 1
    module.form = "none"
    assert module.training_step(batch, 0) is None


@pytest.mark.parametrize("task", ["sft", "classification"])
def test_evaluation_does_not_see_the_penalty(task: str, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "b", task="lm" if task == "sft" else "classification")
    labels = {} if task == "sft" else {"labels": ["a", "b", "c"]}
    seen = []
    for weight in (0.0, 5.0):
        module = compose("adalora", task)(str(tmp_path / "b"), adalora={"orth_reg_weight": weight}, **labels)
        rows = make_rows(4)
        if task == "classification":
            rows = [{**row, "labels": torch.tensor(i % 3)} for i, row in enumerate(rows)]
        torch.manual_seed(0)
        trainer = make_trainer(tmp_path)
        seen.append(trainer.validate(module, DataLoader(rows, batch_size=2), verbose=False)[0]["val_loss"])  # type: ignore[arg-type]
    assert seen[0] == seen[1]


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_penalty_is_float32_under_every_precision(precision: str, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "b")
    module = compose("adalora", "sft")(str(tmp_path / "b"), lr=1e-3, adalora={"init_r": 4, "target_r": 4})
    trainer = make_trainer(tmp_path, precision=precision, max_steps=1, max_epochs=1)
    trainer.fit(module, make_loader())
    first = float(trainer.callback_metrics["orthogonality"])
    fresh = compose("adalora", "sft")(str(tmp_path / "b"), adalora={"init_r": 4, "target_r": 4})
    fresh.configure_model()
    assert first == pytest.approx(float(penalty(found(fresh.model))), rel=0.02)  # both random starts
    assert trainer.callback_metrics["orthogonality"].dtype == torch.float32


def test_only_acting_sets_are_penalised() -> None:
    module = placed(AdaLoRATiny, "llama")
    add_adapter(module.model, "other")
    with adapters(module, "other"):
        penalty(found(module.model)).backward()
    assert found(module.model)[0].adalora_q["default"].grad is None
    assert found(module.model)[0].adalora_q["other"].grad is not None


# Refused --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_r": 0}, "init_r is 0"),
        ({"target_r": 13}, "target_r is 13; it must be from 1 to init_r, 12"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"alpha": 0}, "alpha is 0"),
        ({"orth_reg_weight": -1}, "orth_reg_weight is -1"),
        ({"target_modules": []}, "target_modules is empty"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaLoRAConfig(**settings)


def test_settings_of_other_methods_are_unknown() -> None:
    with pytest.raises(TypeError, match="adalora has no setting 'use_dora'"):
        AdaLoRATiny("llama", adalora={"use_dora": True})


# Cutting --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_cutting_keeps_the_logits(kind: str) -> None:
    module = placed(AdaLoRATiny, kind)
    shake(module)
    prune(module, empty=2)
    before, parameters = logits(module.model, kind), [id(p) for p in module.parameters()]
    kept = [int(a.kept["default"].sum()) for a in found(module.model)]
    module.shrink()
    assert (logits(module.model, kind) - before).abs().max() <= 1e-6 * before.abs().max()
    assert [len(a.adalora_lambda["default"]) for a in found(module.model)] == kept
    assert kept[:2] == [0, 0]
    assert [id(p) for p in module.parameters()] == parameters
    count = sum(p.numel() for a in found(module.model) for _, p in a.own_parameters())
    shapes = [(a.base.weight.shape, rank) for a, rank in zip(found(module.model), kept, strict=True)]
    assert count == sum(rank * (sum(shape) + 1) for shape, rank in shapes)


def run(tmp_path: Path, *callbacks: Any, **settings: Any) -> tuple[Any, Any]:
    if not (tmp_path / "b").exists():
        save_tiny("llama", tmp_path / "b")
    torch.manual_seed(0)
    module = compose("adalora", "sft")(
        str(tmp_path / "b"), lr=1e-2, adalora={"init_r": 4, "target_r": 2, "tinit": 2, "tfinal": 4, **settings}
    )
    trainer = make_trainer(tmp_path / "run", *callbacks, max_epochs=3)
    trainer.fit(module, make_loader(), make_loader(4, shuffle=False))
    return module, trainer


def test_every_kind_of_file_of_a_run_gives_its_logits(tmp_path: Path) -> None:
    merge = AdapterMerge(tmp_path / "merged")
    report = RunReport()
    keep = AdapterCheckpoint(tmp_path / "run/checkpoints", every_n_steps=1, monitor=None)
    module, trainer = run(tmp_path, keep, report, merge)
    ranks = [len(a.adalora_lambda["default"]) for a in found(module.model)]
    assert sum(ranks) == 2 * len(ranks)
    assert len(set(ranks)) > 1
    assert merge.report["differences"]["float32"] < 1e-4
    assert "ranks.png" in (tmp_path / "run/README.md").read_text()
    expected = logits(module.eval().model, "llama")
    trainer.save_checkpoint(tmp_path / "cut.ckpt")
    module.save_adapter(tmp_path / "adapter")
    # last.ckpt was written before the cut: its tensors are whole, with zeros
    whole = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert {len(v) for k, v in whole["state_dict"].items() if "lambda" in k} == {4}
    for path in ("cut.ckpt", "run/checkpoints/last.ckpt", "adapter", "merged"):
        again = lit_peft.load(tmp_path / path, device="cpu")
        close(logits(again.model, "llama"), expected)
        if path != "merged":
            again.save_adapter(tmp_path / f"{Path(path).stem}-saved")
            saved = load_file(tmp_path / f"{Path(path).stem}-saved" / hub.WEIGHTS)
            assert sorted(len(v) for k, v in saved.items() if k.endswith("lora_E")) == sorted(ranks)
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "b"), tmp_path / "adapter")
    close(logits(theirs.eval(), "llama"), expected)
    for path in ("cut.ckpt", "run/checkpoints/last.ckpt"):  # validate --ckpt_path, into a cut and a fresh module
        for target in (module, lit_peft.load(tmp_path / "run", device="cpu")):
            made = make_trainer(tmp_path)
            made.validate(
                target, make_loader(4, shuffle=False), ckpt_path=tmp_path / path, weights_only=True, verbose=False
            )
            close(logits(target.eval().model, "llama"), expected)


def close(a: Tensor, b: Tensor) -> None:
    assert (a - b).abs().max() <= 2e-6 * b.abs().max().clamp(min=1)


def test_another_rank_is_still_refused(tmp_path: Path) -> None:
    _, trainer = run(tmp_path, shrink=False)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    other = compose("adalora", "sft")(str(tmp_path / "b"), adalora={"init_r": 3, "target_r": 2})
    with pytest.raises(ValueError, match=r"adalora.init_r is 3 here and \d in the checkpoint"):
        make_trainer(tmp_path).validate(other, make_loader(4), ckpt_path=tmp_path / "a.ckpt", weights_only=True)


def test_allocator_is_brought_once(tmp_path: Path) -> None:
    module, trainer = run(tmp_path)
    trainer.fit_loop.epoch_loop.max_steps = 20
    trainer.validate(module, make_loader(4), verbose=False)
    assert sum(isinstance(callback, RankAllocator) for callback in trainer.callbacks) == 1


# Beside others --------------------------------------------------------------------------------------------------------


def test_rows_are_routed() -> None:
    module = placed(AdaLoRATiny, "llama")
    add_adapter(module.model, "other", AdaLoRAConfig(init_r=3, target_r=2))
    for i, adapter in enumerate(found(module.model)):
        for name in ("default", "other"):
            for parameter, _ in adapter.triplets(name):
                nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(i + len(name)))
    single = []
    for name in ("default", "other"):
        with adapters(module, name):
            single.append(logits(module.model, "llama"))
    with routed(module, ["other", "default"]):
        both = logits(module.model, "llama")
    assert torch.allclose(both, torch.stack([single[1][0], single[0][1]]), atol=1e-5)
    assert not torch.allclose(single[0], single[1], atol=1e-2)


def test_stacked_with_bitfit(tmp_path: Path) -> None:
    module = placed(AdaLoRABitFitTiny, "gpt2")
    shake(module)
    prune(module)
    module.save_adapter(tmp_path / "a")
    again = placed(AdaLoRABitFitTiny, "gpt2", adapter=str(tmp_path / "a"))
    check_equal(module.model, again.model, "gpt2")
    before = logits(module.model, "gpt2")
    module.merge_adapters()
    close(logits(module.model, "gpt2"), before)
    assert not any(isinstance(m, Adapter) for m in module.model.modules())


def test_learns_a_toy_task_that_needs_it(tmp_path: Path) -> None:
    """The training loss falls well below its start, with a third of the ranks dropped on the way."""
    save_tiny("llama", tmp_path / "b")
    torch.manual_seed(0)
    module = compose("adalora", "sft")(str(tmp_path / "b"), lr=2e-2, adalora={"init_r": 6, "target_r": 4})
    report = RunReport()
    trainer = make_trainer(tmp_path / "run", report, max_epochs=40)
    trainer.fit(module, make_loader(8, 4))
    assert report.train[-1][1] < 0.3 * report.train[0][1]
    assert float(trainer.callback_metrics["orthogonality"]) < 0.1 * 14 * 2 * 6  # what it is at the start, about
    assert sum(len(a.adalora_lambda["default"]) for a in found(module.model)) == 4 * 14
