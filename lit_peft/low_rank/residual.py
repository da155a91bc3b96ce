"""LoRA that starts inside the base's weight: PiSSA (https://arxiv.org/abs/2404.02948), OLoRA (arXiv 2406.01775).

    y = W x + b + s (B A - B0 A0) x,    A, B start at A0, B0

with s B0 A0 the part of W that is trained on. The papers take that part out of W; here W stays as it is and A0, B0 are
kept beside it, frozen. So the base is never changed, in memory or on disk, several sets share it, and switched off they
leave it exactly. The product is computed, and saved, as plain LoRA of twice the rank:

    B A - B0 A0 = [B - B0 | B0] [A ; A - A0]

which is exactly zero at the start in any precision, and does not cancel large numbers later.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from lit_peft.adapter import innermost
from lit_peft.low_rank.linear import LoRALinear
from lit_peft.low_rank.rows import change_rows
from lit_peft.ops.lora_linear import joins
from lit_peft.ops.residual import residual_linear, residual_update
from lit_peft.selection import Rows
from lit_peft.structure import is_linear, widths
from lit_peft.weights import dense

if TYPE_CHECKING:
    from lit_peft.methods.lora import LoRAConfig

FAST = re.compile(r"pissa_niter_(\d+)")  # randomised, with so many power iterations


def check_layer(path: str, module: nn.Module, config: LoRAConfig) -> None:
    """Raise a ValueError unless the layer's weight has as many directions as the rank asks for."""
    start = config.init_lora_weights
    if not is_linear(module):
        kind = type(module).__name__
        raise ValueError(f"{start} starts from a linear layer's weight, and {path} is a {kind}. Leave it out.")
    if config.r > min(widths(module)):
        raise ValueError(
            f"lora.r is {config.r}, but the weight of {path} has rank {min(widths(module))} at most, and {start} "
            "starts from that many of its directions. Lower r, or give this layer its own in rank_pattern."
        )


def principal(weight: Tensor, r: int, start: str) -> tuple[Tensor, Tensor]:
    """Return A0 (r, in) and B0 (out, r) of a weight (out, in), before the division by the scale, in float32.

    PiSSA: W = U S V^T, A0 = sqrt(S_r) V_r^T, B0 = U_r sqrt(S_r). OLoRA: W = Q R, A0 = R_r, B0 = Q_r. Signs are chosen
    by the weight alone, so that every process and every machine starts alike.
    """
    weight = weight if weight.dtype == torch.float64 else weight.float()
    if start == "olora":
        q, upper = torch.linalg.qr(weight)
        signs = torch.where(upper.diagonal() < 0, -1.0, 1.0)[:r]
        return signs[:, None] * upper[:r], q[:, :r] * signs
    fast = FAST.fullmatch(start)
    if fast:
        # the same on all processes, and the global generator is left alone
        with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
            torch.manual_seed(0)
            u, sizes, v = torch.svd_lowrank(weight, q=min(r + 8, *weight.shape), niter=int(fast[1]))
        right = v.t()
    else:
        u, sizes, right = torch.linalg.svd(weight, full_matrices=False)
    u, root, right = u[:, :r], sizes[:r].sqrt(), right[:r]
    largest = right.gather(1, right.abs().argmax(1, keepdim=True)).squeeze(1)
    signs = torch.where(largest < 0, -1.0, 1.0)
    return (signs * root)[:, None] * right, u * (signs * root)


class ResidualLinear(LoRALinear):
    """Adds s (B A - B0 A0) dropout(x) to a linear layer's output; A0 and B0 are frozen.

    Example:
        >>> import torch
        >>> from lit_peft import LoRAConfig
        >>> layer = ResidualLinear(torch.nn.Linear(8, 4), LoRAConfig(r=2, init_lora_weights="pissa"))
        >>> x = torch.ones(1, 8)
        >>> bool((layer(x) == layer.base(x)).all())
        True
    """

    frozen: ClassVar[tuple[str, ...]] = ("lora_a0", "lora_b0")
    starts: ClassVar[tuple[str, ...]] = ("pissa", "olora")

    def add(self, name: str, config: LoRAConfig) -> None:
        """Make A (r, in) and B (out, r) of another named set, and keep where they started."""
        super().add(name, config)
        if "lora_a0" not in self._modules:
            self.lora_a0 = nn.ParameterDict()
            self.lora_b0 = nn.ParameterDict()
        self.lora_a0[name] = nn.Parameter(self.lora_a[name].detach().clone(), requires_grad=False)
        self.lora_b0[name] = nn.Parameter(self.lora_b[name].detach().clone(), requires_grad=False)

    @torch.no_grad()
    def start(self, a: Tensor, b: Tensor, config: LoRAConfig) -> None:
        """Fill A and B from the base's weight."""
        layer = innermost(self.base)
        check_layer(f"this {type(layer).__name__}", layer, config)
        a0, b0 = principal(dense(layer), config.r, config.init_lora_weights)
        # PiSSA divides both factors by the root of the scale, OLoRA neither
        share = 1.0 if config.init_lora_weights == "olora" else config.scale**0.5
        a.copy_(a0 / share)
        b.copy_(b0 / share)

    def pair(self, name: str) -> tuple[Tensor, Tensor]:
        """Return the update as the plain LoRA that is multiplied: A' (2r, in) and B' (out, 2r)."""
        a, b, a0, b0 = (_whole(part[name]) for part in (self.lora_a, self.lora_b, self.lora_a0, self.lora_b0))
        return torch.cat([a, a - a0]), torch.cat([b - b0, b0], dim=1)

    def stored_rank(self, name: str) -> int:
        """Return the rank of A' and B'."""
        return 2 * int(self.configs[name].r)

    def change(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """Return y + s (B A - B0 A0) dropout(x): (..., in), (..., out) -> (..., out)."""
        config: LoRAConfig = self.configs[name]
        dropout = config.dropout if self.training else 0.0
        return residual_update(y, x, *self._parts(name), config.scale, dropout=dropout)

    def joined(self, name: str, x: Tensor) -> Tensor | None:
        """Return x W^T + c + s (B A - B0 A0) dropout(x), where the base is a plain linear layer."""
        if not joins(self.base, x) or type(self).change is not ResidualLinear.change:
            return None
        config: LoRAConfig = self.configs[name]
        dropout = config.dropout if self.training else 0.0
        return residual_linear(x, self.base, *self._parts(name), config.scale, dropout=dropout)

    def _parts(self, name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.lora_a[name], self.lora_b[name], self.lora_a0[name], self.lora_b0[name]

    def change_rows(self, choice: Rows, x: Tensor, y: Tensor | None = None) -> Tensor | None:
        """Return the output, each row with s B' A' x of its own sets added."""
        return change_rows(self, choice, x, y) if type(self).change is ResidualLinear.change else None

    def tensors(self, name: str = "default") -> dict[str, Tensor]:
        """Return the set as plain LoRA of twice the rank, under HF PEFT's names."""
        a, b = self.pair(name)
        return {"lora_A.weight": a.detach(), "lora_B.weight": b.detach()}

    def load_tensors(self, tensors: Mapping[str, Tensor], name: str = "default") -> None:
        """Take any plain LoRA of twice the rank; the inverse of `tensors`.

        Raises:
            ValueError: if a key is missing or a shape differs.
        """
        for key, mine in self.tensors(name).items():
            if key not in tensors or tensors[key].shape != mine.shape:
                raise ValueError(f"{key!r} is missing or not of shape {tuple(mine.shape)}. Is it another adapter's?")
        r = self.configs[name].r
        a, b = tensors["lora_A.weight"], tensors["lora_B.weight"]
        with torch.no_grad():
            self.lora_a[name].copy_(a[:r])
            self.lora_a0[name].copy_(a[:r] - a[r:])
            self.lora_b[name].copy_(b[:, :r] + b[:, r:])
            self.lora_b0[name].copy_(b[:, r:])


def _whole(tensor: Tensor) -> Tensor:
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()
