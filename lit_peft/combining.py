"""Several sets of adapter weights combined into one: the rules, on plain tensors.

`linear` is a weighted sum. TIES (https://arxiv.org/abs/2306.01708) keeps the largest entries of each set, then only
those that agree with the majority's sign, and averages them. DARE (https://arxiv.org/abs/2311.03099) drops entries at
random and scales up the rest. For LoRA the rules apply to A and to B, as in HF PEFT's `add_weighted_adapter`; with
`_svd` behind them to the updates s B A, whose best approximation of the wanted rank is kept. `cat` and `svd` are exact
weighted sums of the updates (`svd` up to the rank).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

RULES = ("linear", "ties", "dare_linear", "dare_ties")
FACTORS = ("cat", "svd", *(f"{rule}_svd" for rule in RULES[1:]))
HOWS = (*RULES, *FACTORS)


def check_how(how: str, density: float | None) -> None:
    """Raise a ValueError for an unknown rule, or a density that it does not go with or lacks."""
    if how not in HOWS:
        raise ValueError(f"There is no way {how!r} to combine adapters. Choose one of {', '.join(HOWS)}.")
    thins = how.startswith(("ties", "dare"))
    if thins and density is None:
        raise ValueError(f"{how} needs density, the share of entries that is kept: between 0 and 1.")
    if density is not None and not thins:
        raise ValueError(f"{how} keeps every entry. Leave density={density} out, or choose ties or dare_linear.")
    if density is not None and not 0 < density <= 1:
        raise ValueError(f"density is {density}; it must be above 0 and at most 1.")


def weighted(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    how: str,
    *,
    density: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Combine tensors of one shape by `linear`, `ties`, `dare_linear` or `dare_ties`.

    Args:
        tensors: one of each set.
        weights: one for each.
        how: the rule.
        density: the share of entries that TIES and DARE keep.
        generator: of DARE's choice, on the CPU.

    Raises:
        ValueError: for another rule, or tensors of different shapes.

    Example:
        >>> import torch
        >>> weighted([torch.tensor([1.0, 2.0]), torch.tensor([3.0, -1.0])], [0.5, 1.0], "linear")
        tensor([3.5000, 0.0000])
    """
    if how not in RULES:
        raise ValueError(f"{how!r} combines low-rank updates only. Choose one of {', '.join(RULES)} here.")
    if len({tensor.shape for tensor in tensors}) > 1:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
        raise ValueError(
            f"{how} needs tensors of one shape, and these are {shapes}. For LoRA of several ranks: cat or svd."
        )
    stack = torch.stack(list(tensors))
    share = density if density is not None else 1.0
    if how == "ties":
        stack = torch.stack([_largest(tensor, share) for tensor in stack])
    elif how.startswith("dare"):
        stack = torch.stack([_thinned(tensor, share, generator) for tensor in stack])
    factors = torch.tensor(list(weights), dtype=stack.dtype, device=stack.device).view(-1, *[1] * (stack.ndim - 1))
    if not how.endswith("ties"):
        return (stack * factors).sum(0)
    majority = torch.where(stack.sum(0) >= 0, 1.0, -1.0)
    agree = stack.sign() == majority
    return (stack * factors * agree).sum(0) / agree.sum(0).clamp(min=1)


def _largest(tensor: Tensor, share: float) -> Tensor:
    kept = torch.topk(tensor.abs().flatten(), int(share * tensor.numel())).indices
    mask = torch.zeros(tensor.numel(), dtype=tensor.dtype, device=tensor.device)
    mask[kept] = 1
    return tensor * mask.view(tensor.shape)


def _thinned(tensor: Tensor, share: float, generator: torch.Generator | None) -> Tensor:
    mask = torch.rand(tensor.shape, generator=generator) < share  # on the CPU: the same on every device
    return tensor * mask.to(tensor.device, tensor.dtype) / share


def low_rank(
    pairs: Sequence[tuple[Tensor, Tensor, float]],
    weights: Sequence[float],
    how: str,
    *,
    rank: int | None = None,
    density: float | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Combine low-rank updates s B A into one of scale 1.

    Args:
        pairs: A (r, in), B (out, r) and s of each set.
        weights: one for each; negative ones subtract.
        how: `cat`, `svd`, or a rule of `weighted`, with or without `_svd`.
        rank: of the result of `svd`; None: the largest of the sets.
        density: the share of entries that TIES and DARE keep.
        generator: of DARE's choice.

    Returns:
        A and B of the combination, in float32.

    Raises:
        ValueError: if the rule needs equal ranks, or none can be chosen.
    """
    if rank is not None and not how.endswith("svd"):
        raise ValueError(f"{how} fixes the rank itself. Leave rank={rank} out, or choose svd.")
    scaled = [(a.float(), b.float(), weight * scale) for (a, b, scale), weight in zip(pairs, weights, strict=True)]
    if how in ("cat", "svd"):
        a = torch.cat([factor * a for a, _, factor in scaled])
        b = torch.cat([b for _, b, _ in scaled], dim=1)
        return (a, b) if how == "cat" else _truncated(a, b, _wanted(rank, pairs))
    if how.endswith("_svd"):
        updates = [scale * b.float() @ a.float() for a, b, scale in pairs]
        update = weighted(updates, weights, how.removesuffix("_svd"), density=density, generator=generator)
        return _truncated(torch.eye(update.shape[1], device=update.device), update, _wanted(rank, pairs))
    # The square root of the factor goes to A and to B each, so that A's and B's sums have the update's size.
    roots = [math.sqrt(abs(factor)) for *_, factor in scaled]
    signed = [math.copysign(root, factor) for root, (*_, factor) in zip(roots, scaled, strict=True)]
    a = weighted([a for a, *_ in scaled], signed, how, density=density, generator=generator)
    return a, weighted([b for _, b, _ in scaled], roots, how, density=density, generator=generator)


def _wanted(rank: int | None, pairs: Sequence[tuple[Tensor, Tensor, float]]) -> int:
    if rank is not None and rank < 1:
        raise ValueError(f"rank is {rank}; it must be 1 or more.")
    most = min(pairs[0][0].shape[1], pairs[0][1].shape[0])
    return min(rank or max(a.shape[0] for a, *_ in pairs), most)


def _truncated(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the best approximation of B A of a rank, from two thin decompositions: B A itself is never formed."""
    q_b, r_b = torch.linalg.qr(b.to("cpu", torch.float64))  # not every device has float64
    q_a, r_a = torch.linalg.qr(a.t().to("cpu", torch.float64))
    u, s, v = torch.linalg.svd(r_b @ r_a.t(), full_matrices=False)
    return (v[:rank] @ q_a.t()).to(a.device, a.dtype), ((q_b @ u[:, :rank]) * s[:rank]).to(b.device, b.dtype)
