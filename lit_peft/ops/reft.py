"""A low-rank edit of a few rows of the hidden states, and its gradients; and the rotation that LoReFT edits with.

    h_t -> h_t + Q D(E h_t + b)        at chosen rows t;  h_t (d,), E (r, d), b (r,), Q (d, r)

with D the dropout. LoReFT has E = W - Q^T, taken in full precision once a call; DiReFT has W_1 and W_2^T. In the
backward pass, for g the gradient, G its chosen rows (n, d), H those of h, and P = D(G Q) (n, r):

    dh = g, and P E more at the chosen rows        dE = P^T H        db = sum of P        dQ = G^T D(E H + b)

What is kept: the chosen rows of h. All of h is copied once, or not at all where nobody else holds it, see `unshared`.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_peft.ops.choice import takes_kernel
from lit_peft.ops.low_rank import drawn, dropped
from lit_peft.ops.recipes import as_written, eager


def reference(h: Tensor, rows: Tensor, matrix: Tensor, bias: Tensor, rotation: Tensor, dropout: float = 0.0) -> Tensor:
    """Return the edited h with plain operations; arguments as for `edit_rows`."""
    with as_written(h):
        flat = h.reshape(-1, h.shape[-1])
        read = flat.index_select(0, rows)
        inner = F.linear(read, matrix.to(h.dtype), bias.to(h.dtype))
        inner = F.dropout(inner, dropout) if dropout else inner
        return flat.index_add(0, rows, inner @ rotation.to(h.dtype).t()).view(h.shape)


def edit_rows(
    h: Tensor,
    rows: Tensor,
    matrix: Tensor,
    bias: Tensor,
    rotation: Tensor,
    *,
    dropout: float = 0.0,
    in_place: bool = False,
    kernels: bool | None = None,
) -> Tensor:
    """Return h with Q dropout(E h + b) added at the chosen rows.

    Args:
        h: hidden states (..., d).
        rows: (n,), the numbers of the rows to edit, of h seen as (rows, d); none twice.
        matrix: E (r, d), in any floating dtype.
        bias: b (r,).
        rotation: Q (d, r).
        dropout: the probability with which a coordinate of the edit is left out, the others divided by 1 - p.
        in_place: write into h, which must be no leaf and no view; see `unshared`.
        kernels: whether to launch the kernel; None: as measured.

    Returns:
        (..., d) in h's dtype: h itself if in place. A second derivative is not there: asking for one raises.

    Example:
        >>> import torch
        >>> h, rows, one = torch.ones(3, 2), torch.tensor([1]), torch.ones(1, 2)
        >>> edit_rows(h, rows, one, torch.zeros(1), one.t()).tolist()
        [[1.0, 1.0], [3.0, 3.0], [1.0, 1.0]]
    """
    if not eager():
        return reference(h, rows, matrix, bias, rotation, dropout)
    # cast out here, so that the gradients come back in the parameters' dtype
    weights = [weight.to(h.dtype) for weight in (matrix, bias, rotation)]
    launch = not dropout and len(rows) > 0
    launch = launch and takes_kernel(
        "reft", h, kernels, rows=len(rows), width=h.shape[-1], tokens=h.numel() // h.shape[-1]
    )
    settings = (dropout, drawn(dropout), in_place and h.is_contiguous(), launch)
    out: Tensor = _Edit.apply(h, rows, *weights, *settings)  # type: ignore[no-untyped-call]
    return out


def unshared(h: Tensor, held: int) -> bool:
    """Return whether h may be overwritten: a sum that nobody keeps, neither the graph nor anyone outside the caller.

    A sum is in nobody's backward pass until it is used; hooks, views, leaves and further references are all told by h.

    Args:
        h: a module's output.
        held: how many references the caller knows of, as `sys.getrefcount` counts them where it calls.
    """
    made_by = h.grad_fn
    return (
        type(h) is Tensor
        and made_by is not None
        and made_by.name() == "AddBackward0"
        and h._base is None
        and not h._backward_hooks
        and not h.retains_grad
        and _references(h) <= held + _OWN
    )


def _references(h: object) -> int:
    return sys.getrefcount(h)


def _own() -> int:
    """Return how many references two calls down count beyond those held here: it differs between Pythons."""

    def between(h: object) -> int:
        return _references(h)

    held = object()
    return between(held) - 1


_OWN = _own()


class _Edit(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        rows: Tensor,
        matrix: Tensor,
        bias: Tensor,
        rotation: Tensor,
        p: float,
        seed: int,
        in_place: bool,
        launch: bool,
    ) -> Tensor:
        wants, width = ctx.needs_input_grad, h.shape[-1]
        with as_written(h):
            out = h if in_place else h.clone(memory_format=torch.contiguous_format)
            flat = out.view(-1, width)
            if launch:
                read, inner = _launch(flat, rows, matrix, bias, rotation)
            else:
                read = flat.index_select(0, rows)
                inner = dropped(torch.addmm(bias, read, matrix.t()), p, seed)
                flat.index_copy_(0, rows, torch.addmm(read, inner, rotation.t()))
        if in_place:
            ctx.mark_dirty(h)
        ctx.save_for_backward(
            rows,
            matrix if wants[0] else None,
            rotation,
            read if wants[2] else None,
            inner if wants[4] else None,
        )
        ctx.made = p, seed, launch
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, matrix, rotation, read, inner = ctx.saved_tensors
        p, seed, launch = ctx.made
        wants, width = ctx.needs_input_grad, gradient.shape[-1]
        dh = None
        if launch and wants[0]:
            # the same kernel: E and Q change places
            dh = gradient.clone(memory_format=torch.contiguous_format)
            slope, push = _launch(dh.view(-1, width), rows, rotation.t(), None, matrix.t())
        else:
            slope = gradient.reshape(-1, width).index_select(0, rows)
            push = dropped(slope @ rotation, p, seed)
            if wants[0]:
                dh = gradient.clone(memory_format=torch.contiguous_format)
                dh.view(-1, width).index_copy_(0, rows, torch.addmm(slope, push, matrix))
        dm = push.t() @ read if wants[2] else None
        db = push.sum(0) if wants[3] else None
        dq = slope.t() @ inner if wants[4] else None
        return dh, None, dm, db, dq, None, None, None, None


# As a registered operation the launch has shapes without data. It writes into h.
@torch.library.custom_op("lit_peft::edit_rows", mutates_args=("h",))
def _launch(h: Tensor, rows: Tensor, matrix: Tensor, bias: Tensor | None, rotation: Tensor) -> tuple[Tensor, Tensor]:
    from lit_peft.kernels.reft import edit

    return edit(h, rows, matrix, bias, rotation)


@_launch.register_fake
def _(h: Tensor, rows: Tensor, matrix: Tensor, bias: Tensor | None, rotation: Tensor) -> tuple[Tensor, Tensor]:
    return h.new_empty(len(rows), h.shape[1]), h.new_empty(len(rows), len(matrix))


# The rotation ---------------------------------------------------------------------------------------------------------


class Rotations:
    """The Q factors of some matrices (..., d, r), computed again only when a matrix has changed.

    A matrix counts as unchanged when it is the same memory, of the same version, with the same numbers in it: what is
    written through `.data` makes no new version.

    Example:
        >>> import torch
        >>> matrix = torch.tensor([[3.0], [4.0]], requires_grad=True)
        >>> [round(float(entry), 2) for entry in Rotations()(matrix)]
        [0.6, 0.8]
    """

    def __init__(self) -> None:
        self.kept: tuple[Tensor, Tensor, int, Tensor, Tensor] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave what is kept out of files and copies."""
        return Rotations, ()

    def __call__(self, matrix: Tensor) -> Tensor:
        """Return Q (..., d, r), with the signs that keep an orthonormal matrix as it is, in float32 or wider."""
        if not eager() or type(matrix) not in (Tensor, nn.Parameter) or matrix.is_inference():
            return orthonormal(matrix)
        found: Tensor = _Rotation.apply(matrix, *self.factors(matrix))  # type: ignore[no-untyped-call]
        return found

    @torch.no_grad()
    def factors(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Return Q and R, those that are kept if they are still the matrix's."""
        if self.kept is not None:
            alias, numbers, version, q, upper = self.kept
            same = alias.data_ptr() == matrix.data_ptr() and alias.shape == matrix.shape and alias.dtype == matrix.dtype
            if same and version == matrix._version and torch.equal(numbers, matrix):
                return q, upper
        q, upper = _signed(matrix)
        # the alias keeps the memory from being handed to another matrix
        self.kept = matrix.detach(), matrix.detach().clone(), matrix._version, q, upper
        return q, upper


def orthonormal(matrix: Tensor) -> Tensor:
    """Return the Q factor (..., d, r) of a matrix, with the signs that keep an orthonormal matrix as it is."""
    return _signed(matrix)[0]


def _signed(matrix: Tensor) -> tuple[Tensor, Tensor]:
    with as_written(matrix):
        q, upper = torch.linalg.qr(matrix.to(torch.promote_types(matrix.dtype, torch.float32)))
    signs = upper.diagonal(dim1=-2, dim2=-1).sign()
    return q * signs[..., None, :], upper * signs[..., :, None]


class _Rotation(torch.autograd.Function):
    """Q of A = Q R, both handed in, R's diagonal above 0: dA = (dQ + Q S) R^-T, S the symmetric matrix whose lower
    triangle is that of -dQ^T Q.
    """

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, q: Tensor, upper: Tensor) -> Tensor:
        ctx.save_for_backward(q, upper)
        ctx.dtype = matrix.dtype
        return q.view_as(q)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, upper = ctx.saved_tensors
        with as_written(gradient):
            product = gradient.transpose(-2, -1) @ q
            mirrored = product.tril() + product.tril(-1).transpose(-2, -1)
            inner = gradient - q @ mirrored
            # X R^T = inner
            found = torch.linalg.solve_triangular(upper.transpose(-2, -1), inner, upper=False, left=False)
        return found.to(ctx.dtype), None, None
