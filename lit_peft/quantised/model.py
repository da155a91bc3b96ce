"""Whole models with NF4 weights: which layers, quantising one in memory, reading one straight into four bits, and back.

`NF4` goes through the loading of transformers, so that every format, renaming and sharding it knows is read; each
weight is quantised as it comes from the file, on a model that is still without memory (meta device).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lit_peft.quantised.linear import NF4Linear, codec
from lit_peft.sites import linears

METHOD = "lit_peft_nf4"


def quantisable(model: nn.Module) -> dict[str, nn.Module]:
    """Return path -> layer of what is quantised: all linear layers but heads, output embedding and tied weights."""
    tied: Any = getattr(model, "all_tied_weights_keys", None) or {}
    names = {*tied, *tied.values()}
    return {path: layer for path, layer in linears(model).items() if f"{path}.weight" not in names}


def quantise(model: nn.Module, double_quant: bool = True) -> list[str]:
    """Replace the linear layers of a model in memory by `NF4Linear`, one after the other.

    Returns:
        Their paths.

    Example:
        >>> from torch import nn
        >>> quantise(nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
        ['0']
    """
    paths = list(quantisable(model))
    for path in paths:
        _swap(model, path, model.get_submodule(path).get_parameter("weight"), double_quant)
    return paths


def dequantise(model: nn.Module, dtype: torch.dtype | None = None) -> list[nn.Module]:
    """Replace every `NF4Linear` of a model by the plain layer of the same outputs, which takes 8 times the memory.

    Args:
        model: the model, adapted or not; changed in place.
        dtype: of the weights; None: as before they were quantised.

    Returns:
        The new layers.
    """
    found: list[nn.Module] = []
    for path, module in list(model.named_modules()):
        if isinstance(module, NF4Linear):
            found.append(module.dense(dtype))
            model.set_submodule(path, found[-1])
    return found


def requantisation_error(weight: Tensor, double_quant: bool = True) -> float:
    """Return ||Q(W) - W|| / ||W|| (Frobenius) for a weight (out, in) that would be stored as NF4."""
    again = NF4Linear(weight, double_quant=double_quant).dequantised(torch.float32)
    return float((again - weight.float()).norm() / weight.float().norm().clamp(min=1e-30))


def _swap(model: nn.Module, path: str, weight: Tensor, double_quant: bool) -> None:
    layer: Any = model.get_submodule(path)
    transposed = isinstance(layer, Conv1D)
    quantised = NF4Linear(
        weight.t() if transposed else weight, layer.bias, double_quant=double_quant, transposed=transposed
    )
    model.set_submodule(path, quantised.train(layer.training))


@register_quantization_config(METHOD)
class NF4(QuantizationConfigMixin):  # type: ignore[misc]
    """Tells `from_pretrained` to read the weights of linear layers into NF4.

    Args:
        double_quant: store the blocks' scales in 8 bits too.
    """

    def __init__(self, double_quant: bool = True) -> None:
        codec()  # missing: said before anything is read
        self.quant_method = METHOD
        self.double_quant = double_quant


class _Quantise(ConversionOps):  # type: ignore[misc]
    """Puts an `NF4Linear` in the place of one linear layer, once its weight was read."""

    def __init__(self, double_quant: bool) -> None:
        self.double_quant = double_quant

    def convert(
        self, input_dict: dict[str, Any], *, model: nn.Module, missing_keys: set[str] | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Take `{name: weight}` and return nothing that would still have to be loaded."""
        for name, value in input_dict.items():
            path = name.removesuffix(".weight")
            _swap(model, path, value[0] if isinstance(value, list) else value, self.double_quant)
            # transformers would draw new weights for a module that it did not fill itself
            model.get_submodule(path)._is_hf_initialized = True  # type: ignore[assignment]
            if missing_keys is not None:
                missing_keys.discard(name)
        return {}


@register_quantizer(METHOD)
class _Reader(HfQuantizer):  # type: ignore[misc]
    """Hooks of transformers' loading."""

    quantized_element_size = 4.127 / 8
    is_trainable = True

    def is_serializable(self) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        self.names = {f"{path}.weight" for path in quantisable(model)}

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        return param_name in self.names

    def get_quantize_ops(self) -> _Quantise:
        return _Quantise(self.quantization_config.double_quant)

    def postprocess_model(self, model: Any, **kwargs: Any) -> None:
        # NF4Linear says itself what it is; the configuration must stay that of the base, for merging and for saving
        self.remove_quantization_config(model)
        for module in model.modules():
            bias = getattr(module, "bias", None) if isinstance(module, NF4Linear) else None
            if bias is not None and not getattr(bias, "_is_hf_initialized", False):  # the file had none
                nn.init.zeros_(bias)
