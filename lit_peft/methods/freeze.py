"""Freeze tuning: train the last layers of the model as they are, freeze the rest.

The selection is by layer index, not by a piece of the name: "layers.2" as a piece would also hit layers 20 to 27.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from torch import nn

from lit_peft.adapter import named_adapters, remember
from lit_peft.mixin import PEFT
from lit_peft.sites import stacks


@dataclass(frozen=True, kw_only=True)
class FreezeConfig:
    """Settings of freeze tuning.

    Args:
        last_layers: how many of the last layers to train (of each stack, where there is an encoder and a decoder).
        keep_base: keep a copy of these layers' base weights in CPU memory, so that `disabled` can give the base back.

    Raises:
        ValueError: if last_layers is below 1.
    """

    last_layers: int = 2
    keep_base: bool = True

    default_lr: ClassVar[float] = 5e-5

    def __post_init__(self) -> None:
        if self.last_layers < 1:
            raise ValueError(f"freeze.last_layers is {self.last_layers}; it must be 1 or more.")


class Freeze(PEFT):
    """Train the last layers of the task's model, freeze the rest.

    Args:
        freeze: how many layers.

    Example:
        >>> from lit_peft import Freeze, SFT
        >>> class Mine(Freeze, SFT): ...
    """

    method = "freeze"

    def __init__(self, *args: Any, freeze: FreezeConfig = FreezeConfig(), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.freeze_config = self.configured(FreezeConfig, "freeze", freeze)
        self._trained: tuple[str, ...] = ()

    def place_adapters(self) -> None:
        """Choose the layers and keep a copy of them."""
        super().place_adapters()
        assert self.model is not None
        found = stacks(self.model)
        shortest = min((len(stack) for stack in found), default=0)
        wanted = self.freeze_config.last_layers
        if wanted > shortest:
            raise ValueError(f"freeze.last_layers is {wanted}, but this model has {shortest} layers.")
        self._trained = tuple(f"{path}." for stack in found for path in stack[-wanted:])
        if self.freeze_config.keep_base:
            adapters = {id(p) for _, adapter in named_adapters(self.model) for _, p in adapter.own_parameters()}
            named = self.model.named_parameters()
            remember(self.model, ((n, p) for n, p in named if n.startswith(self._trained) and id(p) not in adapters))

    def is_trainable(self, name: str, parameter: nn.Parameter) -> bool:
        """The last layers are."""
        return (bool(self._trained) and name.startswith(self._trained)) or super().is_trainable(name, parameter)

    def learning_rate(self, name: str, parameter: nn.Parameter) -> float | None:
        """Return this method's rate for its layers, except for adapters placed inside them."""
        preferred = super().learning_rate(name, parameter)
        if preferred is None and self._trained and name.startswith(self._trained):
            return self.freeze_config.default_lr
        return preferred

    def preferred_dtype(self) -> str:
        """Train in float32: updates of 1e-5 vanish in bf16's 8 bits."""
        return "float32"

    def adopt(self, config: Mapping[str, Any]) -> None:
        """Take the number of layers from an adapter folder."""
        super().adopt(config)
        if config.get("peft_type") == "LIT_FREEZE":
            last = {"last_layers": config["last_layers"]}
            self.freeze_config = self.configured(FreezeConfig, "freeze", self.freeze_config, **last)

    def parts(self) -> list[dict[str, Any]]:
        """Return the settings for `adapter_config.json`."""
        return [*super().parts(), {"peft_type": "LIT_FREEZE", **asdict(self.freeze_config)}]
