import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from torch.utils.data import DataLoader

from lit_peft.callbacks import AnswerWriter, answer_writer
from tests.callbacks.tiny_runs import make_loader, make_module, make_trainer


def test_records_are_written_in_order(base: Path, tmp_path: Path) -> None:
    module = make_module(base)
    writer = AnswerWriter(tmp_path / "out/answers.jsonl")
    for _ in range(2):  # a second prediction replaces the first
        found = make_trainer(tmp_path, writer).predict(module, make_loader(5, shuffle=False))
    expected = [record for batch in found or [] for record in batch]
    lines = (tmp_path / "out/answers.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == expected
    assert len(expected) == 5


def test_several_processes_are_put_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows 0..6 dealt out to two processes in batches of two."""
    dealt = [[[0, 2], [4, 6]], [[1, 3], [5]]]
    records = [
        [(0, batch, place, {"row": row}) for batch, rows in enumerate(batches) for place, row in enumerate(rows)]
        for batches in dealt
    ]

    def gather(into: list[Any], mine: Any) -> None:
        into[:] = records

    monkeypatch.setattr(answer_writer.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(answer_writer.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(answer_writer.dist, "all_gather_object", gather)
    writer = AnswerWriter(tmp_path / "answers.jsonl")
    trainer = type("T", (), {"is_global_zero": True})()
    writer.on_predict_end(trainer, BoringModel())
    assert [json.loads(line)["row"] for line in (tmp_path / "answers.jsonl").read_text().splitlines()] == list(range(7))


def test_tensors_and_other_scripts(tmp_path: Path) -> None:
    class Odd(BoringModel):
        def predict_step(self, batch: Any, batch_idx: int) -> list[dict[str, Any]]:
            return [{"vector": torch.ones(2), "text": "schön", "path": Path("a")}]

    make_trainer(tmp_path, AnswerWriter(tmp_path / "a.jsonl")).predict(Odd(), DataLoader(RandomDataset(32, 1)))
    text = (tmp_path / "a.jsonl").read_text()
    assert "schön" in text
    assert json.loads(text) == {"vector": [1.0, 1.0], "text": "schön", "path": "a"}


def test_other_predictions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="returned a Tensor; AnswerWriter needs a list of dicts"):
        make_trainer(tmp_path, AnswerWriter(tmp_path / "a.jsonl")).predict(
            BoringModel(), DataLoader(RandomDataset(32, 4))
        )
    assert not (tmp_path / "a.jsonl").exists()
