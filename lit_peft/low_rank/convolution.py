"""LoRA around a convolution over one, two or three dimensions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_peft.adapter import innermost
from lit_peft.low_rank.linear import LoRALinear

if TYPE_CHECKING:
    from lit_peft.methods.lora import LoRAConfig

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class LoRAConv(LoRALinear):
    """Adds s B * (A * dropout(x)) to a convolution's output: A with the base's kernel and r channels, B pointwise.

    A slides as the base does: same stride, padding, padding mode, dilation and groups. Each of g groups has r / g
    channels of its own, so that the change is a kernel of the base's shape and folds into it exactly. A is
    (r, in / g, kernel...), B (out, r / g, 1...).

    Saved in HF PEFT's layout. PEFT itself forgets the dilation and the padding mode, and its A reads all groups; that
    of g groups is therefore stored with zeros for the other groups.

    Example:
        >>> import torch
        >>> from lit_peft import LoRAConfig
        >>> layer = LoRAConv(torch.nn.Conv2d(4, 6, 3, dilation=2), LoRAConfig(r=2))
        >>> layer(torch.ones(1, 4, 9, 9)).shape
        torch.Size([1, 6, 5, 5])
    """

    @property
    def convolution(self) -> Any:
        """The convolution below all adapters."""
        return innermost(self.base)

    def pair_shapes(self, config: LoRAConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return (r, in / groups, kernel...) and (out, r / groups, 1...)."""
        conv = self.convolution
        check_groups(config, conv)
        ones = (1,) * len(conv.kernel_size)
        wide = conv.in_channels // conv.groups
        return (config.r, wide, *conv.kernel_size), (conv.out_channels, config.r // conv.groups, *ones)

    def start(self, a: Tensor, b: Tensor, config: LoRAConfig) -> None:
        """Fill A: normal where `gaussian` is asked, else Kaiming-uniform, as what needs a matrix has none here."""
        if config.init_lora_weights == "gaussian":
            nn.init.normal_(a, std=1 / config.r)
        else:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))

    def change(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """Return y + s B * (A * dropout(x)): (batch, in, ...), (batch, out, ...) -> (batch, out, ...)."""
        config: LoRAConfig = self.configs[name]
        conv = self.convolution
        a, b = self.pair(name)
        h: Tensor = F.dropout(x, config.dropout, self.training) if config.dropout else x
        # the base's own way to pad and slide, with another kernel
        h = conv._conv_forward(h, a.to(h.dtype), None).to(y.dtype)
        pointwise = (F.conv1d, F.conv2d, F.conv3d)[len(conv.kernel_size) - 1]
        return y + config.scale * pointwise(h, b.to(y.dtype), groups=conv.groups)

    def delta(self, name: str) -> Tensor:
        """Return the change of the kernel, (out, in / groups, kernel...), in float32."""
        groups = self.convolution.groups
        a, b = self.pair(name)
        one = b.float().view(groups, b.shape[0] // groups, -1)
        other = a.float().view(groups, a.shape[0] // groups, -1)
        delta: Tensor = self.configs[name].scale * torch.bmm(one, other)
        return delta.view(self.convolution.weight.shape)

    def tensors(self, name: str = "default") -> dict[str, Tensor]:
        """Return A (r, in, kernel...) and B under HF PEFT's names."""
        groups = self.convolution.groups
        a = self.lora_a[name].detach()
        if groups > 1:
            whole = a if not hasattr(a, "full_tensor") else a.full_tensor()
            a = torch.cat([_placed(part, i, groups) for i, part in enumerate(whole.chunk(groups))])
        return {"lora_A.weight": a, "lora_B.weight": self.lora_b[name].detach()}

    def check_tensors(self, tensors: Mapping[str, Tensor], name: str = "default") -> None:
        """See that each group reads its own channels only.

        Raises:
            ValueError: if not, as in what HF PEFT trains on a convolution with groups.
        """
        groups = self.convolution.groups
        for index, part in enumerate(tensors["lora_A.weight"].chunk(groups)):
            if not torch.equal(_placed(_own(part, index, groups), index, groups), part):
                raise ValueError(
                    f"The adapter's A reads all channels of a convolution with {groups} groups, which does not fit "
                    "into the base's kernel. Leave that layer out of target_modules."
                )

    def load_tensors(self, tensors: Mapping[str, Tensor], name: str = "default") -> None:
        """Copy A and B; the inverse of `tensors`."""
        groups = self.convolution.groups
        parts = enumerate(tensors["lora_A.weight"].chunk(groups))
        self.lora_a[name].copy_(torch.cat([_own(part, index, groups) for index, part in parts]))
        self.lora_b[name].copy_(tensors["lora_B.weight"])


def check_groups(config: LoRAConfig, conv: Any) -> None:
    """See that the groups of a convolution can share the rank.

    Raises:
        ValueError: if not.
    """
    if config.r % conv.groups:
        raise ValueError(
            f"lora.r is {config.r}, which {conv.groups} groups of a {type(conv).__name__} cannot share. Choose a "
            f"multiple of {conv.groups}, or leave the layer out."
        )


def _own(part: Tensor, index: int, groups: int) -> Tensor:
    """Return the channels that group `index` reads, out of all."""
    return part.chunk(groups, 1)[index]


def _placed(part: Tensor, index: int, groups: int) -> Tensor:
    """Return one group's channels among zeros for those of the others."""
    wide = part.shape[1]
    whole = part.new_zeros(part.shape[0], wide * groups, *part.shape[2:])
    whole[:, index * wide : (index + 1) * wide] = part
    return whole
