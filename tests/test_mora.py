"""MoRA against a float64 reference written from the paper, files of the fork, and what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lit_peft import LoRAConfig, MoRAConfig, load, place, routed
from lit_peft.adapter import innermost, named_adapters
from lit_peft.low_rank import square
from lit_peft.methods.lora import LoRALinear
from lit_peft.methods.mora import MoRALinear
from lit_peft.named import add_adapter
from lit_peft.zoo import compose
from tests.models import save_tiny

TYPES = (1, 2, 3, 4, 6)
SHAPES = [(64, 64), (64, 172), (172, 64), (100, 60), (64, 96), (48, 48), (33, 70)]


def groups(length: int, size: int) -> list[list[int]]:
    """Neighbours in `size` groups, the first ones larger by one."""
    few, more = divmod(length, size)
    found, start = [], 0
    for j in range(size):
        end = start + few + (1 if j < more else 0)
        found.append(list(range(start, end)))
        start = end
    return found


def reference(m: Tensor, x: Tensor, out: int, kind: int) -> Tensor:
    """Paper, section 3.2, entry by entry: widen(M narrow(x)) for one vector x, in float64."""
    size, inputs = m.shape[0], x.shape[0]
    chunks = math.ceil(inputs / size)
    padded = [x[i % inputs] for i in range(chunks * size)]
    if kind == 6:
        rows = []
        for position in range(chunks):
            chunk = padded[position * size : (position + 1) * size]
            turned: list[Any] = [None] * size
            for j in range(size // 2):
                angle = position * 10000.0 ** (-2 * j / size)
                a, b = chunk[j], chunk[j + size // 2]
                turned[j] = a * math.cos(angle) - b * math.sin(angle)
                turned[j + size // 2] = b * math.cos(angle) + a * math.sin(angle)
            rows.append(m @ torch.stack(turned))
        whole = torch.cat(rows)
        return torch.stack([whole[a % len(whole)] for a in range(out)])
    if kind in (1, 4):
        slots = [sum(padded[j::size][1:], padded[j]) for j in range(size)]
    else:
        slots = [torch.stack([x[i] for i in group]).sum() for group in groups(inputs, size)]
    h = m @ torch.stack(slots)
    if kind in (1, 3):
        return torch.stack([h[a % size] for a in range(out)])
    return torch.stack([h[j] for j, group in enumerate(groups(out, size)) for _ in group])


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_gradients_and_merge_equal_the_reference(shape: tuple[int, int], kind: int) -> None:
    wide, tall = shape
    for r in (1, 3):
        config = MoRAConfig(r=r, mora_type=kind)  # type: ignore[arg-type]
        layer = MoRALinear(nn.Linear(wide, tall), config)
        layer.base.requires_grad_(False)
        with torch.no_grad():
            layer.mora_m["default"].normal_()
        m = layer.mora_m["default"].detach().double().requires_grad_()
        x = torch.randn(2, wide, dtype=torch.float64, requires_grad=True)
        w = torch.randn(2, tall, dtype=torch.float64)
        base = layer.base.weight.double(), layer.base.bias.double()
        expected = torch.stack([base[0] @ row + base[1] + reference(m, row, tall, kind) for row in x])
        (expected * w).sum().backward()
        mine = x.detach().float().requires_grad_()
        found = layer(mine)
        (found * w.float()).sum().backward()
        for a, b in (
            (found, expected),
            (mine.grad, x.grad),
            (layer.mora_m["default"].grad, m.grad),
        ):
            assert (a - b).abs().max() < 1e-5 * max(1.0, float(b.abs().max()))  # type: ignore[operator, union-attr]
        merged = layer.merge()
        assert (merged(mine) - expected).abs().max() < 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rank_of_the_update(shape: tuple[int, int], kind: int) -> None:
    """Types 1 to 4: r̂; type 6: full."""
    wide, tall = shape
    size = square.size(wide, tall, 2, kind)
    change = square.delta(torch.randn(size, size, dtype=torch.float64), wide, tall, kind)
    assert torch.linalg.matrix_rank(change) == (min(wide, tall) if kind == 6 else size)


def test_size_is_the_closed_formula() -> None:
    """Llama-2-7B and SmolLM2-135M, r = 8, every linear layer."""
    llama = 32 * (4 * square.size(4096, 4096, 8, 6) ** 2 + 3 * square.size(4096, 11008, 8, 6) ** 2)
    assert llama == 20_014_592
    widths = [(576, 576)] * 2 + [(576, 192)] * 2 + [(576, 1536)] * 3
    assert 30 * sum(square.size(a, b, 8, 6) ** 2 for a, b in widths) == 2_439_000
    assert square.size(64, 64, 256, 1) == 181
    assert square.size(64, 64, 256, 6) == 180


def test_the_largest_rank_fits_and_the_next_does_not() -> None:
    for wide, tall in [*SHAPES, (4096, 4096), (4096, 11008), (8, 8), (5, 1000), (1, 1)]:
        for kind in TYPES:
            most = square.largest_rank(wide, tall, kind)
            assert square.size(wide, tall, most + 1, kind) > min(wide, tall)
            assert most == 0 or square.size(wide, tall, most, kind) <= min(wide, tall)


@pytest.mark.parametrize("kind", TYPES)
def test_conv1d_as_linear(kind: int) -> None:
    conv, linear = Conv1D(20, 30), nn.Linear(30, 20)
    with torch.no_grad():
        linear.weight.copy_(conv.weight.t())
        linear.bias.copy_(conv.bias)
    config = MoRAConfig(r=2, mora_type=kind)  # type: ignore[arg-type]
    pair = MoRALinear(conv, config), MoRALinear(linear, config)
    with torch.no_grad():
        pair[0].mora_m["default"].normal_()
        pair[1].mora_m["default"].copy_(pair[0].mora_m["default"])
    x = torch.randn(4, 3, 30)
    assert torch.allclose(pair[0](x), pair[1](x), atol=1e-5)
    assert torch.allclose(pair[0].merge()(x), pair[1].merge()(x), atol=1e-5)


@pytest.mark.parametrize("kind", [1, 2, 6])
def test_rows_are_routed(kind: int) -> None:
    """Each row gets the set that it asks for; a set that no row asks for gets no row."""
    model = nn.Sequential(nn.Linear(16, 10))
    place(model, ["0"], lambda base: MoRALinear(base, MoRAConfig(r=1, mora_type=kind)))  # type: ignore[arg-type]
    add_adapter(model, "b")
    add_adapter(model, "c")
    layer = model[0]
    assert isinstance(layer, MoRALinear)
    for parameter in layer.mora_m.values():
        nn.init.normal_(parameter)
    x = torch.randn(3, 5, 16)
    with routed(model, ["b", None, "default"]):
        found = model(x)
    y = layer.base(x)
    expected = [layer.change("b", x[:1], y[:1]), y[1:2], layer.change("default", x[2:], y[2:])]
    assert torch.allclose(found, torch.cat(expected), atol=1e-6)
    assert layer.change("c", x[:0], y[:0]).shape == (0, 5, 10)


def test_half_precision_and_deepcopy() -> None:
    layer = MoRALinear(nn.Linear(24, 16, dtype=torch.bfloat16), MoRAConfig(r=2))
    nn.init.normal_(layer.mora_m["default"])
    assert layer.mora_m["default"].dtype == torch.float32
    x = torch.randn(5, 24).bfloat16()
    assert layer(x).dtype == torch.bfloat16
    expected = layer(x).float()
    assert (layer.merge()(x).float() - expected).abs().max() < 2e-2 * expected.abs().max()
    assert [key for key in layer.state_dict() if "turn" in key] == [], "the angles are in no file"


@pytest.mark.parametrize("kind", [1, 6])
def test_on_a_quantised_base(kind: int) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    base = bnb.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32).to("cpu")
    layer = MoRALinear(base, MoRAConfig(r=2, mora_type=kind))  # type: ignore[arg-type]
    nn.init.normal_(layer.mora_m["default"])
    x = torch.randn(3, 64)
    size = layer.mora_m["default"].shape[0]
    delta = square.delta(layer.mora_m["default"].detach(), 64, 64, kind)
    assert size == square.size(64, 64, 2, kind)
    assert torch.allclose(layer(x), base(x) + x @ delta.t(), atol=1e-4)
    with pytest.raises(TypeError, match=r"Cannot merge into a Linear4bit layer\. Load the base unquantised"):
        layer.merge()


# Files ---------------------------------------------------------------------------------------------------------------


def fork_folder(folder: Path, base: Path, kind: int, **more: Any) -> dict[str, Tensor]:
    """A folder as kongds/MoRA's PEFT writes it: peft_type LORA, use_mora, and M twice."""
    folder.mkdir()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "revision": None,
        "inference_mode": True,
        "auto_mapping": None,
        "r": 3,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
        "loftq_config": {},
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": ["q_proj", "down_proj"],
        "use_mora": True,
        "mora_type": kind,
        **more,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    matrices: dict[str, Tensor] = {}
    tensors: dict[str, Tensor] = {}
    for layer in range(2):
        for name, wide, tall in (("self_attn.q_proj", 32, 32), ("mlp.down_proj", 64, 32)):
            size = square.size(wide, tall, 3, kind)
            m = torch.randn(size, size) * 0.2
            path = f"model.layers.{layer}.{name}"
            matrices[path] = m
            tensors[f"base_model.model.{path}.lora_A.weight"] = m
            tensors[f"base_model.model.{path}.lora_B.weight"] = m.clone()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return matrices


@pytest.mark.parametrize("kind", TYPES)
def test_reads_the_forks_files(kind: int, tmp_path: Path) -> None:
    base = save_tiny("llama", tmp_path / "base")
    matrices = fork_folder(tmp_path / "fork", base, kind)
    module = load(tmp_path / "fork")
    assert type(module).__name__ == "MoRASFT"
    assert module.mora.mora_type == kind
    found = dict(named_adapters(module.model))
    assert found.keys() == matrices.keys()
    for path, adapter in found.items():
        linear = innermost(adapter)
        assert isinstance(linear, nn.Linear)
        x = torch.randn(linear.in_features)
        expected = linear.weight.double() @ x.double()
        expected = expected + reference(matrices[path].double(), x.double(), linear.out_features, kind)
        assert (adapter(x) - expected).abs().max() < 1e-5 * max(1.0, float(expected.abs().max()))
    module.save_adapter(tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["version"], config["r"], config["mora_type"]) == ("LIT_MORA", 1, 3, kind)
    ids = torch.arange(8, 20)[None]
    assert torch.equal(load(tmp_path / "ours").model(ids).logits, module.model(ids).logits)


def test_what_is_wrong_with_a_file_is_said(tmp_path: Path) -> None:
    base = save_tiny("llama", tmp_path / "base")
    fork_folder(tmp_path / "fork", base, 1)
    with pytest.raises(ValueError, match=r"is MoRA .*--method mora"):
        compose("lora", "sft")(str(base), adapter=str(tmp_path / "fork")).configure_model()
    fork_folder(tmp_path / "dora", base, 1, use_dora=True)
    with pytest.raises(ValueError, match="use_dora=True"):
        load(tmp_path / "dora")
    file = tmp_path / "fork" / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if "lora_B" in key)
    save_file({**tensors, key: tensors[key] + 1}, file)
    with pytest.raises(ValueError, match="differs from its lora_A"):
        load(tmp_path / "fork")
    module = compose("mora", "sft")(str(base), mora={"r": 2})
    module.configure_model()
    module.save_adapter(tmp_path / "ours")  # type: ignore[operator]
    config = tmp_path / "ours" / "adapter_config.json"
    config.write_text(config.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(ValueError, match="version 2 of LIT_MORA"):
        load(tmp_path / "ours")


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"r": 0}, "mora.r is 0"),
        ({"r": -2}, "mora.r is -2"),
        ({"mora_type": 5}, "mora_type is 5; it must be one of"),
        ({"cycle": [1, 6]}, r"mora.cycle is \[1, 6\]"),
        ({"cycle": []}, r"mora.cycle is \[\]"),
        ({"dropout": 1.0}, "mora.dropout is 1.0"),
        ({"target_modules": []}, "mora.target_modules is empty"),
    ],
)
def test_values_out_of_range(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        MoRAConfig(**settings)


def test_a_rank_too_large_names_the_layer_and_the_largest(tmp_path: Path) -> None:
    base = save_tiny("llama", tmp_path / "base")
    module = compose("mora", "sft")(str(base), mora={"r": 7})
    with pytest.raises(ValueError, match=r"mora.r is 7, .* model.layers.0.self_attn.k_proj .*largest possible r .* 6"):
        module.configure_model()
    assert not list(named_adapters(module.model)), "no layer was touched"  # type: ignore[arg-type]
    compose("mora", "sft")(str(base), mora={"r": 6}).configure_model()


def test_same_number_of_weights_as_lora() -> None:
    linear = nn.Linear(4096, 1024, device="meta")
    lora = sum(p.numel() for _, p in LoRALinear(linear, LoRAConfig(r=8)).own_parameters())
    mora = sum(p.numel() for _, p in MoRALinear(linear, MoRAConfig(r=8)).own_parameters())
    assert abs(mora - lora) < 0.01 * lora
