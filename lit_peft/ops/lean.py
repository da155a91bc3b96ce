"""The gated MLP of Llama and its kin, RMS normalisation, and the output layer, keeping less for the backward pass.

    MLP:   e = x We^T,  g = x Wg^T,  h = act(e) g,  y = h Wd^T          keeps e and g, not act(e), and h is made again
    norm:  w x / sqrt(mean(x^2) + eps), see `norm`                      keeps x and a number a row, and is made again
    head:  the loss is computed from the hidden states, see `cross_entropy`

`make_lean` puts these in the place of a model's own modules, after all methods have placed. The children, their names
and so all checkpoints stay as they are, and `make_plain` brings the model's own modules back.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_peft.ops import border
from lit_peft.ops.norm import rms_norm
from lit_peft.ops.recipes import eager, note, recording


class _Product(torch.autograd.Function):
    """silu(e) g, keeping e and g."""

    @staticmethod
    def forward(ctx: Any, e: Tensor, g: Tensor) -> Tensor:
        ctx.save_for_backward(e, g)
        return silu_product(e, g)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        e, g = ctx.saved_tensors
        de = torch.ops.aten.silu_backward(gradient * g, e) if ctx.needs_input_grad[0] else None
        dg = F.silu(e).mul_(gradient) if ctx.needs_input_grad[1] else None
        return de, dg


def silu_product(e: Tensor, g: Tensor) -> Tensor:
    """Return silu(e) g, of e and g of one shape."""
    return F.silu(e).mul_(g)


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


class LeanMLP(Lean):
    """down(silu(gate(x)) up(x))."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the MLP's output: (..., width) -> (..., width)."""
        e, g = self.gate_proj(x), self.up_proj(x)
        recorded = recording() and (e.requires_grad or g.requires_grad)
        if recorded and e.shape == g.shape and e.dtype == g.dtype and _is_silu(self.act_fn):
            product: Tensor = _Product.apply(e, g)  # type: ignore[no-untyped-call]
            return self.down_proj(note(product, e, g, make=silu_product))  # type: ignore[no-any-return]
        return self.down_proj(self.act_fn(e) * g)  # type: ignore[no-any-return]


class LeanNorm(Lean):
    """w x / sqrt(mean(x^2) + eps)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised x: (..., width) -> (..., width)."""
        if recording() and x.requires_grad and not self.weight.requires_grad:
            return rms_norm(x, self.weight, self.variance_epsilon)
        return _rms_norm(self, x)


class LeanHead(Lean, nn.Linear):
    """An output layer that hands its input over to a loss which is computed with the layer's weight in one go.

    Inside of `with head.opened():` it returns its input as it is, and notes it; everywhere else, its logits.
    """

    def __init__(self, plain: nn.Linear) -> None:
        Lean.__init__(self, plain)
        self.opened_by = 0  # a thread: others may use the model meanwhile
        self.given: Tensor | None = None
        self.mark: Tensor | int = 0
        self.refused = False  # the model does something to the logits
        self.known = False  # it does not

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + c, or x itself: (..., d) -> (..., V) or (..., d)."""
        if eager() and self.opened_by == threading.get_ident():
            self.given, self.mark = x, x.clone() if x.is_inference() else x._version
            return x
        return F.linear(x, self.weight, self.bias)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Let the model's output be the hidden states."""
        self.opened_by, self.given = threading.get_ident(), None
        try:
            yield
        finally:
            self.opened_by = 0

    def is_as_given(self, output: Tensor | None) -> bool:
        """Return whether a model's output is what this layer returned while it was open, unchanged."""
        if output is None or output is not self.given:
            return False
        return output.equal(self.mark) if isinstance(self.mark, Tensor) else output._version == self.mark


def head_of(model: nn.Module) -> LeanHead | None:
    """Return the frozen output layer whose loss can be taken in one go, if the model has one."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    if not isinstance(head, LeanHead) or head.refused or not eager():
        return None
    if _hooked(head) or model._forward_hooks:  # which are to see logits
        return None
    parts = [part for part in (head.weight, head.bias) if part is not None]
    plain = all(type(part) is nn.Parameter and not part.requires_grad for part in parts)
    return head if plain else None


def scored(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, LeanHead | None]:
    """Call a model for its loss: return its logits and None, or its last hidden states and the layer they belong to.

    The layer is there when it is frozen, and the model's `logits` are what the layer returned, without a cap or scale.

    Args:
        model: a language model, as from transformers.
        inputs: its keyword arguments.

    Returns:
        (batch, length, V) and None; or (batch, length, d) and the layer, for `linear_cross_entropy`.
    """
    head = head_of(model)
    if head is not None:
        try:
            with head.opened():
                output: Tensor | None = model(**inputs).logits
        except Exception:
            if head.known or head.given is None:
                raise
            output = None  # such as a bias of the vocabulary's length; an error of another kind comes again below
        if head.given is None and output is not None:  # the model went another way to its logits
            return output, None
        head.known = head.is_as_given(output)
        head.given, head.mark = None, 0
        if head.known and type(head.weight) is nn.Parameter:  # not one shard of many
            assert output is not None
            return output, head
        head.refused = True  # asked once
    return model(**inputs).logits, None


def _gated_mlp(self: Any, x: Tensor) -> Tensor:
    y: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return y


def _rms_norm(self: Any, x: torch.Tensor) -> torch.Tensor:
    kept = x.dtype
    x = x.to(torch.float32)
    squares = x.pow(2).mean(-1, keepdim=True)
    x = x * torch.rsqrt(squares + self.variance_epsilon)
    return self.weight * x.to(kept)  # type: ignore[no-any-return]


def _says(code: CodeType) -> tuple[Any, ...]:
    """Return what a function does, without the names of its variables."""
    return code.co_code, code.co_names, code.co_consts[1:], code.co_argcount


def make_lean(model: nn.Module) -> int:
    """Let a model's gated MLPs, RMS norms and output layer keep less for the backward pass; values stay what they are.

    Only modules whose own `forward` says exactly what is written above are replaced, told by their code; those with
    hooks, and MLPs with another activation than SiLU, are left alone. `make_plain` undoes it.

    Returns:
        How many modules work in this way now.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> shape = dict(hidden_size=8, intermediate_size=8, num_attention_heads=2, vocab_size=8)
        >>> make_lean(LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **shape)))
        8
    """
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    made: dict[nn.Module, nn.Module] = {}
    for path, module in list(model.named_modules(remove_duplicate=False)):
        kind = _kind(module, head)
        if path and kind is not None:
            if module not in made:
                made[module] = kind(module)
            _put(model, path, made[module])
    border.allow(model)
    return sum(isinstance(module, Lean) for module in model.modules())


def make_plain(model: nn.Module) -> None:
    """Bring back the model's own modules; the inverse of `make_lean`."""
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if path and isinstance(module, Lean):
            own = ("plain", "opened_by", "given", "mark", "refused", "known")
            module.plain.__dict__.update({key: value for key, value in module.__dict__.items() if key not in own})
            _put(model, path, module.plain)
    border.undo(model)


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _hooked(module: nn.Module) -> bool:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return "forward" in module.__dict__ or any(getattr(module, hook) for hook in hooks)


def _is_silu(act: Any) -> bool:
    # by name: transformers has a class of its own for it
    return type(act).__name__ in ("SiLU", "SiLUActivation") and not _hooked(act)


def _kind(module: nn.Module, head: nn.Module | None) -> type[Lean] | None:
    code = getattr(type(module).forward, "__code__", None)
    if type(module) is nn.Linear and module is head and not _hooked(module):
        return LeanHead
    if code is None or _hooked(module):
        return None
    if _says(code) == _says(_rms_norm.__code__):
        return LeanNorm
    silu = _is_silu(getattr(module, "act_fn", None))
    return LeanMLP if silu and _says(code) == _says(_gated_mlp.__code__) else None
