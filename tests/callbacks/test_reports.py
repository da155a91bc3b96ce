import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from lit_peft.callbacks import AdapterCheckpoint, AdapterMerge, RunReport, SampleAnswers, Throughput
from lit_peft.callbacks.curves import draw, smooth
from lit_peft.callbacks.throughput import tokens_in
from tests.callbacks.tiny_runs import Killed, Losses, make_loader, make_module, make_trainer


def fit(base: Path, folder: Path, *callbacks: Callback, **options: Any) -> tuple[Trainer, Any]:
    module = make_module(base)
    trainer = make_trainer(folder, *callbacks, **options)
    trainer.fit(module, make_loader(), make_loader(4, shuffle=False))
    return trainer, module


# Throughput ---------------------------------------------------------------------------------------------------------


def test_throughput_counts_tokens_without_padding(base: Path, tmp_path: Path) -> None:
    class Masked(Callback):
        def on_train_batch_start(
            self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
        ) -> None:
            batch["attention_mask"][0, -2:] = 0
            batch["labels"][0, -2:] = -100

    speed = Throughput(every_n_steps=4)
    trainer, module = fit(base, tmp_path, Masked(), speed, max_epochs=1)
    assert speed.tokens == 6 * (2 * 9 - 2)
    assert speed.tokens_per_second == pytest.approx(speed.tokens / speed.seconds)
    assert speed.trainable == sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert 0 < speed.trainable_share < 0.2
    assert 1e7 < speed.peak_memory < 1e12
    assert {"tokens/s", "GB", "trained%"} <= set(trainer.progress_bar_metrics)
    assert not {"tokens/s", "GB", "trained%"} & set(trainer.logged_metrics)


def test_throughput_stops_its_clock_in_validation(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("lit_peft.callbacks.throughput.time.perf_counter", lambda: now[0])

    class Clock(Callback):
        def on_train_batch_start(self, *rest: Any) -> None:
            now[0] += 1

        def on_validation_batch_start(self, *rest: Any) -> None:
            now[0] += 100

    speed = Throughput()
    fit(base, tmp_path, Clock(), speed, max_epochs=2)
    assert speed.seconds == 12


def test_throughput_goes_on_after_a_resume(base: Path, tmp_path: Path) -> None:
    fit(base, tmp_path, AdapterCheckpoint(tmp_path), Throughput(), max_epochs=1)
    speed, module = Throughput(), make_module(base)
    trainer = make_trainer(tmp_path, AdapterCheckpoint(tmp_path), speed, max_epochs=2)
    trainer.fit(module, make_loader(), ckpt_path=str(tmp_path / "last.ckpt"))
    assert speed.tokens == 2 * 12 * 9


def test_tokens_in() -> None:
    ids = torch.ones(2, 5, dtype=torch.long)
    assert tokens_in({"input_ids": ids, "position_ids": ids}) == 10
    assert tokens_in({"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1, 0, 0]])}) == 3
    assert tokens_in((ids, ids)) == 0


# SampleAnswers ------------------------------------------------------------------------------------------------------


def test_sample_answers_shows_and_writes(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, module = fit(base, tmp_path, SampleAnswers(["hello?", "[b]no markup[/b]"], every_n_epochs=2), max_epochs=4)
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [(row["epoch"], row["step"], row["prompt"]) for row in rows] == [
        (epoch, 6 * (epoch + 1), prompt) for epoch in (1, 3) for prompt in ("hello?", "[b]no markup[/b]")
    ]
    assert rows[-2]["generated"] == module.reply([{"role": "user", "content": "hello?"}])
    shown = capsys.readouterr().out
    assert "answers after epoch 3" in shown
    assert "[b]no markup[/b]" in shown


def test_sample_answers_takes_validation_rows(base: Path, tmp_path: Path) -> None:
    _, module = fit(base, tmp_path, SampleAnswers(rows=2), max_epochs=1)
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    loader = make_loader(4, shuffle=False)
    expected = module.predict_step(loader.collate_fn([loader.dataset[0], loader.dataset[1]]), 0)
    assert [{key: row[key] for key in ("prompt", "answer", "generated")} for row in rows] == expected


def test_sample_answers_do_not_disturb(base: Path, tmp_path: Path) -> None:
    class Rude(SampleAnswers):
        def _answers(self, trainer: Trainer, module: Any) -> list[dict[str, Any]]:
            random.random()
            torch.rand(3)
            return super()._answers(trainer, module)

    weights, losses = [], []
    for extra in ([], [Rude()]):
        seed_everything(3)
        seen = Losses()
        _, module = fit(base, tmp_path, seen, *extra)
        losses.append(seen.seen)
        weights.append({key: value.clone() for key, value in module.state_dict().items() if "lora" in key})
        assert module.training
        assert module.model.training
    assert losses[0] == losses[1]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_sample_answers_refuses_a_silent_module(tmp_path: Path) -> None:
    from lightning.pytorch.demos.boring_classes import BoringModel

    with pytest.raises(TypeError, match="BoringModel has no reply"):
        make_trainer(tmp_path, SampleAnswers(["hello?"]), max_epochs=1).fit(BoringModel())
    with pytest.raises(ValueError, match="rows is 0"):
        SampleAnswers(rows=0)


# RunReport ----------------------------------------------------------------------------------------------------------


def test_card_holds_the_measured_numbers(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/usr/bin/lit-peft", "fit", "--data.path", "my rows.jsonl"])
    folder, report, losses = tmp_path / "run", RunReport(), Losses()
    checkpoint = AdapterCheckpoint(folder / "checkpoints")
    _, module = fit(base, folder, checkpoint, report, losses, Throughput())
    card = (folder / "README.md").read_text()
    assert card.startswith("# run\n")
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    for text in (
        f"| base | {base}, sha {module.base_identity()['sha'].removeprefix('sha256:')[:12]} |",
        "| method | LoRASFT |",
        "| `lora` | r 2, alpha",
        f"| trained | {trained:,} of ",
        "| rows | 12 training, 4 validation |",
        "| steps | 12 optimizer steps, 2 epochs |",
        f"| best validation | val_loss {float(checkpoint.best_model_score):.4g} |",  # type: ignore[arg-type]
        " tokens/s, 216 tokens |",
        "| machine | 1 process on CPU",
        "lit-peft fit --data.path 'my rows.jsonl'",
        f"lit-peft fit --ckpt_path {folder}/checkpoints/last.ckpt",
        f"lit-peft chat {folder}",
        f"lit-peft merge {folder} --out {folder}/merged",
    ):
        assert text in card, text
    assert [step for step, _ in report.train] == list(range(1, 13))
    # the loss of a step is that of its batch: a sum over 2 rows of 5 trained tokens each
    assert [loss for _, loss in report.train] == pytest.approx([loss / 10 for loss in losses.seen.values()])
    assert [row["step"] for row in report.validation] == [6, 12]
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_card_takes_tables_and_samples(base: Path, tmp_path: Path) -> None:
    report = RunReport()
    trainer, module = fit(base, tmp_path, report, max_epochs=1)
    report.add_table("150 rows", ["", "base", "tuned"], [["exact match", "1 %", "80 %"]])
    report.add_samples([{"question": "a|b\nc", "tuned": "<i>yes"}])
    assert report.write(trainer, module) == tmp_path / "README.md"
    card = (tmp_path / "README.md").read_text()
    assert "## 150 rows\n\n|  | base | tuned |\n| --- | --- | --- |\n| exact match | 1 % | 80 % |" in card
    assert r"| a\|b c | &lt;i>yes |" in card
    with pytest.raises(ValueError, match="has 1 cells, the header 2"):
        report.add_table("bad", ["a", "b"], [["one"]])


def test_curves_go_on_after_a_resume(base: Path, tmp_path: Path) -> None:
    module = make_module(base)
    trainer = make_trainer(tmp_path, AdapterCheckpoint(tmp_path, every_n_steps=4), RunReport(), Losses((1, 4)))
    with pytest.raises(Killed):
        trainer.fit(module, make_loader(), make_loader(4, shuffle=False))
    report = RunReport()
    trainer = make_trainer(tmp_path, AdapterCheckpoint(tmp_path), report)
    trainer.fit(make_module(base), make_loader(), make_loader(4, shuffle=False), ckpt_path=str(tmp_path / "last.ckpt"))
    assert [step for step, _ in report.train] == [step for step, _ in report.rate] == list(range(1, 13))
    assert [row["step"] for row in report.validation] == [6, 12]


def test_long_curves_are_thinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_peft.callbacks.run_report.POINTS", 10)
    report = RunReport()
    report._waiting = [(step, torch.tensor(1.0)) for step in range(1, 41)]
    report._fetch()
    assert [step for step, _ in report.train] == list(range(4, 41, 4))


def test_smooth_and_an_empty_picture(tmp_path: Path) -> None:
    assert smooth([1.0, 3.0, 5.0], 1) == [1.0, 3.0, 5.0]
    assert smooth([1.0, 3.0, 5.0], 2) == [2.0, 3.0, 4.0]
    assert draw(tmp_path / "a.png", "nothing", [], [], []).read_bytes().startswith(b"\x89PNG")


# AdapterMerge -------------------------------------------------------------------------------------------------------


def test_merged_at_the_end_and_the_module_left_alone(base: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    merge = AdapterMerge(tmp_path / "merged")
    _, module = fit(base, tmp_path, merge, max_epochs=1)
    assert merge.report["differences"]["float32"] < 1e-4
    ids = torch.randint(5, 128, (1, 9))
    module.eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        assert torch.allclose(merged(input_ids=ids).logits, module.model(input_ids=ids).logits, atol=1e-4)
    assert any("lora_a" in name for name, _ in module.named_parameters())


def test_a_taken_folder_is_found_before_training(base: Path, tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged/mine.txt").touch()
    losses = Losses()
    with pytest.raises(FileExistsError, match=r"mine\.txt"):
        fit(base, tmp_path, AdapterMerge(tmp_path / "merged"), losses)
    assert not losses.seen
