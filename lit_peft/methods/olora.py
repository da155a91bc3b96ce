"""OLoRA: starts at an orthonormal basis of each weight (Büyükakyüz 2024, https://arxiv.org/abs/2406.01775).

With W = Q R: A0 = the first r rows of R, B0 = the first r columns of Q. See `low_rank/residual.py` for how the base
stays as it is.
"""

from __future__ import annotations

from typing import Any, ClassVar

from lit_peft.methods.lora import LoRA


class OLoRA(LoRA):
    """LoRA that starts at the QR decomposition of each weight; saved as plain LoRA of twice the rank.

    Example:
        >>> from lit_peft import OLoRA, SFT
        >>> class Mine(OLoRA, SFT): ...
    """

    method = "olora"
    preset: ClassVar[dict[str, Any]] = {"init_lora_weights": "olora"}
