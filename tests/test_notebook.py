"""The notebook runs from top to bottom on a tiny model, and what is committed of it was made by running it."""

import json
import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

from tests.models import save_tiny

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "first_lora.ipynb"
TINY = 'BACKBONE, DATA, STEPS, ROWS = "model", "chats.jsonl", 3, 2'


@pytest.fixture
def committed() -> NotebookNode:
    notebook: NotebookNode = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    return notebook


def code(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cells: list[NotebookNode]) -> str:
    """All text that the cells put out."""
    return "\n".join(
        str(output.get("text", "")) + "\n".join(str(v) for k, v in output.get("data", {}).items() if k == "text/plain")
        for cell in cells
        for output in cell.outputs
    )


def test_runs_on_a_tiny_model(committed: NotebookNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny("llama", tmp_path / "model")
    rows = [{"prompt": f"What is {i}?", "completion": str(i)} for i in range(40)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, value in {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "MPLBACKEND": "agg",
        "LIT_PEFT_CACHE": str(tmp_path / "cache"),
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "JUPYTER_RUNTIME_DIR": str(tmp_path / "jupyter"),
    }.items():
        monkeypatch.setenv(name, value)
    (parameters,) = [cell for cell in code(committed) if "parameters" in cell.metadata.get("tags", [])]
    assert {"BACKBONE", "DATA", "STEPS", "ROWS"} <= set(re.findall(r"\b[A-Z]+\b", parameters.source))
    parameters.source = TINY
    for cell in code(committed):
        cell.outputs, cell.execution_count = [], None
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(committed, timeout=300, kernel_name="python3", resources=resources).execute()
    found = printed(code(committed))
    for line in ("Methods come first", "unchanged at the start: True", "reference is the base: True"):
        assert line in found
    difference = re.search(r"largest difference of the logits: (\S+)", found)
    assert difference is not None
    assert float(difference[1]) < 1e-4
    assert (tmp_path / "runs" / "first_lora" / "merged" / "config.json").is_file()
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_committed_output_is_real_and_tidy(committed: NotebookNode) -> None:
    cells = code(committed)
    assert 8 <= len(cells) <= 12
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "run it from top to bottom"
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs)
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    text = NOTEBOOK.read_text()
    assert not re.search(r"/(root|home|tmp|work|Users)/|site-packages", text), "a path of the machine is in the outputs"
    assert len(text) < 200_000
    scores = re.search(r"test_choice_accuracy\s+(\S+)\s+(\S+)", printed(cells))
    assert scores is not None
    base, tuned = (float(score) for score in scores.groups())
    assert tuned > base + 0.3
