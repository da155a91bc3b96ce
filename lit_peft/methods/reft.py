"""ReFT: low-rank edits of the residual stream at a few prompt positions (Wu et al. 2024, https://arxiv.org/abs/2404.03592).

    LoReFT:  h -> h + R^T (W h + b - R h),    R (r, d) with orthonormal rows
    DiReFT:  h -> h + W_2^T (W_1 h + b)

behind chosen layers, at the first f and the last l tokens of the prompt. Tokens that are generated are never edited, so
a step of generation costs what the base costs. R stays orthonormal by construction: it is the Q factor of a trained
matrix, and d r numbers are stored.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_peft.adapter import Adapter, innermost, join, place
from lit_peft.methods.bottleneck import first, with_first
from lit_peft.mixin import PEFT
from lit_peft.sites import geometry, hosts, stacks

EDIT = "reft_edit"  # keyword on the way from the stack to its layers: which positions are edited
# (batch, length), True in the prompt; None: every token that is there. Read once, when the stack is called: what the
# layers see are arguments, so that a replay sees the same.
_PROMPT: ContextVar[Tensor | None] = ContextVar("lit_peft_prompt", default=None)


@contextmanager
def prompt_is(mask: Tensor | None) -> Iterator[None]:
    """Say which tokens (batch, length) of the next calls are the prompt; None: all of them."""
    token = _PROMPT.set(mask)
    try:
        yield
    finally:
        _PROMPT.reset(token)


@dataclass(frozen=True, kw_only=True)
class ReFTConfig:
    """Settings of LoReFT and DiReFT.

    Args:
        r: rank of an edit.
        first: f, how many tokens at the start of the prompt are edited.
        last: l, how many at its end.
        layers_to_transform: numbers of the layers; None: all (of the encoder, where there is one).
        tied: the same edit for the first and the last tokens; else one each.
        dropout: dropout on the edit.
        start_at_identity: LoReFT: start with W = R and b = 0, that is, as the base; else W is random as in the paper's
            code.

    Raises:
        ValueError: if a value is out of range.
    """

    r: int = 8
    first: int = 7
    last: int = 7
    layers_to_transform: list[int] | None = None
    tied: bool = True
    dropout: float = 0.0
    start_at_identity: bool = True

    default_lr: ClassVar[float] = 9e-4

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"reft.r is {self.r}; the rank must be 1 or more.")
        if self.first < 0 or self.last < 0 or self.first + self.last == 0:
            raise ValueError(f"reft.first is {self.first} and last {self.last}; edit at least one token.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"reft.dropout is {self.dropout}; it must be at least 0 and below 1.")


def edited(prompt: Tensor, first: int, last: int) -> Tensor:
    """Return 1 at the first, 2 at the last tokens of each row's prompt and 0 elsewhere, (batch, length).

    A prompt shorter than first + last is shared out: no more than half of it counts as first, the rest as last.

    Example:
        >>> import torch
        >>> edited(torch.tensor([[0, 1, 1, 1, 1, 0]]), 1, 2).tolist()
        [[0, 1, 0, 2, 2, 0]]
    """
    there = prompt.bool()
    number = there.long().cumsum(1)  # from 1
    length = number[:, -1:]
    short = length < first + last
    f = torch.where(short, torch.minimum(length // 2 if last else length, torch.full_like(length, first)), first)
    marks = torch.where(number <= f, 1, torch.where(number > length - torch.minimum(length - f, torch.full_like(length, last)), 2, 0))
    return marks * there


class ReFTStack(Adapter):
    """Tells the layers inside which positions to edit; has no parameters of its own."""

    peft_type: ClassVar[str] = ""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the base with the marks of the prompt's first and last tokens, in a prompt pass."""
        text = next(t for t in (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if t is not None)
        shares = self.shares(text)
        cache = kwargs.get("past_key_values")
        if not shares or (cache is not None and cache.get_seq_length()):
            return self.base(*args, **kwargs)
        mask, prompt = kwargs.get("attention_mask"), _PROMPT.get()
        there = text.new_ones(text.shape[:2], dtype=torch.long) if mask is None or mask.ndim != 2 else mask
        if prompt is not None:
            there = there * prompt.to(there)
        config: ReFTConfig = self.configs[shares[0][0]]
        return self.base(*args, **{**kwargs, EDIT: edited(there, config.first, config.last)})


class ReFTLayer(Adapter):
    """Edits a layer's output h (batch, length, d) at the marked positions: LoReFT's h + R^T (W h + b - R h).

    Example:
        >>> import torch
        >>> layer = ReFTLayer(torch.nn.Identity(), ReFTConfig(r=2), hidden_size=8)
        >>> sum(p.numel() for _, p in layer.own_parameters())
        34
    """

    peft_type: ClassVar[str] = "LIT_LOREFT"

    def __init__(self, base: nn.Module, config: ReFTConfig, name: str = "default", hidden_size: int = 0) -> None:
        self.__dict__["hidden_size"] = hidden_size
        super().__init__(base, config, name)
