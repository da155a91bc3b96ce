"""A linear layer whose frozen weight is stored as NF4 (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314).

Section 3: a weight is cut into blocks of 64, each is divided by its largest absolute value c, and every number becomes
the nearest of 16 levels, the quantiles of a normal distribution. With double quantisation the c are stored in 8 bits:
less their mean, in groups of 256 with one float32 each. That is 4 + 8/64 + 32/(64 * 256) = 4.127 bits a weight.

The numbers are encoded and decoded by bitsandbytes. Where they are kept is ours: one string of bytes for each weight,

    [ two levels a byte | 8-bit c | float32 of each group, and the mean ]        each part begins at a multiple of 16

as one frozen parameter. So a cast (`.to(bfloat16)`) cannot touch it; copies, pickles, state dicts, DDP and FSDP2 treat
it like any parameter; and nothing can repack it behind our back, as bitsandbytes' own layer does in an evaluation on
some CPUs, after which gradients were silently wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lit_peft.ops.nf4 import BLOCK as BLOCK
from lit_peft.ops.nf4 import GROUP as GROUP
from lit_peft.ops.nf4 import KNOWN, decode, parts
from lit_peft.ops.nf4 import codec as codec
from lit_peft.ops.nf4_linear import Sizes, few_tokens, nf4_linear
from lit_peft.ops.recipes import autocasting


def encode(weight: Tensor, double_quant: bool = True) -> Tensor:
    """Return a weight (out, in) as NF4: one string of bytes (n,), uint8, on the same device.

    Raises:
        ValueError: if the weight has a number that is not finite.
    """
    if not bool(weight.isfinite().all()):
        raise ValueError("A weight with NaN or infinite numbers cannot be quantised. Is the model's file damaged?")
    levels, state = codec().quantize_4bit(
        (weight if weight.dtype in KNOWN else weight.float()).contiguous(),
        blocksize=BLOCK,
        quant_type="nf4",
        compress_statistics=double_quant,
    )
    if not double_quant:
        return packed_parts(weight.shape, levels.flatten(), None, state.absmax.float())
    scales = torch.cat([state.state2.absmax, state.offset.view(1)]).float()
    return packed_parts(weight.shape, levels.flatten(), state.absmax, scales)


def packed_parts(shape: Sequence[int], levels: Tensor, small: Tensor | None, scales: Tensor) -> Tensor:
    """Return the bytes of a weight (out, in), (n,), from its parts.

    Args:
        shape: (out, in).
        levels: two a byte, uint8.
        small: the 8-bit c of the blocks, uint8; None where they are not quantised.
        scales: float32: of the groups of c, and their mean; or the c themselves.
    """
    places = parts(shape[0], shape[1], small is not None)
    packed = torch.zeros(places[2].stop, dtype=torch.uint8, device=levels.device)
    packed[places[0]] = levels
    if small is not None:
        packed[places[1]] = small
    packed[places[2]] = scales.view(torch.uint8)
    return packed


class NF4Linear(nn.Linear):
    """A linear layer with its frozen weight in 4.127 bits a number; computes in the dtype of its input.

    Attributes:
        packed: the weight's bytes, one frozen uint8 parameter.
        dtype: that of the weight which was quantised, and of what `dequantised` returns.

    Args:
        weight: W (out, in).
        bias: b (out,), kept as it is.
        double_quant: store the blocks' scales in 8 bits too.
        transposed: W came from a `Conv1D`, which stores it as (in, out).

    Example:
        >>> import torch
        >>> layer = NF4Linear(torch.randn(48, 64))
        >>> layer(torch.ones(2, 64)).shape, layer.dequantised().shape
        (torch.Size([2, 48]), torch.Size([48, 64]))
    """

    stores: ClassVar[str] = "nf4"  # so that `ops.nf4_lora` knows it; a subclass may do something else
    unmergeable: ClassVar[str] = (
        "A 4-bit base cannot be merged into in place: rounding it again would change it. Use `lit-peft merge`, "
        "write_merged or AdapterMerge, which fold into a dequantised copy, or load the base with quantize='none'."
    )

    def __init__(
        self,
        weight: Tensor,
        bias: nn.Parameter | None = None,
        *,
        double_quant: bool = True,
        transposed: bool = False,
    ) -> None:
        self._fill(encode(weight.detach(), double_quant), weight.shape, weight.dtype, bias, double_quant, transposed)

    @classmethod
    def of(
        cls,
        packed: Tensor,
        shape: Sequence[int],
        dtype: torch.dtype,
        bias: nn.Parameter | None = None,
        *,
        double_quant: bool = True,
        transposed: bool = False,
    ) -> NF4Linear:
        """Return the layer of a weight (out, in) that is encoded already; see `encode`."""
        layer = cls.__new__(cls)
        layer._fill(packed, shape, dtype, bias, double_quant, transposed)
        return layer

    def _fill(
        self,
        packed: Tensor,
        shape: Sequence[int],
        dtype: torch.dtype,
        bias: nn.Parameter | None,
        double_quant: bool,
        transposed: bool,
    ) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = shape
        self.double_quant = double_quant
        self.transposed = transposed
        self.dtype = dtype
        self.packed = nn.Parameter(packed, requires_grad=False)
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """W (out, in), decoded anew: for code that looks at it, such as T5's, which casts to its dtype."""
        return self.dequantised()

    def dequantised(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return W (out, in), in the dtype it had or another; gathered where it is sharded."""
        packed: Any = self.packed.detach()
        if hasattr(packed, "full_tensor"):
            packed = packed.full_tensor()
        return decode(packed, *self._sizes(), dtype or self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        if autocasting(x):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nf4_linear(x, self.packed, bias, self._sizes())

    def _sizes(self) -> Sizes:
        return self.out_features, self.in_features, self.double_quant

    def _fused(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Multiply while decoding, which for few tokens (generating) is faster; without gradients."""
        return few_tokens(x, self.packed, bias, self._sizes())

    def dense(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Return a plain layer of the same outputs: an `nn.Linear`, or the `Conv1D` that this was."""
        weight = self.dequantised(dtype)
        with torch.device("meta"):
            layer: nn.Module = (
                Conv1D(self.out_features, self.in_features)
                if self.transposed
                else nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
            )
        layer.weight = nn.Parameter(weight.t().contiguous() if self.transposed else weight, requires_grad=False)
        layer.register_parameter("bias", self.bias)
        return layer.train(self.training)

    def _apply(self, fn: Any, recurse: bool = True) -> NF4Linear:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # bytes have no dtype to cast, so what `.to(dtype)` asks for is noted
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.packed.device)).dtype
        return self

    def extra_repr(self) -> str:
        """Return the sizes, for `print(model)`."""
        return f"{super().extra_repr()}, nf4{' twice' if self.double_quant else ''}"
