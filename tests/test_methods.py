"""The contract of a method, over methods x architectures x tasks. A new method is one `Case(...)` line."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lit_peft.adapter import innermost, named_adapters
from lit_peft.mixin import PEFT
from lit_peft.named import disabled
from lit_peft.sites import geometry, linears, widths
from lit_peft.zoo import compose, task_class
from tests.counts import (
    HEADS,
    Count,
    biases,
    bottlenecks,
    compacter,
    edits,
    ia3_count,
    last_layer,
    lora_count,
    mora_count,
    norms,
    p_tuning,
    prefixes,
    ranks_by_layer,
    svd_count,
    unipelt,
)
from tests.models import IM_END, VOCAB, save_tiny


@dataclass(frozen=True)
class Case:
    """What a method promises. `merges`: folds into the base; `reversible`: `disabled` gives the base back; `identity`:
    starts as the base.

    `base`: arguments of the task that make the model it starts as, where that is not the stored one.
    """

    method: str
    count: Count
    settings: dict[str, Any] = field(default_factory=dict)
    merges: bool = True
    reversible: bool = True
    identity: bool = True
    base: dict[str, Any] = field(default_factory=dict)


SHORT = {"num_virtual_tokens": 3, "encoder_hidden_size": 8}
NARROW = {"bottleneck_size": 4}
PHM, NORMS = {"phm_dim": 2, "reduction_factor": 8}, {"train_norms": True}

CASES = [
    Case("houlsby", bottlenecks(2, 3), {"bottleneck": {"bottleneck_size": 3}}, merges=False, identity=False),
    Case("houlsby", bottlenecks(2, 4, norms), {"bottleneck": {**NARROW, **NORMS}}, merges=False, identity=False),
    Case("pfeiffer", bottlenecks(1, 4), {"bottleneck": NARROW}, merges=False),
    Case("parallel", bottlenecks(1, 4), {"bottleneck": NARROW}, merges=False),
    Case("prefix", prefixes(3, 8), {"prefix": SHORT}, merges=False, identity=False),
    Case("p_tuning_v2", prefixes(3, None), {"prefix": {"num_virtual_tokens": 3}}, merges=False, identity=False),
    Case(
        "prompt", lambda m: 3 * geometry(m).hidden, {"prompt": {"num_virtual_tokens": 3}}, merges=False, identity=False
    ),
    Case(
        "p_tuning",
        lambda m: p_tuning(3, geometry(m).hidden),
        {"prompt": {"num_virtual_tokens": 3}},
        merges=False,
        identity=False,
    ),
    Case("compacter", compacter(2, 8), {"compacter": PHM}, merges=False, identity=False),
    Case("compacter", compacter(2, 8, norms), {"compacter": {**PHM, **NORMS}}, merges=False, identity=False),
    Case("mam", bottlenecks(1, 4, prefixes(3, 8)), {"prefix": SHORT, "bottleneck": NARROW}, False, identity=False),
    Case("unipelt", unipelt, {"lora": {"r": 2}, "prefix": SHORT, "bottleneck": NARROW}, merges=False, identity=False),
    Case("loreft", edits(2), {"reft": {"r": 2, "first": 1, "last": 2}}, merges=False),
    Case("direft", edits(2), {"reft": {"r": 2, "first": 1, "last": 2}}, merges=False),
    Case("lora", lora_count(4), {"lora": {"r": 4}}),
    Case(
        "lora",
        ranks_by_layer,
        {"lora": {"r": 4, "rank_pattern": {r".*\.0\..*": 2}, "alpha_pattern": {r".*\.0\..*": 3.0}}},
    ),
    Case("rslora", lora_count(3), {"lora": {"r": 3}}),
    Case("relora", lora_count(3), {"lora": {"r": 3}}),
    *[Case("mora", mora_count(2, kind), {"mora": {"r": 2, "mora_type": kind}}) for kind in (1, 2, 6)],
    Case("remora", mora_count(1, 1), {"mora": {"r": 1}}),
    Case(
        "dora",
        lambda m: lora_count(4)(m) + sum(widths(linear)[1] for linear in linears(m).values()),
        {"lora": {"r": 4}},
    ),
    Case("pissa", lora_count(4), {"lora": {"r": 4}}),
    Case("olora", lora_count(3), {"lora": {"r": 3}}),
    Case("eva", lora_count(4), {"lora": {"r": 4}}),
    Case("loraplus", lora_count(4), {"lora": {"r": 4}}),
    Case(
        "qlora",
        lora_count(4),
        {"lora": {"r": 4, "dropout": 0.0}, "dtype": "float32"},
        merges=False,
        base={"quantize": "nf4"},
    ),
    # no ranks are dropped here, where runs differ in length; see test_adalora.py
    Case("adalora", svd_count(4), {"adalora": {"init_r": 4, "target_r": 4}}),
    Case("bitfit", biases),
    Case("bitfit", biases, {"quantize": "nf4"}, merges=False, base={"quantize": "nf4"}),
    Case("ia3", ia3_count),
    Case("freeze", last_layer, {"freeze": {"last_layers": 1}}),
    Case("full", lambda m: sum(p.numel() for p in m.parameters()), reversible=False),
    Case("full", lambda m: sum(p.numel() for p in m.parameters()), {"keep_base": True}),
    Case("lora+bitfit", lambda m: lora_count(4)(m) + biases(m), {"lora": {"r": 4}}),
]


def label(case: Case) -> str:
    return "-kept" if "keep_base" in case.settings else "-nf4" if "quantize" in case.settings else ""


PAIRS = [
    ("llama", "sft"),
    ("gpt2", "sft"),
    ("t5", "sft"),
    ("llama", "classification"),
    ("gpt2", "classification"),
    ("bert", "classification"),
    ("t5", "classification"),
]
GRID = [
    pytest.param(case, kind, task, id=f"{case.method}{label(case)}-{kind}-{task}")
    for case in CASES
    for kind, task in PAIRS
]
grid = pytest.mark.parametrize(("case", "kind", "task"), GRID)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    home = tmp_path_factory.mktemp("backbones")

    @lru_cache(None)
    def make(kind: str, task: str) -> Path:
        return save_tiny(kind, home / f"{kind}-{task}", task="classification" if task == "classification" else "lm")

    return make


def build(case: Case, folder: Path, task: str, **more: Any) -> PEFT:
    torch.manual_seed(1)
    extra = {"labels": ["a", "b", "c"]} if task == "classification" else {}
    module = compose(case.method, task)(str(folder), lr=1e-2, scheduler="constant", **case.settings, **extra, **more)
    module.configure_model()
    assert isinstance(module, PEFT)
    return module


def batch(task: str, rows: int = 4, seed: int = 0, length: int = 12) -> dict[str, Tensor]:
    """Ragged rows with labels; every row ends with eos, as T5's classifier demands."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(8, VOCAB, (rows, length), generator=generator)
    lengths = torch.randint(length // 2, length + 1, (rows,), generator=generator)
    mask = (torch.arange(length) < lengths[:, None]).long()
    ids = ids * mask
    ids[torch.arange(rows), lengths - 1] = IM_END
    if task == "classification":
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.randint(0, 3, (rows,), generator=generator)}
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :3] = -100  # the prompt
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def outputs(module: PEFT, rows: dict[str, Tensor]) -> Tensor:
    """Logits in eval mode."""
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            return module.trained_logits(rows)[0] if "trained_logits" in dir(module) else module.logits(rows)  # type: ignore[attr-defined]
    finally:
        module.train(training)


def gradients(module: PEFT, rows: dict[str, Tensor]) -> dict[str, Tensor]:
    module.zero_grad()
    module.train()
    module.training_step(rows, 0).backward()
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def shake(module: PEFT) -> None:
    """Move what is trained away from its start, so that an identity cannot hide a mistake."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)


def quick_trainer(folder: Path, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": folder,
        "max_epochs": 1,
    }
    return Trainer(**{**defaults, **options})


def loader(task: str, batches: int) -> DataLoader[Any]:
    return DataLoader([batch(task, seed=i) for i in range(batches)], batch_size=None)  # type: ignore[arg-type]


def same(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((a - b).abs().max() <= tolerance * max(1.0, float(b.abs().max())))


@grid
def test_starts_as_the_base_and_steps_aside(case: Case, kind: str, task: str, folders: Any) -> None:
    folder = folders(kind, task)
    rows = batch(task)
    kind_of_base = task_class(task) if case.base else compose("full", task)
    labels = {"labels": ["a", "b", "c"]} if task == "classification" else {}
    base: Any = kind_of_base(str(folder), **labels, **case.base)
    base.configure_model()
    expected = outputs(base, rows)
    module = build(case, folder, task)
    if case.identity:
        assert same(outputs(module, rows), expected, 1e-6)
    head = {n: p.detach().clone() for n, p in module.model.named_parameters() if n.startswith(HEADS)}  # type: ignore[union-attr]
    shake(module)
    assert not same(outputs(module, rows), expected, 1e-3), "training would change nothing"
    if not case.reversible:
        with pytest.raises(TypeError, match="keep_base"), disabled(module):
            pass
        return
    with torch.no_grad():  # a task's new head is no part of the base: compare with the head as it was
        for name, parameter in module.model.named_parameters():  # type: ignore[union-attr]
            if name in head:
                parameter.copy_(head[name])
    with disabled(module):
        assert torch.equal(outputs(module, rows), expected)


@grid
def test_only_what_is_declared_trains(case: Case, kind: str, task: str, folders: Any) -> None:
    folder = folders(kind, task)
    base = compose("full", task)(str(folder), **({"labels": ["a", "b", "c"]} if task == "classification" else {}))
    base.configure_model()
    module = build(case, folder, task)
    model = module.model
    assert model is not None
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    head = sum(p.numel() for n, p in base.model.named_parameters() if n.startswith(HEADS))  # type: ignore[union-attr]
    expected = case.count(base.model)  # type: ignore[arg-type]
    expected += head if task == "classification" and case.method != "full" else 0
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    shake(module)
    found = {n.removeprefix("model.") for n, g in gradients(module, batch(task)).items() if g.abs().sum() > 0}
    # Attention ignores a bias on the keys (softmax is shift-invariant), so its gradient is zero up to rounding.
    silent = {n for n in trained - found if not _cancels(n, kind)}
    assert not silent, f"no gradient reaches {sorted(silent)[:3]}"
    assert found <= trained
    restore = {n: before[n] for n in trained}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in restore:
                parameter.copy_(restore[name])
    trainer = quick_trainer(folder, max_steps=3)
    trainer.fit(module, loader(task, 3))
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved <= trained, f"frozen weights moved: {sorted(moved - trained)[:3]}"
    assert len(moved) >= 0.5 * len(trained)


def _cancels(name: str, kind: str) -> bool:
    unused = kind == "t5" and "relative_attention_bias" in name
    return (
        "key" in name or "k_proj" in name or unused or name.startswith(("pooler", "wpe", "shared")) or "embed" in name
    )


@grid
def test_checkpoint_holds_only_what_is_trained_and_resumes_exactly(
    case: Case, kind: str, task: str, folders: Any, tmp_path: Path
) -> None:
    folder = folders(kind, task)
    straight = build(case, folder, task)
    quick_trainer(tmp_path, max_epochs=2).fit(straight, loader(task, 3))
    first = build(case, folder, task)
    trainer = quick_trainer(tmp_path, max_epochs=1)
    trainer.fit(first, loader(task, 3))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    kept = {key for key in content["state_dict"] if key.startswith("model.")}
    trained = {f"model.{n}" for n, p in first.model.named_parameters(remove_duplicate=False) if p.requires_grad}  # type: ignore[union-attr]
    frozen = {f"model.{path}.{n}" for path, a in named_adapters(first.model) for n, _ in a.own_parameters()}  # type: ignore[arg-type]
    assert kept == trained | frozen
    second = build(case, folder, task)
    shake(second)
    quick_trainer(tmp_path, max_epochs=2).fit(second, loader(task, 3), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    for name, parameter in straight.named_parameters():
        assert torch.equal(parameter, dict(second.named_parameters())[name]), name


@grid
def test_merged_equals_unmerged(case: Case, kind: str, task: str, folders: Any) -> None:
    module = build(case, folders(kind, task), task)
    shake(module)
    rows = batch(task)
    expected = outputs(module, rows)
    merged = copy.deepcopy(module)
    if not case.merges:
        with pytest.raises(TypeError, match="cannot be merged"):
            merged.merge_adapters()
        return
    merged.merge_adapters()
    assert not list(named_adapters(merged.model))  # type: ignore[arg-type]
    assert same(outputs(merged, rows), expected)
    assert same(outputs(module, rows), expected, 0), "merging a copy changed the original"


@grid
def test_saved_and_reloaded_equals_trained(case: Case, kind: str, task: str, folders: Any, tmp_path: Path) -> None:
    folder = folders(kind, task)
    module = build(case, folder, task)
    shake(module)
    rows = batch(task)
    module.save_adapter(tmp_path / "saved")
    again = build(case, folder, task, adapter=str(tmp_path / "saved"))
    assert torch.equal(outputs(again, rows), outputs(module, rows))


@grid
def test_gradient_checkpointing_and_accumulation_change_no_gradient(
    case: Case, kind: str, task: str, folders: Any, tmp_path: Path
) -> None:
    folder = folders(kind, task)
    plain = build(case, folder, task)
    shake(plain)
    expected = gradients(plain, batch(task))
    checked = build(case, folder, task, gradient_checkpointing=True)
    shake(checked)
    found = gradients(checked, batch(task))
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert same(found[name], gradient), name
    whole = batch(task, rows=4)
    parts = [{k: v[i : i + 1] for k, v in whole.items()} for i in range(4)]
    results = []
    for batches, accumulate in (([whole], 1), (parts, 4)):
        module = build(case, folder, task, max_grad_norm=1e9)
        recorder = Recorder()
        data: Any = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
        trainer = quick_trainer(tmp_path, accumulate_grad_batches=accumulate, callbacks=[recorder])
        trainer.fit(module, data)
        results.append(recorder.found)
    for name, gradient in results[0].items():
        assert same(results[1][name], gradient), name


from lightning.pytorch import Callback  # noqa: E402


class Recorder(Callback):
    """Keeps the gradients that the optimizer sees."""

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}

    def on_before_zero_grad(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        found = {n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None}
        self.found = found or self.found

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        self.on_before_zero_grad(trainer, pl_module, None)


def test_every_method_of_the_catalogue_has_a_case() -> None:
    from lit_peft.catalogue import METHODS

    assert set(METHODS) <= {case.method for case in CASES}
    assert innermost(nn.Linear(1, 1)).in_features == 1
