"""Cross entropy of a frozen output layer, without the logits of all tokens at once.

    loss = sum_i  lse_i - z_i[t_i]          z = x W^T + c (n, V),   lse_i = log sum_v exp z_i[v]
    dx_i = (softmax(z_i) - onehot(t_i)) W

Rows are taken in pieces: each piece's logits live only until its part of the loss and of dx is there. That is two
matrix products a row, forward and backward together, as with all logits kept; V numbers a row are stored for one piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_peft.ops.recipes import as_written, autocasting

# logits of one piece: as many as stay cheap to hold, and enough rows for a full matrix product
PIECE = {"cpu": 2**23, "cuda": 2**28}
# dx is computed before the loss is scaled, and float16 ends at 6e-8
LIFT = {torch.float16: 2.0**10}


def reference(x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the summed cross entropy with plain operations."""
    return F.cross_entropy(F.linear(x, weight, bias).float(), targets, reduction="sum")


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the cross entropy of softmax(x W^T + c), summed over the rows, in float32.

    Args:
        x: hidden states (n, d).
        weight: W (V, d), frozen.
        targets: (n,), each in [0, V).
        bias: c (V,), frozen.

    Raises:
        ValueError: if W or c is to be trained.

    Example:
        >>> import torch
        >>> x, weight = torch.zeros(2, 3), torch.ones(4, 3)
        >>> round(float(linear_cross_entropy(x, weight, torch.tensor([0, 3]))), 4)  # 2 log 4
        2.7726
    """
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError("The output layer is to be trained: take F.cross_entropy of its logits.")
    if autocasting(x):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    loss: Tensor = _CrossEntropy.apply(x, weight, targets, bias)  # type: ignore[no-untyped-call]
    return loss


@torch.no_grad()
def token_scores(x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return each row's cross entropy (n,) in float32, and whether its target is the likeliest token (n,)."""
    losses = torch.empty(len(x), device=x.device)
    hits = torch.empty(len(x), device=x.device)
    for part in _pieces(x, weight):
        logits = F.linear(x[part], weight, bias).float()
        losses[part] = F.cross_entropy(logits, targets[part], reduction="none")
        hits[part] = (logits.argmax(-1) == targets[part]).float()
    return losses, hits


def _pieces(x: Tensor, weight: Tensor) -> Iterator[slice]:
    """Yield equal pieces of the rows."""
    most = max(1, PIECE.get(x.device.type, PIECE["cpu"]) // len(weight))
    number = -(-len(x) // most)
    size = -(-len(x) // max(1, number))
    yield from (slice(start, start + size) for start in range(0, len(x), max(1, size)))


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> Tensor:
        total = x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32))
        needed = ctx.needs_input_grad[0]
        dx = torch.empty_like(x) if needed else None
        lift = LIFT.get(x.dtype, 1.0)
        with as_written(x):
            weight = weight.to(x.dtype)
            for part in _pieces(x, weight):
                logits = F.linear(x[part], weight, None if bias is None else bias.to(x.dtype))
                logits = logits.to(total.dtype)
                aim = targets[part, None]
                picked = logits.gather(1, aim)
                lse = logits.logsumexp(1, keepdim=True)
                total += (lse - picked).sum()
                if dx is not None:
                    slope = logits.sub_(lse).exp_()
                    slope.scatter_add_(1, aim, slope.new_full(aim.shape, -1.0))
                    torch.mm(slope.mul_(lift).to(x.dtype), weight, out=dx[part])
        ctx.save_for_backward(dx)
        ctx.lift = lift
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (dx,) = ctx.saved_tensors
        return (dx * (gradient / ctx.lift)).to(dx.dtype), None, None, None
