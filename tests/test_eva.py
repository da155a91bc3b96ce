"""EVA: directions and ranks against principal component analysis in float64 and HF PEFT; the runs around it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lit_peft import EVA, LoRAConfig, disabled
from lit_peft.adapter import named_adapters
from lit_peft.callbacks import EVACalibration
from lit_peft.callbacks.input_directions import Directions, redistribute
from lit_peft.zoo import compose
from tests.models import save_tiny, tiny
from tests.test_methods import batch, loader, outputs, quick_trainer, same, shake


def built(folder: Path, task: str = "sft", **options: Any) -> Any:
    extra = {"labels": ["a", "b", "c"]} if task == "classification" else {}
    return compose("eva", task)(str(folder), **{"lora": LoRAConfig(r=4), "lr": 1e-2, **extra, **options})


def fitted(module: Any, folder: Path, calibration: EVACalibration | None = None, steps: int = 0, **options: Any) -> Any:
    """The module, calibrated by a Trainer on three batches; `steps` of training."""
    callbacks = [*([calibration] if calibration else []), *options.pop("callbacks", [])]
    options = {"max_steps": steps, **options}
    data = options.pop("data") if "data" in options else loader("sft", 3)
    quick_trainer(folder, callbacks=callbacks, **options).fit(module, data)
    return module


def ranks(module: Any) -> dict[str, int]:
    return {path: a.configs["default"].r for path, a in named_adapters(module.model)}


def pca(x: Tensor) -> tuple[Tensor, Tensor]:
    """Shares of the variance and directions, in float64."""
    x = x.double()
    _, sizes, right = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    return sizes**2 / (sizes**2).sum(), right


# The analysis ---------------------------------------------------------------------------------------------------------


def test_one_batch_is_a_principal_component_analysis() -> None:
    torch.manual_seed(0)
    x = torch.randn(50, 12) * torch.arange(1, 13) + 3
    found = Directions(4)
    found.update(x, 0.99)
    shares, right = pca(x)
    assert found.shares_of(4) == pytest.approx(shares[:4].tolist(), rel=1e-4)
    torch.testing.assert_close(
        (found.components.double() * right[:4]).sum(1).abs(), torch.ones(4).double(), rtol=1e-5, atol=1e-5
    )
    assert not found.still


def test_batches_add_up_to_the_analysis_of_all_rows() -> None:
    """Exact where the rows lie in as many dimensions as are kept."""
    torch.manual_seed(0)
    x = torch.randn(60, 5) * torch.tensor([9.0, 5, 3, 2, 1]) @ torch.linalg.qr(torch.randn(12, 12))[0][:5] + 1
    found = Directions(6)
    for part in x.split([20, 1, 9, 30]):
        found.update(part, 0.99)
    shares, right = pca(x)
    assert found.shares_of(5) == pytest.approx(shares[:5].tolist(), rel=1e-4)
    cosines = (found.components[:5].double() * right[:5]).sum(1).abs()
    torch.testing.assert_close(cosines, torch.ones(5).double(), rtol=1e-4, atol=1e-4)


def test_stands_still_on_more_of_the_same_and_not_on_news() -> None:
    torch.manual_seed(0)
    scales = torch.tensor([30.0, 10, 3, 1, 0.1, 0.1])
    found = Directions(3)
    found.update(torch.randn(2000, 6) * scales, 0.99)
    found.update(torch.randn(2000, 6) * scales, 0.99)
    assert found.still
    found.update(100 * torch.randn(2000, 6) * scales.flip(0), 0.99)
    assert not found.still


def test_too_few_rows_are_filled_up_with_orthogonal_directions() -> None:
    found = Directions(4)
    found.update(torch.randn(2, 8), 0.99)
    first = found.first(4)
    torch.testing.assert_close(first @ first.t(), torch.eye(4), rtol=1e-5, atol=1e-5)


def test_ranks_go_to_the_largest_shares_and_ties_to_the_earlier() -> None:
    shares = {"a": [0.9, 0.1, 0.0], "b": [0.4, 0.3, 0.2], "c": [0.4, 0.3, 0.2], "d": [0.01, 0.0, 0.0]}
    assert redistribute(shares, 5) == {"a": 1, "b": 2, "c": 2, "d": 0}
    assert redistribute(shares, 4) == {"a": 1, "b": 2, "c": 1, "d": 0}
    assert sum(redistribute(shares, 11).values()) == 11


# The calibration ------------------------------------------------------------------------------------------------------

KINDS = [("llama", "sft"), ("gpt2", "sft"), ("t5", "sft"), ("bert", "classification"), ("t5", "classification")]


@pytest.mark.parametrize(("kind", "task"), KINDS)
def test_a_starts_at_the_components_of_the_real_tokens(kind: str, task: str, tmp_path: Path) -> None:
    """Padding is left out: with other padding the same directions come out."""
    folder = save_tiny(kind, tmp_path / "base", task="classification" if task == "classification" else "lm")
    rows = batch(task, rows=8, length=14)
    calibration = EVACalibration(max_batches=1, rho=1)
    module = built(folder, task)
    module.configure_model()
    calibration.calibrate(module, [rows])
    longer = {
        k: torch.cat([v, torch.full((8, 5), -100 if k == "labels" else 0)], 1) if v.ndim > 1 else v
        for k, v in rows.items()
    }
    again = built(folder, task)
    again.configure_model()
    calibration.calibrate(again, [longer])
    pairs = list(zip(named_adapters(module.model), named_adapters(again.model), strict=True))
    assert pairs
    for (path, one), (_, other) in pairs:
        a, b = one.lora_a["default"], other.lora_a["default"]
        torch.testing.assert_close(a @ a.t(), torch.eye(4), rtol=1e-4, atol=1e-4)
        assert (a @ b.t()).abs().diagonal().min() > 0.99, path


def test_components_are_those_of_the_layers_inputs(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "base")
    rows = batch("sft", rows=6)
    module = built(folder)
    module.configure_model()
    EVACalibration(max_batches=1).calibrate(module, [rows])
    inputs: dict[str, Tensor] = {}
    plain = tiny("llama")
    for path, layer in plain.named_modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_pre_hook(lambda _, args, path=path: inputs.update({path: args[0]}))
    with torch.no_grad():
        plain(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"])
    shares = {}
    for path in ranks(built_ranks(folder)):
        x = inputs[path][rows["attention_mask"].bool()]
        shares[path], right = pca(x)
        if path in ranks(module):
            a = dict(named_adapters(module.model))[path].lora_a["default"].double()
            torch.testing.assert_close(
                (a * right[: len(a)]).sum(1).abs(), torch.ones(len(a)).double(), rtol=1e-4, atol=1e-4
            )
    expected = redistribute({path: values[:8].tolist() for path, values in shares.items()}, 4 * len(shares))
    # layers that share an input share every value, so float64 and float32 agree on all but near ties
    found = {path: ranks(module).get(path, 0) for path in shares}
    assert sum(abs(found[path] - expected[path]) for path in shares) <= 2
    assert sum(found.values()) == 4 * len(shares)


def built_ranks(folder: Path) -> Any:
    module = built(folder)
    module.configure_model()
    return module


def test_budget_cap_scale_and_dropped_layers(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "base")
    module = fitted(built(folder, lora=LoRAConfig(r=1, alpha=6)), tmp_path)
    assert isinstance(module, EVA)
    found = ranks(module)
    assert sum(found.values()) == 14
    assert len(found) < 14, "no layer was left out"
    assert max(found.values()) == 2
    for path, adapter in named_adapters(module.model):
        config = adapter.configs["default"]
        assert config.alpha == 6 * config.r
        assert adapter.lora_a["default"].shape[0] == config.r == module.lora.at(path).r
        assert module.lora.at(path).alpha == config.alpha
    with disabled(module):
        base = outputs(module, batch("sft"))
    assert torch.equal(outputs(module, batch("sft")), base)
    trained = sum(p.numel() for p in module.model.parameters() if p.requires_grad)
    assert trained == sum(p.numel() for _, a in named_adapters(module.model) for _, p in a.own_parameters())


def test_rho_of_one_keeps_every_rank(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "base")
    module = fitted(built(folder, lora=LoRAConfig(r=2)), tmp_path, EVACalibration(rho=1))
    assert set(ranks(module).values()) == {2}
    assert len(ranks(module)) == 14


def test_dora_on_top(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "base")
    module = fitted(built(folder, lora=LoRAConfig(r=2, use_dora=True)), tmp_path)
    with disabled(module):
        base = outputs(module, batch("sft"))
    assert same(outputs(module, batch("sft")), base, 1e-6)
    assert len(set(ranks(module).values())) > 1


def test_peft_gives_the_same_directions_and_ranks(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ids = [torch.randint(8, 128, (8, 32)) for _ in range(3)]
    folder = save_tiny("llama", tmp_path / "base")
    module = built(folder, lora=LoRAConfig(r=4, target_modules=["q_proj", "o_proj", "down_proj"]))
    module.configure_model()
    EVACalibration(rho=2, tau=0).calibrate(module, [{"input_ids": one} for one in ids[:2]])
    config = peft.LoraConfig(
        r=4,
        target_modules=["q_proj", "o_proj", "down_proj"],
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=2, tau=0, use_label_mask=False),
    )
    theirs = peft.get_peft_model(tiny("llama"), config)
    peft.initialize_lora_eva_weights(
        theirs, [{"input_ids": one} for one in ids], gather_distributed_inputs=False, show_progress_bar=False
    )
    modules = dict(theirs.named_modules())
    alike, total = 0, 0
    for path, rank in ranks(module).items():
        other = modules[f"base_model.model.{path}"]
        total += abs(other.r["default"] - rank)
        a, b = dict(named_adapters(module.model))[path].lora_a["default"], other.lora_A["default"].weight
        r = min(len(a), len(b), 2)
        alike += int((a[:r] * b[:r]).sum(1).abs().min() > 0.95)
    assert total <= 4, "ranks differ"
    assert alike >= len(ranks(module)) - 1


# The run around it ----------------------------------------------------------------------------------------------------


class Rows(Callback):
    """What training is given, and what it draws."""

    def __init__(self) -> None:
        self.found: list[Any] = []

    def on_train_batch_start(self, trainer: Trainer, module: Any, rows: Any, *_: Any) -> None:
        self.found.append((rows["input_ids"].tolist(), torch.get_rng_state().sum().item()))


@pytest.mark.parametrize("own_generator", [False, True])
def test_training_sees_the_same_rows_in_the_same_order(own_generator: bool, tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "base")
    whole = batch("sft", rows=10)
    rows = [{k: v[i] for k, v in whole.items()} for i in range(10)]
    seen = []
    for method in ("lora", "eva"):
        module: Any = compose(method, "sft")(str(folder), lora=LoRAConfig(r=2))
        recorder = Rows()
        generator = torch.Generator().manual_seed(3) if own_generator else None
        data = DataLoader(rows, batch_size=2, shuffle=True, generator=generator)  # type: ignore[arg-type]
        torch.manual_seed(5)
        quick_trainer(tmp_path, max_epochs=2, callbacks=[recorder]).fit(module, data)
        seen.append(recorder.found)
    assert len(seen[0]) == 10
    assert [ids for ids, _ in seen[0]] == [ids for ids, _ in seen[1]]


def test_datamodule_is_not_read_ahead(tmp_path: Path) -> None:
    from lit_peft import Instructions

    folder = save_tiny("llama", tmp_path / "base")
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"q{i}", "completion": f"a{i}"}) + "\n" for i in range(12)))
    seen = []
    for method in ("lora", "eva"):
        module: Any = compose(method, "sft")(str(folder), lora=LoRAConfig(r=2))
        recorder = Rows()
        data = Instructions(str(file), batch_size=2, max_length=64, val_fraction=0, cache_dir=str(tmp_path))
        quick_trainer(tmp_path, max_epochs=2, callbacks=[recorder], limit_val_batches=0).fit(module, data)
        seen.append([ids for ids, _ in recorder.found])
    assert len(seen[0]) == 12
    assert seen[0] == seen[1]


class Stream(IterableDataset[Any]):
    """Rows that can be read once."""

    def __init__(self) -> None:
        self.rows = iter([batch("sft", seed=i) for i in range(4)])

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return next(self.rows)


def test_data_that_can_be_read_once_is_refused(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "base")
    with pytest.raises(ValueError, match="would use up rows"):
        fitted(built(folder), tmp_path, data=DataLoader(Stream(), batch_size=None))


def test_without_a_trainer_it_says_so_and_starts_as_lora(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "base")
    module = built(folder)
    with pytest.warns(UserWarning, match=r"no Trainer means no training data\. Use Trainer\.fit, or call"):
        module.configure_model()
    assert set(ranks(module).values()) == {4}
    EVACalibration().calibrate(module, [batch("sft")])
    with pytest.raises(ValueError, match="Nothing waits"):
        EVACalibration().calibrate(module, [batch("sft")])


def test_bad_input(tmp_path: Path) -> None:
    for values, message in (({"tau": 1.5}, "tau is 1.5"), ({"rho": 0.5}, "rho is 0.5"), ({"max_batches": 0}, "is 0")):
        with pytest.raises(ValueError, match=message):
            EVACalibration(**values)
    folder = save_tiny("llama", tmp_path / "base")
    with pytest.raises(TypeError, match="is for the method EVA, which LoRASFT lacks"):
        fitted(compose("lora", "sft")(str(folder)), tmp_path, EVACalibration())
    module = built(folder)
    module.configure_model()
    with pytest.raises(ValueError, match="no batch"):
        EVACalibration().calibrate(module, [])


def test_resumes_exactly_without_calibrating_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny("llama", tmp_path / "base")

    class Half(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    straight = fitted(built(folder), tmp_path, max_epochs=2, steps=-1, callbacks=[Half()])

    def never(*_: Any) -> None:
        raise AssertionError("calibrated again")

    monkeypatch.setattr(EVACalibration, "directions", never)
    resumed = built(folder)
    other = loader("sft", 3)
    quick_trainer(tmp_path, max_epochs=2).fit(resumed, other, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert ranks(resumed) == ranks(straight)
    assert len(set(ranks(straight).values())) > 1
    for name, parameter in straight.named_parameters():
        assert torch.equal(parameter, dict(resumed.named_parameters())[name]), name
    checked = built(folder)
    quick_trainer(tmp_path, limit_val_batches=1).validate(
        checked, loader("sft", 1), ckpt_path=tmp_path / "half.ckpt", weights_only=True, verbose=False
    )
    assert ranks(checked) == ranks(straight)

    from lit_peft import load

    quick = load(tmp_path / "half.ckpt", device="cpu")
    assert ranks(quick) == ranks(straight)
    assert torch.equal(outputs(quick, batch("sft")), outputs(checked, batch("sft")))


def test_folder_holds_the_ranks_and_peft_reads_it(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "base")
    module = fitted(built(folder, lora=LoRAConfig(r=2)), tmp_path)
    shake(module)
    module.save_adapter(tmp_path / "saved")
    again = built(folder, adapter=str(tmp_path / "saved"))
    again.configure_model()
    assert ranks(again) == ranks(module)
    ids = batch("sft")["input_ids"].clamp_min(8)
    module.eval()
    again.eval()
    assert torch.equal(again.model(ids).logits, module.model(ids).logits)
    theirs = peft.PeftModel.from_pretrained(tiny("llama"), str(tmp_path / "saved")).eval()
    torch.testing.assert_close(theirs(ids).logits, module.model(ids).logits, rtol=1e-5, atol=2e-6)
    trained = fitted(again, tmp_path, steps=2)  # goes on without a calibration
    assert ranks(trained) == ranks(module)
