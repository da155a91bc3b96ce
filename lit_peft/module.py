"""The ends of the `super()` chains that methods and tasks share."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from inspect import Parameter, signature
from types import MappingProxyType
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

FALLBACK_LR = 2e-5  # for weights whose owner has no preference: that of full fine-tuning


class AdaptableModule(LightningModule):
    """A LightningModule with a `model` that methods can adapt: what tasks and methods both derive from.

    Every hook here is the end of a cooperative chain. Methods override one, call `super()` first, and add their part.

    Attributes:
        model: the model that the task builds in `configure_model`; None before.
        counted: how many tokens or rows the last training loss was summed over; None where it is a mean. A method that
            adds a penalty to the loss multiplies it by this.
        given_lr: the learning rate that the optimizer was asked for; None where each owner has its own.
        thaws: weights that join the training later, with their learning rates.
    """

    model: nn.Module | None
    counted: Tensor | None = None
    given_lr: float | None = None
    thaws: Mapping[str, float] = MappingProxyType({})

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        follower = self._follower()
        if kwargs and follower is LightningModule:
            raise TypeError(_unknown_argument(type(self), sorted(kwargs)[0]))
        super().__init__(*args, **kwargs)
        if not hasattr(self, "model"):
            self.model = None

    def _follower(self) -> type:
        """Return the next class in line: LightningModule, or the user's own module behind a method."""
        order = type(self).__mro__
        return order[order.index(AdaptableModule) + 1]

    def place_adapters(self) -> None:
        """Put adapters into `self.model`; called once, when the task has built it. The chain's end places nothing."""

    def is_trainable(self, name: str, parameter: nn.Parameter) -> bool:
        """Say whether an *existing* parameter is trained (adapters' own parameters always are).

        Args:
            name: the parameter's path in `self.model`.
            parameter: the parameter itself.
        """
        return False

    def learning_rate(self, name: str, parameter: nn.Parameter) -> float | None:
        """Return the learning rate that the owner of this parameter prefers, None if it has no preference."""
        return None

    def adjusted_learning_rate(self, name: str, parameter: nn.Parameter, lr: float) -> float:
        """Return the learning rate of one parameter where that of its group would be `lr` (LoRA+ raises that of B)."""
        return lr

    def rated_by(self, name: str) -> AdaptableModule:
        """Return the module whose learning rates hold for a parameter: this one, or that of a further named set."""
        return self

    def parameter_groups(self, lr: float | None = None, weight_decay: float | None = None) -> list[dict[str, Any]]:
        """Group what is trained by learning rate and weight decay, for an optimizer.

        Args:
            lr: learning rate of everything that is trained; None: each owner's own.
            weight_decay: applied to matrices, never to vectors (biases, norms, gates); None: none.

        Raises:
            ValueError: if nothing is trained.

        Example:
            >>> # in a module of your own, class Mine(LoRAPlus, Theirs):
            >>> # def configure_optimizers(self): return torch.optim.AdamW(self.parameter_groups(lr=1e-4))
        """
        groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
        preferred = set()
        self.given_lr = lr
        for full_name, parameter in self.named_parameters():
            name = full_name.removeprefix("model.")
            later = name in self.thaws
            if not (parameter.requires_grad or later):
                continue
            if later:
                rate = self.thaws[name]
            else:
                voice = self.rated_by(name)
                voice.given_lr = lr
                own = voice.learning_rate(name, parameter) or FALLBACK_LR
                preferred.add(own)
                rate = voice.adjusted_learning_rate(name, parameter, own if lr is None else lr)
            decay = weight_decay or 0.0 if parameter.ndim > 1 else 0.0
            groups.setdefault((rate, decay, later), []).append(parameter)
        if not groups:
            raise ValueError(f"{type(self).__name__} trains nothing. Add a method, class Mine(LoRA, ...), or Full.")
        if lr is not None:
            for own in sorted(preferred):
                if not 0.1 <= lr / own <= 10:
                    rank_zero_warn(f"lr {lr:g} is more than ten times off this method's usual {own:g}.")
                    break
        return [
            {
                "params": parameters,
                "lr": rate,
                "weight_decay": decay,
                "name": f"{'thawed ' if later else ''}lr {rate:g}",
            }
            for (rate, decay, later), parameters in sorted(groups.items(), key=lambda item: item[0])
        ]

    def preferred_dtype(self) -> str:
        """Return the dtype to load the backbone in when the user names none: `auto` keeps the stored one."""
        return "auto"

    def preferred_quantization(self) -> str:
        """Return how the backbone's weights are stored when the user does not say: `none`, or `nf4`."""
        return "none"

    def preferred_optim(self) -> str:
        """Return the optimizer on a CUDA device when the user names none."""
        return "adamw"


def init_parameters(cls: type) -> dict[str, Parameter]:
    """Return the named `__init__` parameters of a class and of all its parents, nearest first."""
    found: dict[str, Parameter] = {}
    for parent in cls.__mro__:
        if "__init__" in parent.__dict__ and issubclass(parent, AdaptableModule):
            for key, parameter in signature(parent.__init__).parameters.items():
                if key != "self" and parameter.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY):
                    found.setdefault(key, parameter)
    return found


def _unknown_argument(cls: type, key: str) -> str:
    known = sorted(init_parameters(cls))
    near = get_close_matches(key, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"{cls.__name__} has no argument {key!r}.{hint} It takes {', '.join(known)}."
