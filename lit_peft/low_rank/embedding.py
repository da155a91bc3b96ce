"""LoRA around an embedding table."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_peft.adapter import innermost
from lit_peft.low_rank.linear import LoRALinear

if TYPE_CHECKING:
    from lit_peft.methods.lora import LoRAConfig


class LoRAEmbedding(LoRALinear):
    """Adds s B A[:, token] to a token's row of an embedding table: W + s (B A)^T, W (vocabulary, width).

    Only the looked-up columns of A (r, vocabulary) are read; B is (width, r). A starts at zero and B normal, as in HF
    PEFT. A base that scales its rows (Gemma's `embed_scale`) scales the change alike. There is no dropout on tokens.

    Example:
        >>> import torch
        >>> from lit_peft import LoRAConfig
        >>> layer = LoRAEmbedding(torch.nn.Embedding(10, 4), LoRAConfig(r=2))
        >>> layer(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 4])
    """

    def pair_shapes(self, config: LoRAConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return (r, vocabulary) and (width, r)."""
        rows, width = innermost(self.base).get_parameter("weight").shape
        return (config.r, rows), (width, config.r)

    def start(self, a: Tensor, b: Tensor, config: LoRAConfig) -> None:
        """Fill A with zeros and B with N(0, 1): a token's change is zero until its column of A moves."""
        a.zero_()
        nn.init.normal_(b)

    def change(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """Return y + s B A[:, x]: token ids (...), rows (..., width) -> (..., width)."""
        base = innermost(self.base)
        a, b = self.pair(name)
        # as the base: the row of padding is looked up, but not trained
        h = F.embedding(x, a.t(), padding_idx=getattr(base, "padding_idx", None)).to(y.dtype)
        change: Tensor = F.linear(h, b.to(y.dtype)) * self.configs[name].scale
        factor: Tensor | float = getattr(base, "embed_scale", 1.0)
        return y + change * factor

    def delta(self, name: str) -> Tensor:
        """Return the change of the table s (B A)^T, (vocabulary, width), in float32."""
        a, b = self.pair(name)
        delta: Tensor = self.configs[name].scale * torch.mm(a.float().t(), b.float().t())
        return delta

    def tensors(self, name: str = "default") -> dict[str, Tensor]:
        """Return A and B under HF PEFT's names."""
        return {"lora_embedding_A": self.lora_a[name].detach(), "lora_embedding_B": self.lora_b[name].detach()}
