"""Settings of prefix tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, kw_only=True)
class PrefixConfig:
    """Settings of prefix tuning.

    Args:
        num_virtual_tokens: length p of the prefix.
        prefix_projection: train the rows through a network (the paper) instead of directly.
        encoder_hidden_size: width of that network's hidden layer.
        dropout: dropout on the rows.
        gate: scale the prefix by a learned gate for each token (UniPELT), or by a fixed number; 0 leaves it out.
        init_text: start from the keys and values of this text, repeated or cut to p tokens: the prefix then does what
            the text in front would do. Empty: at random.
        shift_positions: whether the text's positions begin behind the prefix, at p, as in HF PEFT; or where they do
            without it, as in the folders of adapter-hub's library.

    Raises:
        ValueError: if a value is out of range.
    """

    num_virtual_tokens: int = 30
    prefix_projection: bool = True
    encoder_hidden_size: int = 512
    dropout: float = 0.0
    gate: bool | float = False
    init_text: str = ""
    shift_positions: bool = True

    default_lr: ClassVar[float] = 8e-5
    peft_type: ClassVar[str] = "PREFIX_TUNING"

    def __post_init__(self) -> None:
        if self.num_virtual_tokens < 1:
            raise ValueError(f"prefix.num_virtual_tokens is {self.num_virtual_tokens}; it must be 1 or more.")
        if self.encoder_hidden_size < 1:
            raise ValueError(f"prefix.encoder_hidden_size is {self.encoder_hidden_size}; it must be 1 or more.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"prefix.dropout is {self.dropout}; it must be at least 0 and below 1.")
        if self.init_text and self.prefix_projection and self.encoder_hidden_size < self.num_virtual_tokens:
            raise ValueError(
                f"prefix.encoder_hidden_size is {self.encoder_hidden_size}, too narrow to yield the rows of a text of "
                f"{self.num_virtual_tokens} tokens. Set it to {self.num_virtual_tokens} or more."
            )

    @property
    def off(self) -> bool:
        """Whether the gate is fixed at 0: the prefix is then left out, with its positions."""
        return not isinstance(self.gate, bool) and self.gate == 0
