"""Rotary positions: every head of queries and keys, in two halves u and v, turned by the angles of its place.

    (u, v) -> (u cos - v sin, v cos + u sin)           backward: the same with -sin

One launch for both, forward and backward, where plain operations take ten and more. Kept: the angles alone.
Su et al. 2021, RoFormer, https://arxiv.org/abs/2104.09864, equation 34; halves are as in Llama, not pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor

from lit_peft.ops.choice import takes_kernel


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    """Return (-v, u) of the halves (u, v) of the last dimension."""
    u = x[..., : x.shape[-1] // 2]
    v = x[..., x.shape[-1] // 2 :]
    return torch.cat((-v, u), dim=-1)


def reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, dim: int = 1) -> tuple[Tensor, Tensor]:
    """Return turned q and k (batch, heads, length, width) with plain operations."""
    cos = cos.unsqueeze(dim)
    sin = sin.unsqueeze(dim)
    turned_q = (q * cos) + (rotate_half(q) * sin)
    turned_k = (k * cos) + (rotate_half(k) * sin)
    return turned_q, turned_k


def rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, dim: int = 1, *, kernels: bool | None = None
) -> tuple[Tensor, Tensor]:
    """Return turned q and k.

    Args:
        q: queries (batch, heads, length, width).
        k: keys, with heads of their own number.
        cos: cosines of the angles (batch or 1, length, width), without gradients.
        sin: their sines.
        dim: where the heads are; the kernel is there for 1.
        kernels: whether to launch the kernel; None: as measured.

    Returns:
        Both in the shapes of q and k.

    Example:
        >>> import torch
        >>> x, zero, one = torch.tensor([[[[1.0, 0.0]]]]), torch.zeros(1, 1, 2), torch.ones(1, 1, 2)
        >>> rotate(x, x, zero, one)[0].tolist()  # a quarter
        [[[[0.0, 1.0]]]]
    """
    rows = q.numel() // max(1, q.shape[-1] * q.shape[1])
    width = (q.shape[1] + k.shape[1]) * q.shape[-1]
    if not fits(q, k, cos, dim) or not takes_kernel("rotary", q, kernels, rows=rows, width=width):
        return reference(q, k, cos, sin, dim)
    turned: tuple[Tensor, Tensor] = _Rotary.apply(q, k, cos, sin)  # type: ignore[no-untyped-call]
    return turned


def fits(q: Tensor, k: Tensor, cos: Tensor, dim: int) -> bool:
    """Return whether the kernel can turn these: whole heads of an even width."""
    batches, width = (1, q.shape[0]), q.shape[-1]
    return (
        dim == 1
        and q.ndim == k.ndim == 4
        and cos.ndim == 3
        and cos.shape[0] in batches
        and cos.shape[1:] == q.shape[2:]
        and width % 2 == 0
        and not cos.requires_grad
        and q.dtype == k.dtype == cos.dtype
    )


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        turned_q, turned_k = _rotary(q, k, cos, sin, False)
        return turned_q.transpose(1, 2), turned_k.transpose(1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        turned_q, turned_k = _rotary(dq, dk, *ctx.saved_tensors, True)
        return turned_q.transpose(1, 2), turned_k.transpose(1, 2), None, None


# As registered operations the launches have shapes without data: fake tensors, the memory count and compilers see them.
@torch.library.custom_op("lit_peft::rotary", mutates_args=())
def _rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> tuple[Tensor, Tensor]:
    from lit_peft.kernels.rotary import rotary

    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    return rotary(q, k, cos.contiguous(), sin.contiguous(), backward)


@_rotary.register_fake
def _(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> tuple[Tensor, Tensor]:
    shapes = [(x.shape[0], x.shape[2], x.shape[1], x.shape[3]) for x in (q, k)]
    return q.new_empty(shapes[0]), k.new_empty(shapes[1])


class _Seen(dict[str, Any]):
    """What a function finds by name: one thing here, all others where it always did."""

    def __init__(self, below: dict[str, Any], **own: Any) -> None:
        super().__init__(own)
        self.below = below

    def __missing__(self, name: str) -> Any:
        return self.below[name]


def as_they_are(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, dim: int = 1) -> tuple[Tensor, Tensor]:
    """Return q and k, which have been turned already."""
    return q, k


def turns(forward: Any, name: str = "apply_rotary_pos_emb") -> bool:
    """Return whether what an attention's `forward` calls by a name is what `reference` says, told by its code."""
    own = forward.__globals__.get(name)
    half = getattr(own, "__globals__", {}).get("rotate_half")
    return _says(own) == _says(reference) and _says(half) == _says(rotate_half)


def turning(
    forward: Callable[..., Any], by: Callable[..., Any] = rotate, name: str = "apply_rotary_pos_emb"
) -> Callable[..., Any]:
    """Return an attention's `forward` that calls `rotate` where it called the model's own function for the same.

    It is another function of the same code: the one that was given, and the model, stay as they are. Where the model's
    own function is another one, the given one is returned.

    Args:
        forward: a plain function.
        by: what is called instead.
        name: what it calls.
    """
    return _other(forward, by, name) if turns(forward, name) else forward


@lru_cache(maxsize=32)
def _other(forward: FunctionType, by: Callable[..., Any], name: str) -> Callable[..., Any]:
    seen = _Seen(forward.__globals__, **{name: by})
    made = FunctionType(forward.__code__, seen, forward.__name__, forward.__defaults__, forward.__closure__)
    made.__kwdefaults__ = forward.__kwdefaults__
    return made


def _says(function: Any) -> tuple[Any, ...] | None:
    """Return what a function does, without the names of its variables; None for what is no function."""
    code: CodeType | None = getattr(function, "__code__", None)
    return None if code is None else (code.co_code, code.co_names, code.co_consts[1:], code.co_argcount)
