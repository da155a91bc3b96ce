"""The adapters of prefix tuning: one that makes the rows of a whole stack of layers, and gates on them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_peft.adapter import Adapter, innermost
from lit_peft.gates import Gates
from lit_peft.methods.prefix_config import PrefixConfig
from lit_peft.positions import check_room, own_positions, position_table, positions_of
from lit_peft.prefixed import GATE, KEYWORD, Prefix, Recorder, prepare
from lit_peft.sites import geometry, is_linear, widths
from lit_peft.sublayers import attention_cores
from lit_peft.virtual_tokens import TOKENS

NETWORK = ("embedding", "hidden", "hidden_bias", "output", "output_bias")


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
        base = innermost(self.base)
        check_room(base, config.num_virtual_tokens, "prefix.num_virtual_tokens")
        super().add(name, config)
        if "prefix_table" not in self._modules:
            for part in ("table", *NETWORK):
                setattr(self, f"prefix_{part}", nn.ParameterDict())
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
            self.__dict__["positions"] = position_table(base)  # not by setattr: it is the base's own
        p, wide = config.num_virtual_tokens, 2 * self.attentions * self.kv_heads * self.head_dim
        device = next(base.parameters()).device

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
        return _through(*(getattr(self, f"prefix_{part}")[name] for part in NETWORK))

    def trained_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield what training changes: nothing of a set whose gate is fixed at 0."""
        for key, parameter in super().trained_parameters():
            config = self.configs.get(key.rpartition(".")[2])
            if config is None or not config.off:
                yield key, parameter

    def fold(self, name: str) -> None:
        """Replace the network of one named set by the rows that it yields."""
        if name in self.prefix_table:
            return
        with torch.no_grad():
            rows = self.rows(name)
        trained = self.prefix_embedding[name].requires_grad
        for part in NETWORK:
            del getattr(self, f"prefix_{part}")[name]
        self.prefix_table[name] = nn.Parameter(rows, requires_grad=trained)
        self.configs[name] = replace(self.configs[name], prefix_projection=False)

    def tensors(self, name: str = "default") -> dict[str, Tensor]:
        """Return the rows, as HF PEFT keeps them, and the network where there is one."""
        found = super().tensors(name)
        table = found.pop("prefix_table", None)
        if table is None:  # sharded parts must be whole for this
            parts = (found[f"prefix_{part}"] for part in NETWORK)
            table = _through(*(t.full_tensor() if hasattr(t, "full_tensor") else t for t in parts))
        return {TOKENS: table, **found}

    def shapes(self, tensors: Mapping[str, Tensor], name: str = "default") -> dict[str, tuple[int, ...]]:
        """Return the shapes of the rows, and of the network.

        Raises:
            ValueError: if there is a network here and none in the folder.
        """
        if TOKENS in tensors and name in self.prefix_embedding and "prefix_embedding" not in tensors:
            raise ValueError(
                "This folder holds a prefix without the network that it was trained through (HF PEFT does not keep "
                "it). Set prefix_projection: false."
            )
        return super().shapes(tensors, name)

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
            # 2n times (1, kv_heads, p, head_dim); taken apart at once, so that their gradients come together at once
            parts = (
                table.view(p, 2 * self.attentions, self.kv_heads, self.head_dim).permute(1, 2, 0, 3)[:, None].unbind()
            )
            for number in range(self.attentions):
                keys[number].append(parts[2 * number])
                values[number].append(parts[2 * number + 1])
            visible = torch.zeros(batch, p, dtype=torch.bool, device=table.device)
            visible[slice(None) if rows is None else rows] = True
            seen.append(visible)
        mask = torch.cat(seen, 1)
        joined = [[torch.cat(sets, 2) if len(sets) > 1 else sets[0] for sets in part] for part in (keys, values)]
        made = Prefix(*joined, mask if routed else None)
        moving = [self.configs[name].shift_positions for name, _ in shares]
        moved = torch.cat([part if moves else part[:, :0] for moves, part in zip(moving, seen, strict=True)], 1)
        return made, moved.sum(1, keepdim=True) if routed else moved[:1].sum(1, keepdim=True)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the base with a prefix for each of its attention modules, and the text's positions moved behind it."""
        text = next(t for t in (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if t is not None)
        rows_of = text if text.ndim > 2 else text[..., None]  # a generator's beams are told from batches by the width
        shares = [(name, rows) for name, rows in self.shares(rows_of) if not self.configs[name].off]
        if not shares:
            return self.base(*args, **kwargs)
        prefix, moved = self.prefix(shares, text.shape[0])
        if self.takes_positions and any(self.configs[name].shift_positions for name, _ in shares):
            given = kwargs.get("position_ids")
            if given is None:
                cache = kwargs.get("past_key_values")
                past = 0 if cache is None else int(cache.get_seq_length())
                self._check_length(
                    text.shape[1] + past, sum(self.configs[name].num_virtual_tokens for name, _ in shares)
                )
                given = own_positions(self.positions, text, past)
            kwargs["position_ids"] = given + moved
        out = self.base(*args, **{**kwargs, KEYWORD: prefix})
        if not torch.compiler.is_compiling() and len(prefix.used) < self.attentions:
            raise TypeError(
                f"{type(innermost(self.base)).__name__} does not pass keyword arguments down to all of its attention "
                "modules, so the prefix would be without effect. Use another method, such as lora."
            )
        return out

    def _check_length(self, length: int, p: int) -> None:
        most = 0 if self.positions is None else positions_of(innermost(self.base), self.positions)
        if most and length + p > most:
            raise ValueError(
                f"A text of {length} tokens behind a prefix of {p} is longer than the {most} positions of "
                f"{type(innermost(self.base)).__name__}. Shorten texts (data.max_length) or the prefix."
            )

    def recorded(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        """Return the rows (length, 2 n kv_heads head_dim) that a text of one row would be, and the base's output."""
        record = Recorder()
        out = self.base(*args, **kwargs, **{KEYWORD: record})
        pairs = [record.found[number] for number in range(self.attentions)]
        return torch.cat([part[0].transpose(0, 1).flatten(1) for pair in pairs for part in pair], 1), out

    def start(self, name: str, rows: Tensor) -> None:
        """Let one named set begin at these rows.

        A network begins at them too: of all output layers that yield them exactly, the one closest to its own random
        start, which is a matter of least squares.
        """
        with torch.no_grad():
            if name in self.prefix_table:
                self.prefix_table[name].copy_(rows)
                return
            e, w1, b1 = (getattr(self, f"prefix_{part}")[name].double() for part in NETWORK[:3])
            hidden = torch.tanh(F.linear(e, w1, b1))
            missing = rows.double() - self.rows(name).double()
            self.prefix_output[name].add_((torch.linalg.pinv(hidden) @ missing).t().to(self.prefix_output[name].dtype))


def _through(e: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """The paper's network: W_2 tanh(W_1 E + b_1) + b_2."""
    return F.linear(torch.tanh(F.linear(e, w1, b1)), w2, b2)


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
            if self.configs[name].off:  # its prefix is not there
                continue
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
