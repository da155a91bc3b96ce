"""Gates: how much a part of a composed method acts on a token, learned from the hidden state (UniPELT).

    g(h) = sigmoid(w . h + b)

On decoders there is one gate for each token. The paper's average over the sequence would let a token see the tokens
behind it; it is kept for encoders, over the tokens that are no padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from lit_peft.selection import told

_SEEN: ContextVar[dict[str, list[Tensor]] | None] = ContextVar("lit_peft_gates", default=None)


class Gates(nn.Module):
    """The gate of each named set: a weight (d,) and a bias, which start near g = 1/2.

    Args:
        part: what the gate is for, such as `lora`: the name it is logged under.
        hidden_size: width d.
    """

    def __init__(self, part: str, hidden_size: int) -> None:
        super().__init__()
        self.part = part
        self.hidden_size = hidden_size
        self.weight = nn.ParameterDict()
        self.bias = nn.ParameterDict()
        self.fixed: dict[str, float] = {}

    def add(self, name: str, device: torch.device, gate: bool | float = True) -> None:
        """Make the gate of another named set: a learned one, none (False: always 1), or a fixed number."""
        self.fixed.pop(name, None)
        if gate is not True:
            self.fixed[name] = 1.0 if gate is False else float(gate)
            return
        weight = torch.empty(self.hidden_size, device=device)
        if device.type != "meta":
            nn.init.normal_(weight, std=0.02)
        self.weight[name] = nn.Parameter(weight)
        self.bias[name] = nn.Parameter(torch.zeros(1, device=device))

    def forward(self, name: str, h: Tensor, causal: bool, rows: Tensor | None = None) -> Tensor | float:
        """Return the gate for h (batch, length, d): (batch, length, 1), or (batch, 1, 1) where it is an average.

        Args:
            name: the named set.
            h: the hidden state that it is read from.
            causal: one gate a token; else the average over the text.
            rows: which rows of the batch h is of; None: all.
        """
        if name in self.fixed:
            return self.fixed[name]
        gate = torch.sigmoid((h * self.weight[name].to(h.dtype)).sum(-1, keepdim=True) + self.bias[name].to(h.dtype))
        if not causal:
            there = told("padding")
            if there is not None and rows is not None:
                there = there[rows]
            if there is None or there.shape != h.shape[:2]:
                gate = gate.mean(1, keepdim=True)
            else:
                weight = there[..., None].to(gate.dtype)
                gate = (gate * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1)
        seen = _SEEN.get()
        if seen is not None:
            seen.setdefault(self.part, []).append(gate.detach().mean())
        return gate


@contextmanager
def watched() -> Iterator[dict[str, list[Tensor]]]:
    """Collect the mean of every gate that is computed inside the `with` block, by part."""
    found: dict[str, list[Tensor]] = {}
    token = _SEEN.set(found)
    try:
        yield found
    finally:
        _SEEN.reset(token)
