"""EVA: LoRA that starts where its inputs vary (Paischer et al. 2024, https://arxiv.org/abs/2410.07170).

A starts at the first principal components of the layer's inputs and B at zero, so the start is the base. The ranks are
shared out anew, their sum kept: layers whose inputs have more large components get more, up to rho r, others fewer or
none. The calibration is a callback, `EVACalibration`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lit_peft.adapter import Adapter
from lit_peft.callbacks.eva_calibration import EVACalibration
from lit_peft.low_rank.dora import DoRALinear
from lit_peft.low_rank.linear import LoRALinear
from lit_peft.methods.lora import LoRA, LoRAConfig
from lit_peft.sites import match
from lit_peft.targets import bare, shortest_targets


class EVA(LoRA):
    """LoRA that starts at the main directions of each layer's inputs, with ranks to match.

    `Trainer.fit` calibrates on the training data before the first step; give it an `EVACalibration` of your own to set
    how. Without a Trainer it starts as plain LoRA and says so.

    Example:
        >>> from lit_peft import EVA, SFT
        >>> class Mine(EVA, SFT): ...
    """

    method = "eva"
    preset: ClassVar[dict[str, Any]] = {"init_lora_weights": "eva"}

    def configure_callbacks(self) -> list[Callback]:
        """Bring `EVACalibration`, unless the Trainer has one."""
        callbacks = super().configure_callbacks()
        if not any(isinstance(callback, EVACalibration) for callback in self.trainer.callbacks):  # type: ignore[attr-defined]
            callbacks.append(EVACalibration())
        return callbacks

    def configure_model(self) -> None:
        """Say so where no calibration can follow."""
        first = not self._placed
        super().configure_model()
        if first and self._trainer is None and self.uncalibrated():
            rank_zero_warn(
                "EVA starts as plain LoRA here, because no Trainer means no training data. Use Trainer.fit, or call "
                "EVACalibration().calibrate(module, batches) before training."
            )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the ranks first, where they are not known yet."""
        noted = checkpoint.get("hyper_parameters", {}).get("lora", {})
        if self._placed and self.uncalibrated() and self._trainer is not None and not self.trainer.optimizers:
            self.recall(noted)
        super().on_load_checkpoint(checkpoint)

    def uncalibrated(self) -> dict[str, int]:
        """Return the ranks of the layers that wait for a calibration, by path."""
        if self.lora.init_lora_weights != "eva":
            return {}
        linear = {path: a for path, a in self._placed_lora().items() if type(a) in (LoRALinear, DoRALinear)}
        return {path: adapter.configs["default"].r for path, adapter in linear.items()}

    def calibrate(self, directions: Mapping[str, Tensor]) -> None:
        """Start A at directions (r_i, in), with alpha_i = alpha r_i / r; a layer with none goes back to its base."""
        placed = self._placed_lora()
        configs = {path: adapter.configs["default"] for path, adapter in placed.items()}
        for path, found in directions.items():
            r = len(found)
            configs[path] = replace(configs[path], r=r, alpha=configs[path].alpha * r / configs[path].r) if r else None
        self._rebuild({path: config for path, config in configs.items() if path in directions})
        with torch.no_grad():
            for path, found in directions.items():
                if len(found):
                    placed[path].lora_a["default"].copy_(found)
        kept = {bare(path): config for path, config in configs.items() if config is not None}
        assert self.model is not None
        modules = {bare(path) for path, _ in self.model.named_modules()}
        r, alpha = self.lora.r, self.lora.alpha
        self.lora = self.configured(
            LoRAConfig,
            "lora",
            self.lora,
            target_modules=shortest_targets(kept, sorted(modules)),
            exclude_modules=None,
            layers_to_transform=None,
            rank_pattern={f"^{re.escape(path)}": c.r for path, c in kept.items() if c.r != r},
            alpha_pattern={f"^{re.escape(path)}": c.alpha for path, c in kept.items() if c.alpha != alpha},
            init_lora_weights="loaded",
        )

    def recall(self, settings: Mapping[str, Any]) -> None:
        """Take the ranks that an earlier calibration found, from the settings noted in its checkpoint."""
        if settings.get("init_lora_weights") != "loaded":
            return
        noted = LoRAConfig(**settings)
        assert self.model is not None
        kept = {bare(path) for path in match(self.model, noted.target_modules, exclude_modules=noted.exclude_modules)}
        paths = self._placed_lora()
        self._rebuild({path: noted.at(bare(path)) if bare(path) in kept else None for path in paths})
        self.lora = self.configured(LoRAConfig, "lora", noted)

    def _placed_lora(self) -> dict[str, Any]:
        assert self.model is not None
        found = {p: m for p, m in self.model.named_modules() if isinstance(m, Adapter) and "default" in m.configs}
        return {path: adapter for path, adapter in found.items() if isinstance(adapter.configs["default"], LoRAConfig)}

    def _rebuild(self, configs: Mapping[str, LoRAConfig | None]) -> None:
        assert self.model is not None
        modules: dict[str, nn.Module] = dict(self.model.named_modules(remove_duplicate=False))
        for path in reversed(list(configs)):  # inner ones first
            adapter, config = modules[path], configs[path]
            assert isinstance(adapter, Adapter)
            adapter.remove("default")
            if config is not None:
                with isolate_rng():  # what is drawn next stays what it would have been
                    adapter.add("default", replace(config, init_lora_weights="loaded"))
            elif not adapter.configs:
                for alias in [alias for alias, module in modules.items() if module is adapter]:
                    self.model.set_submodule(alias, adapter.base)
