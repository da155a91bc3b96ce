"""Compacter's products against the Kronecker sum that they stand for."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch.utils._python_dispatch import TorchDispatchMode

from lit_peft.adapter import named_adapters
from lit_peft.methods.compacter import CompacterAdapter, CompacterConfig, kronecker
from lit_peft.named import adapters
from lit_peft.selection import telling, told
from lit_peft.zoo import compose
from tests.models import save_tiny, tiny
from tests.test_methods import batch, gradients, loader, quick_trainer, shake


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


def made(kind: str, folder: Path, **settings: Any) -> Any:
    if not (folder / kind).exists():
        save_tiny(kind, folder / kind)
    own = {"phm_dim": 2, "reduction_factor": 8, **settings}
    module: Any = compose("compacter", "sft")(str(folder / kind), compacter=own)
    module.configure_model()
    shake(module)
    return module


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_the_rule_is_one_tensor(kind: str, tmp_path: Path) -> None:
    module = made(kind, tmp_path)
    rules = [p for n, p in module.model.named_parameters(remove_duplicate=False) if "compacter_rule" in n]
    assert len(rules) == 1
    assert rules[0].shape == (2, 2, 2)
    module.save_adapter(tmp_path / "saved")
    with safe_open(tmp_path / "saved" / "adapter_model.safetensors", "pt") as file:
        assert len([key for key in file.keys() if "compacter_rule" in key]) == 1  # noqa: SIM118
    trainer = quick_trainer(tmp_path, max_steps=1)
    trainer.fit(module, loader("sft", 1))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert len([key for key in content["state_dict"] if "compacter_rule" in key]) == 1
    groups = content["optimizer_states"][0]["param_groups"]
    assert sum(len(group["params"]) for group in groups) == len(set(module.trained_keys()))


def test_encoder_and_decoder_learn_one_rule_in_every_set(tmp_path: Path) -> None:
    module = made("t5", tmp_path)
    rows = batch("sft")
    name = next(n for n, _ in module.named_parameters() if "compacter_rule" in n)
    whole = gradients(module, rows)[name]
    parts = []
    for side in ("encoder", "decoder"):  # what the other half adds to the gradient of the one rule
        other = copy.deepcopy(module)
        half = other.model.get_submodule(side)
        rule = torch.nn.Parameter(dict(other.named_parameters())[name].detach().clone())
        half.base.register_forward_pre_hook(lambda *_, rule=rule: swap(rule))
        gradients(other, rows)
        parts.append(rule.grad)
    assert all(part is not None and part.any() for part in parts)
    assert torch.allclose(parts[0] + parts[1], whole, atol=1e-5)
    module.add_adapter("other", compacter={"phm_dim": 4, "reduction_factor": 4})
    rules = {n: p.shape for n, p in module.model.named_parameters(remove_duplicate=False) if "compacter_rule" in n}
    assert sorted(rules.values()) == [(2, 2, 2), (4, 4, 4)]
    with adapters(module, "other"):
        module.training_step(rows, 0)
    module.delete_adapter("other")
    assert torch.equal(gradients(module, rows)[name], whole)


def swap(rule: torch.nn.Parameter) -> None:
    (told("compacter_rule") or {})["default"] = rule


class Shapes(TorchDispatchMode):
    """Notes the size of every tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[tuple[int, ...], str] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.found.setdefault(tuple(tensor.shape), str(func))
        return out


@pytest.mark.parametrize("only", [False, True], ids=["compacter", "compacter++"])
def test_the_weight_is_never_formed(only: bool, tmp_path: Path) -> None:
    """d = 512, m = 256, n = 4 for 2 x 3 tokens: all that is made is smaller than half of W's d x m numbers."""
    save_tiny("llama", tmp_path / "wide", hidden_size=512, num_attention_heads=4)
    settings = {"phm_dim": 4, "reduction_factor": 2, "only_feed_forward": only}
    module: Any = compose("compacter", "sft")(str(tmp_path / "wide"), compacter=settings)
    module.configure_model()
    adapters_ = [a for _, a in named_adapters(module.model) if isinstance(a, CompacterAdapter)]
    assert len(adapters_) == (2 if only else 4)
    h = torch.randn(2, 3, 512, requires_grad=True)
    rule = next(p for n, p in module.model.named_parameters() if "compacter_rule" in n)
    with Shapes() as shapes, telling(compacter_rule={"default": rule}):
        adapters_[0].branch("default", h).square().sum().backward()
    assert rule.grad is not None
    largest = max(shapes.found, key=lambda shape: torch.Size(shape).numel())
    assert torch.Size(largest).numel() < 512 * 256 / 2, f"{largest} by {shapes.found[largest]}"
    with Shapes() as dense:  # the measure works
        torch.kron(rule[0], torch.ones(128, 64))
    assert max(torch.Size(shape).numel() for shape in dense.found) == 512 * 256


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"phm_dim": 0}, "must be 1 or more"),
        ({"reduction_factor": 0}, "must be 1 or more"),
        ({"dropout": 1.0}, "below 1"),
        ({"activation": "zelu"}, "unknown"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CompacterConfig(**settings)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("compacter", {"compacter": {"phm_dim": 3, "reduction_factor": 8}}),
        ("houlsby", {"bottleneck": {"bottleneck_size": None, "reduction_factor": 5}}),
        ("pfeiffer", {"bottleneck": {"reduction_factor": 64}}),
        ("parallel", {"bottleneck": {"bottleneck_size": 4, "leave_out": [9]}}),
        ("mam", {"bottleneck": {"bottleneck_size": 4, "leave_out": [0, 1]}}),
    ],
)
def test_what_does_not_fit_is_one_line_and_touches_nothing(
    method: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    module: Any = compose(method, "sft")(str(save_tiny("llama", tmp_path / "m")), **settings)
    with pytest.raises(ValueError, match=r"32|leave_out") as caught:
        module.configure_model()
    assert "\n" not in str(caught.value)
    assert not list(named_adapters(module.model))
    base = tiny("llama").state_dict()
    plain = {name.replace(".base.", "."): p for name, p in module.model.named_parameters()}
    assert all(torch.equal(plain[name], weight) for name, weight in base.items() if name in plain)


def test_widths_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match=r"multiple of phm_dim 4. The nearest reduction_factor that fits is 36"):
        CompacterConfig(reduction_factor=32).sized(576)
    assert CompacterConfig(reduction_factor=36).sized(576).hidden_size == 576
    assert CompacterConfig().sized(768).reduction_factor == 32
    assert CompacterConfig().sized(576).reduction_factor == 36
    with pytest.raises(ValueError, match="phm_dim 5 does not divide the hidden size 576"):
        CompacterConfig(phm_dim=5).sized(576)


def test_a_factor_that_was_found_is_in_the_folder(tmp_path: Path) -> None:
    module = made("llama", tmp_path, reduction_factor=None)  # 32 / 32 is no multiple of 2
    module.save_adapter(tmp_path / "saved")
    again: Any = compose("compacter", "sft")(str(tmp_path / "llama"), adapter=str(tmp_path / "saved"))
    again.configure_model()
    assert again.compacter.reduction_factor == module.compacter.reduction_factor == 16
