"""Attention to a prefix and a causal text, forward and backward: two merged parts, or keys and values put together."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.kernel_cases import Case
from lit_peft.ops.prefix_attention import prefix_attention


def run(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor, slope: Tensor, kernels: bool) -> Sequence[Tensor]:
    parts = [part.detach().requires_grad_() for part in (q, k, v, pk, pv)]
    out = prefix_attention(*parts, is_causal=True, kernels=kernels)  # type: ignore[misc]
    return out.detach(), *torch.autograd.grad(out, parts, slope)


def exact(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor, slope: Tensor) -> Sequence[Tensor]:
    """One softmax in float64, one text and one group of heads after another: the scores of all would not fit."""
    out = torch.empty_like(q, dtype=torch.float64)
    parts = [part.detach().double().requires_grad_() for part in (q, k, v, pk, pv)]
    groups, p = q.shape[1] // k.shape[1], pk.shape[2]
    hidden = F.pad(torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1), (p, 0))
    for row in range(len(q)):
        for head in range(k.shape[1]):
            mine = slice(head * groups, head * groups + groups)
            keys = torch.cat([parts[3][0, head], parts[1][row, head]])
            values = torch.cat([parts[4][0, head], parts[2][row, head]])
            scores = (parts[0][row, mine] @ keys.mT * q.shape[3] ** -0.5).masked_fill(hidden, float("-inf"))
            found = scores.softmax(-1) @ values
            found.backward(slope[row, mine].double())
            out[row, mine] = found.detach()
    return out, *[part.grad for part in parts if part.grad is not None]


def cases(small: bool) -> list[Case]:
    # texts, tokens, heads, heads of keys, width: of a Llama 3.2 1B and an 8B, and a short text
    models = [(4, 512, 32, 8, 64), (4, 2048, 32, 8, 64), (4, 512, 32, 8, 128), (4, 2048, 32, 8, 128)]
    if small:
        models = [(2, 17, 4, 2, 16)]

    def case(batch: int, n: int, heads: int, kv: int, width: int, p: int) -> Case:
        def make(device: torch.device) -> list[Tensor]:
            def drawn(rows: int, tokens: int, parts: int) -> Tensor:
                shape = rows, tokens, parts, width
                return torch.randn(shape, device=device, dtype=torch.bfloat16).transpose(1, 2)

            front = (drawn(1, p, kv) for _ in "kv")
            return [drawn(batch, n, heads), *(drawn(batch, n, kv) for _ in "kv"), *front, drawn(batch, n, heads)]

        sizes = {"rows": batch * n, "width": width, "p": p}
        moved = 2 * batch * n * width * (6 * heads + 6 * kv)  # q, o, and g, q, o, dq; k, v, and k, v, dk, dv
        products = 7 * batch * heads * n * (n + 2 * p) * width  # of the text's scores half, of the prefix's all
        return Case("prefix", sizes, make, run, exact, moved, products)

    return [case(*model, p) for model in models for p in ((3,) if small else (30, 128))]
