"""Pfeiffer adapters (2020, https://arxiv.org/abs/2005.00247): one in each layer, on the sum behind the feed-forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from lit_peft.adapter import Adapter
from lit_peft.methods.bottleneck import Bottleneck, BottleneckConfig, BottleneckInNorm, Bottlenecks
from lit_peft.sublayers import is_norm, on_sum


@dataclass(frozen=True, kw_only=True)
class PfeifferConfig(BottleneckConfig):
    """Settings of Pfeiffer adapters, with the defaults of its paper.

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

    reduction_factor: float = 16


class Pfeiffer(Bottlenecks):
    """Pfeiffer adapters on the task's model.

    Args:
        bottleneck: size, activation, scale and start.

    Example:
        >>> from lit_peft import Pfeiffer, SFT
        >>> class Mine(Pfeiffer, SFT): ...
    """

    method = "pfeiffer"
    peft_type = "LIT_PFEIFFER"

    def __init__(self, *args: Any, bottleneck: PfeifferConfig = PfeifferConfig(), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.bottleneck = self.configured(PfeifferConfig, "bottleneck", bottleneck)

    def sites(self) -> dict[str, int]:
        """Return what yields the sum behind the feed-forward."""
        assert self.model is not None
        return on_sum(self.model)

    def bottleneck_class(self, module: nn.Module) -> type[Adapter]:
        """Return the adapter around a norm (post-LN models) or around a layer."""
        return BottleneckInNorm if is_norm(module) else Bottleneck
