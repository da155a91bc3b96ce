"""What LoRA keeps for the backward pass on the true shapes of 1B and 8B models, counted without memory for them."""

import weakref
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from lit_peft import LoRAConfig, place
from lit_peft.low_rank.linear import LoRALinear
from lit_peft.ops import lora_linear, low_rank
from lit_peft.ops.lean import make_lean

TOKENS, R = 4096, 16
SHAPES = {"1B": (2048, 8192, 32, 8), "8B": (4096, 14336, 32, 8)}  # width, inner width, heads, shared heads


class Live(TorchDispatchMode):
    """Counts the bytes that are alive, of all storages made since."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.bytes = 0
        self._alive = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (key := tensor.untyped_storage()._cdata) not in self._alive:
                storage = tensor.untyped_storage()
                self._alive.add(key)
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self._gone, key, storage.nbytes())
        return out

    def _gone(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.bytes -= size


def kept(arm: str, size: str, layers: int, dropout: float) -> int:
    """Returns the bytes that live after the forward pass through some decoder layers in bfloat16."""
    width, inner, heads, shared = SHAPES[size]
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=shared,
        num_hidden_layers=layers,
        vocab_size=32,
    )
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config).to(torch.bfloat16).requires_grad_(False)
    if arm == "peft":
        settings = {"r": R, "lora_dropout": dropout, "target_modules": "all-linear"}
        model = peft.get_peft_model(model, peft.LoraConfig(**settings), autocast_adapter_dtype=False)  # type: ignore[arg-type]
        model = model.get_base_model()
    else:
        place(
            model,
            lambda path, _: path.endswith("_proj"),
            lambda base: LoRALinear(base, LoRAConfig(r=R, dropout=dropout)),
        )
        make_lean(model)
    model.train()
    with FakeTensorMode():
        for module in model.modules():
            for key, old in list(module._parameters.items()):
                if old is not None:
                    new = torch.empty(old.shape, dtype=old.dtype)
                    module._parameters[key] = nn.Parameter(new, requires_grad=old.requires_grad)
        x = torch.empty(1, TOKENS, width, dtype=torch.bfloat16)
        turns = tuple(torch.empty(1, TOKENS, width // heads, dtype=torch.bfloat16) for _ in range(2))
        with Live([x, *turns, *model.parameters()]) as live:
            h = x
            for layer in model.model.layers:  # one by one, with no mask: as the model calls them on whole rows
                h = layer(h, position_embeddings=turns)
                h = h[0] if isinstance(h, tuple) else h
            return live.bytes


def per_token_and_layer(arm: str, size: str, dropout: float = 0.0) -> float:
    """Returns bytes, in units of the width, that one more layer keeps for a token."""
    return (kept(arm, size, 3, dropout) - kept(arm, size, 2, dropout)) / TOKENS / SHAPES[size][0]


@pytest.fixture(autouse=True)
def seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_rank, "drawn", lambda p: 1)  # a number cannot be drawn where nothing is computed
    monkeypatch.setattr(lora_linear, "whole", lambda parameter: isinstance(parameter, nn.Parameter))  # fake ones too


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_eight_billion(dropout: float) -> None:
    """h, h' 2 each, q 2, k, v 1/2 each, attention 2, e and g 7 each: 23, and what is rank r; HF PEFT twice as much."""
    ours, theirs = per_token_and_layer("ours", "8B", dropout), per_token_and_layer("peft", "8B", dropout)
    assert ours <= 24
    assert ours <= 0.6 * theirs


@pytest.mark.parametrize(("dropout", "most"), [(0.0, 24), (0.1, 26)])
def test_one_billion(dropout: float, most: int) -> None:
    """As above with e and g 8 each, as this shape is wider inside, and h' computed again: 23, and what is rank r.

    With dropout, layers are called one by one and h' is kept: 25.
    """
    ours, theirs = per_token_and_layer("ours", "1B", dropout), per_token_and_layer("peft", "1B", dropout)
    assert ours <= most
    assert ours <= 0.6 * theirs
