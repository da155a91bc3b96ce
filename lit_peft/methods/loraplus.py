"""LoRA+: a higher learning rate for B than for A (Hayou et al. 2024, https://arxiv.org/abs/2402.12354)."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from lit_peft.adapter import innermost
from lit_peft.methods.lora import LoRA


class LoRAPlus(LoRA):
    """LoRA with B, and what has one dimension, at `lora.loraplus_lr_ratio` times the learning rate of A.

    Heads' matrices learn as A does; adapted embeddings at `lora.loraplus_lr_embedding`. A module with an optimizer of
    its own asks for the groups: `torch.optim.AdamW(self.parameter_groups(lr=1e-4))`. A further named set has a ratio of
    its own: `module.add_adapter("two", LoRAPlus, lora=LoRAConfig(loraplus_lr_ratio=4))`.

    Example:
        >>> from lit_peft import LoRAPlus, SFT
        >>> class Mine(LoRAPlus, SFT): ...
    """

    method = "loraplus"
    default_lr: ClassVar[float] = 1e-4  # of A

    def adjusted_learning_rate(self, name: str, parameter: nn.Parameter, lr: float) -> float:
        """Return `lr` times the ratio for B and vectors, the embeddings' own rate for theirs."""
        lr = super().adjusted_learning_rate(name, parameter, lr)
        owner, _ = self.owner(name)
        if owner is not None and isinstance(innermost(owner), nn.Embedding):
            return self.lora.loraplus_lr_embedding
        low_rank = owner is not None and ".lora_" in name
        vector = parameter.ndim == 1
        if vector and not low_rank:
            # Without a rate for all, another method's vectors (BitFit's) keep the one that it chose for them.
            vector = owner is None and (self.given_lr is not None or self.learning_rate(name, parameter) is None)
        raised = vector or (low_rank and ".lora_b" in name)
        return lr * self.lora.loraplus_lr_ratio if raised else lr
