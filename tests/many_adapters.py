"""One tiny base under four adapters of several kinds, for the tests of names and of routing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lit_peft import (
    IA3,
    BitFit,
    BitFitConfig,
    IA3Config,
    LoRA,
    LoRAConfig,
    adapters,
)
from lit_peft.adapter import adapter_names
from tests.tiny_adapted import Tiny, placed


class Many(LoRA, IA3, BitFit, Tiny): ...


class LoRATiny(LoRA, Tiny): ...


def four(kind: str, **config: Any) -> Any:
    """One base under LoRA of two ranks and other targets, BitFit, (IA)3, and a stack of all three."""
    torch.manual_seed(0)
    module = placed(Many, kind, lora=LoRAConfig(r=3), **config)
    module.add_adapter("policy", lora=LoRAConfig(r=4, target_modules="attention"))
    module.add_adapter("value", bitfit=BitFitConfig())
    module.add_adapter("reward", ia3=IA3Config(), lora=LoRAConfig(r=2))
    for index, name in enumerate(adapter_names(module.model)):
        move(module.model, name, index)
    return module


def move(model: nn.Module, name: str, seed: int, size: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in own(model, name).items():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=size)
            assert key


def own(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    return {key: p for key, p in model.named_parameters() if key.endswith(f".{name}")}


def inputs(kind: str, rows: int = 6) -> dict[str, Tensor]:
    """Rows of several lengths, padded on the left."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(8, 120, (rows, 9), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : row % 4] = 0
    found = {"input_ids": ids * mask, "attention_mask": mask}
    return found | ({"decoder_input_ids": ids[:, :5]} if kind == "t5" else {})


def chosen(model: nn.Module, entry: Any) -> Any:
    return adapters(model, *(() if entry is None else (entry,) if isinstance(entry, str) else entry))


@torch.no_grad()
def out(module: Any, *names: str) -> Tensor:
    with adapters(module, *names):
        return module.model(**inputs("llama")).logits  # type: ignore[no-any-return]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found
