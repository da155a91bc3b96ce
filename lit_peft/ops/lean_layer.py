"""A model's own decoder layers, computed by the two functions of `layer` where they say exactly what is computed there.

A layer stays the same object, with the same children, names, hooks and checkpoints: only its class becomes one below
its own, whose `forward` asks at every call whether all that it holds is as it has to be (plain frozen layers, each with
one low-rank update at most, norms and MLP known), and is the model's own where it is not.
"""

from __future__ import annotations

import dis
from functools import lru_cache
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from lit_peft.ops import fused_layer
from lit_peft.ops.choice import measured, takes_kernel
from lit_peft.ops.fused_layer import Fused
from lit_peft.ops.layer import Group, Rest, enter, leave
from lit_peft.ops.lean_blocks import MADE, LeanAttention, LeanMLP, LeanNorm, below, is_silu, revived, says
from lit_peft.ops.parts import layer_of, parts_of
from lit_peft.ops.recipes import recording, watched
from lit_peft.ops.rotary import as_they_are, turns

# What an attention may call and read: nothing here changes or sums up its input but the three layers that read it.
NAMES = {
    "ALL_ATTENTION_FUNCTIONS", "_attn_implementation", "apply_rotary_pos_emb", "attention_dropout", "config",
    "contiguous", "eager_attention_forward", "get_interface", "getattr", "head_dim", "k_norm", "k_proj", "layer_idx",
    "o_proj", "q_norm", "q_proj", "reshape", "scaling", "shape", "sliding_window", "training", "transpose", "update",
    "v_proj", "view",
}  # fmt: skip


class LeanLayer:
    """What comes before a decoder layer's own class."""

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the layer's output: (..., width) -> (..., width)."""
        x, kwargs = hidden_states, kwargs if args else _DEFAULTS | kwargs
        known = not args and _known(self, x)
        fused = _fused(self, x, kwargs["position_embeddings"]) if known else None
        groups = _groups(self, x) if known and fused is None else None
        norm, attention = self.input_layernorm, self.self_attn
        if fused is not None:
            passed, y, found = fused_layer.enter(x, fused)
        elif groups is not None:
            passed, y, found = enter(x, norm.weight, norm.variance_epsilon, groups[0])
        else:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        given = zip(attention.reads, found, strict=True)
        layers = {name: _Given(getattr(attention, name), y, out) for name, out in given}
        layers["o_proj"] = _Given(attention.o_proj)
        turn = None if fused is None else as_they_are
        a, _ = attention.answered(layers, (), kwargs | {"hidden_states": y}, turn)
        if fused is not None:
            return fused_layer.leave(passed, a, fused)
        assert groups is not None
        return leave(passed, a, groups[1])

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        """Let files and copies be of a class that can be found by its name."""
        return revived, (LeanLayer, getattr(type(self), MADE)), self.__dict__


_DEFAULTS: dict[str, Any] = {
    "attention_mask": None,
    "position_ids": None,
    "past_key_values": None,
    "use_cache": False,
    "position_embeddings": None,
}


class _Given:
    """Answers the call of a layer with what it has been found to return, or else with its input."""

    def __init__(self, layer: nn.Module, x: Tensor | None = None, y: Tensor | None = None) -> None:
        self.layer, self.x, self.y = layer, x, y

    def __call__(self, x: Tensor) -> Tensor:
        assert self.y is None or x is self.x  # see NAMES
        return x if self.y is None else self.y

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)


def _known(layer: Any, x: Tensor) -> bool:
    """Return whether all between the linear layers is what it was, and seen by nobody."""
    if not recording():
        return False
    norms, attention, mlp = (layer.input_layernorm, layer.post_attention_layernorm), layer.self_attn, layer.mlp
    if (
        not isinstance(attention, LeanAttention)
        or type(mlp) is not LeanMLP
        or any(type(n) is not LeanNorm for n in norms)
    ):
        return False
    if not _says_so(getattr(type(layer), MADE)):  # patched since
        return False
    if any(watched(module) for module in (attention, mlp, *norms)) or not is_silu(mlp.act_fn):
        return False
    code = getattr(type(attention.plain).forward, "__code__", None)
    return (
        code is not None
        and _reads_three(code)
        and not any(n.weight.requires_grad or n.weight.dtype != x.dtype for n in norms)
    )


def _parts(layer: Any) -> list[list[Any]]:
    """Return what reads the first norm, the attention, the second norm and the gated product."""
    attention, mlp = layer.self_attn, layer.mlp
    return [attention.children_read(), [attention.o_proj], mlp.children_read(), [mlp.down_proj]]


def _fused(layer: Any, x: Tensor, turned: Any) -> Fused | None:
    """Return the layer on kernels, or None where they are not to be launched or cannot compute it."""
    attention, pair = layer.self_attn, isinstance(turned, tuple) and len(turned) == 2
    if not pair or not takes_kernel("layer", x, rows=x.numel() // max(1, x.shape[-1]), width=x.shape[-1]):
        return None
    own: Any = type(attention.plain).forward
    if (
        not turns(own)
        or turned[0].shape[-1] != attention.head_dim
        or not {"q_norm", "k_norm"}.isdisjoint(own.__code__.co_names)
    ):
        return None
    first, o, inner, down = (parts_of(children, x) for children in _parts(layer))
    if first is None or o is None or inner is None or down is None:
        return None
    before, between = layer.input_layernorm, layer.post_attention_layernorm
    norms = (before.weight, before.variance_epsilon), (between.weight, between.variance_epsilon)
    fused = Fused(first, o, inner, down, norms, turned)
    return fused if fused_layer.fits(x, fused) else None


def _groups(layer: Any, x: Tensor) -> tuple[Group, Rest] | None:
    """Return what is in front of the attention and what is behind it, or None where layers are better by themselves."""
    if layer.self_attn.pays(x) or layer.mlp.pays(x):
        return None
    if x.is_cuda and measured().get(torch.cuda.get_device_name(x.device)):  # the blocks know which kernels win
        return None
    found = [_group(children, x) for children in _parts(layer)]
    first, o, inner, down = found
    if first is None or o is None or inner is None or down is None:
        return None
    norm = layer.post_attention_layernorm
    return first, Rest(o, norm.weight, norm.variance_epsilon, inner, down)


def _group(children: list[Any], x: Tensor) -> Group | None:
    bases, pairs = [], []
    for child in children:
        base, pair = layer_of(child, x)
        if base is None:
            return None
        bases.append(base)
        pairs.append(pair)
    return Group(tuple(base.weight for base in bases), tuple(base.bias for base in bases), tuple(pairs))


@lru_cache(maxsize=64)
def _reads_three(code: CodeType) -> bool:
    """Return whether an attention's `forward` reads its input by its three layers alone, and ends with `o_proj`."""
    steps = _steps(code)
    names = [step.argval for step in steps if step.argval in NAMES]
    strings = {value for value in code.co_consts if isinstance(value, str)}
    if not set(code.co_names) <= NAMES or ("getattr" in code.co_names and not strings <= NAMES):
        return False
    if any(names.count(f"{name}_proj") != 1 for name in "qkvo") or any(map(_computes, steps)):
        return False
    # its shape, and the three: it is handed to nobody else
    x = code.co_varnames[1] if code.co_argcount > 1 else ""
    if [x in _variables(step) for step in steps].count(True) != 4:
        return False
    last = next(i for i, step in enumerate(steps) if step.argval == "o_proj")
    ends = (
        "LOAD_FAST",
        "STORE_FAST",
        "CALL",
        "PUSH_NULL",
        "BUILD_TUPLE",
        "RETURN_VALUE",
    )  # their names vary by version
    return all(step.opname.startswith(ends) for step in steps[last + 1 :])


@lru_cache(maxsize=64)
def _turns_once(code: CodeType) -> bool:
    """Return whether queries and keys are turned in any case, by `apply_rotary_pos_emb(q, k, cos, sin)`."""
    steps = _steps(code)
    places = [i for i, step in enumerate(steps) if step.argval == "apply_rotary_pos_emb"]
    if len(places) != 1 or any("JUMP" in step.opname for step in steps[: places[0]]):
        return False
    after = steps[places[0] + 1 :]
    call = next((i for i, step in enumerate(after) if step.opname.startswith("CALL")), 0)
    loads = all(step.opname.startswith(("LOAD_FAST", "PUSH_NULL")) for step in after[:call])
    return loads and after[call].opname == "CALL" and after[call].arg == 4


def _steps(code: CodeType) -> list[dis.Instruction]:
    return [step for step in dis.get_instructions(code) if step.opname not in ("CACHE", "PRECALL", "EXTENDED_ARG")]


def _variables(step: dis.Instruction) -> tuple[Any, ...]:
    """Return which variables a step reads or writes; one step may do so with two."""
    return step.argval if isinstance(step.argval, tuple) else (step.argval,) if "FAST" in step.opname else ()


def _computes(step: dis.Instruction) -> bool:
    """Return whether a step is a sum, a product or the like, and not the choice of an entry."""
    return (
        step.opname.startswith("BINARY_")
        and step.opname not in ("BINARY_SUBSCR", "BINARY_SLICE")
        and step.argrepr != "[]"
    )


def _decoder_layer(
    self: Any,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    past_key_values: Any = None,
    use_cache: bool | None = False,
    position_embeddings: Any = None,
    **kwargs: Any,
) -> torch.Tensor:
    x = hidden_states
    hidden_states = self.input_layernorm(hidden_states)
    hidden_states, _ = self.self_attn(
        hidden_states=hidden_states,
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=past_key_values,
        use_cache=use_cache,
        position_embeddings=position_embeddings,
        **kwargs,
    )
    hidden_states = x + hidden_states
    x = hidden_states
    hidden_states = self.post_attention_layernorm(hidden_states)
    hidden_states = self.mlp(hidden_states)
    hidden_states = x + hidden_states
    return hidden_states


def become_lean(module: nn.Module) -> bool:
    """Give a decoder layer that says what is written above the class that computes it leanly; return whether it has."""
    if isinstance(module, LeanLayer):
        return True
    kind: Any = type(module)
    if not _says_so(kind) or "forward" in module.__dict__:
        return False
    if not isinstance(module.self_attn, LeanAttention) or not isinstance(module.mlp, LeanMLP):
        return False
    module.__class__ = below(LeanLayer, kind)
    return True


def _says_so(kind: Any) -> bool:
    """Return whether a class computes what is written in `_decoder_layer`."""
    code = getattr(kind.forward, "__code__", None)
    # transformers checkpoints a layer's forward from around it, that of a class below it too
    if code is not None and code.co_name == "forward_with_checkpointing":
        code = getattr(getattr(kind.forward, "__wrapped__", None), "__code__", None)
    return code is not None and _code_says_so(code)


@lru_cache(maxsize=64)
def _code_says_so(code: CodeType) -> bool:
    return says(code) == says(_decoder_layer.__code__)


def become_plain(module: nn.Module) -> None:
    """Give a decoder layer its own class back, unless somebody has put a class of theirs below the lean one since."""
    if MADE in type(module).__dict__ and isinstance(module, LeanLayer):
        module.__class__ = getattr(type(module), MADE)
