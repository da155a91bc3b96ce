"""The rank allocator over whole runs: stopped and resumed, too short, without an end; and its picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from lit_peft.callbacks import RankAllocator
from lit_peft.callbacks.rank_map import draw, table
from lit_peft.methods.adalora import AdaLoRAConfig
from tests.test_rank_allocator import DEPTH, allocator, built, fit, layers


class Save(Callback):
    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("step", [2, 11, 20, 26])  # before, amidst, at the end, after the end of the schedule
def test_resumed_run_ends_with_the_same_ranks(step: int, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"tinit": 3, "tfinal": 10, "deltaT": 3}
    straight = built(**settings)
    saved = tmp_path / "a.ckpt"
    first = fit(straight, tmp_path, Save(step, saved))
    torch.load(saved, weights_only=True)
    second = built(seed=9, **settings)
    made = fit(second, tmp_path, ckpt=saved)
    assert allocator(made).ranks == allocator(first).ranks
    for (name, a), (_, b) in zip(straight.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_checkpoint_without_averages_is_named(tmp_path: Path) -> None:
    saved = tmp_path / "a.ckpt"
    fit(built(tinit=3, tfinal=10), tmp_path, Save(15, saved))
    content = torch.load(saved, weights_only=True)
    content["callbacks"] = {}
    torch.save(content, saved)
    with pytest.warns(UserWarning, match="starts anew at step 15"):
        fit(built(tinit=3, tfinal=10), tmp_path, ckpt=saved)


def test_a_finished_run_goes_on_with_its_ranks(tmp_path: Path) -> None:
    module = built()
    made = fit(module, tmp_path)
    ranks = allocator(made).ranks
    made.save_checkpoint(tmp_path / "cut.ckpt")  # weights and optimizer are cut
    longer = built(seed=5)
    again = fit(longer, tmp_path, steps=50, ckpt=tmp_path / "cut.ckpt")
    assert again.global_step == 50
    assert allocator(again).ranks == ranks
    fit(module, tmp_path, steps=5)  # and the module itself, under a new Trainer
    assert [len(a.adalora_lambda["default"]) for a in layers(module)] == list(ranks.values())


def test_ending_too_early_is_said(tmp_path: Path) -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            trainer.should_stop = trainer.global_step >= 7

    module = built()
    with pytest.warns(UserWarning, match="ended at step 7, before the ranks are settled at step 18"):
        fit(module, tmp_path, Stop())
    assert all(len(a.adalora_lambda["default"]) == 6 for a in layers(module))


# Refused --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_r": 0}, "target_r is 0"),
        ({"tinit": 1.0}, "tinit is 1.0; a share is at least 0 and below 1"),
        ({"tfinal": -3}, "tfinal is -3"),
        ({"deltaT": 0}, "deltaT is 0"),
        ({"beta1": 1.0}, "beta1 is 1.0"),
        ({"beta2": -0.1}, "beta2 is -0.1"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RankAllocator(**settings)
    with pytest.raises(ValueError, match=rf"adalora\.{message}"):
        AdaLoRAConfig(**settings)


def test_a_run_without_an_end(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no end to share the ranks out by"):
        fit(built(), tmp_path, steps=-1)


def test_a_run_too_short(tmp_path: Path) -> None:
    module = built(tinit=4, tfinal=4)
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    with pytest.raises(ValueError, match=r"tinit \(4\) and tfinal \(4\) leave no step in between: the run has 8"):
        fit(module, tmp_path, steps=8)
    assert all(torch.equal(p, before[n]) for n, p in module.named_parameters())


def test_own_callback_wins(tmp_path: Path) -> None:
    mine = RankAllocator(target_r=1, tinit=0, tfinal=5)
    made = fit(built(), tmp_path, mine)
    assert [c for c in made.callbacks if isinstance(c, RankAllocator)] == [mine]
    assert sum(mine.ranks.values()) == DEPTH
    assert made.callbacks[0] is mine


# The picture ----------------------------------------------------------------------------------------------------------


def test_picture_is_in_the_run_folder(tmp_path: Path) -> None:
    fit(built(), tmp_path)
    assert (tmp_path / "ranks.png").read_bytes()[:4] == b"\x89PNG"


def test_table_sorts_layers_and_kinds(tmp_path: Path) -> None:
    ranks = {
        "decoder.block.0.layer.0.SelfAttention.q": 1,
        "decoder.block.0.layer.1.EncDecAttention.q": 2,
        "decoder.block.1.layer.0.SelfAttention.q": 3,
        "encoder.block.0.layer.0.SelfAttention.q": 4,
        "pooler.dense": 5,
    }
    assert table(ranks) == {
        "decoder.block": {"SelfAttention.q": {0: 1, 1: 3}, "EncDecAttention.q": {0: 2}},
        "encoder.block": {"q": {0: 4}},
        "": {"pooler.dense": {0: 5}},
    }
    assert draw(tmp_path / "a.png", "some", ranks).stat().st_size > 5000
    assert draw(tmp_path / "b.png", "none left", dict.fromkeys(ranks, 0)).stat().st_size > 5000
