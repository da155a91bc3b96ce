"""Principal components of rows that come in batches, and ranks shared out by how much each component explains."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

EXACT = 1024  # up to this size a full SVD, above it a randomised one


class Directions:
    """Incremental principal components of rows that come in batches.

    Args:
        count: how many components.

    Attributes:
        components: (count, in), by falling variance.
        sizes: (count,), their singular values.
    """

    mean: Tensor
    sizes: Tensor
    components: Tensor

    def __init__(self, count: int) -> None:
        self.count = count
        self.rows = 0
        self.total = 0.0
        self.still = False

    def update(self, x: Tensor, tau: float) -> None:
        """Take more rows x (n, in), and note whether each direction now has a cosine of tau to what it was before."""
        if not len(x):
            return
        mean, n = x.mean(0), len(x)
        stack = x - mean
        if self.rows:
            shift = (self.mean - mean) * math.sqrt(self.rows * n / (self.rows + n))
            self.total += float(shift.square().sum())
            stack = torch.cat([self.sizes[:, None] * self.components, stack, shift[None]])
            mean = self.mean + (mean - self.mean) * (n / (self.rows + n))
        self.total += float((x - x.mean(0)).square().sum())
        before = self.components if self.rows else None
        self.mean, self.rows = mean, self.rows + n
        self.sizes, self.components = _largest(stack, self.count)
        if before is not None and before.shape == self.components.shape:
            self.still = bool(((before * self.components).sum(1).abs() >= tau).all())

    def shares_of(self, count: int) -> list[float]:
        """Return the first components' shares of the variance, as many as asked for and the width allows."""
        shares = self.sizes.square() / max(self.total, torch.finfo(torch.float32).tiny)
        return (shares.tolist() + [0.0] * count)[: min(count, self.components.shape[1])]

    def first(self, r: int) -> Tensor:
        """Return r directions (r, in): the components, and where there are too few, any that are orthogonal to them."""
        found = self.components[:r]
        if len(found) < r:
            with isolate_rng():
                torch.manual_seed(0)
                more = torch.randn(r - len(found), found.shape[1]).to(found)
            found = torch.cat([found, torch.linalg.qr(torch.cat([found, more]).t())[0].t()[len(found) :]])
        return found


def _largest(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest singular values of x and their right singular vectors (k, in), signs settled."""
    if min(x.shape) <= EXACT:
        _, sizes, right = torch.linalg.svd(x, full_matrices=False)
    else:
        with isolate_rng():
            torch.manual_seed(0)
            _, sizes, columns = torch.svd_lowrank(x, q=min(k + 8, *x.shape), niter=2)
            right = columns.t()
    sizes, right = sizes[:k], right[:k]
    largest = right.gather(1, right.abs().argmax(1, keepdim=True))
    return sizes, right * torch.where(largest < 0, -1.0, 1.0)


def redistribute(shares: Mapping[str, Sequence[float]], budget: int) -> dict[str, int]:
    """Give each layer as many ranks as it has shares among the `budget` largest of all; ties go to the earlier layer.

    Example:
        >>> redistribute({"a": [0.9, 0.05], "b": [0.5, 0.3]}, 3)
        {'a': 1, 'b': 2}
    """
    order = sorted(((-share, i, j) for i, values in enumerate(shares.values()) for j, share in enumerate(values)))
    chosen = [i for _, i, _ in order[:budget]]
    return {path: chosen.count(i) for i, path in enumerate(shares)}
