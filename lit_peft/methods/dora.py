"""DoRA: weight-decomposed low-rank adaptation (Liu et al. 2024, https://arxiv.org/abs/2402.09353).

    y = b + (m / n) * (W x + s B A x),    n_i = |W_i + s (B A)_i|

The mathematics are in `low_rank/dora.py`.
"""

from __future__ import annotations

from typing import Any, ClassVar

from lit_peft.methods.lora import LoRA


class DoRA(LoRA):
    """LoRA on the direction of each row of W, and a trained length for each row; starts as the base, and merges.

    Example:
        >>> from lit_peft import DoRA, SFT
        >>> class Mine(DoRA, SFT): ...
    """

    method = "dora"
    default_lr: ClassVar[float] = 1e-4
    preset: ClassVar[dict[str, Any]] = {"use_dora": True}
