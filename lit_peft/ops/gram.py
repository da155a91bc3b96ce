"""How far matrices are from having orthonormal rows or columns, all matrices in one function.

    G = R R^T - I (r, r)  for rows R (r, width),    G = C^T C - I  for columns C (width, r)

    value = sum of ||G||_F^2 over all matrices        dR = 4 G R        dC = 4 C G

That is AdaLoRA's penalty (equation 4 of arXiv 2303.10512) for Q as rows and P as columns. Kept: the G alone, beside the
matrices, which are parameters. Computed in float32 at least, under every precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lit_peft.ops.choice import takes_kernel
from lit_peft.ops.recipes import as_written, eager

MOST = 64  # the largest rank that the kernels take


def reference(rows: Sequence[Tensor], columns: Sequence[Tensor] = ()) -> Tensor:
    """Return the sum of ||R R^T - I||^2 and ||C^T C - I||^2 with plain operations."""
    parts = []
    for matrix in [*rows, *(matrix.t() for matrix in columns)]:
        with as_written(matrix):
            gap = matrix @ matrix.t() - torch.eye(len(matrix), device=matrix.device, dtype=matrix.dtype)
        parts.append(gap.square().sum())
    return torch.stack(parts).sum() if parts else torch.zeros(())


def orthogonality(rows: Sequence[Tensor], columns: Sequence[Tensor] = (), *, kernels: bool | None = None) -> Tensor:
    """Return the sum of ||R R^T - I||^2 and ||C^T C - I||^2 (squared Frobenius norms).

    Args:
        rows: the R (r, width), of any sizes, in float32 or float64.
        columns: the C (width, r).
        kernels: whether to launch the kernel; None: as measured.

    Returns:
        A scalar; 0 for no matrices. A second derivative is not there: asking for one raises.

    Example:
        >>> import torch
        >>> orthogonality([torch.eye(2, 5)], [2 * torch.eye(3, 1)]).item()
        9.0
    """
    matrices = [*rows, *columns]
    tall = [False] * len(rows) + [True] * len(columns)
    parts: list[Tensor] = []
    for device in dict.fromkeys(matrix.device for matrix in matrices):
        mine = [i for i, matrix in enumerate(matrices) if matrix.device == device]
        here, sides = [matrices[i] for i in mine], [tall[i] for i in mine]
        if not eager():
            wide, high = ([m for m, t in zip(here, sides, strict=True) if t == side] for side in (False, True))
            parts.append(reference(wide, high))
            continue
        fits = all(m.dtype == torch.float32 and m.shape[t] <= MOST for m, t in zip(here, sides, strict=True))
        launch = fits and takes_kernel("gram", max(here, key=torch.Tensor.numel), kernels, matrices=len(here))
        parts.append(_Orthogonality.apply(sides, launch, *here))  # type: ignore[no-untyped-call]
    return torch.stack([part.to(parts[0].device) for part in parts]).sum() if parts else torch.zeros(())


class _Orthogonality(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tall: list[bool], launch: bool, *matrices: Tensor) -> Tensor:
        kept: tuple[Tensor, ...]
        if launch:
            gaps, value = torch.ops.lit_peft.gram([matrix.contiguous() for matrix in matrices], tall)
            kept = (gaps,)
        else:
            kept, value = _gaps(matrices, tall)
        ctx.save_for_backward(*kept, *matrices)
        ctx.made = tall, launch, len(kept)
        return value  # type: ignore[no-any-return]

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        tall, launch, number = ctx.made
        kept, matrices = ctx.saved_tensors[:number], ctx.saved_tensors[number:]
        if launch:
            found = torch.ops.lit_peft.gram_backward([m.contiguous() for m in matrices], tall, kept[0], gradient)
            return None, None, *found
        grown = [gaps * (4 * gradient) for gaps in kept]
        places = _places(matrices, tall)
        slopes: list[Tensor | None] = []
        with as_written(gradient):
            for i, (matrix, high) in enumerate(zip(matrices, tall, strict=True)):
                group, place = places[i]
                gap = grown[group][place]
                wanted = ctx.needs_input_grad[2 + i]
                slopes.append(None if not wanted else matrix @ gap if high else gap @ matrix)
        return None, None, *slopes


def _places(matrices: Sequence[Tensor], tall: Sequence[bool]) -> list[tuple[int, int]]:
    """Return of each matrix the group of its rank and dtype, and its place in it."""
    groups: dict[tuple[int, torch.dtype], list[int]] = {}
    for i, (matrix, high) in enumerate(zip(matrices, tall, strict=True)):
        groups.setdefault((matrix.shape[high], matrix.dtype), []).append(i)
    found = {i: (group, place) for group, members in enumerate(groups.values()) for place, i in enumerate(members)}
    return [found[i] for i in range(len(matrices))]


def _gaps(matrices: Sequence[Tensor], tall: Sequence[bool]) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return the G of each group (number, r, r), and the value."""
    places = _places(matrices, tall)
    groups: dict[int, list[int]] = {}
    for i, (group, _) in enumerate(places):
        groups.setdefault(group, []).append(i)
    kept, parts = [], []
    for members in groups.values():
        first = matrices[members[0]]
        rank = first.shape[tall[members[0]]]
        gaps = first.new_empty(len(members), rank, rank)
        with as_written(first):
            for gap, i in zip(gaps.unbind(), members, strict=True):
                matrix = matrices[i].t() if tall[i] else matrices[i]
                torch.mm(matrix, matrix.t(), out=gap)
        gaps.diagonal(dim1=1, dim2=2).sub_(1)
        kept.append(gaps)
        parts.append(gaps.square().sum())
    return tuple(kept), torch.stack([part.to(parts[0].dtype) for part in parts]).sum()


@torch.library.custom_op("lit_peft::gram", mutates_args=())
def _gram(matrices: Sequence[Tensor], tall: Sequence[bool]) -> tuple[Tensor, Tensor]:
    from lit_peft.kernels.gram import gram

    return gram(list(matrices), list(tall))


@_gram.register_fake
def _(matrices: Sequence[Tensor], tall: Sequence[bool]) -> tuple[Tensor, Tensor]:
    most = max(matrix.shape[high] for matrix, high in zip(matrices, tall, strict=True))
    return matrices[0].new_empty(len(matrices), most, most), matrices[0].new_empty(())


@torch.library.custom_op("lit_peft::gram_backward", mutates_args=())
def _gram_backward(matrices: Sequence[Tensor], tall: Sequence[bool], gaps: Tensor, slope: Tensor) -> list[Tensor]:
    from lit_peft.kernels.gram import gram_backward

    return gram_backward(list(matrices), list(tall), gaps, slope)


@_gram_backward.register_fake
def _(matrices: Sequence[Tensor], tall: Sequence[bool], gaps: Tensor, slope: Tensor) -> list[Tensor]:
    return [torch.empty_like(matrix) for matrix in matrices]
