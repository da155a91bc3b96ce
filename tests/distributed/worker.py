"""Runs in every process of one launch: all methods under DDP and FSDP2, with resumes across strategies.

Started by `test_two_processes.py`; `python -m tests.distributed.worker OUT FOLDER` alone is the one-process reference.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from lit_peft.data.instructions import Instructions
from lit_peft.mixin import PEFT
from lit_peft.strategies import FSDP2Strategy
from lit_peft.zoo import compose

ROWS = 22  # does not divide by the batch, so that fillers are needed
STEPS, HALF = 5, 2  # an epoch has three steps: HALF is in its middle
SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"lora": {"r": 4}},
    "rslora": {"lora": {"r": 4}},
    "relora": {"lora": {"r": 4}, "restart_every": 1},  # so that the checkpoint in the middle has base weights
    "mora": {"mora": {"r": 2}},
    "remora": {"mora": {"r": 2}, "restart_every": 2, "restart_warmup": 1},
    "dora": {"lora": {"r": 4}},
    "pissa": {"lora": {"r": 4}},
    "olora": {"lora": {"r": 4}},
    "eva": {"lora": {"r": 4}},
    "loraplus": {"lora": {"r": 4}},
    "qlora": {"lora": {"r": 4, "dropout": 0.0}, "dtype": "float32"},
    "adalora": {"adalora": {"init_r": 4, "target_r": 2, "shrink": False}},
    "bitfit": {},
    "houlsby": {"bottleneck": {"bottleneck_size": 4, "random_drop": True, "train_norms": True}},
    "pfeiffer": {"bottleneck": {"bottleneck_size": 4}},
    "parallel": {"bottleneck": {"bottleneck_size": 4}},
    "prefix": {"prefix": {"num_virtual_tokens": 3, "encoder_hidden_size": 8}},
    "p_tuning_v2": {"prefix": {"num_virtual_tokens": 3}},
    "prompt": {"prompt": {"num_virtual_tokens": 3}},
    "p_tuning": {"prompt": {"num_virtual_tokens": 3}},
    "compacter": {"compacter": {"phm_dim": 2, "reduction_factor": 8, "train_norms": True}},
    "mam": {
        "prefix": {"num_virtual_tokens": 3, "encoder_hidden_size": 8},
        "bottleneck": {"bottleneck_size": 4},
    },
    "unipelt": {
        "prefix": {"num_virtual_tokens": 3, "encoder_hidden_size": 8},
        "bottleneck": {"bottleneck_size": 4},
    },
    "loreft": {"reft": {"r": 2}},
    "direft": {"reft": {"r": 2}},
    "ia3": {},
    "freeze": {"freeze": {"last_layers": 1}},
    "full": {},
    "lora+bitfit": {"lora": {"r": 4}},
}


class Losses(Callback):
    """Keeps the loss of every optimizer step, and saves a checkpoint in the middle of the first epoch."""

    def __init__(self, save: Path | None) -> None:
        self.found: list[float] = []
        self.save = save

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if len(self.found) < trainer.global_step:
            self.found.append(float(trainer.callback_metrics["train_loss"]))
            if trainer.global_step == HALF and self.save is not None:
                trainer.save_checkpoint(self.save)


def strategy(name: str) -> Any:
    if name == "ddp":
        return DDPStrategy(process_group_backend="gloo")
    if name == "fsdp2":
        return FSDP2Strategy(process_group_backend="gloo")
    return "auto"


def trained(module: PEFT) -> dict[str, Tensor]:
    """Whole tensors of what was trained, on every process."""
    found, keys = {}, module.trained_keys()  # with the base weights that a restart has rewritten
    for name, parameter in module.named_parameters():
        if parameter.requires_grad or name in keys:
            data = parameter.detach()
            found[name] = (data.full_tensor() if hasattr(data, "full_tensor") else data).clone()
    return found


def fit(
    method: str, kind: str, folder: Path, out: Path, save: Path | None = None, ckpt: Path | None = None
) -> tuple[PEFT, Trainer, Losses]:
    seed_everything(3, verbose=False)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    module = compose(method, "sft")(str(folder), lr=1e-2, **SETTINGS[method])
    data = Instructions(
        str(out / "rows.jsonl"), batch_size=4 // world, max_length=64, val_fraction=0.1, cache_dir=str(out)
    )
    losses = Losses(save)
    trainer = Trainer(
        accelerator="cpu",
        devices=world,
        strategy=strategy(kind),
        max_steps=STEPS,
        accumulate_grad_batches=2,
        max_epochs=-1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=None,
        val_check_interval=3,
        callbacks=[losses],
        default_root_dir=out,
        inference_mode=kind != "fsdp2",
    )
    trainer.fit(module, data, ckpt_path=ckpt, weights_only=True if ckpt else None)
    assert isinstance(module, PEFT)
    return module, trainer, losses


def main(out: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    kinds = ["ddp", "fsdp2"] if world > 1 else ["one"]
    for method in SETTINGS:
        for kind in kinds:
            checkpoint = out / f"{method}-{kind}.ckpt"
            module, trainer, losses = fit(method, kind, folder, out, save=checkpoint)
            metrics = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("val")}
            result = {"losses": losses.found, "weights": trained(module), "metrics": metrics}
            module, _, _ = fit(method, kind, folder, out, ckpt=checkpoint)
            result["resumed"] = trained(module)
            if rank == 0:
                torch.save(result, out / f"{method}-{kind}.pt")
        if world > 1:  # one file serves both: go on under the other strategy
            for kind, other in (("ddp", "fsdp2"), ("fsdp2", "ddp")):
                module, _, _ = fit(method, kind, folder, out, ckpt=out / f"{method}-{other}.ckpt")
                weights = trained(module)
                if rank == 0:
                    torch.save({"weights": weights}, out / f"{method}-{other}-to-{kind}.pt")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
