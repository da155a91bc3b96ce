"""DoRA against its formula in float64 and against HF PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lit_peft import DoRA, LoRAConfig, adapters, add_adapter, disabled, place, routed
from lit_peft.adapter import named_adapters
from lit_peft.low_rank.dora import DoRALinear
from lit_peft.weights import dense
from lit_peft.zoo import compose
from tests.models import save_tiny, tiny
from tests.test_methods import batch, outputs, shake

CONFIG = LoRAConfig(r=3, alpha=5, use_dora=True)


def layer(kind: str = "linear", config: LoRAConfig = CONFIG) -> DoRALinear:
    """A layer in float64 whose A, B and m are off their start."""
    torch.manual_seed(0)
    base: nn.Module = nn.Linear(7, 5) if kind == "linear" else Conv1D(5, 7)
    with torch.no_grad():
        base.get_parameter("bias").normal_()
    made = DoRALinear(base.double(), config)
    for _, parameter in made.own_parameters():
        parameter.data = parameter.data.double() + 0.3 * torch.randn_like(parameter.data, dtype=torch.double)
    return made


def by_formula(made: DoRALinear, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """y = b + (m / n) (W + s B A) x with n detached, and the leaves A, B, m."""
    leaves = [p["default"].detach().clone().requires_grad_() for p in (made.lora_a, made.lora_b, made.lora_magnitude)]
    a, b, m = leaves
    turned = dense(made.base) + 5 / 3 * b @ a
    n = turned.norm(dim=1).detach()
    return F.linear(x, (m / n)[:, None] * turned, made.base.bias), leaves


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_values_and_gradients_are_those_of_the_detached_form(kind: str) -> None:
    made = layer(kind)
    x = torch.randn(2, 4, 7, dtype=torch.double, requires_grad=True)
    y = made(x)
    expected, leaves = by_formula(made, x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(y)
    mine = torch.autograd.grad(
        y, [made.lora_a["default"], made.lora_b["default"], made.lora_magnitude["default"], x], weights
    )
    theirs = torch.autograd.grad(expected, [*leaves, x], weights)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_merge_is_exact_and_the_norm_follows(kind: str) -> None:
    made = layer(kind)
    x = torch.randn(4, 7, dtype=torch.double)
    expected = made(x).detach()
    base = made.merge()
    # folding adds in float32, whatever the base is
    torch.testing.assert_close(base(x), expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():  # trained on from the merged weight, the lengths are those of the new one
        made.lora_b["default"].zero_()
    torch.testing.assert_close(made.norm("default"), dense(base).double().norm(dim=1), rtol=1e-6, atol=1e-6)


def test_starts_as_the_base_bit_for_bit_and_counts_one_more_for_each_output() -> None:
    torch.manual_seed(0)
    made = DoRALinear(nn.Linear(7, 5), CONFIG)
    x = torch.randn(4, 7)
    assert torch.equal(made(x), made.base(x))
    assert sum(p.numel() for _, p in made.own_parameters()) == 3 * (7 + 5) + 5


def test_the_base_runs_once_without_dropout_and_twice_with() -> None:
    for dropout, times in ((0.0, 1), (0.5, 2)):
        made = layer(config=LoRAConfig(r=3, alpha=5, use_dora=True, dropout=dropout))
        calls = []
        made.base.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        made.train()(torch.randn(2, 7, dtype=torch.double))
        assert len(calls) == times


def test_half_precision_keeps_a_small_change_of_length() -> None:
    torch.manual_seed(0)
    made = DoRALinear(nn.Linear(64, 64, bias=False).bfloat16(), LoRAConfig(r=2, use_dora=True))
    with torch.no_grad():
        made.lora_magnitude["default"].mul_(1.01)  # 1.0078 in bfloat16
    x = torch.randn(512, 64).bfloat16()
    base = made.base(x).float()
    change = (made(x).float() * base).sum() / base.square().sum()
    assert abs(change - 1.01) < 5e-4


def test_buffer_moves_with_the_layer_and_is_in_no_checkpoint() -> None:
    made = layer()
    assert "dora_square" in dict(made.named_buffers())
    assert "dora_square" not in made.state_dict()
    buffer = made.dora_square
    assert made.float().dora_square is not buffer
    assert made.dora_square.dtype == torch.float32
    expected = made.norm("default")
    made.bfloat16().float()  # what was rounded is worked out again
    torch.testing.assert_close(made.norm("default"), expected, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(made.dora_square, dense(made.base).square().sum(1), rtol=1e-6, atol=1e-6)
    assert made.to("meta").dora_square is None


class Quantised(nn.Linear):
    """Keeps its weight in eighths and can say what it is."""

    def dequantised(self) -> Tensor:
        return (self.weight * 8).round() / 8

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dequantised(), self.bias)


@pytest.mark.parametrize("start", ["default", "pissa", "olora"])
def test_works_on_a_base_that_holds_no_plain_weight(start: Any) -> None:
    """DoRA's lengths and the starts from the weight are those of the dequantised one."""
    from lit_peft.low_rank.residual import ResidualLinear

    torch.manual_seed(0)
    config = LoRAConfig(r=3, alpha=5, use_dora=start == "default", init_lora_weights=start)
    made = (DoRALinear if config.use_dora else ResidualLinear)(Quantised(7, 5), config)
    plain = nn.Linear(7, 5)
    with torch.no_grad():
        plain.weight.copy_(made.base.dequantised())
        plain.bias.copy_(made.base.bias)
    other = type(made)(plain, config)
    if config.use_dora:  # A starts at random
        other.lora_a["default"].data = made.lora_a["default"].data.clone()
    for one in (made, other):
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for _, parameter in one.trained_parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    x = torch.randn(4, 7)
    torch.testing.assert_close(made(x), other(x))
    assert not torch.allclose(made(x), made.base(x), atol=1e-2)


def test_sets_are_routed_by_row_and_refused_together() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5))
    place(model, ["0"], lambda base: DoRALinear(base, CONFIG))
    add_adapter(model, "other")
    with torch.no_grad():
        for _, adapter in named_adapters(model):
            for _, parameter in adapter.own_parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    x = torch.randn(3, 7)
    single = {}
    for name in ("default", "other"):
        with adapters(model, name):
            single[name] = model(x)
    with routed(model, ["other", None, "default"]):
        mixed = model(x)
    with disabled(model):
        base = model(x)
    torch.testing.assert_close(mixed, torch.stack([single["other"][0], base[1], single["default"][2]]))
    with adapters(model, "default", "other"), pytest.raises(TypeError, match="one set at a time"):
        model(x)
    with routed(model, [("default", "other"), None, None]), pytest.raises(TypeError, match="one set at a time"):
        model(x)
    with pytest.raises(TypeError, match="do not add up"):
        model[0].merge(("default", "other"))


def test_below_bitfit_it_works_and_above_it_is_refused(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "base")
    for method, fits in (("bitfit+dora", True), ("dora+bitfit", False)):
        module: Any = compose(method, "sft")(str(folder), lora=LoRAConfig(r=2))
        module.configure_model()
        shake(module)
        if not fits:
            with pytest.raises(TypeError, match="name dora last"):
                outputs(module, batch("sft"))
            continue
        expected = outputs(module, batch("sft"))
        module.merge_adapters()
        torch.testing.assert_close(outputs(module, batch("sft")), expected, rtol=1e-5, atol=1e-5)


def test_what_is_no_linear_layer_is_refused() -> None:
    from lit_peft.methods.lora import check_layer

    with pytest.raises(ValueError, match="linear layers only, and wte is a Embedding"):
        check_layer("wte", CONFIG, nn.Embedding(3, 4))
    with pytest.raises(ValueError, match="does not go with"):
        LoRAConfig(use_dora=True, init_lora_weights="pissa")
    with pytest.raises(TypeError, match="cannot hold"):
        layer().add("plain", LoRAConfig(r=3))


def peft_model(kind: str, dropout: float = 0.0) -> tuple[Any, Any]:
    """A PEFT model with DoRA off its start, and its configuration."""
    targets = ["c_attn", "c_fc"] if kind == "gpt2" else ["q_proj", "down_proj"]
    config = peft.LoraConfig(
        r=3, lora_alpha=5, use_dora=True, lora_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(tiny(kind), config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model, config


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_peft_agrees_on_files_logits_and_gradients(kind: str, dropout: float, tmp_path: Path) -> None:
    theirs, _ = peft_model(kind, dropout)
    theirs.save_pretrained(tmp_path / "theirs")
    folder = save_tiny(kind, tmp_path / "base")
    module: Any = compose("dora", "sft")(str(folder), adapter=str(tmp_path / "theirs"), check_base=False)
    module.configure_model()
    assert isinstance(module, DoRA)
    ids = torch.randint(8, 100, (2, 9), generator=torch.Generator().manual_seed(1))
    weights = torch.randn(2, 9, 128, generator=torch.Generator().manual_seed(2))
    found = []
    for model in (theirs, module.model):
        model.eval()
        logits = model(ids).logits
        model.train()
        torch.manual_seed(5)  # the same rows are dropped
        (model(ids).logits * weights).sum().backward()
        trained = [(n.lower(), p.grad) for n, p in model.named_parameters() if p.grad is not None]
        grads = [g for key in ("lora_a", "lora_b", "magnitude") for n, g in trained if key in n]
        found.append((logits.detach(), grads))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=2e-6)
    assert len(found[0][1]) == len(found[1][1]) == 12
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    module.save_adapter(tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(tiny(kind), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(back(ids).logits, found[1][0], rtol=1e-5, atol=2e-6)
    from lit_peft import load

    loaded = load(tmp_path / "ours", backbone=str(folder), device="cpu", task="sft", check_base=False)
    assert type(loaded).__name__ == "LoRASFT"  # the folder says what it is
    torch.testing.assert_close(loaded.model(ids).logits, found[1][0], rtol=1e-6, atol=1e-6)
