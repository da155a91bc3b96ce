"""LoRA with a gate, as part of UniPELT (Mao et al. 2022, https://arxiv.org/abs/2110.07577)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional as F

from lit_peft.adapter import Adapter, innermost
from lit_peft.gates import Gates
from lit_peft.low_rank.linear import LoRALinear
from lit_peft.structure import widths

if TYPE_CHECKING:
    from lit_peft.methods.unipelt import GatedLoRAConfig


class GatedLoRALinear(LoRALinear):
    """Adds g(x) s B A dropout(x) to a linear layer's output, with a gate g in (0, 1) read from the input.

    The authors' code lets the gate replace s; with alpha = r, s is 1 and both are the same.
    """

    peft_type = "LIT_GATED_LORA"
    site = ("causal",)
    merge = Adapter.merge  # which refuses: the gate depends on the input

    def add(self, name: str, config: GatedLoRAConfig) -> None:  # type: ignore[override]
        """Make A, B and the gate of another named set."""
        super().add(name, config)
        base = innermost(self.base)
        if "lora_gate" not in self._modules:
            self.lora_gate = Gates("lora", widths(base)[0])
        device = next(base.parameters()).device
        self.lora_gate.add(name, device, config.gate)

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Map (batch, length, in) to (batch, length, out)."""
        y: Tensor = self.base(x, *args, **kwargs)
        for name, rows in self.shares(x):
            part = x if rows is None else x[rows]
            update = self.update(name, part) * self.lora_gate(name, part, self.configs[name].causal, rows)
            y = y + update.to(y.dtype) if rows is None else y.index_add(0, rows, update.to(y.dtype))
        return y

    def update(self, name: str, x: Tensor) -> Tensor:
        """Return s B A dropout(x), (..., in) -> (..., out)."""
        config = self.configs[name]
        h = F.dropout(x, config.dropout, self.training) if config.dropout else x
        inner = F.linear(h, self.lora_a[name].to(h.dtype))
        out: Tensor = F.linear(inner, self.lora_b[name].to(h.dtype)) * config.scale
        return out

    def tensors(self, name: str = "default") -> dict[str, Tensor]:
        """Return A, B and the gate."""
        found = super().tensors(name)
        if name in self.lora_gate.weight:
            found["lora_gate.weight"] = self.lora_gate.weight[name].detach()
            found["lora_gate.bias"] = self.lora_gate.bias[name].detach()
        return found
