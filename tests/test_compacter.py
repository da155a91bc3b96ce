"""Compacter's products against the Kronecker sum that they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lit_peft.methods.compacter import CompacterConfig, kronecker
from lit_peft.zoo import compose
from tests.models import save_tiny


@pytest.mark.parametrize(("n", "wide", "tall"), [(1, 5, 3), (2, 6, 4), (4, 12, 8), (3, 9, 3)])
def test_equals_the_dense_sum(n: int, wide: int, tall: int) -> None:
    generator = torch.Generator().manual_seed(0)

    def new(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    x, rule, s, t, bias = new(2, 3, wide), new(n, n, n), new(n, wide // n), new(n, tall // n), new(tall)
    dense = sum(torch.kron(rule[i], torch.outer(s[i], t[i])) for i in range(n))
    expected = x @ dense + bias
    found = kronecker(x, rule, s, t, bias)
    assert torch.allclose(found, expected)
    inputs = [x, rule, s, t, bias]
    for mine, theirs in zip(
        torch.autograd.grad(found.square().sum(), inputs),
        torch.autograd.grad(expected.square().sum(), inputs),
        strict=True,
    ):
        assert torch.allclose(mine, theirs)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_the_rule_is_one_tensor(kind: str, tmp_path: Path) -> None:
    settings = {"phm_dim": 2, "reduction_factor": 8}
    module: Any = compose("compacter", "sft")(str(save_tiny(kind, tmp_path / kind)), compacter=settings)
    module.configure_model()
    rules = [p for n, p in module.model.named_parameters() if "compacter_rule" in n]
    assert len(rules) == 1
    assert rules[0].shape == (2, 2, 2)


def test_widths_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="multiple of phm_dim 4"):
        CompacterConfig(reduction_factor=32).sized(576)
    assert CompacterConfig(reduction_factor=36).sized(576).hidden_size == 576
