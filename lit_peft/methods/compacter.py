"""Compacter: bottleneck adapters of Kronecker products (Mahabadi et al. 2021, https://arxiv.org/abs/2106.04647).

    W = sum_i A_i (x) (s_i t_i),    i = 1..n,    A_i (n, n),  s_i (in / n, 1),  t_i (1, out / n)

A bottleneck's two projections are such sums. The rule A (n, n, n) is one tensor for all layers; a projection owns in +
out numbers and a bias. W is not formed: (A (x) B) x is two small products, faster on CPUs at all sizes tried; only the
bottleneck's kernel, where it is asked for, is handed W.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from math import log
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from lit_peft.adapter import Adapter, innermost
from lit_peft.methods.bottleneck import first, with_first
from lit_peft.methods.norms import NormConfig, norm_class
from lit_peft.mixin import PEFT
from lit_peft.ops.bottleneck import WIDEST, bottleneck
from lit_peft.ops.choice import takes_kernel
from lit_peft.placing import join
from lit_peft.selection import telling, told
from lit_peft.sites import geometry
from lit_peft.sublayers import after, hosts, norms

RULE = "compacter_rule"
REDUCTION = 32


@dataclass(frozen=True, kw_only=True)
class CompacterConfig:
    """Settings of Compacter.

    Args:
        phm_dim: n, how many Kronecker products a weight is the sum of.
        reduction_factor: hidden size / width of the bottleneck; None: 32, or the nearest that fits the hidden size.
        activation: the non-linearity, by its name in transformers.
        only_feed_forward: adapters behind feed-forward only (Compacter++).
        dropout: dropout on the adapter's input.
        rule_std: width of the normal distribution that the shared rule A starts from.
        train_norms: train the model's LayerNorms (RMSNorms) too, as the paper does.
        hidden_size: width d of the residual stream; None: the model's.

    Raises:
        ValueError: if a value is out of range.
    """

    phm_dim: int = 4
    reduction_factor: int | None = None
    activation: str = "gelu"
    only_feed_forward: bool = False
    dropout: float = 0.0
    rule_std: float = 0.01
    train_norms: bool = False
    hidden_size: int | None = None

    default_lr: ClassVar[float] = 3e-3

    def __post_init__(self) -> None:
        if self.phm_dim < 1:
            raise ValueError(f"compacter.phm_dim is {self.phm_dim}; it must be 1 or more.")
        if self.reduction_factor is not None and self.reduction_factor < 1:
            raise ValueError(f"compacter.reduction_factor is {self.reduction_factor}; it must be 1 or more.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"compacter.dropout is {self.dropout}; it must be at least 0 and below 1.")
        if self.activation not in ACT2FN:
            raise ValueError(f"compacter.activation {self.activation!r} is unknown. Use relu, gelu, silu, tanh, ...")

    def sized(self, hidden: int) -> CompacterConfig:
        """Return the settings with the model's width, and a reduction_factor that fits it, filled in.

        Raises:
            ValueError: if the widths do not divide by n.
        """
        d, n = self.hidden_size or hidden, self.phm_dim
        fitting = [d // m for m in range(n, d + 1, n) if d % m == 0]
        if not fitting:
            raise ValueError(f"compacter.phm_dim {n} does not divide the hidden size {d}. Choose one that does.")
        wanted = self.reduction_factor or REDUCTION
        nearest = min(fitting, key=lambda factor: abs(log(factor / wanted)))
        if self.reduction_factor not in (None, nearest):
            raise ValueError(
                f"compacter: the hidden size {d} over reduction_factor {wanted} must be a multiple of phm_dim {n}. "
                f"The nearest reduction_factor that fits is {nearest}."
            )
        return replace(self, hidden_size=d, reduction_factor=nearest)


class CompacterRule(Adapter):
    """Holds the rule A (n, n, n) that all layers share, and tells it to the adapters inside."""

    peft_type: ClassVar[str] = "LIT_COMPACTER"

    def add(self, name: str, config: CompacterConfig) -> None:
        """Make the rule of another named set."""
        super().add(name, config)
        if "compacter_rule" not in self._modules:
            self.compacter_rule = nn.ParameterDict()
        n = config.phm_dim
        rule = torch.empty(n, n, n, device=next(innermost(self.base).parameters()).device)
        if rule.device.type != "meta":
            nn.init.normal_(rule, std=config.rule_std)
        self.compacter_rule[name] = nn.Parameter(rule)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the base; the adapters inside find the rules of all sets."""
        with telling(**{RULE: {**(told(RULE) or {}), **dict(self.compacter_rule.items())}}):
            return self.base(*args, **kwargs)


class BorrowedRule(Adapter):
    """Tells the adapters inside the rule that another part of the model holds: a decoder has its encoder's.

    Attributes:
        lender: what holds it.
    """

    lender: CompacterRule | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the base; the adapters inside find the rules of all sets."""
        assert self.lender is not None
        with telling(**{RULE: {**(told(RULE) or {}), **dict(self.lender.compacter_rule.items())}}):
            return self.base(*args, **kwargs)


class CompacterAdapter(Adapter):
    """A bottleneck y -> y + U act(D y) whose D and U are sums of Kronecker products."""

    peft_type: ClassVar[str] = "LIT_COMPACTER"
    site = ("hidden_size",)

    def add(self, name: str, config: CompacterConfig) -> None:
        """Make s (n, in / n), t (n, out / n) and the bias of both projections of another named set."""
        super().add(name, config)
        if "compacter_down_s" not in self._modules:
            for part in ("down_s", "down_t", "down_bias", "up_s", "up_t", "up_bias"):
                setattr(self, f"compacter_{part}", nn.ParameterDict())
        assert config.hidden_size is not None, "resolve the configuration with `sized` first"
        assert config.reduction_factor is not None, "resolve the configuration with `sized` first"
        d, n = config.hidden_size, config.phm_dim
        m = d // config.reduction_factor
        device = next(innermost(self.base).parameters()).device

        def new(wide: int, tall: int) -> nn.Parameter:
            tensor = torch.empty(n, wide // n, device=device)
            if device.type != "meta":  # Glorot's bound for the factors of an (in / n, out / n) matrix
                bound = (6 / (wide // n + tall // n)) ** 0.5
                nn.init.uniform_(tensor, -bound, bound)
            return nn.Parameter(tensor)

        self.compacter_down_s[name], self.compacter_down_t[name] = new(d, m), new(m, d)
        self.compacter_up_s[name], self.compacter_up_t[name] = new(m, d), new(d, m)
        self.compacter_down_bias[name] = nn.Parameter(torch.zeros(m, device=device))
        self.compacter_up_bias[name] = nn.Parameter(torch.zeros(d, device=device))

    def branch(self, name: str, h: Tensor, onto: Tensor | None = None) -> Tensor:
        """Return U act(D h), (..., d) -> (..., d), of one named set, added onto a tensor where one is given."""
        config: CompacterConfig = self.configs[name]
        rule = (told(RULE) or {}).get(name)
        if rule is None:
            raise TypeError("A Compacter adapter was called outside of its model, which holds the rule that it shares.")
        x = F.dropout(h, config.dropout, self.training) if config.dropout else h
        down = self.compacter_down_s[name], self.compacter_down_t[name], self.compacter_down_bias[name]
        up = self.compacter_up_s[name], self.compacter_up_t[name], self.compacter_up_bias[name]
        inner, rows = len(down[2]), x.numel() // x.shape[-1]
        if inner <= WIDEST and takes_kernel("compacter", x, rows=rows, width=x.shape[-1], inner=inner):
            matrices = matrix(rule, *down[:2]), down[2], matrix(rule, *up[:2]), up[2]
            return bottleneck(onto, x, *matrices, config.activation, kernels=True)
        out = kronecker(ACT2FN[config.activation](kronecker(x, rule, *down)), rule, *up)
        return out if onto is None else onto + out

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the base and add the bottleneck of its (first) output to it."""
        out = self.base(*args, **kwargs)
        y = first(out)
        total = y
        for name, rows in self.shares(y):
            if rows is None:
                total = self.branch(name, y, onto=total)
            else:
                total = total.index_add(0, rows, self.branch(name, y[rows]).to(y.dtype))
        return with_first(out, total)


def kronecker(x: Tensor, rule: Tensor, s: Tensor, t: Tensor, bias: Tensor) -> Tensor:
    """Return x W + bias for W = sum_i A_i (x) (s_i t_i), without forming W (Compacter, equation 5).

    Args:
        x: (..., in).
        rule: A (n, n, n).
        s: (n, in / n).
        t: (n, out / n).
        bias: (out,).

    Example:
        >>> import torch
        >>> x, rule, s, t = torch.ones(1, 4), torch.ones(2, 2, 2), torch.ones(2, 2), torch.ones(2, 3)
        >>> kronecker(x, rule, s, t, torch.zeros(6)).tolist()
        [[8.0, 8.0, 8.0, 8.0, 8.0, 8.0]]
    """
    dtype, n = x.dtype, rule.shape[0]
    blocks = x.reshape(*x.shape[:-1], n, -1)  # (..., b, p)
    inner = F.linear(blocks, s.to(dtype))  # (..., b, i): each block against each s_i
    inner = torch.einsum("...bi,iba->...ai", inner, rule.to(dtype))
    return (inner @ t.to(dtype)).flatten(-2) + bias.to(dtype)


def matrix(rule: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """Return W^T (out, in) for W = sum_i A_i (x) (s_i t_i), for the kernel, which takes matrices.

    Args:
        rule: A (n, n, n).
        s: (n, in / n).
        t: (n, out / n).

    Example:
        >>> import torch
        >>> matrix(torch.ones(2, 2, 2), torch.ones(2, 2), torch.ones(2, 3)).shape
        torch.Size([6, 4])
    """
    n = len(rule)
    left = torch.einsum("iba,iq->aqbi", rule, t.to(rule.dtype)).reshape(-1, n)
    return (left @ s.to(rule.dtype)).view(n * t.shape[1], n * s.shape[1])


class Compacter(PEFT):
    """Compacter on the task's model.

    Args:
        compacter: number of products, width and places.

    Example:
        >>> from lit_peft import Compacter, SFT
        >>> class Mine(Compacter, SFT): ...
    """

    method = "compacter"

    def __init__(self, *args: Any, compacter: CompacterConfig = CompacterConfig(), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.compacter = self.configured(CompacterConfig, "compacter", compacter)

    def place_adapters(self) -> None:
        """Put adapters behind attention and feed-forward, and the rule around each stack of layers."""
        super().place_adapters()
        assert self.model is not None
        config = self.compacter.sized(geometry(self.model).hidden)
        if self.compacter.reduction_factor is None and config.reduction_factor != REDUCTION:
            size = f"the hidden size {config.hidden_size} and phm_dim {config.phm_dim}"
            rank_zero_info(f"Compacter: reduction_factor {config.reduction_factor}, nearest to {REDUCTION} for {size}.")
        self.compacter = replace(self.compacter, reduction_factor=config.reduction_factor)
        attentions, forwards = after(self.model)
        sites = forwards if config.only_feed_forward else {**attentions, **forwards}
        paths = hosts(self.model)
        if config.train_norms:  # before the adapters, around which the paths inside would be longer
            rate = config.default_lr
            changes = {path: NormConfig(layer=layer, default_lr=rate) for path, layer in norms(self.model).items()}
            join(self.model, changes, lambda base: norm_class(CompacterRule.peft_type), self.placing)
        join(self.model, dict.fromkeys(sites, config), lambda base: CompacterAdapter, self.placing)
        join(self.model, {paths[0]: config}, lambda base: CompacterRule, self.placing)
        # encoder and decoder are called one after the other, yet there is one rule: one weight, in one place
        if paths[1:]:
            join(self.model, dict.fromkeys(paths[1:], config), lambda base: BorrowedRule, self.placing)
        lender = next(adapter for adapter in self.model.modules() if isinstance(adapter, CompacterRule))
        for adapter in self.model.modules():
            if isinstance(adapter, BorrowedRule):
                adapter.__dict__["lender"] = lender  # not by setattr: it is no submodule

    def adopt(self, config: Mapping[str, Any]) -> None:
        """Take the settings from an adapter folder."""
        super().adopt(config)
        if config.get("peft_type") == CompacterRule.peft_type:
            known = {field.name for field in fields(CompacterConfig)}
            stored = {key: value for key, value in config.items() if key in known}
            self.compacter = self.configured(CompacterConfig, "compacter", stored)

    def parts(self) -> list[dict[str, Any]]:
        """Return the settings for `adapter_config.json`."""
        return [*super().parts(), {"peft_type": CompacterRule.peft_type, **asdict(self.compacter)}]
