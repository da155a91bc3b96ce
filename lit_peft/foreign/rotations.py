"""Rotations as torch's parametrisations store them: a frame (d, d), and reflections that turn it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

ORIGINAL, FRAME = "parametrizations.weight.original", "parametrizations.weight.0.base"


def rotation(folder: Path, tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """Return the weight of a layer, whether it is stored as it is or as torch's orthogonal parametrisation.

    The latter stores Q (d, d) and X (d, r), and stands for Q H_1 ... H_r, Householder reflections whose vectors are
    below X's diagonal; rows and columns are exchanged where r comes first.

    Raises:
        ValueError: if it is stored in neither way.
    """
    plain = tensors.get(f"{name}.weight", tensors.get(name))
    if plain is not None:
        return plain
    x, frame = tensors.get(f"{name}.{ORIGINAL}"), tensors.get(f"{name}.{FRAME}")
    if x is None or frame is None or x.shape[0] == x.shape[1]:
        raise ValueError(f"{folder} holds no {name} of an edit in a form that is known. Save the adapter again.")
    tall = x.shape[0] > x.shape[1]
    x = (x if tall else x.t()).double()
    vectors = x.tril(diagonal=-1)
    turned = torch.linalg.householder_product(vectors, 2 / (1 + vectors.square().sum(0)))
    found: Tensor = (frame.double() @ (turned * x.diagonal().sign())).float()
    return found if tall else found.t()


def without_subtraction(source: Tensor, bias: Tensor, projection: Tensor) -> tuple[Tensor, Tensor]:
    """Return W and b of DiReFT that equal NoReFT: P^T (W h + b - P h) = P^T ((W - P) h + b)."""
    return source.float() - projection.float(), bias.float()
