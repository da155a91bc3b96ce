"""A bottleneck adapter, and its gradients.

    out = y + s c (U act(D x + b_d) + b_u)        D (m, d), U (out, m), c a gate for each row, or 1

With the narrow Z = D x^T + b_d (m, rows) and H = act(Z), b_u counts as U's last column, for a last row of H that is 1.
In the backward pass, for g the gradient of out and P = s U^T g^T (m, rows):

    dc = sum of P * H over m, plus s g . b_u        dZ = c P act'(Z)        dx = dZ^T D
    dy = g        dD = dZ x        db_d = sum of dZ over rows        [dU | db_u] = s g^T (c H)^T

What is kept: x (or what it is made of, see `recipes`) and Z. Neither H, nor what U makes of it, nor anything in another
dtype is; dropout is drawn again from its seed. Where y is x, dx is g + dZ^T D in one product.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.activations import ACT2FN

from lit_peft.ops.choice import takes_kernel
from lit_peft.ops.low_rank import drawn, dropped
from lit_peft.ops.recipes import Recipe, as_written, autocasting, eager, recipe_of

WIDEST = 256  # bottleneck that one program of the kernel holds
# the activations whose slope is computed from Z, by their names in transformers
FORMULAS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_fast": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
    "linear": "linear",
}
_VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "linear": torch.clone,
}
_SLOPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # of (g, z): g act'(z)
    "relu": lambda g, z: torch.ops.aten.threshold_backward(g, z, 0),
    "gelu": torch.ops.aten.gelu_backward,
    "gelu_tanh": partial(torch.ops.aten.gelu_backward, approximate="tanh"),
    "silu": torch.ops.aten.silu_backward,
    "tanh": lambda g, z: torch.ops.aten.tanh_backward(g, torch.tanh(z)),
    "sigmoid": lambda g, z: torch.ops.aten.sigmoid_backward(g, torch.sigmoid(z)),
    "linear": lambda g, z: g,
}


def reference(
    y: Tensor | None,
    x: Tensor,
    down: Tensor,
    down_bias: Tensor,
    up: Tensor,
    up_bias: Tensor,
    activation: str = "relu",
    scale: float = 1.0,
    gate: Tensor | None = None,
) -> Tensor:
    """Return y + s c (U act(D x + b_d) + b_u) with plain operations, by any activation that transformers names."""
    inner = ACT2FN[activation](F.linear(x, down.to(x.dtype), down_bias.to(x.dtype)))
    out = F.linear(inner, up.to(x.dtype), up_bias.to(x.dtype))
    out = out if scale == 1 else out * scale
    out = out if gate is None else out * gate
    return out if y is None else y + out


def bottleneck(
    y: Tensor | None,
    x: Tensor,
    down: Tensor,
    down_bias: Tensor,
    up: Tensor,
    up_bias: Tensor,
    activation: str = "relu",
    scale: float = 1.0,
    *,
    gate: Tensor | float | None = None,
    dropout: float = 0.0,
    kernels: bool | None = None,
) -> Tensor:
    """Return y + s c (U act(D dropout(x) + b_d) + b_u).

    Args:
        y: what the adapter adds to (..., out); x itself for one that stands behind a module; None: nothing.
        x: what it reads (..., d).
        down: D (m, d), in any floating dtype.
        down_bias: b_d (m,).
        up: U (out, m).
        up_bias: b_u (out,).
        activation: act, by its name in transformers; the plain operations are taken for one not in `FORMULAS`.
        scale: s.
        gate: c (..., 1), broadcast over x's rows, or a number.
        dropout: the probability with which an entry of x is left out, the others divided by 1 - p.
        kernels: whether to launch the kernel; None: as measured.

    Returns:
        (..., out). A second derivative is not there: asking for one raises.

    Example:
        >>> import torch
        >>> x, one = torch.ones(2, 4), torch.ones(1, 4)
        >>> bottleneck(x, x, one, torch.zeros(1), one.t(), torch.zeros(4), scale=0.5)[0].tolist()
        [3.0, 3.0, 3.0, 3.0]
    """
    if isinstance(gate, int | float):
        scale, gate = scale * gate, None
    if activation not in FORMULAS or not eager():  # a compiler chooses by itself what it keeps
        read = F.dropout(x, dropout) if dropout else x
        return reference(y, read, down, down_bias, up, up_bias, activation, scale, gate)
    dtype = torch.get_autocast_dtype(x.device.type) if autocasting(x) else x.dtype
    # cast out here, so that the gradients come back in the parameters' dtype
    weights = [weight.to(dtype) for weight in (down, down_bias, up, up_bias)]
    rows = None if gate is None else gate.to(dtype).expand(*x.shape[:-1], 1).reshape(-1)
    launch = not dropout and len(down) <= WIDEST and x.dtype == dtype and (y is None or y.dtype == dtype)
    same = y is x
    if launch:
        sizes = {"rows": x.numel() // x.shape[-1], "width": x.shape[-1], "inner": len(down), "behind": int(same)}
        launch = takes_kernel("bottleneck", x, kernels, **sizes)
    settings = (FORMULAS[activation], float(scale), dropout, drawn(dropout), recipe_of(x), same, launch)
    out: Tensor = _Bottleneck.apply(None if same else y, x, *weights, rows, *settings)  # type: ignore[no-untyped-call]
    return out


def _inner(z: Tensor, act: str) -> Tensor:
    """Return H with its last row of ones, (m + 1, rows), of Z with any last row."""
    inner = _VALUES[act](z)
    inner[-1] = 1
    return inner


class _Bottleneck(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor | None,
        x: Tensor,
        down: Tensor,
        down_bias: Tensor,
        up: Tensor,
        up_bias: Tensor,
        gate: Tensor | None,
        act: str,
        scale: float,
        p: float,
        seed: int,
        recipe: Recipe,
        same: bool,
        launch: bool,
    ) -> Tensor:
        base, m = x if same else y, len(down)
        with as_written(x):
            rows = dropped(x, p, seed).reshape(-1, x.shape[-1]).to(down.dtype)
            onto = None if base is None else base.reshape(-1, len(up))
            if launch:
                out, z = _launch(onto, rows, down, down_bias, up, up_bias, gate, act, scale)
            else:
                # Z is (m, rows), not (rows, m): products with narrow results are up to four times slower on CPUs
                z = rows.new_empty(m + 1, len(rows))
                torch.addmm(down_bias[:, None], down, rows.t(), out=z[:m])
                z[m] = 0
                inner = _inner(z, act)
                if gate is not None:
                    inner.mul_(gate)
                # copied as it lies on a CPU; elsewhere so that rows begin at multiples of 16 bytes
                cpu = x.device.type == "cpu"
                widened = torch.cat([up, up_bias[:, None]], 1).t() if cpu else torch.cat([up.t(), up_bias[None]])
                if onto is not None and onto.dtype == inner.dtype:
                    out = torch.addmm(onto, inner.t(), widened, alpha=scale)
                else:
                    out = (inner.t() @ widened).mul_(scale)
                    out = out if onto is None else onto + out
        needed = ctx.needs_input_grad
        ctx.save_for_backward(
            z,
            down if needed[1] else None,
            up,
            up_bias if needed[6] else None,
            gate,
            *(recipe.parts if needed[2] else ()),
        )
        ctx.made = recipe.make, x.shape, x.dtype, None if y is None else y.dtype, act, scale, p, seed, same, launch
        shape = (*x.shape[:-1], len(up))
        return torch.ops.aten._unsafe_view(out, shape)  # type: ignore[no-any-return]  # as in `low_rank`

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]  # a second derivative would lack H's
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        z, down, up, up_bias, gate, *parts = ctx.saved_tensors
        make, shape, dtype, other, act, scale, p, seed, same, launch = ctx.made
        needed, m = ctx.needs_input_grad, up.shape[1]
        outer = gradient.reshape(-1, gradient.shape[-1])
        g = outer.to(z.dtype)
        dx = dd = ddb = du = dub = dgate = None
        dz = inner = z
        if launch:
            # H and its ones lie in columns there, and dx comes with g added
            dz, inner, dx, dgate = _launch_backward(g, z, down, up, up_bias, gate, act, scale, same)
            dz, inner = dz.t(), inner.t()[: m + 1]
        else:
            if any(needed[4:7]):
                inner = _inner(z, act)
            if any(needed[1:4]) or needed[6]:
                pushed = (up.t() @ g.t()).mul_(scale)
                if needed[6]:
                    dgate = (pushed * inner[:m]).sum(0).add_(g @ up_bias, alpha=scale)
                dz = _SLOPES[act](pushed if gate is None else pushed.mul_(gate), z[:m])
            if gate is not None and (needed[4] or needed[5]):
                inner.mul_(gate)
            if needed[1] and same and not p and outer.dtype == z.dtype:
                dx = torch.addmm(outer, dz.t(), down)
            elif needed[1]:
                dx = dropped((dz.t() @ down).view(shape), p, seed).view(-1, shape[-1])
                dx = outer + dx if same else dx
        if needed[2]:
            dd = dz @ dropped(make(*parts), p, seed).reshape(-1, shape[-1]).to(z.dtype)
        if needed[3]:
            ddb = dz.sum(1)
        if needed[4] or needed[5]:
            both = (g.t() @ inner.t()).mul_(scale)
            du, dub = both[:, :m], both[:, m]
        dx = None if dx is None or not needed[1] else dx.view(shape).to(dtype)
        dy = gradient.to(other) if needed[0] else None
        return dy, dx, dd, ddb, du, dub, dgate if needed[6] else None, *[None] * 7


# As registered operations the launches have shapes without data: fake tensors, the memory count and compilers see them.
@torch.library.custom_op("lit_peft::bottleneck", mutates_args=())
def _launch(
    y: Tensor | None,
    x: Tensor,
    down: Tensor,
    down_bias: Tensor,
    up: Tensor,
    up_bias: Tensor,
    gate: Tensor | None,
    act: str,
    scale: float,
) -> tuple[Tensor, Tensor]:
    from lit_peft.kernels.bottleneck import bottleneck

    weights = (down.contiguous(), down_bias.contiguous(), up.contiguous(), up_bias.contiguous())
    onto = None if y is None else y.contiguous()
    return bottleneck(onto, x.contiguous(), *weights, None if gate is None else gate.contiguous(), act, scale)


@_launch.register_fake
def _(
    y: Tensor | None,
    x: Tensor,
    down: Tensor,
    down_bias: Tensor,
    up: Tensor,
    up_bias: Tensor,
    gate: Tensor | None,
    act: str,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(len(x), len(up)), x.new_empty(len(x), len(down))


@torch.library.custom_op("lit_peft::bottleneck_backward", mutates_args=())
def _launch_backward(
    g: Tensor,
    z: Tensor,
    down: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    gate: Tensor | None,
    act: str,
    scale: float,
    same: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from lit_peft.kernels.bottleneck import bottleneck_backward

    down, up_bias, gate = (None if part is None else part.contiguous() for part in (down, up_bias, gate))
    return bottleneck_backward(g.contiguous(), z, down, up.contiguous(), up_bias, gate, act, scale, same)


@_launch_backward.register_fake
def _(
    g: Tensor,
    z: Tensor,
    down: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    gate: Tensor | None,
    act: str,
    scale: float,
    same: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, m = z.shape
    dx = g.new_empty(0) if down is None else g.new_empty(rows, down.shape[1])
    return z.new_empty(rows, m), z.new_empty(rows, m // 8 * 8 + 8), dx, g.new_empty(rows if up_bias is not None else 0)
