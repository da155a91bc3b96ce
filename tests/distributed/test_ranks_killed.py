"""SIGKILL while AdaLoRA shares out its ranks: the resumed run ends with the same ranks, averages and weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.killed_runs import EVERY, Runs, compare, resume, same

pytestmark = pytest.mark.slow


class RankRuns(Runs):
    """Runs of AdaLoRA whose ranks are settled two thirds through."""

    def flags(self, launcher: str, run: Path, *more: str) -> list[str]:
        plain = [flag for flag in super().flags(launcher, run, *more) if not flag.startswith("--model.lora.")]
        settings = {"init_r": 4, "target_r": 2, "dropout": 0.2, "tinit": 2, "tfinal": 0.34}
        return [*plain, "--method=adalora", *(f"--model.adalora.{key}={value}" for key, value in settings.items())]


def settled(run: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["callbacks"]["RankAllocator"]
    return state


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> RankRuns:
    return RankRuns(tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("launcher", ["one", "ddp", "fsdp2"])
def test_ranks_after_a_kill(launcher: str, runs: RankRuns) -> None:
    whole, run = runs.whole(launcher), runs.home / f"{launcher}-killed"
    place = f"on_train_batch_start:{EVERY + 2 if launcher == 'one' else 2 * EVERY}"
    runs.killed(launcher, runs.flags(launcher, run), hold=place)
    mid = settled(run)
    assert not mid["finished"]
    assert 2 * 14 < sum(map(sum, mid["on"].values())) < 4 * 14, "not in the middle of the schedule"
    resume(runs, launcher, run)
    compare(run, whole)
    ends = [settled(run), settled(whole)]
    same(*ends)
    assert ends[0]["finished"]
    assert sum(map(sum, ends[0]["on"].values())) == 2 * 14
    assert len({sum(on) for on in ends[0]["on"].values()}) > 1
    assert (run / "ranks.png").is_file()
