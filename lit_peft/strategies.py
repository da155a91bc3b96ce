"""FSDP2 with the defaults that adapters want, as `--trainer.strategy fsdp2`."""

from __future__ import annotations

import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry


class FSDP2Strategy(ModelParallelStrategy):
    """Lightning's ModelParallelStrategy, sharding over all processes and saving one file.

    Lightning's `auto` means tensor parallelism inside a node, which adapters do not have. One file, because it holds
    adapters only: it is small, and one device and DDP read it too.

    Args:
        data_parallel_size: how many processes share the model; `auto`: all of them.
        save_distributed_checkpoint: write a folder of shards instead of one file.
        process_group_backend: `nccl`, `gloo`, ...; None: what suits the device.
        timeout: how long collectives wait.

    Example:
        >>> from lit_peft.strategies import FSDP2Strategy
        >>> # Trainer(strategy=FSDP2Strategy(), devices=8)
    """

    def __init__(
        self,
        data_parallel_size: Literal["auto"] | int = "auto",
        save_distributed_checkpoint: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta | None = timedelta(minutes=30),
    ) -> None:
        super().__init__(
            data_parallel_size=data_parallel_size,
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )

    def setup_environment(self) -> None:
        """Take all processes for data parallelism unless a number was given."""
        if self._data_parallel_size == "auto":
            self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a checkpoint of any strategy.

        Others number the optimizer's parameters in the optimizer's own order; Lightning's loader takes such numbers for
        positions among *all* of the model's parameters, frozen ones included, and would fill the wrong ones. So the
        numbers are replaced by names first.
        """
        path = Path(self.broadcast(checkpoint_path))
        if path.is_dir() or not self.optimizers:
            return super().load_checkpoint(path, weights_only=weights_only)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        assert self.lightning_module is not None
        names = {id(parameter): name for name, parameter in self.lightning_module.named_parameters()}
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            known: dict[Any, str] = {}
            for now, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
                known |= {key: names[id(p)] for key, p in zip(saved["params"], now["params"], strict=True)}
                saved["params"] = [known[key] for key in saved["params"]]
            state["state"] = {known[key]: value for key, value in state["state"].items()}
        with tempfile.TemporaryDirectory() as folder:
            renamed = Path(folder) / "renamed.ckpt"
            torch.save(checkpoint, renamed)
            # The path is this process's own, so the base class must not replace it by rank 0's.
            return _on_every_rank(self, renamed, weights_only)


def _on_every_rank(strategy: FSDP2Strategy, path: Path, weights_only: bool | None) -> dict[str, Any]:
    from lightning.fabric.strategies.model_parallel import _load_checkpoint

    assert strategy.lightning_module is not None
    assert strategy.model is not None
    state = {"state_dict": strategy.model} | {f"optimizer_{i}": o for i, o in enumerate(strategy.optimizers)}
    return _load_checkpoint(
        path=path,
        state=state,
        strict=strategy.lightning_module.strict_loading,
        optimizer_states_from_list=True,
        weights_only=weights_only,
    )


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="FSDP2 over all processes, one checkpoint file")
