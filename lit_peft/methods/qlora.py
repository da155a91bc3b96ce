"""QLoRA: LoRA over a base that is stored in four bits (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314).

    y = W~ x + b + s B A dropout(x),    W~ = dequant(NF4(W))        (equations 5 and 6)

Any method that leaves its linear layers frozen works over such a base: `--method bitfit --model.quantize nf4`. QLoRA is
LoRA with that, and the paper's settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lit_peft.methods.lora import LoRA, LoRAConfig

DEFAULTS = {"r": 64, "alpha": 16, "dropout": 0.1}  # appendix B.2, for 7B and 13B models; .05 dropout above


class QLoRA(LoRA):
    """LoRA on a base in NF4: 4.127 bits for each frozen weight, computed in bfloat16, paged AdamW on CUDA.

    Args:
        lora: rank, scale, dropout and targets.

    Example:
        >>> from lit_peft import QLoRA, SFT
        >>> class Mine(QLoRA, SFT): ...
    """

    method = "qlora"

    def __init__(self, *args: Any, lora: LoRAConfig = LoRAConfig(**DEFAULTS), **kwargs: Any) -> None:  # type: ignore[arg-type]
        given: Any = {**DEFAULTS, **lora} if isinstance(lora, Mapping) else lora
        super().__init__(*args, lora=given, **kwargs)

    def preferred_quantization(self) -> str:
        """Store the base in NF4, unless the user says `quantize: none`."""
        return "nf4"

    def preferred_dtype(self) -> str:
        """Compute in bfloat16: the authors saw a fifth of their runs break in float16."""
        return "bfloat16"

    def preferred_optim(self) -> str:
        """Page the optimizer's state to the CPU when the GPU's memory runs out."""
        return "paged_adamw_32bit"
