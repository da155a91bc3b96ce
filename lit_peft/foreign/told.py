"""What a reader of another library's folder hands on, and where in a model its tensors belong.

The other libraries name a tensor by a module that exists in their models only. A reader says instead which role it has
in which layer (`layer_sum.3.bottleneck_down`), and the model at hand says which module that is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from lit_peft.sites import stacks
from lit_peft.sublayers import after, attention_cores, beside, hosts, is_causal, on_sum
from lit_peft.targets import bare
from lit_peft.tensor_files import load_tensors


@dataclass(frozen=True)
class Part:
    """One method's part of a folder.

    Attributes:
        config: as `adapter_config.json` would have it, `peft_type` included.
        tensors: by `ROLE.NUMBER.NAME`, or by the path of a weight that was trained in place.
        encoder_only: why a decoder would compute something else; empty where it would not.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    encoder_only: str = ""


@dataclass(frozen=True)
class Told:
    """A folder of another library.

    Attributes:
        file: what to name in errors.
        parts: one for each method, innermost first.
        notes: what `lit_peft.json` would say.
    """

    file: Path
    parts: list[Part]
    notes: dict[str, Any] = field(default_factory=dict)

    def configs(self) -> list[dict[str, Any]]:
        """Return the configuration of each part."""
        return [dict(part.config) for part in self.parts]


def _by_layer(found: Mapping[str, int]) -> dict[str, str]:
    return {str(number): path for path, number in found.items()}


def _in_order(paths: list[str]) -> dict[str, str]:
    return {str(number): path for number, path in enumerate(paths)}


# what a reader may say of a tensor -> number -> the module's path in this model
ROLES: dict[str, Callable[[nn.Module], dict[str, str]]] = {
    "attention_output": lambda model: _by_layer(after(model)[0]),
    "feed_forward_output": lambda model: _by_layer(after(model)[1]),
    "layer_sum": lambda model: _by_layer(on_sum(model)),
    "feed_forward_side": lambda model: _by_layer(beside(model)),
    "layer": lambda model: _in_order(stacks(model)[0]),
    "attention": lambda model: _in_order(attention_cores(model)),
    "stack": lambda model: _in_order(hosts(model)),
}


def placed(told: Told, part: Part, model: nn.Module) -> dict[str, Tensor]:
    """Return a part's tensors under the names that our own folder of this model would have.

    Args:
        told: the folder.
        part: one of its parts.
        model: the model, with the adapters in place.

    Raises:
        ValueError: if the model has two stacks of layers, or computes something else than the folder's.
    """
    if len(stacks(model)) > 1:
        raise ValueError(
            f"{told.file} is read for models with one stack of layers, and {type(model).__name__} is an "
            "encoder-decoder. Train the adapter anew, or run it in the library that wrote it."
        )
    if part.encoder_only and any(is_causal(model, path) for path in hosts(model)):
        raise ValueError(f"{told.file} cannot be used on {type(model).__name__}: {part.encoder_only}")
    found: dict[str, Tensor] = {}
    where: dict[str, dict[str, str]] = {}
    linear = [bare(path) for path, module in model.named_modules()]
    for key, tensor in part.tensors.items():
        role, _, rest = key.partition(".")
        number, _, leaf = rest.partition(".")
        if role in ROLES:
            paths = where.get(role)
            if paths is None:
                paths = where[role] = {n: bare(path) for n, path in ROLES[role](model).items()}
            found[f"{paths[number]}.{leaf}" if number in paths else key] = tensor
        elif role == "linear":  # written with / for the dots of a path that may lack the model's first names
            ending = number.replace("/", ".")
            path = next((path for path in linear if path == ending or path.endswith(f".{ending}")), key)
            found[f"{path}.{leaf}"] = tensor
        else:
            found[key] = tensor
    return found


def unpickled(path: Path) -> dict[str, Tensor]:
    """Read a file of tensors: safetensors, or a pickle of nothing but tensors.

    Raises:
        FileNotFoundError: if it is missing.
        ValueError: if it is damaged, or holds other objects, whose loading could run code.
    """
    if path.suffix == ".safetensors":
        return load_tensors(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist. Copy the whole folder.")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise ValueError(
            f"{path} is damaged, or holds objects that are no tensors and could run code. Save it as safetensors."
        ) from error
    except Exception as error:  # on arbitrary bytes the unpickler fails in any way
        raise ValueError(f"{path} is damaged or half-written. Copy or save it again.") from error
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise ValueError(f"{path} does not hold tensors by name. Save the adapter again.")
    return dict(loaded)
