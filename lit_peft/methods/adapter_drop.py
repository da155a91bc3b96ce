"""AdapterDrop: leave out the adapters of the first layers (Rücklé et al. 2021, https://arxiv.org/abs/2010.11918).

What is left out does not run. The backward pass ends at the first adapter that acts: below it nothing needs a gradient,
nothing is saved for one, and under gradient checkpointing nothing is computed again.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lit_peft.adapter import Adapter, named_adapters
from lit_peft.selection import telling, told

DROP = "adapter_drop"
COVERED = "adapter_drop_covered"


def dropped(layers: int) -> AbstractContextManager[None]:
    """Leave out the bottleneck adapters of the first layers, in the calls made inside the `with` block (AdapterDrop).

    Example:
        >>> from lit_peft.methods.bottleneck import dropped
        >>> # with dropped(5):
        >>> #     faster = model(**batch).logits
    """
    return telling(**{DROP: layers})


def dropped_in_step(layers: int) -> AbstractContextManager[None]:
    """As `dropped`, in a training step whose loss is then given to `reaching`."""
    return telling(**{DROP: layers, COVERED: True})


def is_dropped(config: Any) -> bool:
    """Whether this call leaves out the adapters of the layer that a configuration is of."""
    return bool(config.layer < (told(DROP) or 0))


def must_reach(adapter: Adapter) -> bool:
    """Whether an adapter that is left out needs a gradient all the same: DDP waits for one from everything."""
    return adapter.training and dist.is_available() and dist.is_initialized() and not told(COVERED)


def left_out(model: nn.Module, layers: int) -> list[nn.Parameter]:
    """Return what is trained of the bottleneck adapters in the first layers."""
    adapters = [adapter for _, adapter in named_adapters(model)]
    return [
        parameter
        for adapter in adapters
        for name, config in adapter.configs.items()
        if getattr(config, "layer", layers) < layers
        for key, parameter in adapter.trained_parameters()
        if key.endswith(f".{name}")
    ]


def reaching(out: Any, model: nn.Module, layers: int) -> Any:
    """Return a training step's loss, from which DDP's gradients reach the adapters that were left out: zeros.

    The sum stands beside the model, so the backward pass still ends at the first adapter that acts. One process needs
    no such gradients, and FSDP2 does not wait for them.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return out
    zeros = [parameter.sum() * 0 for parameter in left_out(model, layers) if not hasattr(parameter, "full_tensor")]
    if not zeros:
        return out
    nothing: Tensor = torch.stack(zeros).sum()
    return {**out, "loss": out["loss"] + nothing} if isinstance(out, dict) else out + nothing
