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
from lit_peft.sublayers import across, beside, is_norm, norms_before


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
        reads_stream: on models that normalise first, read the residual stream as it is and not what the feed-forward
            reads, as folders of adapter-hub's library want it.
    """

    bottleneck_size: int | None = 512
    scale: float = 4.0
    reads_stream: bool = False

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
    bottleneck: ParallelConfig
    peft_type = "LIT_PARALLEL"

    def __init__(self, *args: Any, bottleneck: ParallelConfig = ParallelConfig(), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.bottleneck = self.configured(ParallelConfig, "bottleneck", bottleneck)

    def sites(self) -> dict[str, int]:
        """Return the feed-forward blocks, or what adds their input and normalises."""
        assert self.model is not None
        return beside(self.model)

    def readers(self) -> dict[str, str]:
        """Return what notes the input of an adapter that does not stand around all of the feed-forward it is beside.

        That is the first linear layer where no module holds the whole, and the norm where the stream is read.
        """
        assert self.model is not None
        if self.bottleneck.reads_stream and not any(map(_adds, map(self.model.get_submodule, self.sites()))):
            return norms_before(self.model)
        return across(self.model)

    def bottleneck_class(self, module: nn.Module) -> type[Adapter]:
        """Return the adapter around BERT's module that adds and normalises, a last linear layer, or a feed-forward."""
        if _adds(module):
            return BottleneckBesideNorm
        return BottleneckAcross if is_linear(module) or self.bottleneck.reads_stream else BottleneckBeside


def _adds(module: nn.Module) -> bool:
    """Whether a module adds what the feed-forward read, and normalises."""
    return any(is_norm(innermost(child)) for child in innermost(module).children())
