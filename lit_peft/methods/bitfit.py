"""BitFit: train only the biases (Ben Zaken et al. 2021, https://arxiv.org/abs/2106.10199).

    y = f(x) + (b + d)

The paper trains b itself. Here the change d is trained beside the frozen b: the same gradients and the same result,
and the base stays exact, so that BitFit can be switched off, named, swapped and merged like every other adapter.
Models without biases (Llama, Qwen3) get zero biases on the chosen linear layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lit_peft.adapter import Adapter, innermost
from lit_peft.combining import weighted
from lit_peft.mixin import PEFT
from lit_peft.placing import join
from lit_peft.sites import Site, match, walk, widths

# Modules whose output is (something) + bias. Others (an attention block's packed bias) do not add it at the end.
ADDS_BIAS = (nn.Linear, Conv1D, nn.LayerNorm, nn.GroupNorm)


@dataclass(frozen=True, kw_only=True)
class BitFitConfig:
    """Settings of BitFit.

    Args:
        target_modules: `all` for every bias of the model; or linear layers, written as for LoRA (`all-linear`, a role,
            a list of endings, a regular expression): only their biases.
        create_missing: give zero biases to chosen linear layers that have none (all of them on Llama).

    Raises:
        ValueError: if target_modules is empty.
    """

    target_modules: list[str] | str = "all"
    create_missing: bool = True

    default_lr: ClassVar[float] = 1e-3

    def __post_init__(self) -> None:
        if not self.target_modules:
            raise ValueError("bitfit.target_modules is empty. Name some, or leave it out for every bias.")

    def to_peft(self) -> dict[str, Any]:
        """Return the settings for `adapter_config.json`; HF PEFT has no BitFit."""
        return {"peft_type": "LIT_BITFIT", "create_missing": self.create_missing, "biases": self.target_modules}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> BitFitConfig:
        """Read the settings of a saved folder."""
        return cls(target_modules=config["biases"], create_missing=config["create_missing"])


class BitFitBias(Adapter):
    """Adds a trained change d to the bias of a layer, or to the output of a layer without one.

    Example:
        >>> import torch
        >>> layer = BitFitBias(torch.nn.Linear(8, 4, bias=False), BitFitConfig())
        >>> [tuple(p.shape) for _, p in layer.own_parameters()]
        [(4,)]
    """

    peft_type: ClassVar[str] = "LIT_BITFIT"

    def add(self, name: str, config: BitFitConfig) -> None:
        """Make a zero change (out,) under another name."""
        super().add(name, config)
        if "bitfit_bias" not in self._modules:
            self.bitfit_bias = nn.ParameterDict()
        base = innermost(self.base)
        bias = base._parameters.get("bias")
        size = bias.shape if bias is not None else (widths(base)[1],)
        device = next(base.parameters()).device
        self.bitfit_bias[name] = nn.Parameter(torch.zeros(size, device=device, dtype=torch.float32))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Map (..., in) to (..., out)."""
        shares = self.shares(x)
        if type(self.base) is nn.Linear and shares and all(rows is None for _, rows in shares):
            # one kernel with the bias inside, as in a model that has it
            change = sum(self.bitfit_bias[name] for name, _ in shares)
            bias = change if self.base.bias is None else self.base.bias + change
            y: Tensor = F.linear(x, self.base.weight, bias.to(self.base.weight.dtype))
            return y
        return super().forward(x, *args, **kwargs)

    def change(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """Return y + d: (..., out) -> (..., out)."""
        change: Tensor = self.bitfit_bias[name]
        return y + change.to(y.dtype)

    def merge(self, names: tuple[str, ...] | None = None) -> nn.Module:
        """Add d to the base's bias, creating it where there was none."""
        with torch.no_grad():
            for name in self.active() if names is None else names:
                if name not in self.configs:
                    continue
                change = self.bitfit_bias[name]
                old = self.base._parameters.get("bias")
                dtype = self.base.weight.dtype if old is None else old.dtype
                new = change if old is None else old.float() + change
                self.base.bias = nn.Parameter(new.to(dtype), requires_grad=False)
        return self.base

    def combined(
        self, names: Sequence[str], weights: Sequence[float], how: str, **options: Any
    ) -> tuple[BitFitConfig, dict[str, Tensor]]:
        """Return the weighted sum of the changes d, or what another rule makes of them.

        Raises:
            ValueError: for a rule that is for low ranks only.
        """
        changes = [self.bitfit_bias[name].detach() for name in names]
        change = weighted(changes, weights, how, density=options["density"], generator=options["generator"])
        return self.configs[names[0]], {"bitfit_bias": change}

    def tensors(self, name: str = "default") -> dict[str, Tensor]:
        """Return the change as `{"bitfit_bias": (out,)}`."""
        return {"bitfit_bias": self.bitfit_bias[name].detach()}


class BitFit(PEFT):
    """BitFit on the task's model: the biases are trained, nothing else.

    Args:
        bitfit: which biases, and whether to create missing ones.

    Example:
        >>> from lit_peft import BitFit, SFT
        >>> class Mine(BitFit, SFT): ...
    """

    method = "bitfit"

    def __init__(self, *args: Any, bitfit: BitFitConfig = BitFitConfig(), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.bitfit = self.configured(BitFitConfig, "bitfit", bitfit)

    def place_adapters(self) -> None:
        """Put a `BitFitBias` around every layer whose bias is trained.

        Raises:
            ValueError: if there is no bias to train and none may be created.
        """
        super().place_adapters()
        assert self.model is not None
        paths, created = self._targets(self.model)
        if created:
            rank_zero_info(
                f"BitFit: this model has no bias on {created} of the {len(paths)} chosen layers; zero biases are "
                "created there. They are part of the adapter."
            )
        join(self.model, dict.fromkeys(paths, self.bitfit), lambda base: BitFitBias, self.placing)

    def _targets(self, model: nn.Module) -> tuple[list[str], int]:
        """Return the layers to adapt and how many of them have no bias yet."""
        modules = dict(model.named_modules())

        def has_bias(path: str) -> bool:
            return innermost(modules[path])._parameters.get("bias") is not None

        if self.bitfit.target_modules == "all":
            paths = [
                site.path
                for site in walk(model)
                if isinstance(site.base, ADDS_BIAS) and has_bias(site.path) and not self._trained_anyway(site)
            ]
            if paths or not self.bitfit.create_missing:
                if not paths:
                    raise ValueError("This model has no biases. Set bitfit.create_missing=true to add them.")
                return paths, 0
        target = "all-linear" if self.bitfit.target_modules == "all" else self.bitfit.target_modules
        paths = match(model, target)
        missing = [path for path in paths if not has_bias(path)]
        if missing and not self.bitfit.create_missing:
            raise ValueError(f"{missing[0]} has no bias. Set bitfit.create_missing=true to add one, or leave it out.")
        return paths, len(missing)

    def _trained_anyway(self, site: Site) -> bool:
        return any(self.is_trainable(f"{site.name}.{key}", p) for key, p in site.base.named_parameters(recurse=False))

    def adopt(self, config: Mapping[str, Any]) -> None:
        """Take the targets from an adapter folder."""
        super().adopt(config)
        if config.get("peft_type") == "LIT_BITFIT":
            self.bitfit = self.configured(BitFitConfig, "bitfit", BitFitConfig.from_peft(config))

    def gathered(self, layers: Mapping[str, Any]) -> BitFitConfig:
        """Return the configuration of a combined adapter.

        Raises:
            ValueError: if the adapters do not have the same settings.
        """
        if any(config != self.bitfit for config in layers.values()):
            raise ValueError(
                "BitFit combines adapters of the same bitfit.target_modules. Let these act together instead."
            )
        return self.bitfit

    def parts(self) -> list[dict[str, Any]]:
        """Return the settings for `adapter_config.json`."""
        return [*super().parts(), self.bitfit.to_peft()]
