"""Prefix tuning (Li and Liang 2021, https://arxiv.org/abs/2101.00190).

    K -> [P_K ; K],    V -> [P_V ; V]    in every attention, with p trained rows each

While training the rows come from a small network, P = W_2 tanh(W_1 E + b_1) + b_2 with E (p, d); trained directly they
were found unstable. The text's own tokens start at position p.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_peft.adapter import Adapter, innermost, named_adapters
from lit_peft.gates import Gates
from lit_peft.mixin import PEFT
from lit_peft.placing import join
from lit_peft.prefixed import GATE, KEYWORD, Prefix, prepare
from lit_peft.sites import geometry, is_linear, widths
from lit_peft.sublayers import attention_cores, hosts, is_causal


@dataclass(frozen=True, kw_only=True)
class PrefixConfig:
    """Settings of prefix tuning.

    Args:
        num_virtual_tokens: length p of the prefix.
        prefix_projection: train the rows through a network (the paper) instead of directly.
        encoder_hidden_size: width of that network's hidden layer.
        dropout: dropout on the rows.
        gate: scale the prefix by a learned gate for each token (UniPELT), or by a fixed number.
        shift_positions: whether the text's positions begin behind the prefix, at p, as in HF PEFT; or at 0, as in the
            folders of adapter-hub's library.

    Raises:
        ValueError: if a value is out of range.
    """

    num_virtual_tokens: int = 30
    prefix_projection: bool = True
    encoder_hidden_size: int = 512
    dropout: float = 0.0
    gate: bool | float = False
    shift_positions: bool = True

    default_lr: ClassVar[float] = 8e-5
    peft_type: ClassVar[str] = "LIT_PREFIX"

    def __post_init__(self) -> None:
        if self.num_virtual_tokens < 1:
            raise ValueError(f"prefix.num_virtual_tokens is {self.num_virtual_tokens}; it must be 1 or more.")
        if self.encoder_hidden_size < 1:
            raise ValueError(f"prefix.encoder_hidden_size is {self.encoder_hidden_size}; it must be 1 or more.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"prefix.dropout is {self.dropout}; it must be at least 0 and below 1.")


class PrefixBackbone(Adapter):
    """Hands every attention module inside the base p keys and values of its own, as an argument of the call.

    It sits around a whole stack of layers (`model.model` of a Llama, the encoder and the decoder of a T5), so that one
    network makes the rows of all of them. The rows of one set are (p, 2 n kv_heads head_dim) for n attention modules,
    ordered K_1 V_1 K_2 V_2 ... as HF PEFT has them.
    """

    @property
    def peft_type(self) -> str:
        """The kind of folder that holds this adapter, set by its method."""
        return str(next(iter(self.configs.values())).peft_type)

    def add(self, name: str, config: PrefixConfig) -> None:
        """Make the rows, or the network that yields them, of another named set."""
        super().add(name, config)
        if "prefix_table" not in self._modules:
            for part in ("table", "embedding", "hidden", "hidden_bias", "output", "output_bias"):
                setattr(self, f"prefix_{part}", nn.ParameterDict())
            base = innermost(self.base)
            cores = attention_cores(base)
            if not cores:
                raise TypeError(
                    f"{type(base).__name__} does not use transformers' attention interface, so prefixes cannot enter. "
                    "Use another method, such as lora."
                )
            prepare(base, [innermost(base.get_submodule(path)) for path in cores])
            size = geometry(base)
            self.attentions, self.kv_heads, self.head_dim = len(cores), size.kv_heads, size.head_dim
            self.hidden_size = size.hidden
            self.takes_positions = "position_ids" in inspect.signature(base.forward).parameters
        p, wide = config.num_virtual_tokens, 2 * self.attentions * self.kv_heads * self.head_dim
        device = next(innermost(self.base).parameters()).device

        def new(*shape: int, bound: float | None = None) -> nn.Parameter:
            tensor = torch.empty(shape, device=device)
            if device.type != "meta":
                nn.init.normal_(tensor) if bound is None else nn.init.uniform_(tensor, -bound, bound)
            return nn.Parameter(tensor)

        if not config.prefix_projection:
            self.prefix_table[name] = new(p, wide)
            return
        d, mu = self.hidden_size, config.encoder_hidden_size
        self.prefix_embedding[name] = new(p, d)
        self.prefix_hidden[name], self.prefix_hidden_bias[name] = new(mu, d, bound=d**-0.5), new(mu, bound=d**-0.5)
        self.prefix_output[name], self.prefix_output_bias[name] = (
            new(wide, mu, bound=mu**-0.5),
            new(wide, bound=mu**-0.5),
        )

    def rows(self, name: str) -> Tensor:
        """Return the rows of one named set, (p, 2 n kv_heads head_dim)."""
        if name in self.prefix_table:
            table: Tensor = self.prefix_table[name]
            return table
        hidden = F.linear(self.prefix_embedding[name], self.prefix_hidden[name], self.prefix_hidden_bias[name])
        return F.linear(torch.tanh(hidden), self.prefix_output[name], self.prefix_output_bias[name])

    def prefix(self, shares: list[tuple[str, Tensor | None]], batch: int) -> tuple[Prefix, Tensor]:
        """Return the keys and values of the sets that act, and how far each row's text is moved, (batch or 1, 1)."""
        keys: list[list[Tensor]] = [[] for _ in range(self.attentions)]
        values: list[list[Tensor]] = [[] for _ in range(self.attentions)]
        seen: list[Tensor] = []
        routed = any(rows is not None for _, rows in shares)
        for name, rows in shares:
            config: PrefixConfig = self.configs[name]
            table = F.dropout(self.rows(name), config.dropout, self.training)
            p = table.shape[0]
            # (2n, kv_heads, p, head_dim)
            parts = table.view(p, 2 * self.attentions, self.kv_heads, self.head_dim).permute(1, 2, 0, 3)
            for number in range(self.attentions):
                keys[number].append(parts[2 * number][None])
                values[number].append(parts[2 * number + 1][None])
            visible = torch.zeros(batch, p, dtype=torch.bool, device=table.device)
            visible[slice(None) if rows is None else rows] = True
            seen.append(visible)
        mask = torch.cat(seen, 1)
        made = Prefix([torch.cat(k, 2) for k in keys], [torch.cat(v, 2) for v in values], mask if routed else None)
        moving = [self.configs[name].shift_positions for name, _ in shares]
        moved = torch.cat([part if moves else part[:, :0] for moves, part in zip(moving, seen, strict=True)], 1)
        return made, moved.sum(1, keepdim=True) if routed else moved[:1].sum(1, keepdim=True)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the base with a prefix for each of its attention modules, and the text's positions moved behind it."""
        text = next(t for t in (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if t is not None)
        shares = self.shares(text)
        if not shares:
            return self.base(*args, **kwargs)
        prefix, moved = self.prefix(shares, text.shape[0])
        if self.takes_positions and any(self.configs[name].shift_positions for name, _ in shares):
            positions = kwargs.get("position_ids")
            if positions is None:
                cache = kwargs.get("past_key_values")
                past = 0 if cache is None else cache.get_seq_length()
                positions = torch.arange(text.shape[1], device=text.device)[None] + past
            kwargs["position_ids"] = positions + moved
        out = self.base(*args, **{**kwargs, KEYWORD: prefix})
        if not torch.compiler.is_compiling() and len(prefix.used) < self.attentions:
            raise TypeError(
                f"{type(innermost(self.base)).__name__} does not pass keyword arguments down to all of its attention "
                "modules, so the prefix would be without effect. Use another method, such as lora."
            )
        return out


class PrefixGate(Adapter):
    """Computes how much each token of an attention module's input attends to the prefix."""

    peft_type = PrefixBackbone.peft_type
    causal = True

    def add(self, name: str, config: PrefixConfig) -> None:
        """Make the gate of another named set."""
        super().add(name, config)
        base = innermost(self.base)
        if "prefix_gate" not in self._modules:
            first = next(module for module in base.modules() if is_linear(module))
            self.prefix_gate = Gates("prefix", widths(first)[0])
        device = next(base.parameters()).device
        self.prefix_gate.add(name, device, config.gate)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the base with a gate (batch, length or 1, p) for the prefix."""
        x = args[0] if args else kwargs["hidden_states"]
        gates = []
        for name, rows in self.shares(x):
            p = self.configs[name].num_virtual_tokens
            gate = self.prefix_gate(name, x if rows is None else x[rows], self.causal, rows)
            if isinstance(gate, float):
                gate = x.new_full((x.shape[0] if rows is None else len(rows), 1, 1), gate)
            if rows is not None:
                gate = x.new_zeros(x.shape[0], gate.shape[1], 1).index_copy(0, rows, gate)
            gates.append(gate.expand(-1, -1, p))
        if not gates:
            return self.base(*args, **kwargs)
        length = max(gate.shape[1] for gate in gates)
        return self.base(*args, **kwargs, **{GATE: torch.cat([gate.expand(-1, length, -1) for gate in gates], -1)})


def _gates(model: nn.Module) -> list[PrefixGate]:
    return [adapter for _, adapter in named_adapters(model) if isinstance(adapter, PrefixGate)]


class PrefixTuning(PEFT):
    """Prefix tuning on the task's model.

    Args:
        prefix: length of the prefix, and the network that its rows are trained through.

    Example:
        >>> from lit_peft import PrefixTuning, SFT
        >>> class Mine(PrefixTuning, SFT): ...
    """

    method = "prefix"

    def __init__(self, *args: Any, prefix: PrefixConfig = PrefixConfig(), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.prefix: PrefixConfig = self.configured(PrefixConfig, "prefix", prefix)

    def place_adapters(self) -> None:
        """Put a `PrefixBackbone` around every stack of layers."""
        super().place_adapters()
        assert self.model is not None
        cores = {} if self.prefix.gate is False else dict.fromkeys(attention_cores(self.model), self.prefix)
        causal = {path: is_causal(self.model, path) for path in cores}
        join(self.model, dict.fromkeys(hosts(self.model), self.prefix), lambda base: PrefixBackbone, self.placing)
        for path in attention_cores(self.model) if cores else []:  # their paths have changed
            join(self.model, {path: self.prefix}, lambda base: PrefixGate, self.placing)
        for adapter, is_decoder in zip(_gates(self.model), causal.values(), strict=True):
            adapter.causal = is_decoder

    def adopt(self, config: Mapping[str, Any]) -> None:
        """Take the settings from an adapter folder."""
        super().adopt(config)
        if config.get("peft_type") == self.prefix.peft_type:
            kind = type(self.prefix)
            known = {field.name for field in fields(kind)}
            self.prefix = self.configured(kind, "prefix", {k: v for k, v in config.items() if k in known})

    def parts(self) -> list[dict[str, Any]]:
        """Return the settings for `adapter_config.json`."""
        return [*super().parts(), {"peft_type": self.prefix.peft_type, **asdict(self.prefix)}]
