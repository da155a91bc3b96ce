"""A weight stored as NF4 (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314): where its bytes lie, decoding it.

    W = q(level) c,    c = value(8 bits) * scale of the group + mean,  or c as it is stored      (equation 6)

for blocks of 64 weights with one c each, and groups of 256 c with one scale each. The weight is one string of bytes,

    [ two levels a byte | 8-bit c | float32 of each group, and the mean ]        each part begins at a multiple of 16

Decoded by bitsandbytes, or by one launch of a kernel of ours, which gives the same bits.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lit_peft.ops.choice import takes_kernel

BLOCK, GROUP = 64, 256
ALIGNED = 16  # bytes: CUDA kernels read that much at once
KNOWN = (torch.float32, torch.bfloat16, torch.float16)  # dtypes that bitsandbytes and the kernel write


@cache
def codec() -> Any:
    """Return `bitsandbytes.functional`, imported when it is first needed.

    Raises:
        ValueError: if bitsandbytes is not installed.
    """
    log = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level, unloaded = log.level, "bitsandbytes" not in sys.modules and "kernels" not in sys.modules
    # On some CPUs the import would fetch a kernel from the hub, or complain that it cannot; nothing here calls it.
    log.setLevel(logging.ERROR)
    if unloaded:
        sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        import bitsandbytes.functional as functional
    except ModuleNotFoundError as error:
        raise ValueError("quantize='nf4' needs bitsandbytes. Run: pip install bitsandbytes") from error
    finally:
        log.setLevel(level)
        if unloaded:
            del sys.modules["kernels"]
    return functional


_VALUES: dict[torch.device, Tensor] = {}
_PAIRS: dict[torch.device, Tensor] = {}


def values(like: Tensor) -> Tensor:
    """Return the 256 numbers (float32) that the 8-bit c stand for, on a tensor's device."""
    if not _is_real(like):  # not kept: it would meet real tensors later
        return torch.empty(256, dtype=torch.float32, device=like.device)
    if like.device not in _VALUES:
        _VALUES[like.device] = codec().create_dynamic_map().to(like.device)
    return _VALUES[like.device]


def _pairs(device: torch.device) -> Tensor:
    """Return, for each of the 256 bytes of levels, the two float32 numbers that it stands for, as one int64."""
    if device not in _PAIRS:
        levels: Tensor = codec().get_4bit_type("nf4", device="cpu").float()
        # the first of two weights is the upper half of the byte, and the lower half of the int64
        both = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], dim=1)
        _PAIRS[device] = both.view(torch.int64).flatten().to(device)
    return _PAIRS[device]


def _is_real(tensor: Tensor) -> bool:
    """Return whether a tensor holds numbers; others only tell shapes."""
    return type(tensor) in (Tensor, nn.Parameter)


def parts(out: int, wide: int, double: bool) -> tuple[slice, slice, slice]:
    """Return where levels, 8-bit c and float32 numbers lie in the bytes of a weight (out, wide)."""
    blocks = -(-out * wide // BLOCK)
    sizes = (-(-out * wide // 2), blocks if double else 0, 4 * (-(-blocks // GROUP) + 1 if double else blocks))
    found, start = [], 0
    for size in sizes:
        found.append(slice(start, start + size))
        start += -(-size // ALIGNED) * ALIGNED
    return found[0], found[1], found[2]


def decode(
    packed: Tensor,
    out: int,
    wide: int,
    double: bool,
    dtype: torch.dtype,
    *,
    rows: Tensor | None = None,
    into: Tensor | None = None,
    kernels: bool | None = None,
) -> Tensor:
    """Return the weight that a string of bytes stands for, each number rounded once.

    Args:
        packed: the bytes (n,), uint8.
        out: rows of the weight.
        wide: its columns.
        double: whether the c are in 8 bits.
        dtype: of the result.
        rows: factors of the rows (out,), as DoRA has them: diag(rows) W.
        into: where to write it: (out, wide) in this dtype; rows may lie apart, as in a buffer with a border.
        kernels: whether to launch the kernel; None: as measured.

    Returns:
        (out, wide); `into` where it is given.

    Example:
        >>> import torch
        >>> from lit_peft.quantised.linear import encode
        >>> decode(encode(torch.eye(2)), 2, 2, True, torch.float32).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    known = dtype if dtype in KNOWN else torch.float32  # bitsandbytes makes NaN of others, with no error
    close = into is None or into.stride(1) == 1
    # a compiler sees bitsandbytes' operations
    usual = dtype == known and close and not torch.compiler.is_compiling()
    name = "nf4" if into is None or into.is_contiguous() else "nf4_bordered"
    if usual and takes_kernel(name, packed, kernels, weights=out * wide):
        target = torch.empty(out, wide, dtype=dtype, device=packed.device) if into is None else into
        _decode_into(target, packed, double, rows)
        return target
    levels, small, numbers = parts(out, wide, double)
    largest = packed[numbers].view(torch.float32)
    if not torch.compiler.is_compiling():
        codec()  # registers them
    ops = torch.ops.bitsandbytes
    if double:
        codes, scale = packed[small], largest[:-1]
        largest = largest[-1] + ops.dequantize_blockwise.default(codes, scale, values(packed), GROUP, torch.float32)
    # On CPUs bitsandbytes decodes rows that end inside a block wrongly (0.50.2, no error), and compiles for those that
    # end inside a byte: they are decoded as one row of even length.
    even = [out, wide] if wide % BLOCK == 0 else [1, 2 * (levels.stop - levels.start)]
    if rows is not None:
        known = torch.float32
    weight: Tensor = ops.dequantize_4bit.default(packed[levels], largest, BLOCK, "nf4", even, known)
    weight = weight.flatten()[: out * wide].view(out, wide)
    if rows is not None:
        weight = weight * rows[:, None].to(weight.dtype)
    return weight.to(dtype) if into is None else into.copy_(weight)


@contextmanager
def decoded(
    packed: Tensor, out: int, wide: int, double: bool, dtype: torch.dtype, kernels: bool | None = None
) -> Iterator[Tensor]:
    """Lend the weight that a string of bytes stands for, until the block ends; see `decode`.

    The kernel writes it into memory that is used again for the next weight. bitsandbytes allocates what it returns.
    """
    if _is_real(packed) and not torch.compiler.is_compiling():
        kernels = dtype in KNOWN and takes_kernel("nf4", packed, kernels, weights=out * wide)  # asked once
        if kernels:
            with scratch(out * wide, dtype, packed.device) as memory:
                yield decode(packed, out, wide, double, dtype, into=memory.view(out, wide), kernels=True)
            return
    yield decode(packed, out, wide, double, dtype, kernels=kernels)


_FREE: dict[tuple[torch.device, torch.dtype, int], Tensor] = {}
_LOCK = threading.Lock()


@contextmanager
def scratch(numbers: int, dtype: torch.dtype, device: torch.device) -> Iterator[Tensor]:
    """Lend memory for some numbers, (numbers,), until the block ends: no other block has it meanwhile.

    One piece a device, dtype and stream is kept for the next block, as long as the longest that was asked for. A block
    inside of a block, or in another thread, gets a piece of its own.
    """
    stream, capturing = 0, False
    if device.type == "cuda":
        stream = torch.cuda.current_stream(device).cuda_stream
        capturing = torch.cuda.is_current_stream_capturing()  # a graph has memory of its own
    key = (device, dtype, stream)
    with _LOCK:
        memory = None if capturing else _FREE.pop(key, None)
    if memory is None or memory.numel() < numbers:
        memory = None  # given back before the longer one is asked for
        with torch.inference_mode(False):  # what is made in it could not be written to outside
            memory = torch.empty(numbers, dtype=dtype, device=device)
    try:
        yield memory[:numbers]
    finally:
        if not capturing:
            with _LOCK:
                if key not in _FREE or _FREE[key].numel() < memory.numel():
                    _FREE[key] = memory


# As registered operations the launches have shapes without data: fake tensors, the memory count and compilers see them.
@torch.library.custom_op("lit_peft::nf4_decode", mutates_args=("out",))
def _decode_into(out: Tensor, packed: Tensor, double: bool, rows: Tensor | None) -> None:
    from lit_peft.kernels.nf4 import nf4

    levels, small, numbers = parts(out.shape[0], out.shape[1], double)
    scales = packed[numbers].view(torch.float32)
    factors = None if rows is None else rows.float().contiguous()
    arguments = packed[levels], packed[small] if double else None, scales, _pairs(packed.device), values(packed)
    # launches go to the current device, which need not be the weight's
    with torch.cuda.device(out.device) if out.is_cuda else nullcontext():
        nf4(*arguments, factors, out)


@_decode_into.register_fake
def _(out: Tensor, packed: Tensor, double: bool, rows: Tensor | None) -> None:
    return None
