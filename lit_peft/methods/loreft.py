"""LoReFT: h -> h + R^T (W h + b - R h) at prompt positions (Wu et al. 2024, https://arxiv.org/abs/2404.03592)."""

from __future__ import annotations

from typing import Any, ClassVar

from lit_peft.methods.reft import LoReFTLayer, ReFT, ReFTConfig


class LoReFT(ReFT):
    """LoReFT on the task's model.

    Args:
        reft: rank, positions and layers.

    Example:
        >>> from lit_peft import LoReFT, SFT
        >>> class Mine(LoReFT, SFT): ...
    """

    method = "loreft"
    layer: ClassVar[type[LoReFTLayer]] = LoReFTLayer

    def __init__(self, *args: Any, reft: ReFTConfig = ReFTConfig(), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.reft = self.configured(ReFTConfig, "reft", reft)
