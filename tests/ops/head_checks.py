"""The ops on logits of a frozen output layer against float64, on either path: values and gradients."""

from typing import Any

import torch
from torch import Tensor

from lit_peft.ops import cross_entropy, divergence, log_probabilities
from tests.ops.exact import TOLERANCE, agree

TOLERANCES = TOLERANCE | {torch.float64: 1e-10}


def layer(entries: int, width: int, dtype: torch.dtype, device: Any = "cpu", seed: int = 1) -> tuple[Tensor, Tensor]:
    """Returns W and c."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(entries, width + 1, generator=generator, dtype=torch.float64).to(device, dtype)
    return found[:, :-1].contiguous(), found[:, -1].contiguous()


def aimed(rows: int, entries: int, ignored: bool, device: Any = "cpu") -> Tensor:
    """Returns targets over the whole vocabulary, its first and last entries among them; every third may be ignored."""
    targets = torch.arange(rows, device=device) * (entries - 1) // max(1, rows - 1)
    return torch.where(torch.arange(rows, device=device) % 3 == 1, -100, targets) if ignored else targets


def exactly(x: Tensor) -> Tensor:
    return x.detach().double().requires_grad_()


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None, scale: float, cap: float | None) -> Tensor:
    v = x @ weight.double().t() + (0 if bias is None else bias.double())
    return scale * v if cap is None else cap * torch.tanh(scale * v / cap)


def check_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, kernels: bool, **shape: Any
) -> None:
    exact = exactly(x)
    kept = targets != -100
    z = _logits(exact, weight, bias, shape.get("scale", 1.0), shape.get("softcap"))[kept]
    wanted = (z.logsumexp(1) - z.gather(1, targets[kept, None])[:, 0]).sum()
    got = cross_entropy.linear_cross_entropy(x, weight, targets, bias, kernels=kernels, **shape)
    assert got.dtype == torch.promote_types(x.dtype, torch.float32)
    agree(got, wanted, TOLERANCES[x.dtype])
    mine, theirs = torch.autograd.grad(got * 0.5, x), torch.autograd.grad(wanted * 0.5, exact)
    assert mine[0].dtype == x.dtype
    agree(mine[0], theirs[0], TOLERANCES[x.dtype])
    plain = cross_entropy.reference(x, weight, targets, bias, **shape)
    agree(plain, wanted, TOLERANCES[x.dtype] + 1e-6)  # which works in float32


def check_log_probabilities(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    kernels: bool,
    entropy: bool,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> None:
    exact = exactly(x)
    kept = (targets != -100).double()
    logs = (_logits(exact, weight, bias, 1.0, softcap) / temperature).log_softmax(1)
    wanted = [logs.gather(1, targets.clamp(min=0)[:, None])[:, 0] * kept, -(logs.exp() * logs).sum(1) * kept]
    got: Any = log_probabilities.linear_log_probabilities(
        x, weight, targets, bias, temperature=temperature, softcap=softcap, entropy=entropy, kernels=kernels
    )
    got = list(got) if entropy else [got]
    slopes = torch.randn(2, len(x), device=x.device, dtype=torch.float64)
    # some token gets no gradient, and one a large one
    slopes[:, ::4], slopes[:, :1] = 0.0, 1e3
    mine = theirs = x.new_zeros(())
    for one, other, slope in zip(got, wanted, slopes, strict=False):
        agree(one, other, TOLERANCES[x.dtype])
        mine = mine + (one * slope.to(one.dtype)).sum()
        theirs = theirs + (other * slope).sum()
    found, right = torch.autograd.grad(mine, x)[0], torch.autograd.grad(theirs, exact)[0]
    assert found.dtype == x.dtype
    agree(found, right, TOLERANCES[x.dtype])
    agree(found[1:], right[1:], TOLERANCES[x.dtype])
    plain = log_probabilities.reference(exactly(x), weight.double(), targets.clamp(min=0), temperature=temperature,
                                        softcap=softcap, bias=None if bias is None else bias.double())  # fmt: skip
    agree(plain[0] * kept, wanted[0], 1e-10)
    agree(plain[1] * kept, wanted[1], 1e-10)


def check_divergence(
    x: Tensor, weight: Tensor, teacher: tuple[Tensor, Tensor], kernels: bool, *, kind: str, beta: float = 0.3,
    temperature: float = 1.0, **more: Any,
) -> None:  # fmt: skip
    exact = exactly(x)
    p = (_logits(exact, weight, more.get("bias"), 1.0, more.get("softcap")) / temperature).softmax(1)
    u = _logits(teacher[0].double(), teacher[1], more.get("teacher_bias"), 1.0, more.get("teacher_softcap"))
    q = (u / temperature).softmax(1)
    m = beta * q + (1 - beta) * p
    wanted = {
        "forward_kl": q * (q / p).log(),
        "reverse_kl": p * (p / q).log(),
        "jsd": beta * q * (q / m).log() + (1 - beta) * p * (p / m).log(),
    }[kind].sum() * temperature**2
    settings: Any = {"kind": kind, "beta": beta, "temperature": temperature} | more
    got = divergence.linear_divergence(x, weight, *teacher, kernels=kernels, **settings)
    tolerance = 2 * TOLERANCES[x.dtype]  # the logits of both are rounded
    agree(got, wanted, tolerance)
    agree(torch.autograd.grad(got * 0.5, x)[0], torch.autograd.grad(wanted * 0.5, exact)[0], tolerance)
    doubled = {key: value.double() if isinstance(value, Tensor) else value for key, value in settings.items()}
    plain = divergence.reference(exact, weight.double(), teacher[0].double(), teacher[1].double(), **doubled)
    agree(plain, wanted, 1e-10)
