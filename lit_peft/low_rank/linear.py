"""LoRA around a linear layer: `nn.Linear`, a quantised linear, or GPT-2's `Conv1D`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_peft.adapter import Adapter, innermost
from lit_peft.combining import low_rank
from lit_peft.structure import widths
from lit_peft.weights import fold

if TYPE_CHECKING:
    from lit_peft.methods.lora import LoRAConfig


class LoRALinear(Adapter):
    """Adds s B A dropout(x) to a linear layer's output.

    `base` is an `nn.Linear`, a quantised linear, or GPT-2's `Conv1D` (which stores W transposed). Inputs are
    (..., in), outputs (..., out). Parameters are float32 whatever the base is, and are cast to the input's dtype for
    the product, so that no float32 copy of the activations is kept.

    Example:
        >>> import torch
        >>> from lit_peft import LoRAConfig
        >>> layer = LoRALinear(torch.nn.Linear(8, 4), LoRAConfig(r=2))
        >>> sum(p.numel() for _, p in layer.own_parameters())
        24
    """

    peft_type: ClassVar[str] = "LORA"

    def add(self, name: str, config: LoRAConfig) -> None:
        """Make A (r, in) and B (out, r) of another named set."""
        super().add(name, config)
        if "lora_a" not in self._modules:
            self.lora_a = nn.ParameterDict()
            self.lora_b = nn.ParameterDict()
        wide, tall = widths(innermost(self.base))
        device = next(self.base.parameters()).device
        a = torch.empty(config.r, wide, device=device, dtype=torch.float32)
        b = torch.zeros(tall, config.r, device=device, dtype=torch.float32)
        if device.type != "meta":
            self.start(a, b, config)
        self.lora_a[name] = nn.Parameter(a)
        self.lora_b[name] = nn.Parameter(b)

    def start(self, a: Tensor, b: Tensor, config: LoRAConfig) -> None:
        """Fill A (r, in), empty so far, and B (out, r), zero so far, with their starting values."""
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))

    def change(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """Return y + s B A dropout(x): (..., in), (..., out) -> (..., out)."""
        config: LoRAConfig = self.configs[name]
        a, b = self.lora_a[name], self.lora_b[name]
        h: Tensor = F.dropout(x, config.dropout, self.training) if config.dropout else x
        h = F.linear(h, a.to(h.dtype))
        # addmm adds B h to y in one pass, with no temporary of the output's size
        rows, h = y.reshape(-1, y.shape[-1]), h.reshape(-1, h.shape[-1]).to(y.dtype)
        return torch.addmm(rows, h, b.t().to(y.dtype), alpha=config.scale).view(y.shape)

    def delta(self, name: str) -> Tensor:
        """Return s B A, (out, in), in float32."""
        delta: Tensor = self.configs[name].scale * (self.lora_b[name].float() @ self.lora_a[name].float())
        return delta

    def combined(
        self, names: Sequence[str], weights: Sequence[float], how: str, **options: Any
    ) -> tuple[LoRAConfig, dict[str, Tensor]]:
        """Return a weighted combination of some sets, as one set of scale 1.

        Raises:
            TypeError: if the update of a set is not s B A alone.
        """
        configs: list[LoRAConfig] = [self.configs[name] for name in names]
        other = type(self).delta is not LoRALinear.delta or type(self).change is not LoRALinear.change
        if other or any(config.use_dora for config in configs):
            return super().combined(names, weights, how, **options)
        with torch.no_grad():
            pairs = [(self.lora_a[n], self.lora_b[n], c.scale) for n, c in zip(names, configs, strict=True)]
            options.pop("absent")  # a set without this layer changes nothing there
            a, b = low_rank(pairs, weights, how, **options)
        r = a.shape[0]
        alpha = math.sqrt(r) if configs[0].use_rslora else float(r)
        plain: dict[str, Any] = {"rank_pattern": {}, "alpha_pattern": {}, "init_lora_weights": "default"}
        return replace(configs[0], r=r, alpha=alpha, **plain), {"lora_A.weight": a, "lora_B.weight": b}

    def merge(self, names: tuple[str, ...] | None = None) -> nn.Module:
        """Fold s B A into W: added in float32, rounded once to the base's dtype."""
        with torch.no_grad():
            for name in self.active() if names is None else names:
                if name in self.configs:
                    fold(self.base, self.delta(name))
        return self.base

    def tensors(self, name: str = "default") -> dict[str, Tensor]:
        """Return A and B under HF PEFT's names."""
        return {"lora_A.weight": self.lora_a[name].detach(), "lora_B.weight": self.lora_b[name].detach()}
