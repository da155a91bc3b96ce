"""Parallel adapters (He et al. 2021, https://arxiv.org/abs/2110.04366): one beside the feed-forward of each layer.

    y -> y + s U relu(D x),    s = 4

D starts Kaiming-uniform and U at zero, as in LoRA.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from lit_peft.adapter import Adapter, innermost
from lit_peft.methods.bottleneck import (
    BottleneckAcross,
    BottleneckBeside,
    BottleneckBesideNorm,
    BottleneckConfig,
    Bottlenecks,
)
from lit_peft.structure import is_linear
from lit_peft.sublayers import across, beside, is_norm


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(BottleneckConfig):
    """Settings of parallel adapters, with the defaults of its paper.

    Args:
        bottleneck_size: width m of the bottleneck; None: hidden size / reduction_factor.
        reduction_factor: hidden size / m, where bottleneck_size is not given.
        activation: the non-linearity, by its name in transformers.
        scale: factor s in front of the adapter's output.
        dropout: dropout on the adapter's input.
        init: `zero` starts as the base exactly; `houlsby` near it.
        leave_out: numbers of the layers without adapters (AdapterDrop).
        random_drop: in training leave out the first n layers' adapters, n drawn anew in each step (AdapterDrop).
        train_norms: train the model's LayerNorms (RMSNorms) too; not those of layers left out.
        hidden_size: width d of the residual stream; None: the model's.
        peft_type: set by the method: what its folders are called.
    """

    bottleneck_size: int | None = 512
    scale: float = 4.0

    default_lr: ClassVar[float] = 1e-4


class ParallelAdapter(Bottlenecks):
    """Parallel adapters on the task's model.

    Args:
        bottleneck: size, activation, scale and start.

    Example:
        >>> from lit_peft import ParallelAdapter, SFT
        >>> class Mine(ParallelAdapter, SFT): ...
    """

    method = "parallel"
    peft_type = "LIT_PARALLEL"

    def __init__(self, *args: Any, bottleneck: ParallelConfig = ParallelConfig(), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.bottleneck = self.configured(ParallelConfig, "bottleneck", bottleneck)

    def sites(self) -> dict[str, int]:
        """Return the feed-forward blocks, or what adds their input and normalises."""
        assert self.model is not None
        return beside(self.model)

    def readers(self) -> dict[str, str]:
        """Return the first linear layers of feed-forwards that have no module of their own."""
        assert self.model is not None
        return across(self.model)

    def bottleneck_class(self, module: nn.Module) -> type[Adapter]:
        """Return the adapter around BERT's module that adds and normalises, a last linear layer, or a feed-forward."""
        if is_linear(module):
            return BottleneckAcross
        post = any(is_norm(innermost(child)) for child in module.children())
        return BottleneckBesideNorm if post else BottleneckBeside
