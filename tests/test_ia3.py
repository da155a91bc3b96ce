"""(IA)3: against the paper's formula in float64, and against the real HF PEFT both ways."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lit_peft import IA3, IA3Config, LoRA, adapters, add_adapter, hub, place, routed
from lit_peft.adapter import merge, named_adapters
from lit_peft.methods.ia3 import IA3Linear
from lit_peft.methods.ia3_sites import PEFT_TARGETS, Scaled, t_few
from lit_peft.sites import geometry
from tests.models import CONFIGS, tiny
from tests.tiny_adapted import KINDS, TASK_TYPES, Tiny, base_model, check_equal, in_peft, logits, placed, shake


class IA3Tiny(IA3, Tiny): ...


class IA3LoRATiny(IA3, LoRA, Tiny): ...


X = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(1))


def one(layer: nn.Module, **config: Any) -> Any:
    adapter = IA3Linear(layer, Scaled(**config))
    with torch.no_grad():
        for _, parameter in adapter.own_parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(2)) + 0.5)
    return adapter


def linear(out: int = 6) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(8, out)


def conv1d(out: int = 6) -> Conv1D:
    torch.manual_seed(0)
    layer = Conv1D(out, 8)
    nn.init.normal_(layer.bias)
    return layer


def full(layer: IA3Linear) -> Tensor:
    """The factors over the whole side, written from the layouts: queries untouched, keys and values scaled."""
    config, trained = layer.configs["default"], layer.ia3_l["default"].detach().double()
    if not config.scaled:
        return trained
    if config.groups == 1:
        return torch.cat([torch.ones(6 - len(trained), dtype=torch.double), trained])
    per = len(trained) // config.groups
    pieces = [
        torch.cat([torch.ones(3 - per, dtype=torch.double), trained[i * per :][:per]]) for i in range(config.groups)
    ]
    return torch.cat(pieces)


SIDES = {"output": {}, "input": {"feedforward": True}, "tail": {"scaled": 4}, "by head": {"scaled": 4, "groups": 2}}


@pytest.mark.parametrize("make", [linear, conv1d])
@pytest.mark.parametrize("config", SIDES.values(), ids=SIDES)
def test_formula_gradient_and_merge(make: Any, config: dict[str, Any]) -> None:
    layer = one(make(), **config)
    weight = layer.base.weight.detach().double()
    weight = weight if make is linear else weight.t()
    factors = full(layer).requires_grad_()
    x = X.double()
    if config.get("feedforward"):
        expected = (x * factors) @ weight.T + layer.base.bias.double()
    else:
        expected = (x @ weight.T + layer.base.bias.double()) * factors
    found = layer(X)
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-6)
    expected.sin().sum().backward()
    found.sin().sum().backward()
    gradient = layer.ia3_l["default"].grad.double()
    assert factors.grad is not None
    wanted = factors.grad
    if config.get("groups"):
        wanted = wanted.view(2, 3)[:, 1:].flatten()
    elif config.get("scaled"):
        wanted = wanted[2:]
    torch.testing.assert_close(gradient, wanted, atol=1e-5, rtol=1e-5)
    model = nn.Sequential(layer)
    merged = merge(copy.deepcopy(model))
    assert type(merged[0]) is type(layer.base)
    torch.testing.assert_close(merged(X), model(X), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        merge(copy.deepcopy(model).bfloat16())(X.bfloat16()).float(), found, atol=5e-2, rtol=2e-2
    )


def test_small_factors_are_not_rounded_away_in_bfloat16() -> None:
    layer = one(linear().bfloat16())
    with torch.no_grad():
        layer.ia3_l["default"].fill_(1.003)  # becomes 1 in bfloat16
    x = X.bfloat16()
    expected = (layer.base(x).float() * 1.003).bfloat16()
    assert torch.equal(layer(x), expected)
    assert not torch.equal(layer(x), layer.base(x))


def test_several_sets_multiply_and_rows_are_routed() -> None:
    for config in SIDES.values():
        layer = one(linear(), **config)
        model = nn.Sequential(layer)
        add_adapter(model, "two")
        with torch.no_grad():
            layer.ia3_l["two"].copy_(torch.rand(layer.ia3_l["two"].shape) + 0.5)
        with adapters(model, "default", "two"):
            both = model(X)
        factors = layer.factors("default") * layer.factors("two")
        inner = config.get("feedforward")
        torch.testing.assert_close(both, layer.base(X * factors) if inner else layer.base(X) * factors)
        names = ["two", None, "default", ("default", "two"), "two"]
        with routed(model, names):
            mixed = model(X)
        for row, name in enumerate(names):
            with adapters(model, *(() if name is None else (name,) if isinstance(name, str) else name)):
                torch.testing.assert_close(mixed[row], model(X[row : row + 1])[0])
        merged = merge(copy.deepcopy(model), ("default", "two"))
        torch.testing.assert_close(merged(X), both, atol=1e-5, rtol=1e-5)
        add_adapter(model, "other")
        with pytest.raises(ValueError, match="scales the other side"):
            layer.add("wrong", Scaled(feedforward=not inner))


PLACED = {
    "llama": {"self_attn.k_proj": 16, "self_attn.v_proj": 16, "mlp.down_proj": 64},
    "qwen2": {"self_attn.k_proj": 16, "self_attn.v_proj": 16, "mlp.down_proj": 64},
    "gemma": {"self_attn.k_proj": 16, "self_attn.v_proj": 16, "mlp.down_proj": 64},
    "gpt2": {"attn.c_attn": 64, "mlp.c_proj": 128},
    "gpt_neox": {"attention.query_key_value": 64, "mlp.dense_4h_to_h": 64},
    "bert": {"attention.self.key": 32, "attention.self.value": 32, "output.dense": 64},
    "roberta": {"attention.self.key": 32, "attention.self.value": 32, "output.dense": 64},
}


@pytest.mark.parametrize("kind", PLACED)
def test_t_few_places_by_role(kind: str) -> None:
    model = tiny(kind, "base")
    found = t_few(model)
    place(model, found, lambda base, config: IA3Linear(base, config))
    counts = {path: sum(p.numel() for _, p in a.own_parameters()) for path, a in named_adapters(model)}
    stack = "encoder.layer" if "bert" in kind else "layers" if kind != "gpt2" else "h"
    assert counts == {f"{stack}.{i}.{leaf}": size for i in range(2) for leaf, size in PLACED[kind].items()}
    shape = geometry(model)
    assert sum(counts.values()) == shape.layers * (2 * shape.kv_heads * shape.head_dim + shape.feed_forward)
    assert {path for path, scaled in found.items() if scaled.feedforward} == {
        p for p in counts if p.endswith(("down_proj", "mlp.c_proj", "dense_4h_to_h", "output.dense"))
    }


def test_t_few_on_t5_takes_cross_attention_too() -> None:
    found = t_few(tiny("t5"))
    decoder = [path.partition("layer.")[2] for path in found if path.startswith("decoder.block.1.")]
    expected = [f"{i}.{block}.{leaf}" for i, block in ((0, "SelfAttention"), (1, "EncDecAttention")) for leaf in "kv"]
    assert decoder == [*expected, "2.DenseReluDense.wo"]


def test_neox_scales_keys_and_values_of_every_head() -> None:
    """What the fused layer yields is what the attention reads: only keys and values differ from the base's."""
    model: Any = tiny("gpt_neox")
    layer = model.gpt_neox.layers[0].attention.query_key_value
    plain = layer(X.new_ones(1, 2, 32)).view(1, 2, 4, 3, 8)
    place(model, t_few(model), lambda base, config: IA3Linear(base, config))
    adapter = model.gpt_neox.layers[0].attention.query_key_value
    with torch.no_grad():
        adapter.ia3_l["default"].fill_(2.0)
    scaled = adapter(X.new_ones(1, 2, 32)).view(1, 2, 4, 3, 8)  # (batch, length, heads, q k v, width)
    torch.testing.assert_close(scaled[..., 0, :], plain[..., 0, :])
    torch.testing.assert_close(scaled[..., 1:, :], 2 * plain[..., 1:, :])


class Unknown(nn.Module):
    """A model of nobody's: its layers are found by looking."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        block = {"attn": nn.ModuleDict({name: nn.Linear(8, 8) for name in names}), "fc1": nn.Linear(8, 16)}
        self.layers = nn.ModuleList(
            [nn.ModuleDict({**copy.deepcopy(block), "fc2": nn.Linear(16, 8)}) for _ in range(2)]
        )


def test_unknown_models_by_structure_or_one_line() -> None:
    found = t_few(Unknown("q_proj", "k_proj", "v_proj"))
    assert [path for path in found if path.startswith("layers.0")] == [
        "layers.0.attn.k_proj",
        "layers.0.attn.v_proj",
        "layers.0.fc2",
    ]
    with pytest.raises(ValueError, match=r"Cannot tell keys and values among .*'mixed'.* Set ia3.target_modules"):
        t_few(Unknown("mixed", "out"))
    with pytest.raises(ValueError, match=r"HF PEFT has no .* for 'Unknown'"):
        IA3Config(placement="peft").sites(Unknown("q_proj"))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "t5", "qwen2", "roberta", "gpt_neox"])
def test_peft_placement_is_pefts(kind: str) -> None:
    """Our table against PEFT's own default, layer by layer and side by side."""
    theirs = peft.get_peft_model(tiny(kind, "base"), peft.IA3Config())
    layers = {path.removeprefix("base_model.model."): m for path, m in theirs.named_modules() if hasattr(m, "ia3_l")}
    expected = {path: module.is_feedforward for path, module in layers.items() if hasattr(module, "base_layer")}
    found = IA3Config(placement="peft").sites(tiny(kind, "base"))
    assert {path: scaled.feedforward for path, scaled in found.items()} == expected
    assert not any(scaled.scaled for scaled in found.values())


def test_table_is_pefts() -> None:
    from peft.utils import constants

    targets = constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
    inner = constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
    for kind, (names, feedforward) in PEFT_TARGETS.items():
        assert sorted(names) == sorted(targets[kind]), kind
        assert sorted(feedforward) == sorted(inner[kind]), kind
    assert {config for config, _ in CONFIGS.values()} <= PEFT_TARGETS.keys()


OURS: dict[str, dict[str, Any]] = {
    "t-few": {},
    "peft": {"placement": "peft"},
    "one layer": {"layers_to_transform": 1},
    "targets": {"target_modules": r".*\.0\..*(k|k_proj|key|c_attn)"},
}


@pytest.mark.parametrize("settings", OURS.values(), ids=OURS)
@pytest.mark.parametrize("kind", KINDS)
def test_peft_reads_ours(tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    module = placed(IA3Tiny, kind, ia3=IA3Config(**settings))
    shake(module, size=0.3)
    module.save_adapter(tmp_path / "a")
    assert (logits(module.model, kind) - logits(base_model(kind), kind)).abs().max() > 1e-2
    check_equal(module.model, in_peft(tmp_path / "a", kind), kind)
    again = placed(IA3Tiny, kind, adapter=str(tmp_path / "a"))
    assert torch.equal(logits(again.model, kind), logits(module.model, kind))
    module.load_adapter(tmp_path / "a")  # into the placement that wrote it
    assert torch.equal(logits(again.model, kind), logits(module.model, kind))


THEIRS: dict[str, Any] = {
    "default": {},
    "regex": {"target_modules": r".*\.1\..*\.(k|v|k_proj|v_proj|key|value|c_attn)", "feedforward_modules": []},
    "all linear": {"target_modules": "all-linear", "feedforward_modules": r".*\.(wo|down_proj|mlp\.c_proj)"},
}


@pytest.mark.parametrize("settings", THEIRS.values(), ids=THEIRS)
@pytest.mark.parametrize("kind", KINDS)
def test_we_read_pefts(tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    config = peft.IA3Config(task_type=TASK_TYPES[kind], **settings)
    model = peft.get_peft_model(base_model(kind), config).eval()
    shake(model, 2, size=0.3)
    model.save_pretrained(tmp_path / "a")
    module = placed(IA3Tiny, kind, adapter=str(tmp_path / "a"), check_base=False)
    check_equal(module.model, model, kind)


def test_stacked_over_lora_merges_exactly() -> None:
    module = placed(IA3LoRATiny, "gpt2")
    shake(module, size=0.2)
    expected = logits(module.model, "gpt2")
    merged = copy.deepcopy(module).merge_adapters()
    assert (logits(merged, "gpt2") - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    for wrong, message in (
        ({"placement": "paper"}, "must be t-few or peft"),
        ({"target_modules": []}, "ia3.target_modules is empty"),
        ({"feedforward_modules": ["down_proj"]}, "Give both, or neither"),
    ):
        with pytest.raises(ValueError, match=message):
            IA3Config(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"names none of ia3.target_modules"):
        placed(IA3Tiny, "llama", ia3=IA3Config(target_modules=["k_proj"], feedforward_modules=["down_proj"]))
    with pytest.raises(ValueError, match="names layer 7"):
        placed(IA3Tiny, "llama", ia3=IA3Config(layers_to_transform=7))
    whole = placed(IA3Tiny, "gpt2", ia3=IA3Config(placement="peft"))
    shake(whole)
    whole.save_adapter(tmp_path / "a")
    with pytest.raises(ValueError, match=r"scales the queries of a fused layer too. Set ia3.placement=peft"):
        placed(IA3Tiny, "gpt2").load_adapter(tmp_path / "a")
    file = tmp_path / "a" / hub.CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), "warp": 3}))
    with pytest.raises(ValueError, match="uses warp=3"):
        placed(IA3Tiny, "gpt2", adapter=str(tmp_path / "a"))


def test_a_quantised_base_trains_but_does_not_merge() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    base = bitsandbytes.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4")
    base.load_state_dict({"weight": torch.randn(64, 64), "bias": torch.randn(64)})
    base.to("cpu")
    layer = IA3Linear(base, Scaled())
    x = torch.randn(2, 64)
    with torch.no_grad():
        layer.ia3_l["default"].fill_(3.0)
    torch.testing.assert_close(layer(x), 3 * base(x))
    layer(x).sum().backward()
    assert layer.ia3_l["default"].grad is not None
    with pytest.raises(TypeError, match="Linear4bit"):
        layer.merge()
