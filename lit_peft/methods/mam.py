"""MAM, the mix-and-match adapter (He et al. 2021, https://arxiv.org/abs/2110.04366): a short prefix and a wide adapter.

Prefix tuning on attention, where few parameters go far, and a scaled parallel adapter on feed-forward, which uses more
parameters better. Nothing but a composition of the two methods.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from lit_peft.methods.parallel import ParallelAdapter, ParallelConfig
from lit_peft.methods.prefix import PrefixTuning
from lit_peft.methods.prefix_config import PrefixConfig


@dataclass(frozen=True, kw_only=True)
class MAMPrefixConfig(PrefixConfig):
    """Settings of MAM's prefix, with the defaults of its paper.

    Args:
        num_virtual_tokens: length p of the prefix.
        prefix_projection: train the rows through a network instead of directly.
        encoder_hidden_size: width of that network's hidden layer.
        dropout: dropout on the rows.
        gate: scale the prefix by a learned gate for each token, or by a fixed number; 0 leaves it out.
        init_text: start from the keys and values of this text, repeated or cut to p tokens. Empty: at random.
    """

    encoder_hidden_size: int = 800

    default_lr: ClassVar[float] = 1e-4


class MAM(PrefixTuning, ParallelAdapter):
    """Prefix tuning on attention and a parallel adapter on feed-forward.

    Args:
        prefix: the prefix.
        bottleneck: the parallel adapter.

    Example:
        >>> from lit_peft import MAM, SFT
        >>> class Mine(MAM, SFT): ...
    """

    method = "mam"
    config_types: ClassVar[dict[str, type[Any]]] = {"prefix": MAMPrefixConfig, "bottleneck": ParallelConfig}

    def __init__(
        self,
        *args: Any,
        prefix: MAMPrefixConfig = MAMPrefixConfig(),
        bottleneck: ParallelConfig = ParallelConfig(),
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, prefix=prefix, bottleneck=bottleneck, **kwargs)
