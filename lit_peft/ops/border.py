"""A frozen weight in the corner of a larger matrix, A and B in the borders: the update takes no product of its own.

    F = [ W  B ]   (out + R, in + R)        y  = [x | z] [W | B]^T       z = s D(x) A^T L   (rows, R)
        [ A  . ]                            dx = [g | p] [W ; A]         p = s g B L        (rows, R)

with W (out, in), A (r, in) and B (out, r) as in `low_rank`, padded with zeros to R, a power of two from 64 on. Neither
y nor dx is written twice, and each is rounded once. Making [x | z] moves 4 bytes an entry of x (in half precision);
adding the update to y moves 4 an entry of y, and reads x. So the border pays where `in < 2 out`, and in the backward
pass, where the roles are swapped, where `out < 2 in`.

The layer's weight stays the same parameter, and becomes a view of F with rows of length in + R. Its values, its name,
its place in optimizers and files stay what they are; `state_dict` holds a contiguous copy. A copy of the layer, and the
layer on another device or in another dtype, is plain again. Who wants to shard it calls `undo` first.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

LEAST = 64  # rows of F begin at multiples of 128 bytes, which cuBLAS and TMA want


@dataclass(eq=False)
class Border:
    """What stands around one weight.

    Attributes:
        width: R, the width of the borders.
        hook: keeps the layer's `state_dict` contiguous.
        filled: how often A and B have been copied in: the backward pass uses what its forward pass has put there.
        again: whether they have to be copied although they look unchanged: some optimizers write past the version.
    """

    width: int
    hook: Any
    filled: int = 0
    again: bool = True
    _held: tuple[Any, ...] = ()
    _rank: int = 0
    _alive: tuple[Any, ...] = field(default=())

    def hold(self, weight: Tensor, a: Tensor, b: Tensor) -> int:
        """See that A (r, in) and B (out, r) stand in the borders; return the number of this filling."""
        held = tuple(fact for part in (a, b) for fact in (id(part), part._version, part.data_ptr(), part.shape))
        if self.again or held != self._held or any(reference() is None for reference in self._alive):
            whole, (tall, wide), r = matrix(weight, self.width), weight.shape, len(a)
            with torch.no_grad():
                whole[tall : tall + r, :wide].copy_(a)
                whole[:tall, wide : wide + r].copy_(b)
                if r < self._rank:
                    whole[tall + r : tall + self._rank, :wide].zero_()
                    whole[:tall, wide + r : wide + self._rank].zero_()
            self._held, self._rank, self.again = held, r, False
            self._alive = weakref.ref(a), weakref.ref(b)
            self.filled += 1
        return self.filled


_ALONE: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()  # layer -> a weak reference to its weight
_AROUND: WeakKeyDictionary[nn.Module, Border] = WeakKeyDictionary()


def lies(weight: Tensor, width: int) -> bool:
    """Return whether a weight (out, in) is the corner of a matrix with borders of this width."""
    if weight.dim() != 2 or weight.storage_offset():
        return False
    row = weight.shape[1] + width
    held = (weight.shape[0] + width) * row * weight.element_size()
    return weight.stride() == (row, 1) and weight.untyped_storage().nbytes() == held


def matrix(weight: Tensor, width: int) -> Tensor:
    """Return F (out + R, in + R) of a weight that lies in its corner; without the weight's count of changes."""
    tall, wide = weight.shape
    return weight.data.as_strided((tall + width, wide + width), (wide + width, 1), 0)


def allow(model: nn.Module) -> None:
    """Note which linear layers of a model have their weight to themselves: only those may get a border later on."""
    holders: dict[int, int] = {}
    modules = list(model.modules())
    for module in modules:
        for parameter in module._parameters.values():
            if parameter is not None:
                holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    for module in modules:
        if type(module) is nn.Linear and holders.get(id(module.weight)) == 1:
            _ALONE[module] = weakref.ref(module.weight)


def allowed(layer: nn.Module) -> bool:
    """Return whether `allow` has seen this layer with this very weight: FSDP, for one, puts others in its place."""
    found = _ALONE.get(layer)
    return found is not None and found() is layer._parameters["weight"]


def complaint(layer: nn.Module) -> str:
    """Return why a layer cannot have a border; an empty string if it can."""
    weight = layer._parameters.get("weight")
    if type(layer) is not nn.Linear or type(weight) is not nn.Parameter:
        return f"A {type(layer).__name__} whose weight is a {type(weight).__name__} can have no border."
    if weight.requires_grad:
        return "A weight that is trained can have no border. Freeze it first."
    if weight.is_meta or weight.dim() != 2 or not weight.is_floating_point():
        shape = tuple(weight.shape)
        return f"A weight of shape {shape} and dtype {weight.dtype} on {weight.device} can have no border."
    if bordered(layer) is None:
        held = weight.untyped_storage().nbytes()
        if not weight.is_contiguous() or weight.storage_offset() or held != weight.numel() * weight.element_size():
            return "A weight that is a part of other memory can have no border."
    return ""


def lined(layer: nn.Module) -> bool:
    """Return whether the layer has been given a border, which may be gone since: see `bordered`."""
    return bool(_AROUND) and layer in _AROUND


def bordered(layer: nn.Module) -> Border | None:
    """Return a layer's border, if its weight still lies in one."""
    border = _AROUND.get(layer)
    if border is None:
        return None
    weight = layer._parameters.get("weight")
    if type(weight) is nn.Parameter and not weight.requires_grad and lies(weight, border.width):
        return border
    _forget(layer)  # moved, cast, merged or replaced since
    return None


def surround(layer: nn.Linear, rank: int) -> Border:
    """Put a layer's frozen weight into a larger matrix, with room for updates up to a rank.

    Args:
        layer: a plain `nn.Linear`.
        rank: r, at least 1.

    Returns:
        The border. The layer's own, if it has one that is wide enough.

    Raises:
        ValueError: if the weight is trained, sharded, quantised, or a part of other memory.

    Example:
        >>> layer = nn.Linear(4, 3).requires_grad_(False)
        >>> surround(layer, 2).width, layer.weight.stride()
        (64, (68, 1))
    """
    width = max(LEAST, 1 << (rank - 1).bit_length())
    border = bordered(layer)
    if border is not None and border.width >= width:
        return border
    reason = complaint(layer)
    if reason:
        raise ValueError(reason)
    _forget(layer)
    weight = layer.weight
    tall, wide = weight.shape
    # outside of inference mode: what is made there could not be changed later
    with torch.inference_mode(False), torch.no_grad():
        whole = torch.zeros(tall + width, wide + width, dtype=weight.dtype, device=weight.device)
        whole[:tall, :wide].copy_(weight)
        weight.data = whole[:tall, :wide]
    hook = layer.register_state_dict_post_hook(_contiguous)  # type: ignore[no-untyped-call]
    border = _AROUND[layer] = Border(width, hook)
    return border


def undo(model: nn.Module) -> None:
    """Give all linear layers of a model their own memory back, and let none get a border from now on."""
    for layer in model.modules():
        _ALONE.pop(layer, None)
        if bordered(layer) is not None:
            weight: Tensor = layer._parameters["weight"]  # type: ignore[assignment]
            weight.data = weight.data.contiguous()
            _forget(layer)


def _forget(layer: nn.Module) -> None:
    border = _AROUND.pop(layer, None)
    if border is not None:
        border.filled += 1  # no backward pass may use it any more
        border.hook.remove()


def _contiguous(layer: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    # files hold the weight alone; with keep_vars the parameter itself is asked for
    weight = state.get(f"{prefix}weight")
    if weight is not None and weight is not layer._parameters["weight"]:
        state[f"{prefix}weight"] = weight.contiguous()


def packed(rows: Tensor, z: Tensor, scale: float, width: int) -> Tensor:
    """Return [x | s z | 0]: (rows, in), (rows, r) -> (rows, in + R)."""
    count, wide, r = *rows.shape, z.shape[1]
    out = rows.new_empty(count, wide + width)
    out[:, :wide].copy_(rows)
    torch.mul(z, scale, out=out[:, wide : wide + r])
    out[:, wide + r :].zero_()
    return out


def forward_product(weight: Tensor, width: int, packed_rows: Tensor, bias: Tensor | None) -> Tensor:
    """Return [x | z] [W | B]^T + c: (rows, in + R) -> (rows, out)."""
    sides = matrix(weight, width)[: len(weight)]
    return packed_rows @ sides.t() if bias is None else torch.addmm(bias, packed_rows, sides.t())


def backward_product(weight: Tensor, width: int, packed_rows: Tensor) -> Tensor:
    """Return [g | p] [W ; A]: (rows, out + R) -> (rows, in)."""
    return packed_rows @ matrix(weight, width)[:, : weight.shape[1]]


def pays_forward(weight: Tensor) -> bool:
    """Return whether [x | z] is cheaper to make than y is to change."""
    return weight.shape[1] < 2 * weight.shape[0]


def pays_backward(weight: Tensor) -> bool:
    """Return whether [g | p] is cheaper to make than dx is to change."""
    return weight.shape[0] < 2 * weight.shape[1]
