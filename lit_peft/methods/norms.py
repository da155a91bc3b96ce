"""Trained norms: a change beside the weights of LayerNorms and RMSNorms, as Houlsby and Compacter train them.

    LN(x; w + dw, b + db)

The papers train w and b themselves. With the change beside them the gradients and the result are the same, and the base
stays exact: it can be switched off, named, routed and saved like every other adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from lit_peft.adapter import Adapter, innermost
from lit_peft.methods.adapter_drop import is_dropped, must_reach


@dataclass(frozen=True, kw_only=True)
class NormConfig:
    """Settings of one trained norm, set by the method that trains it.

    Args:
        layer: number of the layer that it sits in.
        default_lr: the method's learning rate.
    """

    layer: int
    default_lr: float


class NormChange(Adapter):
    """Normalises with w + dw and b + db, for a norm with any of these weights.

    Example:
        >>> import torch
        >>> layer = NormChange(torch.nn.LayerNorm(8), NormConfig(layer=0, default_lr=1e-3))
        >>> [(key, tuple(p.shape)) for key, p in layer.own_parameters()]
        [('norm_weight.default', (8,)), ('norm_bias.default', (8,))]
    """

    def add(self, name: str, config: NormConfig) -> None:
        """Make a zero change of every weight of the norm, under another name."""
        super().add(name, config)
        for key, weight in innermost(self.base).named_parameters(recurse=False):
            if f"norm_{key}" not in self._modules:
                setattr(self, f"norm_{key}", nn.ParameterDict())
            change = torch.zeros(weight.shape, device=weight.device)
            getattr(self, f"norm_{key}")[name] = nn.Parameter(change)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Normalise (..., d)."""
        shares = self.shares(x)
        if any(rows is not None for _, rows in shares):
            return super().forward(x, *args, **kwargs)
        acting = [(name, 0.0 if is_dropped(self.configs[name]) else 1.0) for name, _ in shares]
        acting = [(name, factor) for name, factor in acting if factor or must_reach(self)]
        return self.normalised(x, acting, *args, **kwargs) if acting else self.base(x, *args, **kwargs)

    def change(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """Return y and what the change of one named set adds to the norm of x: (..., d) -> (..., d)."""
        if is_dropped(self.configs[name]) and not must_reach(self):
            return y
        factor = 0.0 if is_dropped(self.configs[name]) else 1.0
        difference: Tensor = self.normalised(x, [(name, factor)]) - self.base(x)
        return y + difference.to(y.dtype)

    def normalised(self, x: Tensor, acting: Sequence[tuple[str, float]], *args: Any, **kwargs: Any) -> Any:
        """Return the norm of x with the changes of some named sets, each times a factor, added to its weights."""
        base, inside = innermost(self.base), ""
        while self.base.get_submodule(inside) is not base:
            inside = f"{inside}.base".removeprefix(".")
        weights = {}
        for key, weight in base.named_parameters(recurse=False):
            changes = getattr(self, f"norm_{key}")
            total = sum(changes[name] if factor == 1 else changes[name] * factor for name, factor in acting)
            weights[f"{inside}.{key}".removeprefix(".")] = (weight + total).to(weight.dtype)
        if isinstance(base, nn.LayerNorm) and type(self.base) is nn.LayerNorm:  # without a search for shared weights
            return F.layer_norm(x, base.normalized_shape, weights.get("weight"), weights.get("bias"), base.eps)
        return functional_call(self.base, weights, (x, *args), kwargs)


@lru_cache(None)
def norm_class(kind: str) -> type[NormChange]:
    """Return the class of the norms that one method trains: its folder has their weights beside its own.

    Args:
        kind: the method's `peft_type`.
    """
    return type("NormChange", (NormChange,), {"peft_type": kind, "__doc__": NormChange.__doc__})
