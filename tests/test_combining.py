"""Adapters combined by weights: against HF PEFT's `add_weighted_adapter`, and against the formulas in float64."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_peft import IA3, BitFit, BitFitConfig, IA3Config, LoRA, LoRAConfig, activate, adapters, combine_adapters, place
from lit_peft.adapter import Adapter, adapter_names, named_adapters
from lit_peft.combining import HOWS, low_rank, weighted
from lit_peft.methods.ia3 import IA3Linear
from lit_peft.methods.lora import LoRALinear
from tests.models import tiny
from tests.tiny_adapted import Tiny, in_peft, logits, placed, shake


class LoRATiny(LoRA, Tiny): ...


class IA3Tiny(IA3, Tiny): ...


class BitFitTiny(BitFit, Tiny): ...


class Stack(LoRA, BitFit, Tiny): ...


def moved(module: Any) -> Any:
    shake(module, 3, 0.2)
    return module


def pair(tmp_path: Path, kind: str, *configs: LoRAConfig) -> tuple[Any, Any]:
    """Two sets of LoRA on one base, here and in the real PEFT."""
    module = placed(LoRATiny, kind, lora=configs[0])
    module.add_adapter("two", lora=configs[1])
    moved(module)
    module.save_adapter(tmp_path / "one")
    module.save_adapter(tmp_path / "two", "two")
    theirs: Any = in_peft(tmp_path / "one", kind)
    theirs.load_adapter(tmp_path / "two", "two")
    return module, theirs


EXACT = {
    "linear": {},
    "cat": {},
    "svd": {},
    "svd of a rank": {"rank": 2},
    "ties": {"density": 0.4},
    "ties_svd": {"density": 0.4},
}


@pytest.mark.parametrize("how", EXACT)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_lora_as_in_peft(tmp_path: Path, kind: str, how: str) -> None:
    module, theirs = pair(tmp_path, kind, LoRAConfig(r=3), LoRAConfig(r=3, alpha=9))
    rule, options = how.split()[0], EXACT[how]
    module.combine_adapters(["default", "two"], [0.7, -0.4], "both", rule, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.add_weighted_adapter(
            ["default", "two"], [0.7, -0.4], "both", rule, svd_rank=options.get("rank"), density=options.get("density")
        )
    theirs.set_adapter("both")
    with adapters(module, "both"):
        found, expected = logits(module.model, kind), logits(theirs, kind)
    with adapters(module, "default"):
        assert (logits(module.model, kind) - expected).abs().max() > 1e-2
    tolerance = 1e-4 if "rank" in options else 2e-5  # PEFT cuts off in float32, where the next direction is near
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def update(layer: Any, name: str) -> Tensor:
    return layer.configs[name].scale * layer.lora_b[name].double() @ layer.lora_a[name].double()


@pytest.mark.parametrize("rslora", [False, True])
def test_cat_and_svd_are_the_weighted_sum_of_updates(rslora: bool) -> None:
    torch.manual_seed(0)
    config = LoRAConfig(r=2, use_rslora=rslora)
    model = nn.Sequential(nn.Linear(12, 9))
    place(model, ["0"], lambda base: LoRALinear(base, config))
    layer: Any = model[0]
    layer.add("two", LoRAConfig(r=3, alpha=5))
    moved(model)
    expected = (0.5 * update(layer, "default") - 2 * update(layer, "two")).detach()
    combine_adapters(model, ["default", "two"], [0.5, -2.0], "sum", "cat")
    assert layer.configs["sum"].r == 5
    assert layer.configs["sum"].scale == pytest.approx(1.0)
    torch.testing.assert_close(update(layer, "sum"), expected, atol=1e-5, rtol=1e-5)
    combine_adapters(model, ["default", "two"], [0.5, -2.0], "closest", "svd", rank=3)
    u, s, v = torch.linalg.svd(expected)
    best = u[:, :3] * s[:3] @ v[:3]
    torch.testing.assert_close(update(layer, "closest"), best, atol=1e-5, rtol=1e-5)
    combine_adapters(model, ["default", "two"], [0.5, -2.0], "whole", "svd", rank=5)
    torch.testing.assert_close(update(layer, "whole"), expected, atol=1e-5, rtol=1e-5)


def test_dare_drops_at_random_scales_up_and_repeats() -> None:
    tensors = [torch.ones(200, 100), 3 * torch.ones(200, 100)]
    draw = lambda seed: weighted(  # noqa: E731
        tensors, [1.0, 0.5], "dare_linear", density=0.3, generator=torch.Generator().manual_seed(seed)
    )
    first = draw(0)
    assert torch.equal(first, draw(0))
    assert not torch.equal(first, draw(1))
    assert {round(value, 4) for value in first.unique().tolist()} == {0.0, 3.3333, 5.0, 8.3333}
    assert float(first.mean()) == pytest.approx(2.5, rel=0.03)  # the expectation is that of the whole sum
    assert float((first == 0).float().mean()) == pytest.approx(0.49, abs=0.02)
    everything = weighted(tensors, [1.0, 0.5], "dare_linear", density=1.0)
    assert torch.equal(everything, weighted(tensors, [1.0, 0.5], "linear"))


def test_ties_by_hand() -> None:
    one = torch.tensor([4.0, -3.0, 0.1, 2.0])
    two = torch.tensor([-1.0, -2.0, 5.0, 3.0])
    # the largest half of each: [4 -3 0 0] and [0 0 5 3]; all agree with the sign of their sum; averaged by who is there
    found = weighted([one, two], [1.0, 2.0], "ties", density=0.5)
    torch.testing.assert_close(found, torch.tensor([4.0, -3.0, 10.0, 6.0]))
    # everything kept: signs of [3 -5 5.1 5]; 'two' is left out in the first place
    found = weighted([one, two], [1.0, 1.0], "ties", density=1.0)
    torch.testing.assert_close(found, torch.tensor([4.0, -2.5, 2.55, 2.5]))
    dare = weighted([one, two], [1.0, 1.0], "dare_ties", density=1.0)
    assert torch.equal(dare, found)


def test_ia3_as_in_peft(tmp_path: Path) -> None:
    module = placed(IA3Tiny, "llama")
    module.add_adapter("two")
    moved(module)
    module.save_adapter(tmp_path / "one")
    module.save_adapter(tmp_path / "two", "two")
    theirs: Any = in_peft(tmp_path / "one", "llama")
    theirs.load_adapter(tmp_path / "two", "two")
    theirs.add_weighted_adapter(["default", "two"], [0.3, 0.9], "both")
    theirs.set_adapter("both")
    module.combine_adapters(["default", "two"], [0.3, 0.9], "both")
    with adapters(module, "both"):
        found, expected = logits(module.model, "llama"), logits(theirs, "llama")
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_set_that_lacks_a_layer_changes_nothing_there() -> None:
    module = placed(IA3Tiny, "llama")
    module.add_adapter("two", ia3=IA3Config(target_modules=["v_proj"]))
    moved(module)
    module.combine_adapters(["default", "two"], [0.25, 0.75], "both")
    for path, adapter in named_adapters(module.model):
        assert isinstance(adapter, IA3Linear)
        other = adapter.factors("two") if "two" in adapter.configs else torch.ones(())
        torch.testing.assert_close(adapter.factors("both"), 0.25 * adapter.factors("default") + 0.75 * other, msg=path)


def test_bitfit_and_stacks_sum_up() -> None:
    module = placed(Stack, "llama", lora=LoRAConfig(r=2))
    module.add_adapter("two", lora=LoRAConfig(r=2, alpha=4), bitfit=BitFitConfig())
    moved(module)
    module.combine_adapters(["default", "two"], [2.0, -1.0], "both", "linear")
    layer: Any = module.model.model.layers[0].mlp.up_proj
    assert set(layer.configs) == {"default", "two", "both"}
    d = layer.base.bitfit_bias
    torch.testing.assert_close(d["both"], 2 * d["default"] - d["two"])
    with pytest.raises(ValueError, match="'cat' combines low-rank updates only"):
        module.combine_adapters(["default", "two"], [1.0, 1.0], "third", "cat")
    assert adapter_names(module.model) == ["both", "default", "two"]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("cls", [LoRATiny, BitFitTiny, IA3Tiny])
def test_a_combination_is_saved_and_read(tmp_path: Path, cls: type[Any], kind: str) -> None:
    module = placed(cls, kind)
    keyword = cls.method
    module.add_adapter("two", **({"lora": LoRAConfig(r=3)} if keyword == "lora" else {}))
    moved(module)
    module.combine_adapters(["default", "two"], [0.5, 0.5], "both", "cat" if keyword == "lora" else "linear")
    module.save_adapter(tmp_path / "both", "both")
    if keyword != "bitfit":
        fresh: Any = in_peft(tmp_path / "both", kind)
        with adapters(module, "both"):
            assert torch.allclose(logits(module.model, kind), logits(fresh, kind), atol=1e-4)


def test_mistakes_are_one_line_and_change_nothing() -> None:
    class Odd(LoRALinear):
        def change(self, name: str, x: Tensor, y: Tensor) -> Tensor:
            return 2 * super().change(name, x, y)

    module = placed(LoRATiny, "llama", lora=LoRAConfig(r=2))
    module.add_adapter("two", lora=LoRAConfig(r=3))
    two = ["default", "two"]
    cases: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        ((two, [1.0], "new"), {}, "2 adapters and 1 weights"),
        (([], [], "new"), {}, "0 adapters and 0 weights"),
        ((["default", "who"], [1.0, 1.0], "new"), {}, "No adapter is named 'who'"),
        ((two, [1.0, 1.0], "two"), {}, "already has an adapter named 'two'"),
        ((two, [1.0, 1.0], "a.b"), {}, "'a.b' cannot be the name"),
        ((two, [1.0, 1.0], "new", "mix"), {}, r"no way 'mix' to combine adapters. Choose one of linear"),
        ((two, [1.0, 1.0], "new", "linear"), {}, r"needs tensors of one shape.*cat or svd"),
        ((two, [1.0, 1.0], "new", "ties"), {}, "ties needs density"),
        ((two, [1.0, 1.0], "new", "ties"), {"density": 0.0}, "density is 0.0"),
        ((two, [1.0, 1.0], "new", "cat"), {"density": 0.5}, "cat keeps every entry"),
        ((two, [1.0, 1.0], "new", "cat"), {"rank": 4}, "cat fixes the rank itself"),
        ((two, [1.0, 1.0], "new", "svd"), {"rank": 0}, "rank is 0"),
    ]
    for arguments, options, message in cases:
        with pytest.raises(ValueError, match=message) as raised:
            module.combine_adapters(*arguments, **options)
        assert "\n" not in str(raised.value)
    assert adapter_names(module.model) == two
    model = nn.Sequential(nn.Linear(4, 4))
    place(model, ["0"], lambda base: Odd(base, LoRAConfig(r=2)))
    with pytest.raises(TypeError, match=r"linear is not defined for Odd. Let its sets act together: adapters\("):
        combine_adapters(model, ["default"], [1.0], "new")
    assert isinstance(model[0], Adapter)
    assert list(model[0].configs) == ["default"]


def test_every_rule_runs_on_low_ranks() -> None:
    torch.manual_seed(0)
    pairs = [(torch.randn(2, 6), torch.randn(5, 2), 2.0), (torch.randn(2, 6), torch.randn(5, 2), 0.5)]
    for how in HOWS:
        density = 1.0 if how.startswith(("ties", "dare")) else None
        a, b = low_rank(pairs, [1.0, 1.0], how, density=density, generator=torch.Generator())
        assert a.shape[1] == 6
        assert b.shape == (5, a.shape[0])
        if how in ("cat", "dare_linear_svd"):
            total = sum(scale * right @ left for left, right, scale in pairs)
            if how == "cat":
                torch.testing.assert_close(b @ a, total)
            else:
                u, s, v = torch.linalg.svd(total)  # type: ignore[arg-type]
                torch.testing.assert_close(b @ a, u[:, :2] * s[:2] @ v[:2])


def test_the_combination_can_act_by_default() -> None:
    module = placed(LoRATiny, "llama", lora=LoRAConfig(r=2))
    module.add_adapter("two", lora=LoRAConfig(r=3))
    moved(module)
    plain = logits(tiny("llama"), "llama")
    module.combine_adapters(["default", "two"], [1.0, 1.0], "both", "cat")
    with adapters(module, "default", "two"):
        expected = logits(module.model, "llama")
    activate(module, "both")
    assert (logits(module.model, "llama") - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert not torch.allclose(expected, plain, atol=1e-2)
