"""Logits of a frozen output layer for a piece of the rows at a time.

    v = x W^T + c (n, V)        z = f v,   or with a cap   z = h tanh(f v)

One buffer holds the v of a piece, and takes the gradients of these v when they are known: that is all that is ever
stored of rows x vocabulary. In float32 (float64 for float64) a strip of the buffer is worked on at a time, so that
what is read again is still in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# bytes of one piece's logits: few enough to be cheap to hold, and enough rows for a full matrix product
PIECE = {"cpu": 2**25, "cuda": 2**28}
# logits of one strip: such as fit into a cache
STRIP = {"cpu": 2**18, "cuda": 2**23}
# slopes are computed before the loss is scaled, and float16 ends at 6e-8
LIFT = {torch.float16: 2.0**10}
# rows of logits begin at multiples of so many, which products and kernels on GPUs are faster with
ALIGNED = {"cpu": 1, "cuda": 64}
LEAST = -1e30  # stands for the logarithm of a probability of 0, so that 0 times it is 0


@dataclass(frozen=True)
class Shape:
    """What a model does to its output layer's v: z = factor v, or z = height tanh(factor v) if height is not 0."""

    factor: float = 1.0
    height: float = 0.0

    @property
    def slope(self) -> float:
        """Return dz/dv where that is a constant; else 1, and it is in what `widened` returns."""
        return 1.0 if self.height else self.factor


def shape_of(scale: float = 1.0, softcap: float | None = None, temperature: float = 1.0) -> Shape:
    """Return the shape of z = cap tanh(scale v / cap) / temperature; without a cap, z = scale v / temperature.

    Raises:
        ValueError: if the cap or the temperature is not above 0.

    Example:
        >>> shape_of(softcap=30.0, temperature=2.0)
        Shape(factor=0.03333333333333333, height=15.0)
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0.")
    if softcap is None:
        return Shape(scale / temperature)
    if not softcap > 0:
        raise ValueError(f"softcap is {softcap}; it must be above 0, or None for logits without a cap.")
    return Shape(scale / softcap, softcap / temperature)


def shaped(v: Tensor, shape: Shape) -> Tensor:
    """Return z, of v of any shape, with plain operations."""
    return shape.height * torch.tanh(shape.factor * v) if shape.height else shape.factor * v


def refuse_trained(*parts: Tensor | None) -> None:
    """Check that an output layer is frozen.

    Raises:
        ValueError: if it is not.
    """
    if any(part is not None and part.requires_grad for part in parts):
        raise ValueError("The output layer is to be trained: take F.cross_entropy of its logits.")


def kept_rows(targets: Tensor, ignore_index: int | None) -> Tensor | None:
    """Return the rows whose target is not to be ignored; None for all."""
    if ignore_index is None:
        return None
    rows = (targets != ignore_index).nonzero().squeeze(1)
    return None if len(rows) == len(targets) else rows


def chosen(x: Tensor, rows: Tensor | None, part: slice) -> Tensor:
    """Return a part of the rows in question."""
    return x[part] if rows is None else x.index_select(0, rows[part])


def parts(x: Tensor, weight: Tensor, rows: Tensor | None = None, share: int = 1) -> Iterator[slice]:
    """Yield the pieces of the rows in question, about equal ones; `share` buffers of their logits are within PIECE."""
    most = PIECE.get(x.device.type, PIECE["cpu"]) // (len(weight) * x.element_size() * share)
    most = max(1, most - most % 128 if most > 128 else most)
    total = len(x if rows is None else rows)
    size = -(-total // -(-total // most)) if total else 1
    size = min(most, -(-size // 128) * 128 if size > 128 else size)  # whole tiles of a product
    yield from (slice(start, min(start + size, total)) for start in range(0, total, size))


class Buffer:
    """Memory for the logits of one piece, taken for the first and used for all."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias
        self.room: Tensor | None = None

    def logits(self, x: Tensor) -> Tensor:
        """Return v = x W^T + c (rows, V) in the memory; the ones before are gone."""
        if self.room is None or len(self.room) < len(x):
            unit = ALIGNED.get(x.device.type, ALIGNED["cpu"])
            self.room = x.new_empty(len(x), -(-len(self.weight) // unit) * unit)[:, : len(self.weight)]
        out = self.room[: len(x)]
        if self.bias is None:
            return torch.mm(x, self.weight.t(), out=out)
        return torch.addmm(self.bias, x, self.weight.t(), out=out)


def as_rows(weight: Tensor, bias: Tensor | None, x: Tensor) -> Buffer:
    """Return memory for logits in x's dtype."""
    return Buffer(weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def strips(v: Tensor, share: int = 1) -> Iterator[slice]:
    """Yield the strips of a piece's rows; `share` pieces are worked on side by side."""
    size = max(1, STRIP.get(v.device.type, STRIP["cpu"]) // (v.shape[1] * share))
    yield from (slice(start, start + size) for start in range(0, len(v), size))


def widened(v: Tensor, shape: Shape) -> tuple[Tensor, Tensor | None]:
    """Return z in float32, in the memory of v if that is float32 too, and dz/dv where that is not a constant."""
    z = v.to(torch.promote_types(v.dtype, torch.float32))
    if shape.height:
        z.mul_(shape.factor).tanh_()
        damping = (z * z).sub_(1).mul_(-shape.factor * shape.height)
        return z.mul_(shape.height), damping
    return (z if shape.factor == 1 else z.mul_(shape.factor)), None


def returned(v: Tensor, slopes: Tensor, damping: Tensor | None) -> None:
    """Put the gradients of z, times dz/dv, in the place of v."""
    if damping is not None:
        slopes.mul_(damping)
    if slopes is not v:
        v.copy_(slopes)


def put_product(dx: Tensor, slopes: Tensor, weight: Tensor, rows: Tensor | None, part: slice) -> None:
    """Compute slopes W for a part of the rows in question, into dx (n, d)."""
    if rows is None:
        torch.mm(slopes, weight, out=dx[part])
    else:
        dx.index_copy_(0, rows[part], slopes @ weight)
