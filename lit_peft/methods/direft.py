"""DiReFT: h -> h + W_2^T (W_1 h + b) at prompt positions (Wu et al. 2024, https://arxiv.org/abs/2404.03592)."""

from __future__ import annotations

from typing import Any, ClassVar

from lit_peft.methods.reft import DiReFTLayer, LoReFTLayer, ReFT, ReFTConfig


class DiReFT(ReFT):
    """DiReFT on the task's model.

    Args:
        reft: rank, positions and layers.

    Example:
        >>> from lit_peft import DiReFT, SFT
        >>> class Mine(DiReFT, SFT): ...
    """

    method = "direft"
    layer: ClassVar[type[LoReFTLayer]] = DiReFTLayer

    def __init__(self, *args: Any, reft: ReFTConfig = ReFTConfig(), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.reft = self.configured(ReFTConfig, "reft", reft)
