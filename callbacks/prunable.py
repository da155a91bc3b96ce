"""What rank allocation needs of an adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lit_peft.adapter import named_adapters


class Prunable(Protocol):
    """What the allocator needs of an adapter: triplets that can be switched off one by one, and cut off at the end.

    Attributes:
        kept: for each named set, which triplets (r,) are left for good; no entry until that is settled.
    """

    kept: dict[str, Tensor]

    def triplets(self, name: str) -> tuple[tuple[nn.Parameter, int], ...]:
        """Return the parameters of a named set, each with the dimension that counts its triplets.

        The first one, (r,), switches a triplet off where it is 0.
        """

    def target(self, name: str) -> int:
        """Return the mean rank that a named set is to have in the end."""

    def shrink(self, name: str) -> None:
        """Cut off what is not kept."""


@dataclass(frozen=True)
class PrunableSet:
    """One named set of one adapter."""

    path: str
    name: str
    adapter: Prunable

    @property
    def key(self) -> str:
        """Its name in checkpoints."""
        return f"{self.path}.{self.name}"

    @property
    def triplets(self) -> tuple[tuple[nn.Parameter, int], ...]:
        """Its parameters, each with the dimension that counts its triplets."""
        return self.adapter.triplets(self.name)

    @property
    def rank(self) -> int:
        """How many triplets it has."""
        return len(self.triplets[0][0])


def prunable_sets(module: LightningModule) -> list[PrunableSet]:
    """Return what is trained and prunable, layer by layer; an adapter around another one would lend it its methods."""
    model: Any = module.model
    found: list[tuple[str, Any]] = [(p, a) for p, a in named_adapters(model) if hasattr(type(a), "triplets")]
    return [
        PrunableSet(".".join(piece for piece in path.split(".") if piece != "base"), name, adapter)
        for path, adapter in found
        for name in adapter.configs
        if adapter.triplets(name)[0][0].requires_grad
    ]
