"""The notebook that compares methods runs from top to bottom on a tiny model, and what is committed was run."""

import json
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

from tests.models import save_tiny
from tests.test_notebook import code, printed

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "compare_methods.ipynb"
TINY = """BACKBONE, DATA = "model", "chats.jsonl"
METHODS, BUDGET, STEPS, ROWS = "lora,bitfit,loreft", "2k", 2, 2"""


@pytest.fixture
def committed() -> NotebookNode:
    notebook: NotebookNode = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    return notebook


def test_runs_on_a_tiny_model(committed: NotebookNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny("llama", tmp_path / "model")
    rows = [{"prompt": f"What is {i}?", "completion": str(i)} for i in range(40)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, value in {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "LIT_PEFT_CACHE": str(tmp_path / "cache"),
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "JUPYTER_RUNTIME_DIR": str(tmp_path / "jupyter"),
    }.items():
        monkeypatch.setenv(name, value)
    (parameters,) = [cell for cell in code(committed) if "parameters" in cell.metadata.get("tags", [])]
    assert set(re.findall(r"\b[A-Z]{2,}\b", TINY)) <= set(re.findall(r"\b[A-Z]{2,}\b", parameters.source))
    parameters.source = TINY
    for cell in code(committed):
        cell.outputs, cell.execution_count = [], None
    NotebookClient(
        committed, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    found = printed(code(committed))
    assert "5 of 5  loreft, seed 1" in found
    assert "\x1b" not in found  # no moving bar
    assert "5 of 5 runs are done already" in found
    assert "method: " in found
    home = tmp_path / "runs" / "compare_methods"
    results = json.loads((home / "results.json").read_text())
    assert [row["name"] for row in results["rows"]] == ["base", "3-shot", "lora", "bitfit", "loreft"]
    assert not any(row["errors"] for row in results["rows"])


def test_committed_output_is_real_and_tidy(committed: NotebookNode) -> None:
    cells = code(committed)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "run it from top to bottom"
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs)
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    text = NOTEBOOK.read_text()
    assert not re.search(r"/(root|home|tmp|work|Users)/|site-packages", text), "a path of the machine is in the outputs"
    assert len(text) < 300_000
    scores = dict(re.findall(r"^ *\d of \d  (\S+?)(?:, seed 1)?: ([\d.]+) right choices", printed(cells), re.M))
    assert len(scores) >= 4
    base = float(scores.pop("base"))
    scores.pop("3-shot")
    assert all(float(score) > base for score in scores.values())
