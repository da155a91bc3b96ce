"""Full fine-tuning: every weight is trained. The baseline that every method is measured against."""

from __future__ import annotations

from typing import Any

from torch import nn

from lit_peft.adapter import remember, scope_of
from lit_peft.mixin import PEFT


class Full(PEFT):
    """Train every weight of the task's model.

    Args:
        keep_base: keep a copy of all base weights in CPU memory, so that `disabled` can give the base model back.

    Example:
        >>> from lit_peft import Full, SFT
        >>> class Mine(Full, SFT): ...
    """

    method = "full"
    default_lr = 2e-5

    def __init__(self, *args: Any, keep_base: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.keep_base = keep_base
        self.save_hyperparameters({"keep_base": keep_base})

    def place_adapters(self) -> None:
        """Place nothing; keep the base, or note why it cannot be given back."""
        super().place_adapters()
        assert self.model is not None
        if self.keep_base:
            remember(self.model, self.model.named_parameters())
        else:
            scope_of(
                self.model
            ).irreversible = "Full fine-tuning overwrites the base, so it cannot be given back. Set keep_base=True."

    def is_trainable(self, name: str, parameter: nn.Parameter) -> bool:
        """Everything is."""
        return True

    def learning_rate(self, name: str, parameter: nn.Parameter) -> float | None:
        """Return an adapter's or the task's own preference, else this method's."""
        return super().learning_rate(name, parameter) or self.default_lr

    def preferred_dtype(self) -> str:
        """Train in float32: updates of 1e-5 vanish in bf16's 8 bits."""
        return "float32"

    def parts(self) -> list[dict[str, Any]]:
        """Return the settings for `adapter_config.json`."""
        return [*super().parts(), {"peft_type": "LIT_FULL"}]
