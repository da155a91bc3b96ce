"""Models that bitsandbytes has quantised already: its layers become ours, number for number.

Its own layer must not be trained through: on CPUs with AVX512-BF16 an evaluation repacks the weight in place, and
gradients of later steps are silently wrong.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lit_peft.quantised.linear import BLOCK, GROUP, NF4Linear, packed_parts

WAY_OUT = "Load the unquantised model with quantize='nf4'."


@torch.no_grad()
def own_layers(model: nn.Module) -> list[str]:
    """Replace every 4-bit layer of bitsandbytes in a model by an `NF4Linear` of the same levels and scales.

    Returns:
        Their paths.

    Raises:
        ValueError: for FP4, other block sizes, or a weight that an evaluation has repacked; nothing is changed then.

    Example:
        >>> own_layers(nn.Sequential(nn.Linear(2, 2)))
        []
    """
    found = {path: module for path, module in model.named_modules() if _is_foreign(module)}
    for path, layer in found.items():
        if reason := _unreadable(layer):
            raise ValueError(f"{path} is a 4-bit layer of bitsandbytes {reason}. {WAY_OUT}")
    for path, layer in found.items():
        model.set_submodule(path, _own(layer))
    if found:
        _forget(model)
    return list(found)


def _is_foreign(module: nn.Module) -> bool:
    # by name: a model without such layers needs no bitsandbytes
    return any(c.__name__ == "Linear4bit" and c.__module__.startswith("bitsandbytes") for c in type(module).__mro__)


def _unreadable(layer: Any) -> str:
    """Return why the numbers of a layer cannot be taken over, empty if they can."""
    state = layer.weight.quant_state
    if state is None:
        return "that is not quantised yet" if layer.weight.is_meta else ""
    if state.quant_type != "nf4" or state.blocksize != BLOCK or (state.nested and state.state2.blocksize != GROUP):
        return f"of {state.quant_type} in blocks of {state.blocksize}, and nf4 in blocks of {BLOCK} is known here"
    if getattr(state, "packing_format_for_cpu", False):
        return "that an evaluation on this CPU has repacked"
    return ""


def _own(layer: Any) -> NF4Linear:
    weight, state = layer.weight, layer.weight.quant_state
    transposed = getattr(layer, "source_cls", None) is Conv1D
    if state is None:  # made, and not moved to its device yet
        double = weight.compress_statistics
        made = NF4Linear(weight.data, layer.bias, double_quant=double, transposed=transposed)
        return made.train(layer.training)
    levels, small, scales = weight.data.contiguous().view(torch.uint8).flatten(), None, state.absmax
    if state.nested:
        small, scales = state.absmax, torch.cat([state.state2.absmax, state.offset.view(1)])
    packed = packed_parts(state.shape, levels, small, scales.float())
    return NF4Linear.of(
        packed, state.shape, state.dtype, layer.bias, double_quant=state.nested, transposed=transposed
    ).train(layer.training)


def _forget(model: nn.Module) -> None:
    """Take back what transformers noted: the layers say themselves what they are, and files are those of the base."""
    for module in model.modules():
        for key in ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_quantized"):
            module.__dict__.pop(key, None)
        if kept := module.__dict__.get("_weight_conversions"):  # those that unpack bitsandbytes' files have no way back
            kept[:] = [c for c in kept if not any("Bnb" in type(o).__name__ for o in getattr(c, "operations", ()))]
        config: Any = getattr(module, "config", None)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
