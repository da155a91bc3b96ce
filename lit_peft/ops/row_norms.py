"""The norms of the rows of W + s B A, without that sum (out, in): DoRA (arXiv 2402.09353).

    n_i^2 = |W_i|^2 + 2 s (B A)_i . W_i + s^2 |(B A)_i|^2

with |W_i|^2 kept, the middle term from W A^T (out, r) and the last one from A A^T (r, r). That is one read of W.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lit_peft.ops.recipes import as_written, eager


def exact(tensor: Tensor) -> Tensor:
    """Return a tensor in float32, or as it is in float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def across(weight: Tensor, a: Tensor) -> Tensor:
    """Return A W^T (r, out), in W's dtype: see `low_rank` on why it lies this way."""
    with as_written(weight):
        return a.to(weight.dtype) @ weight.t()


def row_norms(square: Tensor, product: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return n (out,), the norms of the rows of W + s B A, in float32 or better.

    Args:
        square: |W_i|^2 (out,), in float32 or better.
        product: A W^T (r, out).
        a: A (r, in).
        b: B (out, r).
        scale: s.

    Example:
        >>> import torch
        >>> weight, a, b = torch.randn(3, 5), torch.randn(2, 5), torch.randn(3, 2)
        >>> n = row_norms(weight.square().sum(1), across(weight, a), a, b, 0.5)
        >>> bool(torch.allclose(n, (weight + 0.5 * b @ a).norm(dim=1), rtol=1e-4))
        True
    """
    dtype = torch.promote_types(exact(product).dtype, exact(b).dtype)
    product, a, b = product.to(dtype), a.to(dtype), b.to(dtype).t()
    with as_written(b):
        found = torch.addmm(product, a @ a.t(), b, beta=2, alpha=scale).mul_(b).sum(0)
    return torch.add(square, found, alpha=scale).clamp_min_(torch.finfo(found.dtype).tiny).sqrt_()


class Norms:
    """What is known of the norms n of a layer: one for each named set, as long as A, B, s and W stay what they are.

    On the CPU A and B are compared number by number with copies. Elsewhere that would stop the device, and n is only
    handed out again in a backward pass, to the replay of a checkpointed layer: version counters alone would miss
    weights that are exchanged in place through `.data`, as Lightning's averaging of weights does. W, which is frozen,
    is told by its storage and version counter.
    """

    def __init__(self) -> None:
        self._found: dict[str, tuple[Tensor, Tensor, Tensor, tuple[Any, ...]]] = {}
        self._base: list[tuple[Any, ...]] = []

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave what is known out of files and copies."""
        return Norms, ()

    def forget(self) -> None:
        """Know nothing any more."""
        self._found.clear()
        self._base.clear()

    def check(self, held: Sequence[Tensor]) -> bool:
        """Return whether a layer's frozen parameters are those of the last call; if not, forget all norms."""
        same = len(held) == len(self._base)
        same = same and all(_is_marked(*pair) for pair in zip(held, self._base, strict=True))
        if not same:
            self._found.clear()
            self._base = [_mark(tensor) for tensor in held]
        return same

    def get(self, name: str, a: Tensor, b: Tensor, scale: float) -> Tensor | None:
        """Return n of a named set, if it is known to be that of these A, B and s."""
        found = self._found.get(name)
        if found is None or not _plain(a, b):
            return None
        n, kept_a, kept_b, key = found
        if key != _key(a, b, scale):
            return None
        if _compared(a):
            return n if torch.equal(a, kept_a) and torch.equal(b, kept_b) else None
        same = kept_a.data_ptr() == a.data_ptr() and kept_b.data_ptr() == b.data_ptr()
        return n if same and torch._C._current_graph_task_id() >= 0 else None

    def put(self, name: str, a: Tensor, b: Tensor, scale: float, n: Tensor) -> None:
        """Note n of a named set."""
        if _plain(a, b) and not n.is_inference():
            # elsewhere not copies: held, so that no other tensor can take their place in memory
            pair = (a.detach(), b.detach())
            kept_a, kept_b = (tensor.clone() for tensor in pair) if _compared(a) else pair
            self._found[name] = n, kept_a, kept_b, _key(a, b, scale)

    def drop(self, name: str) -> None:
        """Forget one named set."""
        self._found.pop(name, None)


def _plain(*tensors: Tensor) -> bool:
    kinds = all(type(tensor) in (Tensor, nn.Parameter) for tensor in tensors)  # not sharded, not without data
    return kinds and eager() and not any(tensor.is_meta or tensor.is_inference() for tensor in tensors)


def _compared(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _key(a: Tensor, b: Tensor, scale: float) -> tuple[Any, ...]:
    versions = () if _compared(a) else (a._version, b._version)
    return scale, a.shape, b.shape, a.dtype, b.dtype, a.device, b.device, *versions


def _mark(tensor: Tensor) -> tuple[Any, ...]:
    held: Any = tensor if hasattr(tensor, "full_tensor") else tensor.untyped_storage()  # shards have no storage
    return weakref.ref(held), *_state(tensor)


def _is_marked(tensor: Tensor, mark: tuple[Any, ...]) -> bool:
    held: Any = tensor if hasattr(tensor, "full_tensor") else tensor.untyped_storage()
    return mark[0]() is held and mark[1:] == _state(tensor)


def _state(tensor: Tensor) -> tuple[Any, ...]:
    version = 0 if tensor.is_inference() else tensor._version
    return version, tensor.dtype, tuple(tensor.shape), tensor.storage_offset()
