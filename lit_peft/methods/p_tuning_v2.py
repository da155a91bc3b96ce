"""P-tuning v2 (Liu et al. 2021, https://arxiv.org/abs/2110.07602): prefix tuning with its rows trained directly.

The paper's "deep prompts" are the keys and values of prefix tuning, p rows in every layer, as a rule without a network
behind them. They want a learning rate far above that of other methods: 5e-3 to 2e-2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from lit_peft.methods.prefix import PrefixTuning
from lit_peft.methods.prefix_config import PrefixConfig


@dataclass(frozen=True, kw_only=True)
class PTuningV2Config(PrefixConfig):
    """Settings of P-tuning v2.

    Args:
        num_virtual_tokens: length p of the prefix.
        prefix_projection: train the rows through a network instead of directly.
        encoder_hidden_size: width of that network's hidden layer.
        dropout: dropout on the rows.
        gate: scale the prefix by a learned gate for each token, or by a fixed number; 0 leaves it out.
        init_text: start from the keys and values of this text, repeated or cut to p tokens. Empty: at random.
    """

    prefix_projection: bool = False

    default_lr: ClassVar[float] = 1e-2


class PTuningV2(PrefixTuning):
    """P-tuning v2 on the task's model.

    Args:
        prefix: length of the prefix.

    Example:
        >>> from lit_peft import PTuningV2, SFT
        >>> class Mine(PTuningV2, SFT): ...
    """

    method = "p_tuning_v2"

    def __init__(self, *args: Any, prefix: PTuningV2Config = PTuningV2Config(), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.prefix = self.configured(PTuningV2Config, "prefix", prefix)
