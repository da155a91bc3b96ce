"""Bottleneck adapters against the formulas of their papers, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_peft.adapter import named_adapters
from lit_peft.methods.bottleneck import (
    Bottleneck,
    BottleneckBeside,
    BottleneckBesideNorm,
    BottleneckConfig,
    BottleneckInNorm,
    dropped,
)
from lit_peft.named import routed
from lit_peft.zoo import compose
from tests.models import save_tiny
from tests.test_methods import batch, gradients, shake


def filled(kind: Any, base: nn.Module, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = BottleneckConfig(bottleneck_size=3, hidden_size=8, **settings)
    adapter = kind(base, config).double()
    with torch.no_grad():
        for _, parameter in adapter.own_parameters():
            parameter.copy_(torch.randn(parameter.shape))
    return adapter


def f(adapter: Any, h: Tensor, scale: float = 1.0) -> Tensor:
    d, bd = adapter.bottleneck_down["default"], adapter.bottleneck_down_bias["default"]
    u, bu = adapter.bottleneck_up["default"], adapter.bottleneck_up_bias["default"]
    return scale * (torch.clamp(h @ d.t() + bd, min=0) @ u.t() + bu)


class Adds(nn.Module):
    """What BERT has behind its feed-forward: LN(W h + x)."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.dense(h) + x)
        return out


def test_behind_a_module() -> None:
    adapter = filled(Bottleneck, nn.Linear(8, 8), scale=2.0)
    x = torch.randn(2, 5, 8).double().requires_grad_()
    y = adapter.base(x)
    expected = y + f(adapter, y, 2.0)
    assert torch.allclose(adapter(x), expected)
    own = [p for _, p in adapter.own_parameters()]
    for mine, theirs in zip(
        torch.autograd.grad(adapter(x).square().sum(), [x, *own]),
        torch.autograd.grad(expected.square().sum(), [x, *own]),
        strict=True,
    ):
        assert torch.allclose(mine, theirs)


def test_on_the_sum_before_a_norm() -> None:
    adapter = filled(BottleneckInNorm, nn.LayerNorm(8))
    v = torch.randn(2, 5, 8).double()
    z = adapter.base(v)
    assert torch.allclose(adapter(v), adapter.base(v + f(adapter, z)))


def test_beside_a_module_and_beside_one_that_adds() -> None:
    adapter = filled(BottleneckBeside, nn.Linear(8, 8), scale=4.0)
    x, h = torch.randn(2, 5, 8).double(), torch.randn(2, 5, 8).double()
    assert torch.allclose(adapter(x), adapter.base(x) + f(adapter, x, 4.0))
    adapter = filled(BottleneckBesideNorm, Adds())
    base = adapter.base
    assert torch.allclose(adapter(h, x), base.norm(base.dense(h) + x + f(adapter, x)))


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize("method", ["houlsby", "pfeiffer", "parallel"])
def test_dropped_layers_have_no_gradient_and_no_effect(method: str, kind: str, tmp_path: Path) -> None:
    task = "classification" if kind == "bert" else "sft"
    folder = save_tiny(kind, tmp_path / kind, task="classification" if kind == "bert" else "lm")
    labels = {"labels": ["a", "b", "c"]} if kind == "bert" else {}
    module: Any = compose(method, task)(str(folder), bottleneck={"bottleneck_size": 4}, **labels)
    module.configure_model()
    shake(module)
    rows = batch(task)
    with dropped(1):
        found = gradients(module, rows)
    first = {n for n in found if "bottleneck" in n and ".0." in n}
    assert not first
    assert {n for n in found if "bottleneck" in n and ".1." in n}
    module.bottleneck = type(module.bottleneck)(bottleneck_size=4, random_drop=True)
    assert gradients(module, rows)


def test_left_out_layers_have_no_adapter(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "llama")
    make = compose("pfeiffer", "sft")
    module: Any = make(str(folder), bottleneck={"bottleneck_size": 4, "leave_out": [0]})
    module.configure_model()
    assert [path for path, _ in named_adapters(module.model)] == ["model.layers.1"]
    for wrong, message in (([0, 1], "leaves no layer"), ([7], "names layer 7")):
        module = make(str(folder), bottleneck={"bottleneck_size": 4, "leave_out": wrong})
        with pytest.raises(ValueError, match=message):
            module.configure_model()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bottleneck_size": 0}, "must be 1 or more"),
        ({"reduction_factor": 0}, "above 0"),
        ({"activation": "zelu"}, "unknown"),
        ({"scale": 0}, "other than 0"),
        ({"dropout": 1.0}, "below 1"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BottleneckConfig(**settings)


def test_reduction_that_does_not_divide() -> None:
    with pytest.raises(ValueError, match="does not divide the hidden size 32"):
        BottleneckConfig(reduction_factor=5).width(32)


def test_rows_are_routed(tmp_path: Path) -> None:
    module: Any = compose("parallel", "sft")(str(save_tiny("llama", tmp_path / "m")), bottleneck={"bottleneck_size": 4})
    module.configure_model()
    shake(module)
    module.eval()
    ids = torch.randint(8, 90, (3, 7))
    with torch.no_grad():
        alone = module.model(input_ids=ids).logits
        with routed(module, ["default", None, "default"]):
            mixed = module.model(input_ids=ids).logits
        with routed(module, [None, None, None]):
            base = module.model(input_ids=ids).logits
    assert torch.allclose(mixed[[0, 2]], alone[[0, 2]], atol=1e-5)
    assert torch.allclose(mixed[1], base[1], atol=1e-5)
    assert (alone - base).abs().max() > 1e-2
