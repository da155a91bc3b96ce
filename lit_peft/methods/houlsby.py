"""Houlsby adapters (2019, https://arxiv.org/abs/1902.00751): behind attention and behind feed-forward in each layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from lit_peft.methods.bottleneck import BottleneckConfig, Bottlenecks
from lit_peft.sublayers import after


@dataclass(frozen=True, kw_only=True)
class HoulsbyConfig(BottleneckConfig):
    """Settings of Houlsby adapters, with the defaults of its paper.

    Args:
        bottleneck_size: width m of the bottleneck; None: hidden size / reduction_factor.
        reduction_factor: hidden size / m, where bottleneck_size is not given.
        activation: the non-linearity, by its name in transformers.
        scale: factor s in front of the adapter's output.
        dropout: dropout on the adapter's input.
        init: `zero` starts as the base exactly; `houlsby` near it.
        leave_out: numbers of the layers without adapters (AdapterDrop).
        random_drop: in training leave out the first n layers' adapters, n drawn anew in each step (AdapterDrop).
        train_norms: train the model's LayerNorms (RMSNorms) too, as the paper does; not those of layers left out.
        hidden_size: width d of the residual stream; None: the model's.
        peft_type: set by the method: what its folders are called.
    """

    bottleneck_size: int | None = 64
    activation: str = "gelu"
    init: Literal["zero", "houlsby"] = "houlsby"


class Houlsby(Bottlenecks):
    """Houlsby adapters on the task's model.

    Args:
        bottleneck: size, activation, scale and start.

    Example:
        >>> from lit_peft import Houlsby, SFT
        >>> class Mine(Houlsby, SFT): ...
    """

    method = "houlsby"
    peft_type = "LIT_HOULSBY"

    def __init__(self, *args: Any, bottleneck: HoulsbyConfig = HoulsbyConfig(), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.bottleneck = self.configured(HoulsbyConfig, "bottleneck", bottleneck)

    def sites(self) -> dict[str, int]:
        """Return what yields the outputs of attention and feed-forward blocks."""
        assert self.model is not None
        return {**after(self.model)[0], **after(self.model)[1]}
