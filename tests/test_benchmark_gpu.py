"""The GPU script runs from end to end at sizes for Triton's interpreter; what it says of itself holds."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu
from benchmarks.on_gpu.kernels import crossovers
from benchmarks.on_gpu.steps import ADDMM, LORA, SMALL, base_of, built
from tests.kernels.where import DEVICE

HERE = ["--small", "--device", str(DEVICE)]


def test_the_quick_parts_run(tmp_path: Path) -> None:
    report = gpu.main([*HERE, "--out", str(tmp_path), "--parts", "products,losses"])
    assert len(report["parts"]["products"]) == len(report["parts"]["losses"]) == 1
    assert "bordered" in (tmp_path / "gpu.md").read_text()


@pytest.mark.slow
def test_every_part_runs(tmp_path: Path) -> None:
    report = gpu.main([*HERE, "--out", str(tmp_path), "--minutes", "5"])
    assert json.loads((tmp_path / "gpu.json").read_text())["parts"].keys() == gpu.PARTS.keys()
    for row in report["parts"]["kernels"]:
        assert "error" not in row, row
        assert row["right"], row
    missing = {"HF PEFT, bf16, Liger", "Liger"}  # installed by nobody here
    for row in [*report["parts"]["steps"], *report["parts"]["losses"]]:
        assert set(row["errors"]) <= missing, row["errors"]
        assert all(peak > 0 for peak in row["peak"].values())
    page = (tmp_path / "gpu.md").read_text()
    for heading in gpu.PARTS.values():
        assert f"## {heading[0]}" in page


def test_all_arms_compute_the_same_loss_slopes() -> None:
    """At the start LoRA changes nothing: the gradient of the embeddings' output is that of the frozen base."""
    base = base_of(SMALL["tiny"], 96, DEVICE).float()
    ids = torch.randint(96, (1, 16), device=DEVICE)
    slopes: dict[str, Any] = {}
    for name, step in built(base, {key: LORA[key] for key in ("frozen base", "HF PEFT", ADDMM, "lit_peft")}, ids):
        assert not isinstance(step, str), step
        x = step.model.model.embed_tokens(ids).detach().requires_grad_()
        step.model.model(inputs_embeds=x, use_cache=False).last_hidden_state.sin().sum().backward()
        slopes[name] = x.grad
    for name, slope in slopes.items():
        torch.testing.assert_close(slope, slopes["frozen base"], atol=1e-4, rtol=1e-3, msg=name)


def row(op: str, median: float, right: bool = True, **sizes: int) -> dict[str, Any]:
    return {"op": op, "sizes": sizes, "right": right, "over_plain": {"median": median}}


def test_crossovers_are_where_a_kernel_is_right_and_faster() -> None:
    rows = [row("a", 1.2, rows=512), row("a", 0.9, rows=2048), row("a", 0.8, rows=8192)]
    rows += [row("b", 0.5, rows=512), row("b", 0.5, right=False, rows=2048), row("c", 0.5, rows=512)]
    rows += [row("c", 1.5, rows=8192), {"op": "d", "sizes": {"rows": 1}, "error": "broken"}]
    assert crossovers(rows) == {"a": {"rows": 2048}}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--parts", "nothing"], "There is no part 'nothing'"), ([*HERE, "--crossovers"], "--crossovers needs a GPU")],
)
def test_refuses(arguments: list[str], said: str) -> None:
    with pytest.raises(SystemExit, match=said):
        gpu.main(arguments)
