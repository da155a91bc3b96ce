"""This process's part of a sharded tensor, and back; a tensor that is not sharded is its own part.

FSDP2 deals a tensor's first dimension out in equal chunks, in the order of the processes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


def own_part(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor, which is all of it unless it is sharded."""
    tensor = tensor.detach()
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local


def begin_of(parameter: Any, dim: int) -> int:
    """Return where this process's part begins along a dimension."""
    if dim or not hasattr(parameter, "device_mesh"):
        return 0
    mesh = parameter.device_mesh
    chunk = math.ceil(parameter.shape[0] / mesh.size())
    return int(min(parameter.shape[0], mesh.get_local_rank() * chunk))


def part_of(whole: Tensor, parameter: nn.Parameter) -> Tensor:
    """Return this process's part of a whole tensor that is to be laid out like a parameter."""
    own = own_part(parameter)
    return whole.narrow(0, begin_of(parameter, 0), len(own)).to(own.device, own.dtype, copy=True)


def whole_of(own: Tensor, parameter: nn.Parameter) -> Tensor:
    """Return the whole of a tensor that is laid out like a parameter, on the CPU; all processes come here."""
    if not hasattr(parameter, "full_tensor"):
        return own.to("cpu", copy=True)
    whole: Any = torch.zeros_like(parameter, requires_grad=False)
    whole.to_local().copy_(own)
    gathered: Tensor = whole.full_tensor()
    return gathered.cpu()
