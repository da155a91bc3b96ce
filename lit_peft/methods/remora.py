"""ReMoRA: MoRA, folded in and started anew with another type (Jiang et al. 2024, https://arxiv.org/abs/2405.12130).

    W_n = W_(n-1) + widen_t(M_n narrow_t(.)),    t the n-th type of the cycle, then M zero

Each type shares the matrix in another way, so the updates of successive cycles lie in different subspaces and their sum
has a higher rank. The restarts are the callback `AdapterRestart`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, ClassVar

import torch
from torch import Tensor

from lit_peft.methods.mora import MoRA, MoRAConfig, MoRALinear
from lit_peft.methods.relora import Restarting, rewritten_weight
from lit_peft.rewriting import fold_in
from lit_peft.weights import put

CYCLE = [1, 2]


class ReMoRALinear(MoRALinear):
    """MoRA around a linear layer that can be folded into it and started anew, with the next type of its cycle.

    Example:
        >>> import torch
        >>> layer = ReMoRALinear(torch.nn.Linear(8, 8), MoRAConfig(r=1, mora_type=1, cycle=[1, 2]))
        >>> layer.restarts += 1
        >>> layer.kind("default")
        2
    """

    peft_type: ClassVar[str] = "LIT_REMORA"

    def kind(self, name: str) -> int:
        """Return the type of the present cycle."""
        config: MoRAConfig = self.configs[name]
        cycle = config.cycle or [config.mora_type]
        return cycle[self.restarts % len(cycle)]

    def restart(self, name: str, seed: int) -> None:
        """Fold the change into W, in the type of the cycle that ends here, and set M to zero."""
        with torch.no_grad():
            fold_in(self, self.delta(name))
            put(self.mora_m[name], torch.zeros(self.mora_m[name].shape))
        self.restarts += 1  # which chooses the next type

    def tensors(self, name: str = "default") -> dict[str, Tensor]:
        """Return M, and W once it was rewritten."""
        return {**super().tensors(name), **rewritten_weight(self)}


class ReMoRA(Restarting, MoRA):
    """ReMoRA on the task's model: MoRA with restarts, each with the next type of a cycle.

    Args:
        mora: size, cycle of types (None: 1, 2), dropout and targets.

    Example:
        >>> from lit_peft import ReMoRA, SFT
        >>> class Mine(ReMoRA, SFT): ...
    """

    method = "remora"
    square_class: ClassVar[type[MoRALinear]] = ReMoRALinear

    def __init__(self, *args: Any, mora: MoRAConfig = MoRAConfig(), **kwargs: Any) -> None:
        super().__init__(*args, mora=mora, **kwargs)
        fixed = self.fixes({"mora": asdict(self.mora)})["mora"]
        self.mora = self.configured(MoRAConfig, "mora", self.mora, **fixed)

    @classmethod
    def fixes(cls, given: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
        """Return the cycle, and the type that it starts with."""
        cycle = given.get("mora", {}).get("cycle") or CYCLE
        return {**super().fixes(given), "mora": {"cycle": cycle, "mora_type": cycle[0]}}

    def parts(self) -> list[dict[str, Any]]:
        """Return the settings for `adapter_config.json`."""
        *others, mine = super().parts()
        return [*others, {**mine, "restarts": self.restarts()}]
