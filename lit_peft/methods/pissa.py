"""PiSSA: trains the principal part of each weight (Meng et al. 2024, https://arxiv.org/abs/2404.02948).

With W = U S V^T: A0 = sqrt(S_r / s) V_r^T, B0 = U_r sqrt(S_r / s). See `low_rank/residual.py` for how the base stays as
it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from lit_peft.low_rank.residual import FAST
from lit_peft.methods.lora import LoRA, LoRAConfig


class PiSSA(LoRA):
    """LoRA that starts at the largest singular directions of each weight; saved as plain LoRA of twice the rank.

    `lora.init_lora_weights` may be `pissa_niter_4` or `pissa_niter_16`, for a faster, randomised SVD.

    Example:
        >>> from lit_peft import PiSSA, SFT
        >>> class Mine(PiSSA, SFT): ...
    """

    method = "pissa"
    default_lr: ClassVar[float] = 2e-5  # A and B start large, so each step moves the weight further than LoRA's
    preset: ClassVar[dict[str, Any]] = {"init_lora_weights": "pissa"}

    @classmethod
    def fixed(cls, given: LoRAConfig | Mapping[str, Any]) -> Mapping[str, Any]:
        """Leave the choice of a randomised SVD as it is."""
        start = given.get("init_lora_weights") if isinstance(given, Mapping) else given.init_lora_weights
        fixed = super().fixed(given)
        return {**fixed, "init_lora_weights": start} if fixed and FAST.fullmatch(start or "") else fixed
