"""Whole layers of models with all kernels on: the same loss and gradients, and how many operations they are."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lit_peft import LoRAConfig
from lit_peft.ops.lean import make_lean
from tests.kernels.where import DEVICE
from tests.ops.test_packed import IDS, adapted, results, same, tiny

# what only looks at memory in another way, or takes some without filling it
FREE = {
    "aten::_unsafe_view", "aten::alias", "aten::as_strided", "aten::detach", "aten::empty", "aten::empty_like",
    "aten::expand", "aten::new_empty", "aten::select", "aten::slice", "aten::split", "aten::split_with_sizes",
    "aten::t", "aten::transpose", "aten::unsqueeze", "aten::view",
}  # fmt: skip


class Launches(TorchDispatchMode):
    """Lists the operations that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name not in FREE:
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_models_give_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(tiny(kind, num_attention_heads=2, num_key_value_heads=1)).to(DEVICE)
    monkeypatch.setenv("LIT_PEFT_KERNELS", "0")
    exact = results(model)
    make_lean(model.float())
    for kernels in ("0", "1"):
        monkeypatch.setenv("LIT_PEFT_KERNELS", kernels)
        results(model)  # a norm knows its reader from the second time on
        same(results(model), exact, 4e-4)  # as near as plain operations: the updates here are as large as the weights


def counted(layer: nn.Module, x: Tensor, turns: tuple[Tensor, Tensor]) -> tuple[list[str], list[str]]:
    trained = [p for p in layer.parameters() if p.requires_grad]
    for _ in range(2):
        with Launches() as forward:
            y = layer(x, position_embeddings=turns)
        slope = torch.ones_like(y)
        with Launches() as backward:
            torch.autograd.grad(y, [x, *trained], slope)
    return forward.names, backward.names


def test_operations_of_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """LoRA on all seven linear layers of a Llama layer, which plain operations compute in 62 + 98."""
    model = adapted(tiny(), LoRAConfig(r=2)).float().to(DEVICE)
    make_lean(model)
    x = torch.randn(1, 4, 32, device=DEVICE, requires_grad=True)
    turns = model.model.rotary_emb(x, torch.arange(4, device=DEVICE)[None])
    monkeypatch.setenv("LIT_PEFT_KERNELS", "1")
    forward, backward = counted(model.model.layers[1], x, turns)
    assert len(forward) <= 12, forward
    assert len(backward) <= 16, backward
    monkeypatch.setenv("LIT_PEFT_KERNELS", "0")
    plain = counted(model.model.layers[1], x, turns)
    assert len(forward) <= 0.2 * len(plain[0])
    assert len(backward) <= 0.2 * len(plain[1])


def test_no_more_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a token than with plain operations; a slice that were kept would keep all that it is a slice of."""
    model = adapted(tiny()).float().to(DEVICE)
    make_lean(model)
    sizes = []
    for kernels in ("1", "default"):
        monkeypatch.setenv("LIT_PEFT_KERNELS", kernels)
        results(model)
        weights = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
        found: dict[int, int] = {}

        def note(tensor: Tensor, weights: set[int] = weights, found: dict[int, int] = found) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                found[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        sizes.append(sum(found.values()))
        del loss
    stacks = (
        2 * 4 * 32 * (3 + 2) * 2
    )  # the factors A of five layers of rank 2 below each other, for no number of tokens
    assert sizes[0] <= sizes[1] + stacks
