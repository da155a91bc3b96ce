"""What stands in the place of a model's own modules, see `lean`: normalisation, gated MLP and attention."""

from __future__ import annotations

import dis
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from types import CodeType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lit_peft.ops.gated import gated_linear, gated_product
from lit_peft.ops.norm import norm_shrink, rms_norm, shrinks
from lit_peft.ops.packed import Parts, Shrunk, packed_linear
from lit_peft.ops.parts import parts_of, pays
from lit_peft.ops.recipes import recipe_of, recording, signed, watched
from lit_peft.ops.rotary import rotate, turning


class Lean(nn.Module):
    """Stands for one of a model's own modules, with the very same children and parameters; see `make_lean`."""

    def __init__(self, plain: nn.Module) -> None:
        nn.Module.__init__(self)
        self.training = plain.training
        self.__dict__["plain"] = plain  # not a child: names and checkpoints stay as they are
        # one dictionary for both, so that a child or a hook that is put in later is seen by both
        for key, value in plain.__dict__.items():
            if key in self.__dict__ and isinstance(value, dict | set):
                self.__dict__[key] = value

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "plain":
                raise
            return getattr(self.__dict__["plain"], name)


MADE = "_lit_peft_plain"  # the name under which a class that is made here notes what it stands for


@cache
def below(lean: Any, kind: Any) -> Any:
    """Return a class below a model's own that computes leanly, under its name: those who look for it find it."""
    made = type(kind.__name__, (lean, kind), {MADE: kind, "__module__": kind.__module__})
    made.__qualname__ = kind.__qualname__
    return made


def revived(lean: Any, kind: Any) -> nn.Module:
    """Return an empty module of such a class: copies and files name it by what it is made of."""
    made: nn.Module = object.__new__(below(lean, kind))
    return made


@dataclass(frozen=True)
class Normed:
    """Says of a norm's output which norm made it, and what else it made for a reader."""

    norm: LeanNorm
    shrunk: Shrunk | None = None
    factors: tuple[Tensor, ...] = ()  # the A_i as the reader named them


class LeanNorm(Lean):
    """w x / sqrt(mean(x^2) + eps)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised x: (..., width) -> (..., width)."""
        if not recording() or not x.requires_grad or self.weight.requires_grad:
            return _rms_norm(self, x)
        # found out by the last reader itself, see `LeanBlock.parts`; in __dict__, since it is no child
        reader: LeanBlock | None = self.__dict__.get("reader")
        factors = () if reader is None else reader.factors(x)
        if factors and shrinks(x, self.weight, factors):
            y, a, h = norm_shrink(x, self.weight, self.variance_epsilon, factors)
            return signed(y, Normed(self, (a, h), factors))
        return signed(rms_norm(x, self.weight, self.variance_epsilon), Normed(self))


class LeanBlock(Lean):
    """A module with linear layers that read its input, computed as one where that pays."""

    reads: ClassVar[tuple[str, ...]] = ()
    op: ClassVar[str] = ""  # its name among the crossovers

    def parts(self, x: Tensor) -> Parts | None:
        """Return the layers as one, or None where they are to be called one by one: x (..., in)."""
        return parts_of(self.children_read(), x) if recording() and self.pays(x) else None

    def children_read(self) -> list[Any]:
        """Return the modules that read the block's input."""
        return [getattr(self, name) for name in self.reads]

    def pays(self, x: Tensor) -> bool:
        """Return whether they are to be computed as one for this input (..., in)."""
        return pays(self.op, x, sum(getattr(child, "out_features", 0) for child in self.children_read()))

    def factors(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the A_i that are going to be multiplied by x, or by what is like x."""
        parts = self.parts(x)
        return () if parts is None else tuple(pair[0] for pair in parts.pairs if pair is not None)

    def shrunk(self, x: Tensor, parts: Parts) -> Shrunk | None:
        """Return A and H where the norm that made x has made them too; and let it know for the next time."""
        made = recipe_of(x).by
        if not isinstance(made, Normed):
            return None
        made.norm.__dict__["reader"] = self
        wanted = [pair[0] for pair in parts.pairs if pair is not None]
        same = len(wanted) == len(made.factors) and all(map(lambda a, b: a is b, wanted, made.factors))
        return made.shrunk if same else None


class LeanMLP(LeanBlock):
    """down(silu(gate(x)) up(x))."""

    reads = ("gate_proj", "up_proj")
    op = "gated"

    def forward(self, x: Tensor) -> Tensor:
        """Return the MLP's output: (..., width) -> (..., width)."""
        silu = is_silu(self.act_fn)
        parts = self.parts(x) if silu else None
        if parts is not None and parts.sizes[0] == parts.sizes[1]:
            return self.down_proj(gated_linear(x, parts, shrunk=self.shrunk(x, parts)))  # type: ignore[no-any-return]
        e, g = self.gate_proj(x), self.up_proj(x)
        if silu and recording() and (e.requires_grad or g.requires_grad) and e.shape == g.shape and e.dtype == g.dtype:
            return self.down_proj(gated_product(e, g))  # type: ignore[no-any-return]
        return self.down_proj(self.act_fn(e) * g)  # type: ignore[no-any-return]


class LeanAttention(LeanBlock):
    """A model's own attention, whose queries, keys and values come from one product.

    It is the model's own `forward` that runs, on a copy of the module in which the three layers answer from what was
    computed together. Whatever the forward does with caches, masks and kinds of attention stays as it is.
    """

    reads = ("q_proj", "k_proj", "v_proj")
    op = "packed"

    def __new__(cls, plain: nn.Module) -> Any:
        """Return one of a class below the model's own: by that, transformers finds whose weights it is to record."""
        lean: Any = cls
        kind: Any = type(plain)
        return object.__new__(below(lean, kind))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Let files and copies name a class that can be found."""
        return revived, (LeanAttention, type(self.plain)), self.__dict__

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the model's own attention returns."""
        if not recording():
            return self.answered({}, args, kwargs)
        shared = _Shared(self)
        x = args[0] if args else kwargs.get("hidden_states")
        turns = isinstance(x, Tensor) and (x.is_cuda or os.environ.get("LIT_PEFT_KERNELS") == "1")
        layers = {name: _Layer(shared, name) for name in self.reads}
        return self.answered(layers, args, kwargs, turn=rotate if turns else None)

    def answered(
        self, layers: Mapping[str, Any], args: Any, kwargs: Any, turn: Callable[..., Any] | None = None
    ) -> Any:
        """Return what the model's own attention returns with others in the place of some of its layers.

        Args:
            layers: what is called instead, by name.
            args: what the attention is called with.
            kwargs: the same by name.
            turn: what turns queries and keys by their places; None: the model's own function.
        """
        own = type(self.plain).forward
        # others find what they have noted in its __dict__, and its class, as on the model's own module
        copy = object.__new__(type(self.plain))
        state = {key: value for key, value in self.__dict__.items() if key != "plain"}
        copy.__dict__.update({**self.plain.__dict__, **state, **layers})
        return (own if turn is None else turning(own, turn))(copy, *args, **kwargs)


class _Shared:
    """The outputs of a block's layers for the input that was seen last."""

    def __init__(self, block: LeanBlock) -> None:
        self.block = block
        self.x: Tensor | None = None
        self.found: dict[str, Tensor] = {}

    def output(self, name: str, x: Tensor) -> Tensor:
        if x is not self.x:
            self.x = x
            parts = self.block.parts(x)
            # the values are kept for the backward pass: a slice would keep queries and keys with them
            ys = () if parts is None else packed_linear(x, parts, apart=True, shrunk=self.block.shrunk(x, parts))
            self.found = dict(zip(self.block.reads, ys, strict=bool(ys)))
        y = self.found.pop(name, None)
        return getattr(self.block, name)(x) if y is None else y  # type: ignore[no-any-return]


class _Layer:
    """Answers a call of one of a block's layers."""

    def __init__(self, shared: _Shared, name: str) -> None:
        self.shared, self.name = shared, name

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs:  # which the layers that are known here do not take
            return getattr(self.shared.block, self.name)(x, *args, **kwargs)  # type: ignore[no-any-return]
        return self.shared.output(self.name, x)

    def __getattr__(self, name: str) -> Any:
        return getattr(getattr(self.shared.block, self.name), name)


def is_silu(act: Any) -> bool:
    """Return whether an activation is x s(x), and nobody watches it."""
    # by name: transformers has a class of its own for it
    known = type(act).__module__.startswith(("torch.", "transformers."))
    return known and type(act).__name__ in ("SiLU", "SiLUActivation") and not watched(act)


def _gated_mlp(self: Any, x: Tensor) -> Tensor:
    y: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return y


def _rms_norm(self: Any, x: torch.Tensor) -> torch.Tensor:
    kept = x.dtype
    x = x.to(torch.float32)
    squares = x.pow(2).mean(-1, keepdim=True)
    x = x * torch.rsqrt(squares + self.variance_epsilon)
    return self.weight * x.to(kept)  # type: ignore[no-any-return]


def says(code: CodeType) -> tuple[Any, ...]:
    """Return what a function does, without the names of its variables."""
    return code.co_code, code.co_names, code.co_consts[1:], code.co_argcount


def _rotates(code: CodeType) -> bool:
    """Return whether a function calls three projections, turns two, and changes neither its module nor a tensor."""
    if not {*LeanAttention.reads, "apply_rotary_pos_emb"} <= set(code.co_names) or code.co_freevars:
        return False
    if any(name.endswith("_") and not name.endswith("__") for name in code.co_names):
        return False
    return not any(
        step.opname in ("STORE_ATTR", "DELETE_ATTR")
        or step.opname.startswith("INPLACE_")  # before Python 3.11
        or (step.opname == "BINARY_OP" and step.argrepr.endswith("="))
        for step in dis.get_instructions(code)
    )


def stand_in(module: nn.Module) -> type[Lean] | None:
    """Return what can stand for a module that says exactly what is known here; None for any other."""
    forward: Callable[..., Any] = type(module).forward
    code = getattr(forward, "__code__", None)
    if code is None or watched(module) or isinstance(module, Lean):
        return None
    if says(code) == says(_rms_norm.__code__):
        return LeanNorm
    if says(code) == says(_gated_mlp.__code__):
        return LeanMLP if is_silu(getattr(module, "act_fn", None)) else None
    layers = all(isinstance(module._modules.get(name), nn.Module) for name in LeanAttention.reads)
    return LeanAttention if layers and _rotates(code) else None
