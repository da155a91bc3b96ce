"""AdapterFusion at one layer: the paper's formula in float64, values and gradients, and who takes part in a call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lit_peft.methods.bottleneck import Bottleneck, BottleneckBeside, BottleneckConfig, BottleneckInNorm
from lit_peft.methods.fusion_site import FusionBottleneck, FusionConfig, watched
from lit_peft.selection import Rows, choose

NAMES = ["a", "b"]


def filled(kind: Any, base: nn.Module) -> Any:
    """A bottleneck adapter with the sets a and b and their fusion, all random, in float64; the fusion is `default`."""
    torch.manual_seed(0)
    adapter = kind(base, BottleneckConfig(bottleneck_size=3, hidden_size=8), "a")
    adapter.add("b", BottleneckConfig(bottleneck_size=2, hidden_size=8, activation="tanh", scale=0.5))
    adapter.base = FusionBottleneck(base, FusionConfig(adapters=NAMES, hidden_size=8))
    adapter.base.scope = adapter.scope
    adapter.double()
    with torch.no_grad():
        for _, parameter in [*adapter.own_parameters(), *adapter.base.own_parameters()]:
            parameter.copy_(torch.randn(parameter.shape))
    return adapter


def branch(adapter: Any, name: str, h: Tensor) -> Tensor:
    inner = h @ adapter.bottleneck_down[name].t() + adapter.bottleneck_down_bias[name]
    inner = inner.clamp(min=0) if name == "a" else inner.tanh()
    out = inner @ adapter.bottleneck_up[name].t() + adapter.bottleneck_up_bias[name]
    return out if name == "a" else 0.5 * out


def fused(adapter: Any, h: Tensor) -> Tensor:
    """Equations of section 3.2.2, one token and one adapter at a time."""
    site = adapter.base
    q, k = site.fusion_query["default"], site.fusion_key["default"]
    v = torch.eye(8).double() + site.fusion_value["default"]
    tokens = h.reshape(-1, 8)
    rows = []
    for i in range(len(tokens)):
        z = [branch(adapter, name, tokens[i]) for name in NAMES]
        scores = torch.stack([(q @ tokens[i]) @ (k @ zn) for zn in z])
        s = scores.exp() / scores.exp().sum()
        rows.append(sum(s[n] * (v @ zn) for n, zn in enumerate(z)))
    return torch.stack(rows).view(h.shape)


def test_the_papers_formula_behind_beside_and_in_a_norm() -> None:
    x = torch.randn(2, 5, 8).double().requires_grad_()
    for kind, base in (
        (Bottleneck, nn.Linear(8, 8)),
        (BottleneckBeside, nn.Linear(8, 8)),
        (BottleneckInNorm, nn.LayerNorm(8)),
    ):
        adapter = filled(kind, base)
        plain = adapter.base.base
        if kind is Bottleneck:
            expected = plain(x) + fused(adapter, plain(x))
        elif kind is BottleneckBeside:
            expected = plain(x) + fused(adapter, x)
        else:
            expected = plain(x + fused(adapter, plain(x)))
        found = adapter(x)
        assert torch.allclose(found, expected, atol=1e-10), kind
        own = [x, *(p for _, p in adapter.base.own_parameters()), adapter.bottleneck_up["a"]]
        mine = torch.autograd.grad(found.square().sum(), own)
        theirs = torch.autograd.grad(expected.square().sum(), own)
        for one, other in zip(mine, theirs, strict=True):
            assert torch.allclose(one, other, atol=1e-9), kind


def test_equal_adapters_under_the_identity_are_that_adapter_and_weights_sum_to_one() -> None:
    torch.manual_seed(0)
    site = FusionBottleneck(nn.Linear(8, 8), FusionConfig(adapters=["a", "b", "c"], hidden_size=8)).double()
    h, out = torch.randn(2, 3, 8).double(), torch.randn(2, 3, 8).double()
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    with watched(mask) as seen:
        assert torch.allclose(site.attend("default", h, [out, out, out]), out)
    (total, count) = seen.found[id(site), "default"]
    assert count == 3
    assert torch.allclose(total / count, torch.full((3,), 1 / 3))


def test_the_right_adapter_gets_the_attention() -> None:
    """Two tasks, told apart by the token: the adapter of each is found, over eight parts in ten."""
    torch.manual_seed(0)
    adapter = filled(Bottleneck, nn.Linear(8, 8))
    site = adapter.base
    with torch.no_grad():
        nn.init.normal_(site.fusion_query["default"], std=0.02)
        nn.init.normal_(site.fusion_key["default"], std=0.02)
        site.fusion_value["default"].zero_()
    tokens = torch.randn(2, 64, 8).double() * 0.1
    tokens[0, :, 0] += 2
    tokens[1, :, 0] -= 2
    with torch.no_grad():
        y = adapter.base.base(tokens)
        wanted = torch.stack([y[i] + branch(adapter, name, y[i]) for i, name in enumerate(NAMES)])
    optimizer = torch.optim.Adam([site.fusion_query["default"], site.fusion_key["default"]], lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        (adapter(tokens) - wanted).square().mean().backward()
        optimizer.step()
    for i in range(2):
        with watched(None) as seen, torch.no_grad():
            adapter(tokens[i : i + 1])
        (total, count) = seen.found[id(site), "default"]
        assert (total / count)[i] > 0.8


def test_with_several_processes_a_fusion_that_no_row_asks_for_takes_part(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """DDP waits for a gradient from everything that trains."""
    adapter = filled(Bottleneck, nn.Linear(8, 8)).train()
    x = torch.randn(2, 3, 8).double()
    with choose({adapter.scope: Rows(["a", None])}):
        expected = adapter(x)
        monkeypatch.setattr(dist, "is_initialized", lambda: True)
        found = adapter(x)
    assert torch.equal(found, expected)
    found.sum().backward()
    for name, parameter in [*adapter.own_parameters(), *adapter.base.own_parameters()]:
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()) == name.endswith(".a"), name


def test_scope_is_captured_not_remembered() -> None:
    adapter = filled(Bottleneck, nn.Linear(8, 8))
    x = torch.randn(1, 2, 8).double()
    with choose({adapter.scope: ("a",)}):
        alone = adapter(x)
    y = adapter.base.base(x)
    assert torch.allclose(alone, y + branch(adapter, "a", y))
    assert torch.allclose(adapter(x), y + fused(adapter, y))
