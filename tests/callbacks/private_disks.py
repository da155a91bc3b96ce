"""One of two processes that share no disk: train whole, train and die, resume; see `test_adapter_checkpoint`."""

import os
import sys
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from lit_peft.callbacks import AdapterCheckpoint, AdapterMerge
from lit_peft.data.loader import ResumableLoader
from tests.callbacks.tiny_runs import Killed, Losses, make_loader, make_module, make_trainer


class Rows(LightningDataModule):
    def train_dataloader(self) -> ResumableLoader:
        return make_loader(24)

    def val_dataloader(self) -> ResumableLoader:
        return make_loader(8, shuffle=False)


class OwnStates(Callback):
    """Gives every process random states, and so dropout, of its own."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        torch.rand(trainer.global_rank + 1)


def fit(strategy: str, base: Path, folder: str, die_at: tuple[int, int] | None, resume: bool) -> tuple[Losses, object]:
    losses, module = Losses(die_at), make_module(base)
    chosen = DDPStrategy() if strategy == "ddp" else ModelParallelStrategy(save_distributed_checkpoint=False)
    trainer = make_trainer(
        Path(folder),
        AdapterCheckpoint(folder, every_n_steps=4),
        losses,
        OwnStates(),
        AdapterMerge(f"{folder}-merged"),
        strategy=chosen,
        num_nodes=2,
        devices=1,
        use_distributed_sampler=False,
    )
    try:
        # relative: the same path in two folders, as on two machines
        trainer.fit(module, datamodule=Rows(), ckpt_path=f"{folder}/last.ckpt" if resume else None)
    except Killed:
        assert die_at is not None
    return losses, module


def adapters(module: object) -> dict[str, torch.Tensor]:
    state = module.state_dict().items()  # type: ignore[attr-defined]
    return {k: getattr(v, "full_tensor", lambda v=v: v)().clone() for k, v in state if "lora" in k}


def main(strategy: str, home: Path, rank: str) -> None:
    torch.set_num_threads(1)
    os.chdir(home / rank)
    seed_everything(5)
    whole, module = fit(strategy, home / "base", "whole", None, False)
    expected = adapters(module)
    seed_everything(5)
    fit(strategy, home / "base", "run", (1, 5), False)
    assert Path("run/last.ckpt").is_file() == (rank == "0")
    seed_everything(99)
    resumed, module = fit(strategy, home / "base", "run", None, True)
    assert sorted(resumed.seen) == [(1, 2), (1, 3), (1, 4), (1, 5)], resumed.seen
    assert {key: whole.seen[key] for key in resumed.seen} == resumed.seen, (whole.seen, resumed.seen)
    found = adapters(module)
    assert all(torch.equal(expected[key], found[key]) for key in expected)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
