"""MoRA: an update of high rank from a square matrix (Jiang et al. 2024, https://arxiv.org/abs/2405.12130).

    y = W x + b + widen(M narrow(dropout(x))),    M (r̂, r̂),    r̂ = floor(sqrt((in + out) r) + 1/2)

M has as many weights as a LoRA of rank r, but the update's rank is r̂, with type 6 up to min(in, out). M starts at zero,
so the model starts as the base, bit for bit; there is no alpha. `lit_peft.low_rank.square` has the maps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lit_peft.adapter import innermost
from lit_peft.low_rank import square
from lit_peft.low_rank.additive import AdditiveLinear
from lit_peft.mixin import PEFT
from lit_peft.ops.lora_linear import joins
from lit_peft.ops.mora import square_linear, square_update
from lit_peft.placing import join
from lit_peft.sites import match, widths
from lit_peft.targets import KEYS, stored_targets
from lit_peft.weights import whole

VERSION = 1  # of the layout of LIT_MORA and LIT_REMORA folders
# The settings of the fork's files that are read here, or change nothing; any other must be off.
KNOWN = frozenset(
    "peft_type task_type auto_mapping base_model_name_or_path revision inference_mode r mora_type use_mora lora_alpha "
    "lora_dropout use_rslora target_modules exclude_modules layers_to_transform layers_pattern fan_in_fan_out "
    f"init_lora_weights loftq_config megatron_core peft_version {KEYS}".split()
)


@dataclass(frozen=True, kw_only=True)
class MoRAConfig:
    """Settings of MoRA.

    Args:
        r: size of the update, as the rank of the LoRA that has as many weights.
        mora_type: how inputs and outputs share the matrix: 1 (every r̂-th together) to 4, or 6 (chunks, rotated). The
            authors advise 6 for small r, 1 for large.
        cycle: for remora: the types in turn, one after each restart; None: 1, 2.
        target_modules: which linear layers: `all-linear`, a role (`attention`, `feed-forward`), a list of endings of
            module paths, or one regular expression over whole paths.
        exclude_modules: layers to leave out, written like target_modules; wins over it.
        layers_to_transform: only these transformer layers, by number; None: all.
        dropout: dropout on the adapter's input.

    Raises:
        ValueError: if a value is out of range.
    """

    r: int = 8
    mora_type: Literal[1, 2, 3, 4, 6] = 6
    cycle: list[int] | None = None
    target_modules: list[str] | str = "all-linear"
    exclude_modules: list[str] | str | None = None
    layers_to_transform: int | list[int] | None = None
    dropout: float = 0.0

    default_lr: ClassVar[float] = 3e-4

    def __post_init__(self) -> None:
        if type(self.r) is not int or self.r < 1:
            raise ValueError(f"mora.r is {self.r}; it must be a whole number of 1 or more.")
        if self.mora_type not in square.TYPES:
            raise ValueError(f"mora.mora_type is {self.mora_type}; it must be one of 1, 2, 3, 4, 6.")
        if self.cycle is not None and not (self.cycle and (set(self.cycle) <= {1, 2, 3, 4} or set(self.cycle) == {6})):
            raise ValueError(
                f"mora.cycle is {self.cycle}; it takes types 1 to 4 in any order, or 6 alone: type 6 needs a matrix of "
                "another size."
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"mora.dropout is {self.dropout}; it must be at least 0 and below 1.")
        if not self.target_modules:
            raise ValueError("mora.target_modules is empty. Name some, or leave it out for all linear layers.")

    def size(self, linear: nn.Module, name: str) -> int:
        """Return r̂ for one layer.

        Raises:
            ValueError: if r is too large for it.
        """
        wide, tall = widths(linear)
        found = square.size(wide, tall, self.r, self.mora_type)
        if not 0 < found <= min(wide, tall):
            most = square.largest_rank(wide, tall, self.mora_type)
            way = f"The largest possible r there is {most}" if most else "MoRA is not possible there"
            raise ValueError(
                f"mora.r is {self.r}, which is too large for {name} ({wide} inputs, {tall} outputs). {way}; lower "
                "mora.r, or leave the layer out with mora.exclude_modules."
            )
        return found

    def to_peft(self) -> dict[str, Any]:
        """Return the settings for `adapter_config.json`."""
        return {
            "peft_type": "LIT_MORA",
            "version": VERSION,
            "r": self.r,
            "mora_type": self.mora_type,
            "cycle": self.cycle,
            "dropout": self.dropout,
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> MoRAConfig:
        """Read our own settings, or those of the PEFT fork that came with the paper (`use_mora`).

        Raises:
            ValueError: for a newer version, or a setting of the fork that changes the formula.
        """
        own = config["peft_type"] != "LORA"
        if own and config.get("version") != VERSION:
            raise ValueError(
                f"This adapter has version {config.get('version')} of {config['peft_type']}, and {VERSION} is known "
                "here. Update lit_peft."
            )
        for key, value in config.items():
            if not own and key not in KNOWN and value not in (None, False, [], {}, "none"):
                raise ValueError(f"This adapter uses {key}={value!r}, which MoRA does not have here. Save it without.")
        targets = config.get("target_modules")
        if not targets:
            raise ValueError("adapter_config.json names no target_modules. Add the list of adapted layers to the file.")
        return cls(
            r=config.get("r", 8),
            mora_type=config.get("mora_type", 1),
            cycle=config.get("cycle"),
            dropout=config.get("dropout" if own else "lora_dropout", 0.0),
            target_modules=targets,
        )


class MoRALinear(AdditiveLinear):
    """Adds widen(M narrow(dropout(x))) to a linear layer's output.

    `base` is an `nn.Linear`, a quantised linear, or GPT-2's `Conv1D`. Inputs are (..., in), outputs (..., out). M is
    float32 whatever the base is, and cast to the input's dtype for the product.

    Raises:
        ValueError: if r is too large for the layer.

    Example:
        >>> import torch
        >>> from lit_peft import MoRAConfig
        >>> layer = MoRALinear(torch.nn.Linear(8, 8), MoRAConfig(r=1, mora_type=1))
        >>> layer.mora_m["default"].shape
        torch.Size([4, 4])
    """

    peft_type: ClassVar[str] = "LIT_MORA"

    def add(self, name: str, config: MoRAConfig) -> None:
        """Make M (r̂, r̂) of another named set, all zero."""
        linear = innermost(self.base)
        width = config.size(linear, "this layer")
        super().add(name, config)
        if "mora_m" not in self._modules:
            self.mora_m = nn.ParameterDict()
        device = next(self.base.parameters()).device
        self.mora_m[name] = nn.Parameter(torch.zeros(width, width, device=device, dtype=torch.float32))
        if config.mora_type == 6:
            # a buffer follows the model from device to device; it is cheap to make and in no file
            turn = square.angles(-(-widths(linear)[0] // width), width, device)
            self.register_buffer(f"mora_turn_{width}", turn, persistent=False)

    def kind(self, name: str) -> int:
        """Return the type that a named set has at present."""
        mora_type: int = self.configs[name].mora_type
        return mora_type

    def change(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """Return y + widen(M narrow(dropout(x))): (..., in), (..., out) -> (..., out)."""
        return square_update(y, x, *self.matrix(name), dropout=self.configs[name].dropout if self.training else 0.0)

    def joined(self, name: str, x: Tensor) -> Tensor | None:
        """Return x W^T + c + widen(M narrow(dropout(x))), where the base is a plain linear layer."""
        if not joins(self.base, x) or type(self).change is not MoRALinear.change:
            return None
        dropout = self.configs[name].dropout if self.training else 0.0
        return square_linear(x, self.base, *self.matrix(name), dropout=dropout)

    def matrix(self, name: str) -> tuple[Tensor, int, Tensor | None]:
        """Return M (r̂, r̂), its type, and of type 6 the angles of its chunks."""
        m, kind = self.mora_m[name], self.kind(name)
        return m, kind, self._buffers[f"mora_turn_{m.shape[0]}"] if kind == 6 else None

    def delta(self, name: str) -> Tensor:
        """Return the change of the weight, (out, in), in float32, gathered where M is sharded."""
        wide, tall = widths(innermost(self.base))
        return square.delta(whole(self.mora_m[name].detach()).float(), wide, tall, self.kind(name))

    def check_config(self, path: str, config: Mapping[str, Any], name: str = "default") -> None:
        """See that the folder's type is the one in use here: the same numbers mean another update under another type.

        Raises:
            ValueError: if it is not.
        """
        theirs, here = config.get("mora_type", 1), self.configs[name].mora_type
        if theirs != here:
            raise ValueError(
                f"The adapter is MoRA of type {theirs}, and {path} has type {here} here. Set mora.mora_type, or start "
                "from the folder: adapter=FOLDER."
            )

    def tensors(self, name: str = "default") -> dict[str, Tensor]:
        """Return M as `{"mora_m": (r̂, r̂)}`."""
        return {"mora_m": self.mora_m[name].detach()}


class MoRA(PEFT):
    """MoRA on the task's model: updates of high rank beside its linear layers, with LoRA's number of weights.

    Args:
        mora: size, type, dropout and targets.

    Example:
        >>> from lit_peft import MoRA, SFT
        >>> class Mine(MoRA, SFT): ...
    """

    method = "mora"
    square_class: ClassVar[type[MoRALinear]] = MoRALinear

    def __init__(self, *args: Any, mora: MoRAConfig = MoRAConfig(), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.mora = self.configured(MoRAConfig, "mora", mora)

    def place_adapters(self) -> None:
        """Put a `MoRALinear` around every target.

        Raises:
            ValueError: if r is too large for one of them; no layer is touched then.
        """
        super().place_adapters()
        assert self.model is not None
        paths = match(
            self.model,
            self.mora.target_modules,
            exclude_modules=self.mora.exclude_modules,
            layers_to_transform=self.mora.layers_to_transform,
        )
        for path in paths:
            self.mora.size(innermost(self.model.get_submodule(path)), path)
        join(self.model, dict.fromkeys(paths, self.mora), lambda base: self.square_class, self.placing)

    def adopt(self, config: Mapping[str, Any]) -> None:
        """Take the settings from an adapter folder of ours, or of the PEFT fork that came with the paper.

        Raises:
            ValueError: if the folder's layers do not fit this model, or it has settings that are not known here.
        """
        super().adopt(config)
        kind = self.square_class.peft_type
        fork = config["peft_type"] == "LORA" and config.get("use_mora") and kind == "LIT_MORA"
        if not fork and config["peft_type"] != kind:
            return
        assert self.model is not None
        found = MoRAConfig.from_peft(config)
        leaf = "lora_A.weight" if fork else "mora_m"
        targets = stored_targets(config, leaf, (path for path, _ in self.model.named_modules()))
        self.mora = self.configured(
            MoRAConfig, "mora", found, target_modules=targets, exclude_modules=None, layers_to_transform=None
        )

    def parts(self) -> list[dict[str, Any]]:
        """Return the settings for `adapter_config.json`."""
        return [*super().parts(), {**self.mora.to_peft(), "peft_type": self.square_class.peft_type}]
