"""PiSSA, and what it shares with OLoRA, against formulas in float64 and against HF PEFT."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lit_peft import LoRAConfig, add_adapter, disabled
from lit_peft.adapter import named_adapters
from lit_peft.low_rank.residual import ResidualLinear, principal
from lit_peft.weights import dense
from lit_peft.zoo import compose
from tests.models import save_tiny, tiny
from tests.test_methods import batch, loader, outputs, quick_trainer, same, shake

STARTS = ["pissa", "olora"]


def layer(start: str, kind: str = "linear") -> ResidualLinear:
    torch.manual_seed(0)
    base: nn.Module = nn.Linear(7, 5) if kind == "linear" else Conv1D(5, 7)
    with torch.no_grad():
        base.get_parameter("weight").normal_()
    return ResidualLinear(base.double(), LoRAConfig(r=3, alpha=6, init_lora_weights=start))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_pissa_starts_at_the_best_approximation_of_rank_r(kind: str) -> None:
    made = layer("pissa", kind)
    weight = dense(made.base)
    u, sizes, right = torch.linalg.svd(weight)
    taken = 2 * made.lora_b["default"].double() @ made.lora_a["default"].double()
    torch.testing.assert_close(taken, u[:, :3] * sizes[:3] @ right[:3], rtol=1e-5, atol=1e-6)
    norms = made.lora_a["default"].norm(dim=1), made.lora_b["default"].norm(dim=0)
    for norm in norms:  # the scale is shared out evenly
        torch.testing.assert_close(norm.double(), (sizes[:3] / 2).sqrt(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_values_and_gradients_are_those_of_the_residual_form(start: str, kind: str) -> None:
    made = layer(start, kind)
    for _, parameter in made.own_parameters():
        parameter.data = parameter.data.double()
    for _, parameter in made.trained_parameters():
        parameter.data += 0.3 * torch.randn_like(parameter.data)
    x = torch.randn(4, 7, dtype=torch.double, requires_grad=True)
    a, b = made.lora_a["default"], made.lora_b["default"]
    # the papers' form: the start is taken out of the weight
    residual = dense(made.base) - 2 * made.lora_b0["default"] @ made.lora_a0["default"]
    expected = F.linear(x, residual + 2 * b @ a, made.base.bias)
    y = made(x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(y)
    for one, other in zip(
        torch.autograd.grad(y, [a, b, x], weights), torch.autograd.grad(expected, [a, b, x], weights), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_starts_as_the_base_bit_for_bit(start: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    made = ResidualLinear(nn.Linear(7, 5).to(dtype), LoRAConfig(r=3, init_lora_weights=start))  # type: ignore[arg-type]
    x = torch.randn(4, 7, dtype=dtype)
    assert torch.equal(made(x), made.base(x))
    assert {n for n, p in made.own_parameters() if not p.requires_grad} == {"lora_a0.default", "lora_b0.default"}


def test_fast_start_is_close_repeatable_and_leaves_the_generator_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(96, 96, generator=generator))[0] for _ in range(2))
    weight = u * torch.arange(1, 97) ** -1.0 @ v.t()
    a, b = principal(weight, 4, "pissa")
    torch.manual_seed(1)
    fast = principal(weight, 4, "pissa_niter_16")
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(1))
    torch.testing.assert_close(fast[1] @ fast[0], b @ a, rtol=1e-3, atol=1e-4)
    again = principal(weight, 4, "pissa_niter_16")
    assert torch.equal(fast[0], again[0])
    torch.testing.assert_close(fast[0], a, rtol=1e-3, atol=1e-3)  # signs too


def test_choice_of_the_fast_start_is_kept(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "base")
    module: Any = compose("pissa", "sft")(str(folder), lora=LoRAConfig(r=2, init_lora_weights="pissa_niter_4"))
    assert module.lora.init_lora_weights == "pissa_niter_4"
    module.configure_model()
    assert all(type(a) is ResidualLinear for _, a in named_adapters(module.model))


@pytest.mark.parametrize("start", STARTS)
def test_rank_above_what_a_layer_has_is_refused_before_anything_is_placed(start: str, tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "base")
    module: Any = compose(start, "sft")(str(folder), lora=LoRAConfig(r=17))
    with pytest.raises(ValueError, match=r"lora\.r is 17, but the weight of model\.layers\.0\.self_attn\.k_proj"):
        module.configure_model()
    assert not list(named_adapters(module.model))


def test_weight_of_low_rank_is_no_trouble() -> None:
    base = nn.Linear(6, 5, bias=False)
    with torch.no_grad():
        base.weight.copy_(torch.ones(5, 6))
    for start in STARTS:
        made = ResidualLinear(base, LoRAConfig(r=3, init_lora_weights=start))  # type: ignore[arg-type]
        assert all(p.isfinite().all() for p in made.parameters())
        made(torch.randn(2, 6)).sum().backward()
        assert made.lora_a["default"].grad.isfinite().all()


@pytest.mark.parametrize("start", STARTS)
def test_sets_share_a_base_that_is_never_changed(start: str, tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "base")
    module: Any = compose(start, "sft")(str(folder), lora=LoRAConfig(r=2), lr=1e-2)
    module.configure_model()
    before = {n: p.clone() for n, p in tiny("llama").named_parameters()}
    add_adapter(module.model, "second")
    quick_trainer(tmp_path, max_steps=3).fit(module, loader("sft", 3))
    now = {n.replace(".base.", "."): p for n, p in module.model.named_parameters()}
    assert all(torch.equal(now[n], p) for n, p in before.items())
    with disabled(module):
        base = outputs(module, batch("sft"))
    module.model.eval()
    assert not same(outputs(module, batch("sft")), base, 1e-4)
    from lit_peft import adapters

    with adapters(module, "second"):
        assert torch.equal(outputs(module, batch("sft")), base)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("start", STARTS)
def test_saved_as_plain_lora_that_peft_loads_on_the_untouched_base(
    start: str, rslora: bool, kind: str, tmp_path: Path
) -> None:
    folder = save_tiny(kind, tmp_path / "base")
    ending = "c_fc" if kind == "gpt2" else "q_proj"
    config = LoRAConfig(r=4, alpha=6, use_rslora=rslora, rank_pattern={ending: 3}, alpha_pattern={ending: 5})
    module: Any = compose(start, "sft")(str(folder), lora=config)
    module.configure_model()
    shake(module)
    module.save_adapter(tmp_path / "saved")
    written = json.loads((tmp_path / "saved/adapter_config.json").read_text())
    factor = math.sqrt(2) if rslora else 2
    assert (written["r"], written["lora_alpha"]) == (8, factor * 6)
    assert list(written["rank_pattern"].values()) == [6]
    assert list(written["alpha_pattern"].values()) == [factor * 5]
    ids = batch("sft")["input_ids"].clamp_min(8)
    module.eval()
    expected = module.model(ids).logits
    theirs = peft.PeftModel.from_pretrained(tiny(kind), str(tmp_path / "saved")).eval()
    torch.testing.assert_close(theirs(ids).logits, expected, rtol=1e-5, atol=5e-6)
    again: Any = compose(start, "sft")(str(folder), adapter=str(tmp_path / "saved"))
    again.configure_model()
    again.eval()
    with torch.no_grad():  # recorded, layers sum in another order
        torch.testing.assert_close(again.model(ids).logits, module.model(ids).logits, rtol=1e-6, atol=1e-6)
    assert again.lora.init_lora_weights == "loaded"
    # into the same form it goes too: what a callback that goes back to the best step does
    module.load_adapter(tmp_path / "saved")
    torch.testing.assert_close(module.model(ids).logits, expected, rtol=1e-5, atol=2e-6)


def test_peft_starts_alike(tmp_path: Path) -> None:
    """PEFT takes the start out of the base; training from there is the same."""
    config = peft.LoraConfig(r=3, lora_alpha=6, init_lora_weights="pissa", target_modules=["q_proj", "down_proj"])
    theirs = peft.get_peft_model(tiny("llama"), config)
    folder = save_tiny("llama", tmp_path / "base")
    ours: Any = compose("pissa", "sft")(
        str(folder), lora=LoRAConfig(r=3, alpha=6, target_modules=["q_proj", "down_proj"])
    )
    ours.configure_model()
    ids = batch("sft")["input_ids"].clamp_min(8)
    weights = torch.randn(*ids.shape, 128)
    found = []
    for model, key in ((theirs, "lora_B"), (ours.model, "lora_b.")):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        (model(ids).logits * weights).sum().backward()
        assert any(key in n for n, p in model.named_parameters() if p.grad is not None)
        optimizer.step()
        found.append(model(ids).logits.detach())
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert not same(found[1], tiny("llama")(ids).logits, 1e-2)


@pytest.mark.parametrize("start", STARTS)
def test_checkpoint_of_a_run_that_started_from_a_folder_loads(start: str, tmp_path: Path) -> None:
    """The variant adds nothing to weights that came from a file, when they come back from a checkpoint either."""
    from lit_peft import load

    folder = save_tiny("llama", tmp_path / "base")
    first: Any = compose(start, "sft")(str(folder), lora=LoRAConfig(r=2))
    first.configure_model()
    shake(first)
    first.save_adapter(tmp_path / "saved")
    second: Any = compose(start, "sft")(str(folder), adapter=str(tmp_path / "saved"))
    trainer = quick_trainer(tmp_path, max_steps=2)
    trainer.fit(second, loader("sft", 2))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    third = load(tmp_path / "a.ckpt", device="cpu")
    assert torch.equal(outputs(third, batch("sft")), outputs(second, batch("sft")))
