"""Where kernels are tested: on the GPU if there is one, else in Triton's interpreter, made faithful for bfloat16."""

from typing import Any

import numpy as np
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _numbers(handle: Any) -> Any:
    """Returns the numbers of a block; the interpreter holds bfloat16 as bits."""
    import triton.language as tl

    if handle.dtype.scalar == tl.bfloat16:
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    return handle.data


def _rounded(values: Any) -> Any:
    """Returns float32 numbers as the bits of the nearest bfloat16, ties to even; the interpreter cuts them off."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def make_faithful() -> None:
    """Lets the interpreter multiply and round bfloat16 as a GPU does; without this its products are of bits."""
    import triton.language as tl
    from triton.runtime import interpreter

    def create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, most: Any) -> Any:
        product = np.matmul(_numbers(a), _numbers(b), dtype=d.data.dtype) + d.data
        return interpreter.TensorHandle(product, d.dtype.scalar)

    convert = interpreter._convert_float

    def faithful(values: Any, before: Any, after: Any, rounding: Any) -> Any:
        if (before, after) == (tl.float32, tl.bfloat16):
            return _rounded(np.frombuffer(values.tobytes(), np.float32).reshape(values.shape))
        return convert(values, before, after, rounding)

    interpreter.InterpreterBuilder.create_dot = create_dot
    interpreter._convert_float = faithful


if DEVICE.type == "cpu":
    make_faithful()
