"""What tasks share: exact gradients, groups of the optimizer, a loss that is not finite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lit_peft.tasks.task import NonFiniteLossError
from lit_peft.zoo import compose
from tests.models import save_tiny
from tests.test_methods import Recorder, batch, quick_trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("base") / "llama")


def make(folder: Path, method: str = "lora", **settings: Any) -> Any:
    torch.manual_seed(1)
    return compose(method, "sft")(str(folder), **settings)


def test_loss_is_the_mean_over_trained_tokens(folder: Path) -> None:
    module = make(folder)
    module.configure_model()
    rows = batch("sft")
    total = module.training_step(rows, 0)
    logits = module.model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits[:, :-1]
    expected = F.cross_entropy(logits.flatten(0, 1), rows["labels"][:, 1:].flatten(), ignore_index=-100)
    count = (rows["labels"][:, 1:] != -100).sum()
    assert float(total / count) == pytest.approx(float(expected), rel=1e-6)


def test_a_subclass_may_change_the_logits(folder: Path) -> None:
    class Cold(compose("lora", "sft")):  # type: ignore[misc]
        def trained_logits(self, rows: Any) -> Any:
            logits, targets = super().trained_logits(rows)
            return logits * 2, targets

    module = Cold(str(folder))
    module.configure_model()
    logits, targets = module.trained_logits(batch("sft"))
    wanted = F.cross_entropy(logits, targets, reduction="sum")
    assert module.training_step(batch("sft"), 0).item() == pytest.approx(wanted.item(), rel=1e-6)


def test_ragged_accumulation_gives_the_gradients_of_one_batch(folder: Path, tmp_path: Path) -> None:
    """Stock averaging is up to 98 % off here: one row has ten times the trained tokens of another."""
    rows = batch("sft", rows=4, length=24)
    rows["labels"][0, 4:] = -100
    found = []
    for pieces, accumulate in (([rows], 1), ([{k: v[i : i + 1] for k, v in rows.items()} for i in range(4)], 4)):
        module, recorder = make(folder, lr=1e-3, max_grad_norm=1e9), Recorder()
        data: Any = DataLoader(pieces, batch_size=None)  # type: ignore[arg-type]
        quick_trainer(tmp_path, accumulate_grad_batches=accumulate, callbacks=[recorder]).fit(module, data)
        found.append(recorder.found)
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-7)


def test_nothing_to_learn_in_a_batch_is_no_error(folder: Path, tmp_path: Path) -> None:
    empty = batch("sft")
    empty["labels"][:] = -100
    module = make(folder)
    quick_trainer(tmp_path).fit(module, DataLoader([empty, batch("sft")], batch_size=None))  # type: ignore[arg-type]
    assert all(torch.isfinite(p).all() for p in module.parameters())


def test_every_method_of_a_stack_keeps_its_learning_rate(folder: Path, tmp_path: Path) -> None:
    module = make(folder, "lora+bitfit", scheduler="constant", warmup=0.0)
    trainer = quick_trainer(tmp_path, max_steps=1)
    trainer.fit(module, DataLoader([batch("sft")], batch_size=None))  # type: ignore[arg-type]
    rates = {}
    names = {id(p): n for n, p in module.named_parameters()}
    for group in trainer.optimizers[0].param_groups:
        for parameter in group["params"]:
            rates.setdefault(group["lr"], set()).add(names[id(parameter)].split(".")[-2])
    assert rates == {2e-4: {"lora_a", "lora_b"}, 1e-3: {"bitfit_bias"}}


def test_an_unusual_learning_rate_warns(folder: Path, tmp_path: Path) -> None:
    module = make(folder, lr=0.5)
    with pytest.warns(UserWarning, match="more than ten times off"):
        quick_trainer(tmp_path, max_steps=1).fit(module, DataLoader([batch("sft")], batch_size=None))  # type: ignore[arg-type]


def test_flags_win_over_the_learning_rate_of_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    data: Any = DataLoader([batch("sft", seed=i) for i in range(4)], batch_size=None)  # type: ignore[arg-type]
    first = make(folder, lr=1e-3, scheduler="constant", warmup=0.0)
    trainer = quick_trainer(tmp_path, max_steps=2)
    trainer.fit(first, data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = make(folder, lr=5e-4, weight_decay=0.1, scheduler="constant", warmup=0.0)
    trainer = quick_trainer(tmp_path, max_epochs=3, max_steps=6)
    trainer.fit(again, data, ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    group = trainer.optimizers[0].param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (5e-4, 0.1)


def test_a_loss_that_is_not_finite_stops_before_the_step(folder: Path, tmp_path: Path) -> None:
    module = make(folder)
    module.configure_model()
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    with torch.no_grad():
        module.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteLossError, match=r"loss is nan at step 0; nothing was updated"):
        quick_trainer(tmp_path).fit(module, DataLoader([batch("sft")], batch_size=None))  # type: ignore[arg-type]
    assert all(torch.equal(p, before[n]) for n, p in module.named_parameters() if "lora" in n)


def test_clips_to_one_unless_the_trainer_says_otherwise(folder: Path, tmp_path: Path) -> None:
    norms = []
    for options in ({}, {"gradient_clip_val": 1e-3}):
        recorder = Recorder()
        module = make(folder, "full", lr=1e-3)
        quick_trainer(tmp_path, callbacks=[recorder], **options).fit(
            module,
            DataLoader([batch("sft")], batch_size=None),  # type: ignore[arg-type]
        )
        norms.append(float(torch.stack([g.norm() for g in recorder.found.values()]).norm()))
    assert norms == [pytest.approx(1.0, rel=1e-3), pytest.approx(1e-3, rel=1e-3)]


@pytest.mark.parametrize(
    ("options", "fused"),
    [({}, True), ({"precision": "bf16-mixed"}, False), ({"precision": "bf16-mixed", "gradient_clip_val": 0.0}, True)],
    ids=str,
)
def test_all_weights_step_in_one_call(options: dict[str, Any], fused: bool, folder: Path, tmp_path: Path) -> None:
    """But not where Lightning would refuse to clip for it: mixed precision, with the clipping that is the default."""
    module, trainer = make(folder), quick_trainer(tmp_path, **options)
    trainer.fit(module, DataLoader([batch("sft")], batch_size=None))  # type: ignore[arg-type]
    assert trainer.optimizers[0].defaults["fused"] is fused
    assert trainer.global_step == 1


@pytest.mark.parametrize(("before", "after"), [("bf16-mixed", "32-true"), ("32-true", "bf16-mixed")])
def test_resumed_in_another_precision(before: str, after: str, folder: Path, tmp_path: Path) -> None:
    """All weights step in one call where both runs do: its counts of steps lie elsewhere on a GPU."""
    data: Any = DataLoader([batch("sft")], batch_size=None)
    trainer = quick_trainer(tmp_path, max_steps=1, precision=before)
    trainer.fit(make(folder), data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    trainer = quick_trainer(tmp_path, max_epochs=3, max_steps=3, precision=after)
    trainer.fit(make(folder), data, ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert trainer.global_step == 3
    optimizer: Any = trainer.optimizers[0]
    assert not optimizer.param_groups[0]["fused"]
    assert not getattr(optimizer, "_step_supports_amp_scaling", False)
