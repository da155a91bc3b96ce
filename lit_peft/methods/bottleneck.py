"""Bottleneck adapters: small networks inside the layers.

    f(h) = s U act(D h + b_d) + s b_u,    D (m, d), U (d, m)

Houlsby et al. 2019 (https://arxiv.org/abs/1902.00751) put one behind the attention and one behind the feed-forward of
every layer: y -> y + f(y), before the residual sum. Pfeiffer et al. 2020 (https://arxiv.org/abs/2005.00247) put one
behind the feed-forward, on the residual sum. He et al. 2021 (https://arxiv.org/abs/2110.04366) put one beside the
feed-forward: y -> y + f(x), with x what the feed-forward reads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers.activations import ACT2FN

from lit_peft.adapter import Adapter, innermost
from lit_peft.gates import Gates
from lit_peft.methods.adapter_drop import dropped, dropped_in_step, is_dropped, left_out, must_reach, reaching
from lit_peft.methods.composed import ComposedBranches
from lit_peft.methods.norms import NormConfig, norm_class
from lit_peft.mixin import PEFT
from lit_peft.ops.bottleneck import bottleneck
from lit_peft.placing import join
from lit_peft.sites import geometry
from lit_peft.sublayers import is_causal, norms

__all__ = ["Bottleneck", "BottleneckConfig", "Bottlenecks", "dropped"]

HOULSBY_STD = 1e-3
_READ: ContextVar[Tensor | None] = ContextVar("lit_peft_feed_forward_input", default=None)


@dataclass(frozen=True, kw_only=True)
class BottleneckConfig:
    """Settings of bottleneck adapters.

    Args:
        bottleneck_size: width m of the bottleneck; None: hidden size / reduction_factor.
        reduction_factor: hidden size / m, where bottleneck_size is not given.
        activation: the non-linearity, by its name in transformers.
        scale: factor s in front of the adapter's output.
        dropout: dropout on the adapter's input.
        init: `zero` starts as the base exactly (D Kaiming-uniform, U zero); `houlsby` starts near it, with all weights
            from a normal distribution of width 1e-3, cut at two widths.
        leave_out: numbers of the layers without adapters; AdapterDrop (https://arxiv.org/abs/2010.11918) leaves out the
            first ones.
        random_drop: in training leave out the first n layers' adapters, with another n for every batch, so that the
            trained adapters do without any number of them (AdapterDrop).
        train_norms: train the model's LayerNorms (RMSNorms) too, as Houlsby et al. do; not those of layers left out.
        layer: set by the method: number of the layer that it sits in.
        gate: multiply by a learned gate (UniPELT), or by a fixed number.
        causal: set by the method: whether a token may not see those behind it.
        hidden_size: width d of the residual stream; None: the model's.
        peft_type: set by the method: what its folders are called.

    Raises:
        ValueError: if a value is out of range.
    """

    bottleneck_size: int | None = None
    reduction_factor: float = 16
    activation: str = "relu"
    scale: float = 1.0
    dropout: float = 0.0
    init: Literal["zero", "houlsby"] = "zero"
    leave_out: list[int] | None = None
    random_drop: bool = False
    train_norms: bool = False
    layer: int = 0
    gate: bool | float = False
    causal: bool = True
    hidden_size: int | None = None
    peft_type: str = "LIT_BOTTLENECK"

    default_lr: ClassVar[float] = 3e-4

    def __post_init__(self) -> None:
        if self.bottleneck_size is not None and self.bottleneck_size < 1:
            raise ValueError(f"bottleneck.bottleneck_size is {self.bottleneck_size}; it must be 1 or more.")
        if not self.reduction_factor > 0:
            raise ValueError(f"bottleneck.reduction_factor is {self.reduction_factor}; it must be above 0.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"bottleneck.dropout is {self.dropout}; it must be at least 0 and below 1.")
        if self.activation not in ACT2FN:
            raise ValueError(f"bottleneck.activation {self.activation!r} is unknown. Use relu, gelu, silu, tanh, ...")
        if not math.isfinite(self.scale) or self.scale == 0:
            raise ValueError(f"bottleneck.scale is {self.scale}; it must be a number other than 0.")

    def sized(self, hidden: int) -> BottleneckConfig:
        """Return the settings with the model's width filled in."""
        size = self.hidden_size or hidden
        return replace(self, hidden_size=size, bottleneck_size=self.width(size))

    def width(self, hidden: int) -> int:
        """Return m for a model of this hidden size.

        Raises:
            ValueError: if the hidden size does not divide by reduction_factor.
        """
        if self.bottleneck_size is not None:
            return self.bottleneck_size
        m = hidden / self.reduction_factor
        if m < 1 or m != int(m):
            fitting = [factor for factor in range(1, hidden + 1) if hidden % factor == 0]
            nearest = min(fitting, key=lambda factor: abs(math.log(factor / self.reduction_factor)))
            raise ValueError(
                f"bottleneck.reduction_factor {self.reduction_factor:g} does not divide the hidden size {hidden}. "
                f"Take {nearest}, or set bottleneck_size."
            )
        return int(m)


class Bottleneck(ComposedBranches):
    """A bottleneck f(h) = s U act(D dropout(h) + b_d) + s b_u behind a module: y -> y + f(y).

    The module's output, or the first of its outputs, is (batch, ..., d). Several sets that act together add up.

    Example:
        >>> import torch
        >>> layer = Bottleneck(torch.nn.Linear(8, 8), BottleneckConfig(bottleneck_size=2, hidden_size=8))
        >>> sum(p.numel() for _, p in layer.own_parameters())
        42
    """

    site = ("hidden_size", "layer", "causal", "peft_type")

    @property
    def peft_type(self) -> str:
        """The kind of folder that holds this adapter: each bottleneck method has its own."""
        return str(next(iter(self.configs.values())).peft_type)

    def add(self, name: str, config: BottleneckConfig) -> None:
        """Make D (m, d), U (d, m) and their biases of another named set."""
        super().add(name, config)
        if "bottleneck_down" not in self._modules:
            self.bottleneck_down = nn.ParameterDict()
            self.bottleneck_down_bias = nn.ParameterDict()
            self.bottleneck_up = nn.ParameterDict()
            self.bottleneck_up_bias = nn.ParameterDict()
        assert config.hidden_size is not None, "resolve the configuration with `sized` first"
        d, m = config.hidden_size, config.width(config.hidden_size)
        device = next(innermost(self.base).parameters()).device
        down, up = torch.zeros(m, d, device=device), torch.zeros(d, m, device=device)
        if device.type != "meta":
            if config.init == "zero":
                nn.init.kaiming_uniform_(down, a=math.sqrt(5))
            else:
                nn.init.trunc_normal_(down, std=HOULSBY_STD, a=-2 * HOULSBY_STD, b=2 * HOULSBY_STD)
                nn.init.trunc_normal_(up, std=HOULSBY_STD, a=-2 * HOULSBY_STD, b=2 * HOULSBY_STD)
        self.bottleneck_down[name] = nn.Parameter(down)
        self.bottleneck_down_bias[name] = nn.Parameter(torch.zeros(m, device=device))
        self.bottleneck_up[name] = nn.Parameter(up)
        self.bottleneck_up_bias[name] = nn.Parameter(torch.zeros(d, device=device))
        if config.gate is not False:
            if "bottleneck_gate" not in self._modules:
                self.bottleneck_gate = Gates("bottleneck", d)
            self.bottleneck_gate.add(name, device, config.gate)

    def branch(self, name: str, h: Tensor, rows: Tensor | None = None, onto: Tensor | None = None) -> Tensor:
        """Return f(h), (..., d) -> (..., d), of one named set.

        Args:
            name: the set.
            h: what it reads.
            rows: the rows of the batch that h is of; None: all.
            onto: what f(h) is added to; h itself for an adapter behind a module.
        """
        config: BottleneckConfig = self.configs[name]
        gate = None if config.gate is False else self.bottleneck_gate(name, h, config.causal, rows)
        return bottleneck(
            onto,
            h,
            self.bottleneck_down[name],
            self.bottleneck_down_bias[name],
            self.bottleneck_up[name],
            self.bottleneck_up_bias[name],
            config.activation,
            config.scale,
            gate=gate,
            dropout=config.dropout if self.training else 0.0,
        )

    def plus(self, y: Tensor, h: Tensor) -> Tensor:
        """Return y plus f(h) of every set that acts, each on its rows."""
        if self.is_composed():
            return self.plus_composed(y, h)
        for name, rows in self.shares(h):
            if is_dropped(self.configs[name]):
                if not must_reach(self):
                    continue
                rows = torch.empty(0, dtype=torch.long, device=h.device)
            if rows is None:
                y = self.branch(name, h, onto=y)
            else:
                y = y.index_add(0, rows, self.branch(name, h[rows], rows).to(y.dtype))
        return y

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the base and add f of its (first) output to it."""
        out = self.base(*args, **kwargs)
        y = first(out)
        return with_first(out, self.plus(y, y))


class BottleneckInNorm(Bottleneck):
    """A bottleneck on the sum in front of a norm: LN(v) -> LN(v + f(LN(v))), as Pfeiffer has it for post-LN models."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Normalise x, and x + f(LN(x))."""
        z = self.base(x, *args, **kwargs)
        total = self.plus(x, z)
        return z if total is x else self.base(total, *args, **kwargs)

    def reread(self, total: Tensor) -> Tensor:
        """Return the norm of the sum."""
        return self.base(total)  # type: ignore[no-any-return]


class BottleneckBeside(Bottleneck):
    """A bottleneck beside a module: y -> y + f(x), x being the module's input."""

    stacks: ClassVar[bool] = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the base and add f of its input to its (first) output."""
        x = args[0] if args else kwargs["hidden_states"]
        out = self.base(*args, **kwargs)
        return with_first(out, self.plus(first(out), x))


class BottleneckBesideNorm(Bottleneck):
    """A bottleneck beside BERT's feed-forward: LN(h + x) -> LN(h + x + f(x)), around the module that adds them."""

    stacks: ClassVar[bool] = False

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Any:
        """Hand x + f(x) to the base in the place of x."""
        return self.base(hidden_states, self.plus(input_tensor, input_tensor))


class FeedForwardInput(Adapter):
    """Notes what the first linear layer of a feed-forward reads, for the adapter around the last one; no weights."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Call the base."""
        if self.chosen():
            # For the call that comes next in the same layer, which takes it away: in a replay both run again.
            _READ.set(x)
        return self.base(x, *args, **kwargs)


class BottleneckAcross(Bottleneck):
    """A bottleneck beside two linear layers that no module holds together (OPT): y -> y + f(x), around the last one."""

    stacks: ClassVar[bool] = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the base and add f of what the first linear layer has read to its output."""
        out = self.base(*args, **kwargs)
        x = _READ.get()
        if not self.chosen():
            return out
        if x is None:
            raise TypeError("A parallel adapter was called outside of its layer, whose first linear layer it reads.")
        _READ.set(None)
        return self.plus(out, x)


def first(out: Any) -> Tensor:
    """Return a module's output, or the first of its outputs."""
    found: Tensor = out[0] if isinstance(out, tuple) else out
    return found


def with_first(out: Any, y: Tensor) -> Any:
    """Return a module's output with the first one exchanged."""
    return (y, *out[1:]) if isinstance(out, tuple) else y


class Bottlenecks(PEFT):
    """What the bottleneck methods share: one keyword, `bottleneck`; they differ in defaults and in `sites`."""

    bottleneck: BottleneckConfig
    peft_type: ClassVar[str]

    def sites(self) -> dict[str, int]:
        """Return the paths to adapt, with their layers' numbers."""
        raise TypeError(
            f"{type(self).__name__} does not say where adapters go. Use Houlsby, Pfeiffer, ParallelAdapter."
        )

    def bottleneck_class(self, module: nn.Module) -> type[Adapter]:
        """Return the adapter's class for one module."""
        return Bottleneck

    def readers(self) -> dict[str, str]:
        """Return, for the sites whose adapter reads what another module does, that module's path."""
        return {}

    def place_adapters(self) -> None:
        """Put a bottleneck at every site."""
        super().place_adapters()
        assert self.model is not None
        model, config = self.model, self.bottleneck
        config = replace(config.sized(geometry(model).hidden), peft_type=self.peft_type)
        out = set(config.leave_out or ())
        sites = self.sites()
        unknown = sorted(out - set(sites.values()))
        if unknown:
            raise ValueError(f"bottleneck.leave_out names layer {unknown[0]}; layers are 0 to {max(sites.values())}.")
        paths = [path for path, number in sites.items() if number not in out]
        if not paths:
            raise ValueError("bottleneck.leave_out leaves no layer to adapt.")
        if config.random_drop and self.beside is not None and not getattr(self.beside, "drops_at_random", False):
            raise TypeError("bottleneck.random_drop of a further adapter needs the first one's too. Set both or none.")
        where = {path: replace(config, causal=is_causal(model, path), layer=sites[path]) for path in paths}
        readers = self.readers()
        if config.train_norms:  # before the bottlenecks, around which the paths inside would be longer
            rate = type(config).default_lr
            changes = {p: NormConfig(layer=number, default_lr=rate) for p, number in norms(model, out).items()}
            join(model, changes, lambda base: norm_class(self.peft_type), self.placing)
        join(model, where, self.bottleneck_class, self.placing)
        if heard := {readers[path]: where[path] for path in paths if path in readers}:
            join(model, heard, lambda base: FeedForwardInput, self.placing)
        self.depth = max(sites.values()) + 1

    @property
    def drops_at_random(self) -> bool:
        """Whether training leaves out adapters at random."""
        return self.bottleneck.random_drop

    def drawn(self) -> int:
        """Return how many layers this training step leaves out: the same on every process, and after a resume."""
        generator = torch.Generator().manual_seed(self.global_step if self._trainer is not None else 0)
        return int(torch.randint(0, self.depth, (1,), generator=generator))

    def takes_part(self) -> tuple[str, ...]:
        """Return the hook that leaves adapters out, where that is asked."""
        return ("training_step",) if self.bottleneck.random_drop else ()

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the task's step, with a random number of the first layers' adapters left out where that is asked."""
        if not self.drops_at_random:
            return super().training_step(*args, **kwargs)
        layers = self.drawn()
        with dropped_in_step(layers):
            out = super().training_step(*args, **kwargs)
        assert self.model is not None
        return reaching(out, self.model, layers)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Leave what was left out of the step as it is: with one process it has no gradient, under DDP one of zeros."""
        super().on_before_optimizer_step(optimizer)
        if self.drops_at_random:
            assert self.model is not None
            for parameter in left_out(self.model, self.drawn()):
                parameter.grad = None

    def adopt(self, config: Mapping[str, Any]) -> None:
        """Take the settings from an adapter folder."""
        super().adopt(config)
        if config.get("peft_type") == self.peft_type:
            kind = type(self.bottleneck)
            known = {field.name for field in fields(kind)} - {"peft_type"}
            stored = {key: value for key, value in config.items() if key in known}
            self.bottleneck = self.configured(kind, "bottleneck", kind(**stored))

    def parts(self) -> list[dict[str, Any]]:
        """Return the settings for `adapter_config.json`."""
        return [*super().parts(), {**asdict(self.bottleneck), "peft_type": self.peft_type}]
