"""AdaLoRA: low-rank updates whose ranks are shared out over the layers (Zhang et al. 2023, arXiv 2303.10512).

    y = W x + b + s P (lambda * (Q dropout(x))),    P (out, r), lambda (r,), Q (r, in),    s = alpha / init_r

P and Q start from N(0, 0.02^2), lambda at zero: the adapted model starts as the base model. The penalty of equation 4
keeps P and Q close to orthonormal, so that P diag(lambda) Q is close to a singular value decomposition, of which single
triplets can be dropped. `RankAllocator` drops them: from init_r in each layer to target_r on average.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from lit_peft.adapter import innermost, named_adapters
from lit_peft.callbacks.rank_allocator import RankAllocator
from lit_peft.low_rank.singular import AdaLoRALinear, penalty
from lit_peft.mixin import PEFT
from lit_peft.placing import join
from lit_peft.sites import match
from lit_peft.targets import KEYS, stored_targets

EPSILON = 1e-5  # HF PEFT divides by init_r + 1e-5, so alpha is converted both ways
# PEFT's settings that leave the formula as it is or are read below; any other must be off.
PLAIN = frozenset(
    "peft_type task_type auto_mapping base_model_name_or_path revision inference_mode peft_version runtime_config r "
    "init_r target_r lora_alpha lora_dropout use_rslora target_modules exclude_modules layers_to_transform tinit "
    "tfinal deltaT beta1 beta2 orth_reg_weight total_step rank_pattern layers_pattern modules_to_save fan_in_fan_out "
    "init_lora_weights loftq_config eva_config corda_config lora_ga_config velora_config megatron_core "
    f"qalora_group_size ensure_weight_tying {KEYS}".split()
)


@dataclass(frozen=True, kw_only=True)
class AdaLoRAConfig:
    """Settings of AdaLoRA. How many steps the run has, the Trainer knows; counts of steps may be shares of it.

    Args:
        init_r: rank of each layer's update in the beginning.
        target_r: mean rank in the end.
        alpha: numerator of the scale s = alpha / init_r, which stays when ranks shrink.
        dropout: dropout on the adapter's input.
        target_modules: which linear layers: `all-linear`, a role (`attention`, `feed-forward`), a list of endings of
            module paths, or one regular expression over whole paths.
        exclude_modules: layers to leave out, written like target_modules; wins over it.
        layers_to_transform: only these transformer layers, by number; None: all.
        orth_reg_weight: weight of the penalty that keeps P and Q orthonormal.
        beta1: how slowly the mean sensitivity follows.
        beta2: how slowly its uncertainty follows.
        tinit: optimizer steps before the first rank is dropped; a float is a share of the run; None: a tenth.
        tfinal: optimizer steps at the end with settled ranks, written like tinit; None: four tenths.
        deltaT: optimizer steps from one choice of ranks to the next; None: a thousandth of the run.
        shrink: cut the dropped ranks off the weights when training ends (not under FSDP2); saved adapters are cut
            always.

    Raises:
        ValueError: if a value is out of range.
    """

    init_r: int = 12
    target_r: int = 8
    alpha: float = 24
    dropout: float = 0.0
    target_modules: list[str] | str = "all-linear"
    exclude_modules: list[str] | str | None = None
    layers_to_transform: int | list[int] | None = None
    orth_reg_weight: float = 0.1
    beta1: float = 0.85
    beta2: float = 0.85
    tinit: int | float | None = None
    tfinal: int | float | None = None
    deltaT: int | None = None  # HF PEFT's name
    shrink: bool = True

    default_lr: ClassVar[float] = 1e-3

    def __post_init__(self) -> None:
        if type(self.init_r) is not int or self.init_r < 1:
            raise ValueError(f"adalora.init_r is {self.init_r}; the rank must be a whole number, 1 or more.")
        if type(self.target_r) is not int or not 1 <= self.target_r <= self.init_r:
            kind = "" if type(self.target_r) is int else "a whole number "
            raise ValueError(f"adalora.target_r is {self.target_r}; it must be {kind}from 1 to init_r, {self.init_r}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"adalora.dropout is {self.dropout}; it must be at least 0 and below 1.")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"adalora.alpha is {self.alpha}; it must be above 0.")
        if not 0 <= self.orth_reg_weight < math.inf:
            raise ValueError(f"adalora.orth_reg_weight is {self.orth_reg_weight}; it must be 0 or more.")
        if not self.target_modules:
            raise ValueError("adalora.target_modules is empty. Name some, or leave it out for all linear layers.")
        try:
            self.allocator()
        except ValueError as error:
            raise ValueError(f"adalora.{error}") from None

    @property
    def scale(self) -> float:
        """The factor s in front of P diag(lambda) Q."""
        return self.alpha / self.init_r

    def allocator(self) -> RankAllocator:
        """Return the callback that shares out the ranks; each named set has its own target_r."""
        names = ("tinit", "tfinal", "deltaT", "beta1", "beta2", "shrink")
        return RankAllocator(**{name: getattr(self, name) for name in names})

    def to_peft(self) -> dict[str, Any]:
        """Return the settings under HF PEFT's names; its schedule is written as one that is over."""
        alpha = _nearly(self.alpha * (self.init_r + EPSILON) / self.init_r)
        same = {key: getattr(self, key) for key in ("init_r", "target_r", "beta1", "beta2", "orth_reg_weight")}
        schedule = {"tinit": 0, "tfinal": 0, "deltaT": 1, "total_step": 1}
        lora = {"lora_alpha": alpha, "lora_dropout": self.dropout, "bias": "none", "rank_pattern": None}
        return {"peft_type": "ADALORA", **same, **schedule, **lora}

    def from_peft(self, config: Mapping[str, Any]) -> AdaLoRAConfig:
        """Read HF PEFT's settings; when ranks are dropped stays as it is here, because that belongs to a run.

        Raises:
            ValueError: for a setting that changes the formula and is not known here.
        """
        for key, value in config.items():
            if key not in PLAIN and value not in (None, False, [], {}, "none"):
                raise ValueError(f"This adapter uses {key}={value!r}, which AdaLoRA does not have.")
        if not config.get("target_modules"):
            raise ValueError("adapter_config.json names no target_modules. Add the list of adapted layers to the file.")
        init_r, alpha = config.get("init_r", 12), config.get("lora_alpha", 8)
        return replace(
            self,
            init_r=init_r,
            target_r=min(init_r, config.get("target_r", 8)),
            alpha=_nearly((alpha if alpha > 0 else init_r) * init_r / (init_r + EPSILON)),
            dropout=config.get("lora_dropout", 0.0),
            beta1=config.get("beta1", self.beta1),
            beta2=config.get("beta2", self.beta2),
            orth_reg_weight=config.get("orth_reg_weight", self.orth_reg_weight),
            target_modules=config["target_modules"],
            exclude_modules=None,
            layers_to_transform=None,
        )


def _nearly(value: float) -> float:
    """Undo the rounding of one conversion there and back: 16.000000000000004 is 16."""
    short = round(value, 9)
    return short if math.isclose(short, value, rel_tol=1e-14) else value


class AdaLoRA(PEFT):
    """AdaLoRA on the task's model: low-rank updates that share one budget of ranks.

    A further named set has ranks, scale and targets of its own, and a budget of its own. Penalty and schedule belong to
    the run: they are those of the first set.

    Args:
        adalora: ranks, scale, targets, penalty and schedule.

    Example:
        >>> from lit_peft import AdaLoRA, SFT
        >>> class Mine(AdaLoRA, SFT): ...
    """

    method = "adalora"

    def __init__(self, *args: Any, adalora: AdaLoRAConfig = AdaLoRAConfig(), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.adalora = self.configured(AdaLoRAConfig, "adalora", adalora)

    def place_adapters(self) -> None:
        """Put an `AdaLoRALinear` around every target."""
        super().place_adapters()
        assert self.model is not None
        config = self.adalora
        paths = match(
            self.model,
            config.target_modules,
            exclude_modules=config.exclude_modules,
            layers_to_transform=config.layers_to_transform,
        )
        join(self.model, dict.fromkeys(paths, config), lambda base: AdaLoRALinear, self.placing)

    def configure_callbacks(self) -> list[Callback]:
        """Bring a `RankAllocator`, unless the Trainer has one."""
        callbacks = super().configure_callbacks()
        if not any(isinstance(callback, RankAllocator) for callback in self.trainer.callbacks):  # type: ignore[attr-defined]
            callbacks.append(self.adalora.allocator())
        return callbacks

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Add the penalty to the loss that the task returns, whatever task it is; evaluation does not see it."""
        self.counted = None
        output = super().training_step(*args, **kwargs)
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor) or not self.adalora.orth_reg_weight:
            return output
        value = penalty(adapter for _, adapter in self._placed_adapters())
        if self._trainer is not None:
            self.log("orthogonality", value.detach())
        added = self.adalora.orth_reg_weight * value
        if self.counted is not None:
            added = added * self._count(self.counted).to(added.dtype)
        loss = loss + added.to(loss.dtype)
        return {**output, "loss": loss} if isinstance(output, Mapping) else loss

    def _count(self, counted: Tensor) -> Tensor:
        """Return what a summed loss counts: under FSDP2 the mean of all processes.

        There every process computes the same penalty and keeps the gradient of its shard, which nobody adds up; under
        DDP the gradients of all processes are averaged, and each may bring its own count.
        """
        sharded = any(
            hasattr(adapter.triplets(n)[0][0], "full_tensor")
            for _, adapter in self._placed_adapters()
            for n in adapter.configs
        )
        if sharded:
            counted = counted.clone()
            dist.all_reduce(counted)
            counted = counted / dist.get_world_size()
        return counted

    def _placed_adapters(self) -> list[tuple[str, AdaLoRALinear]]:
        assert self.model is not None
        return [(path, adapter) for path, adapter in named_adapters(self.model) if isinstance(adapter, AdaLoRALinear)]

    def shrink(self) -> None:
        """Cut off the ranks that were dropped, in every layer; `RankAllocator` does it by itself when a fit ends.

        A layer left with no rank adds nothing to its base. Outputs stay the same.

        Raises:
            TypeError: if the weights are sharded (FSDP2). Save the adapter instead: files are cut always.
        """
        for path, adapter in self._placed_adapters():
            for name in list(adapter.kept):
                if hasattr(adapter.triplets(name)[0][0], "full_tensor"):
                    raise TypeError(f"{path} is sharded, so its ranks cannot be cut. Save the adapter: files are cut.")
                adapter.shrink(name)

    # Checkpoints and folders -----------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note which rows are kept, where that is settled and they are not cut."""
        super().on_save_checkpoint(checkpoint)
        kept = {path: {name: rows.tolist() for name, rows in a.kept.items()} for path, a in self._placed_adapters()}
        checkpoint["lit_peft"]["kept_rows"] = {path: rows for path, rows in kept.items() if rows}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take on the ranks of the file, cut or not."""
        state = checkpoint.get("state_dict", {})
        kept = checkpoint.get("lit_peft", {}).get("kept_rows", {})
        fits = self.model is not None and not self.changed_settings(checkpoint)
        for path, adapter in self._placed_adapters() if fits else ():
            for name, config in adapter.configs.items():
                stored = state.get(f"model.{path}.adalora_lambda.{name}")
                if stored is not None and len(adapter.adalora_lambda[name]) != len(stored) <= config.init_r:
                    adapter.resize(name, len(stored))
                adapter.kept.pop(name, None)
                if name in kept.get(path, {}):
                    adapter.kept[name] = torch.tensor(kept[path][name])
        super().on_load_checkpoint(checkpoint)

    def adopt(self, config: Mapping[str, Any]) -> None:
        """Take init_r, scale and targets from an adapter folder.

        Raises:
            ValueError: if its layers do not fit this model, or it has a setting that AdaLoRA does not.
        """
        super().adopt(config)
        if config.get("peft_type") == "ADALORA":
            assert self.model is not None
            plain = self.adalora.from_peft(config)
            targets = stored_targets(config, "lora_E", (path for path, _ in self.model.named_modules()))
            self.adalora = self.configured(AdaLoRAConfig, "adalora", plain, target_modules=targets)

    def parts(self) -> list[dict[str, Any]]:
        """Return the settings for `adapter_config.json`."""
        turned = any(isinstance(innermost(adapter), Conv1D) for _, adapter in self._placed_adapters())
        # PEFT sets this by itself on GPT-2, with a warning
        return [*super().parts(), {**self.adalora.to_peft(), "fan_in_fan_out": turned}]
