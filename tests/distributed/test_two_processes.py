"""One process, two DDP and two FSDP2 processes agree, for every method, in one launch."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.distributed.worker import ROWS, SETTINGS
from tests.models import save_tiny

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("two")
    folder = save_tiny("llama", out / "backbone")
    draw = random.Random(0)
    with (out / "rows.jsonl").open("w") as file:
        for _ in range(ROWS):
            question = "".join(draw.choices("abcdefgh ", k=draw.randint(3, 20)))
            answer = "".join(draw.choices("xyz", k=draw.randint(1, 12)))
            file.write(json.dumps({"prompt": f"q{question}?", "completion": answer}) + "\n")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29671"]
    for command in ([sys.executable], launch):
        done = subprocess.run(
            [*command, "-m", "tests.distributed.worker", str(out), str(folder)],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    return out


def close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        difference = (found[name] - tensor).abs().max()
        assert difference <= tolerance, f"{name}: {difference}"


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
@pytest.mark.parametrize("method", SETTINGS)
def test_agrees_with_one_process(method: str, kind: str, results: Path) -> None:
    one = torch.load(results / f"{method}-one.pt", weights_only=True)
    two = torch.load(results / f"{method}-{kind}.pt", weights_only=True)
    assert len(one["losses"]) == len(two["losses"]) == 5
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert one["metrics"]
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-4)
    close(two["weights"], one["weights"], 1e-4)
    ranks = [{k: v.bool().tolist() for k, v in run["weights"].items() if "_lambda." in k} for run in (one, two)]
    assert ranks[0] == ranks[1]


@pytest.mark.parametrize("kind", ["one", "ddp", "fsdp2"])
@pytest.mark.parametrize("method", SETTINGS)
def test_resumes_exactly(method: str, kind: str, results: Path) -> None:
    result = torch.load(results / f"{method}-{kind}.pt", weights_only=True)
    close(result["resumed"], result["weights"], 0.0)


@pytest.mark.parametrize(("start", "end"), [("ddp", "fsdp2"), ("fsdp2", "ddp")])
@pytest.mark.parametrize("method", SETTINGS)
def test_checkpoint_goes_on_under_the_other_strategy(method: str, start: str, end: str, results: Path) -> None:
    straight = torch.load(results / f"{method}-{end}.pt", weights_only=True)
    crossed = torch.load(results / f"{method}-{start}-to-{end}.pt", weights_only=True)
    close(crossed["weights"], straight["weights"], 1e-4)
