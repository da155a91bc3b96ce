"""Bottleneck adapters: small networks inside the layers.

    f(h) = s U act(D h + b_d) + s b_u,    D (m, d), U (d, m)

Houlsby et al. 2019 (https://arxiv.org/abs/1902.00751) put one behind the attention and one behind the feed-forward of
every layer: y -> y + f(y), before the residual sum. Pfeiffer et al. 2020 (https://arxiv.org/abs/2005.00247) put one
behind the feed-forward, on the residual sum. He et al. 2021 (https://arxiv.org/abs/2110.04366) put one beside the
feed-forward: y -> y + f(x), with x what the feed-forward reads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from lit_peft.adapter import Adapter, innermost, join
from lit_peft.mixin import PEFT
from lit_peft.sites import geometry
from lit_peft.sublayers import Place, after, beside, on_residual


@dataclass(frozen=True, kw_only=True)
class BottleneckConfig:
    """Settings of bottleneck adapters.

    Args:
        bottleneck_size: width m of the bottleneck; None: hidden size / reduction_factor.
        reduction_factor: hidden size / m, where bottleneck_size is not given.
        activation: the non-linearity, by its name in transformers.
        scale: factor s in front of the adapter's output.
        dropout: dropout on the adapter's input.
        init: `zero` starts as the base exactly (D Kaiming-uniform, U zero); `houlsby` starts near it, with all weights
            from a normal distribution of width 1e-3, cut at two widths.
        leave_out: numbers of the layers without adapters; AdapterDrop (https://arxiv.org/abs/2010.11918) leaves out the
            first ones.

    Raises:
        ValueError: if a value is out of range.
    """

    bottleneck_size: int | None = None
    reduction_factor: float = 16
    activation: str = "relu"
    scale: float = 1.0
    dropout: float = 0.0
    init: Literal["zero", "houlsby"] = "zero"
    leave_out: list[int] | None = None

    default_lr: ClassVar[float] = 3e-4

    def __post_init__(self) -> None:
        if self.bottleneck_size is not None and self.bottleneck_size < 1:
            raise ValueError(f"bottleneck.bottleneck_size is {self.bottleneck_size}; it must be 1 or more.")
        if not self.reduction_factor > 0:
            raise ValueError(f"bottleneck.reduction_factor is {self.reduction_factor}; it must be above 0.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"bottleneck.dropout is {self.dropout}; it must be at least 0 and below 1.")
        if self.activation not in ACT2FN:
            raise ValueError(f"bottleneck.activation {self.activation!r} is unknown. Use relu, gelu, silu, tanh, ...")
        if not math.isfinite(self.scale) or self.scale == 0:
            raise ValueError(f"bottleneck.scale is {self.scale}; it must be a number other than 0.")

    def width(self, hidden: int) -> int:
        """Return m for a model of this hidden size.

        Raises:
            ValueError: if the hidden size does not divide by reduction_factor.
        """
        if self.bottleneck_size is not None:
            return self.bottleneck_size
        m = hidden / self.reduction_factor
        if m < 1 or m != int(m):
            raise ValueError(
                f"bottleneck.reduction_factor {self.reduction_factor:g} does not divide the hidden size {hidden}. "
                "Choose another, or set bottleneck_size."
            )
        return int(m)
