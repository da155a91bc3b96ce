"""A model's own modules, keeping less for the backward pass: gated MLPs, RMS norms, the output layer; whole layers.

    MLP:   e = x We^T,  g = x Wg^T,  h = act(e) g,  y = h Wd^T          keeps e and g, not act(e), and h is made again
    q,k,v: three layers of one input, see `packed`                      one product where that was measured to pay
    norm:  w x / sqrt(mean(x^2) + eps), see `norm`                      keeps x and a number a row, and is made again
    layer: norms, products and sums around the attention, see `layer`   two functions, with nothing between them
    head:  the loss is computed from the hidden states, see `cross_entropy`

`make_lean` puts these in the place of a model's own modules, after all methods have placed. The children, their names
and so all checkpoints stay as they are, and `make_plain` brings the model's own modules back.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from lit_peft.ops import border
from lit_peft.ops.lean_blocks import Lean, LeanBlock, LeanMLP, LeanNorm, stand_in
from lit_peft.ops.lean_layer import LeanLayer, become_lean, become_plain
from lit_peft.ops.parts import allow
from lit_peft.ops.recipes import eager, watched

__all__ = ["Lean", "LeanHead", "LeanMLP", "LeanNorm", "head_of", "make_lean", "make_plain", "scored"]


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
    if watched(head) or model._forward_hooks:  # which are to see logits
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


def make_lean(model: nn.Module) -> int:
    """Let a model's layers, and what they are made of, and its output layer be computed leanly; values stay the same.

    Only modules whose own `forward` says what is written above are replaced, told by their code; those with hooks, and
    MLPs with another activation than SiLU, are left alone. `make_plain` undoes it.

    Returns:
        How many modules work in this way now.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> shape = dict(hidden_size=8, intermediate_size=8, num_attention_heads=2, vocab_size=8)
        >>> make_lean(LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **shape)))
        12
    """
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    made: dict[nn.Module, nn.Module] = {}
    for path, module in list(model.named_modules(remove_duplicate=False)):
        kind = _kind(module, head)
        if path and kind is not None:
            if module not in made:
                made[module] = stand = kind(module)
                if isinstance(stand, LeanBlock):
                    allow([getattr(stand, name) for name in stand.reads])
            _put(model, path, made[module])
    for module in model.modules():
        become_lean(module)
    border.allow(model)
    return sum(isinstance(module, Lean | LeanLayer) for module in model.modules())


def make_plain(model: nn.Module) -> None:
    """Bring back the model's own modules; the inverse of `make_lean`."""
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if path and isinstance(module, Lean):
            own = ("plain", "opened_by", "given", "mark", "refused", "known", "reader")
            module.plain.__dict__.update({key: value for key, value in module.__dict__.items() if key not in own})
            _put(model, path, module.plain)
        become_plain(module)
    border.undo(model)


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _kind(module: nn.Module, head: nn.Module | None) -> type[Lean] | None:
    if type(module) is nn.Linear and module is head and not watched(module):
        return LeanHead
    return stand_in(module)
