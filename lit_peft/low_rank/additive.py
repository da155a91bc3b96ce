"""What LoRA and MoRA share: an update that is a matrix, added to the weight of a linear layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lit_peft.adapter import Adapter
from lit_peft.weights import fold


class AdditiveLinear(Adapter):
    """An adapter whose sets each add a matrix to W, and so fold into it.

    Example:
        >>> from lit_peft.low_rank.linear import LoRALinear
        >>> issubclass(LoRALinear, AdditiveLinear)
        True
    """

    def delta(self, name: str) -> Tensor:
        """Return the change of the weight, (out, in), in float32.

        Raises:
            TypeError: if the subclass does not say.
        """
        raise TypeError(f"{type(self).__name__} does not say what it adds to the weight.")

    def merge(self, names: tuple[str, ...] | None = None) -> nn.Module:
        """Fold the change into W: added in float32, rounded once to the base's dtype."""
        with torch.no_grad():
            for name in self.active() if names is None else names:
                if name in self.configs:
                    fold(self.base, self.delta(name))
        return self.base
