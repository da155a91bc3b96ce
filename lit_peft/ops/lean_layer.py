"""A model's own decoder layers, computed by the two functions of `layer` where they say exactly what is computed there.

A layer stays the same object, with the same children, names, hooks and checkpoints: only its class becomes one below
its own, whose `forward` asks at every call whether all that it holds is as it has to be (plain frozen layers, each with
one low-rank update at most, norms and MLP known), and is the model's own where it is not.
"""

from __future__ import annotations

import dis
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lit_peft.ops.layer import Group, Rest, enter, leave
from lit_peft.ops.lean_blocks import LeanAttention, LeanMLP, LeanNorm, is_silu, says
from lit_peft.ops.parts import layer_of
from lit_peft.ops.recipes import recording, watched

# What an attention may call and read: nothing here changes or sums up its input but the three layers that read it.
NAMES = {
    "ALL_ATTENTION_FUNCTIONS", "_attn_implementation", "apply_rotary_pos_emb", "attention_dropout", "config",
    "contiguous", "eager_attention_forward", "get_interface", "getattr", "head_dim", "k_norm", "k_proj", "layer_idx",
    "o_proj", "q_norm", "q_proj", "reshape", "scaling", "shape", "sliding_window", "training", "transpose", "update",
    "v_proj", "view",
}  # fmt: skip
MADE = "_lit_peft_plain"  # the name under which a class made here notes what it stands for


class LeanLayer:
    """What comes before a decoder layer's own class."""

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the layer's output: (..., width) -> (..., width)."""
        groups = None if args else _groups(self, hidden_states)
        if groups is None:
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        first, rest = groups
        norm = self.input_layernorm
        x, y, found = enter(hidden_states, norm.weight, norm.variance_epsilon, first)
        attention = self.self_attn
        layers = {
            name: _Given(getattr(attention, name), y, out) for name, out in zip(attention.reads, found, strict=True)
        }
        layers["o_proj"] = _Given(attention.o_proj)
        a, _ = attention.answered(layers, (), {**_DEFAULTS, **kwargs, "hidden_states": y})
        return leave(x, a, rest)

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        """Let files and copies be of a class that can be found by its name."""
        return _revived, (getattr(type(self), MADE),), self.__dict__


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


def _groups(layer: Any, x: Tensor) -> tuple[Group, Rest] | None:
    """Return the layers in front of the attention and what is behind it, or None where one is not as it has to be."""
    if not recording() or x.is_cuda:
        return None
    norms, attention, mlp = (layer.input_layernorm, layer.post_attention_layernorm), layer.self_attn, layer.mlp
    if type(attention) is not LeanAttention or type(mlp) is not LeanMLP or any(type(n) is not LeanNorm for n in norms):
        return None
    if any(watched(module) for module in (attention, mlp, *norms)) or not is_silu(mlp.act_fn):
        return None
    if any(norm.weight.requires_grad or norm.weight.dtype != x.dtype for norm in norms):
        return None
    kind: Any = type(attention.plain)
    if not _reads_three(kind) or attention.pays(x) or mlp.pays(x):
        return None
    found = []
    for children in (attention.children_read(), [attention.o_proj], mlp.children_read(), [mlp.down_proj]):
        group = _group(children, x)
        if group is None:
            return None
        found.append(group)
    first, o, inner, down = found
    return first, Rest(o, norms[1].weight, norms[1].variance_epsilon, inner, down)


def _group(children: list[Any], x: Tensor) -> Group | None:
    bases, pairs = [], []
    for child in children:
        base, pair = layer_of(child, x)
        if base is None:
            return None
        bases.append(base)
        pairs.append(pair)
    return Group(tuple(base.weight for base in bases), tuple(base.bias for base in bases), tuple(pairs))


@cache
def _reads_three(kind: Any) -> bool:
    """Return whether an attention's `forward` reads its input by its three layers alone, and ends with `o_proj`."""
    code = kind.forward.__code__
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("CACHE", "PRECALL", "EXTENDED_ARG")]
    names = [step.argval for step in steps if step.argval in NAMES]
    strings = {value for value in code.co_consts if isinstance(value, str)}
    if not set(code.co_names) <= NAMES or ("getattr" in code.co_names and not strings <= NAMES):
        return False
    if any(names.count(f"{name}_proj") != 1 for name in "qkvo") or any(map(_computes, steps)):
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
    forward = kind.forward
    code = getattr(forward, "__code__", None)
    # transformers checkpoints a layer's forward from around it, that of a class below it too
    if code is not None and code.co_name == "forward_with_checkpointing":
        code = getattr(getattr(forward, "__wrapped__", None), "__code__", None)
    if code is None or says(code) != says(_decoder_layer.__code__) or "forward" in module.__dict__:
        return False
    if not isinstance(module.self_attn, LeanAttention) or not isinstance(module.mlp, LeanMLP):
        return False
    module.__class__ = _below(kind)
    return True


def become_plain(module: nn.Module) -> None:
    """Give a decoder layer its own class back."""
    if isinstance(module, LeanLayer):
        module.__class__ = getattr(type(module), MADE)


@cache
def _below(kind: Any) -> Any:
    # under the name of its own class: those who look for layers by name find them
    made = type(kind.__name__, (LeanLayer, kind), {MADE: kind, "__module__": kind.__module__})
    made.__qualname__ = kind.__qualname__
    return made


def _revived(kind: Any) -> nn.Module:
    made: nn.Module = object.__new__(_below(kind))
    return made
