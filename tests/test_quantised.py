"""NF4 weights: the paper's numbers, products and gradients, storage, reading from files, and what they survive."""

from __future__ import annotations

import copy
import gc
import io
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

from lit_peft import backbone as backbones
from lit_peft.low_rank.linear import LoRALinear
from lit_peft.methods.lora import LoRAConfig
from lit_peft.quantised import linear as nf4
from lit_peft.quantised.linear import NF4Linear
from lit_peft.quantised.model import dequantise, quantisable, quantise, requantisation_error
from lit_peft.weights import count, dense, fold
from tests.models import save_tiny, tiny

SHAPES = [(64, 64), (32, 32), (16, 32), (96, 32), (5, 130), (3, 5), (33, 31), (1, 1), (7, 64), (40, 192)]


def levels() -> Tensor:
    """The 16 levels of NF4: quantiles of a normal distribution (section 3, equation 4), in float64."""
    offset = 0.9677083
    positive = torch.special.ndtri(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -torch.special.ndtri(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    found = torch.cat([negative, torch.zeros(1, dtype=torch.float64), positive]).sort().values
    return found / found.max()


def eight_bit_values() -> Tensor:
    """What the 8-bit codes of the scales mean: signs, powers of ten and midpoints of their fractions, 0 and 1."""
    found = [0.0, 1.0]
    for power in range(7):
        parts = 2**power
        for part in range(parts):
            value = 10.0 ** (power - 6) * (0.1 + 0.9 * (part + 0.5) / parts)
            found += [value, -value]
    return torch.tensor(found, dtype=torch.float64).sort().values


def nearest(x: Tensor, table: Tensor) -> Tensor:
    return table[(x[..., None] - table).abs().argmin(-1)]


def reference(weight: Tensor, double: bool = True) -> Tensor:
    """Quantise and dequantise by the paper, in float64."""
    flat = weight.double().flatten()
    blocks = F.pad(flat, (0, -len(flat) % 64)).view(-1, 64)
    scale = blocks.abs().max(1).values
    codes = nearest(blocks / scale[:, None], levels())
    if double:
        centred = scale - scale.mean()
        groups = F.pad(centred, (0, -len(centred) % 256)).view(-1, 256)
        largest = groups.abs().max(1, keepdim=True).values
        again = nearest(groups / largest.clamp(min=1e-30), eight_bit_values()) * largest
        scale = again.flatten()[: len(scale)] + scale.mean()
    return (codes * scale[:, None]).flatten()[: len(flat)].view(weight.shape)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_weights_are_what_the_paper_says(shape: tuple[int, int], double: bool) -> None:
    weight = draw(*shape)
    found = NF4Linear(weight, double_quant=double).dequantised().double()
    expected = reference(weight, double)
    assert found.shape == weight.shape
    # a scale that lies between two codes may be rounded either way in float32
    apart = (found - expected).abs() > 1e-5
    assert apart.double().mean() <= (0.01 if double else 0.0), f"{int(apart.sum())} of {apart.numel()}"
    if min(shape) > 4:
        error = float((found - weight).norm() / weight.norm())
        assert 0.05 < error < 0.12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes_are_read_and_given_back(dtype: torch.dtype) -> None:
    weight = draw(40, 72, dtype=dtype)
    layer = NF4Linear(weight)
    assert layer.dequantised().dtype == layer.weight.dtype == dtype
    assert torch.allclose(layer.dequantised(torch.float32).double(), reference(weight), atol=1e-5)
    assert torch.equal(layer.dequantised(), layer.dequantised(torch.float32).to(dtype)), "rounded once, at the end"


def test_a_weight_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN or infinite"):
        NF4Linear(torch.full((4, 4), math.nan))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_product_and_gradients(shape: tuple[int, int], bias: bool) -> None:
    weight = draw(*shape)
    layer = NF4Linear(weight, nn.Parameter(draw(shape[0], seed=1)) if bias else None)
    x = draw(2, 3, shape[1], seed=2).requires_grad_()
    upstream = draw(2, 3, shape[0], seed=3)
    y = layer(x)
    y.backward(upstream)
    w = layer.dequantised().double()
    b = layer.bias.detach().double() if bias else 0.0
    assert torch.allclose(y.double(), x.detach().double() @ w.t() + b, atol=1e-4)
    assert x.grad is not None
    assert torch.allclose(x.grad.double(), upstream.double() @ w, atol=1e-4)
    if bias:
        assert torch.allclose(layer.bias.grad.double(), upstream.double().sum((0, 1)), atol=1e-4)
    assert layer.packed.grad is None
    assert not layer.packed.requires_grad


def test_backward_pass_keeps_no_dense_weight() -> None:
    layer, kept = NF4Linear(draw(256, 256)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(draw(2, 256).requires_grad_())
    assert sum(t.nbytes for t in kept) <= layer.packed.nbytes


@pytest.mark.parametrize(("double", "bits"), [(True, 4.127), (False, 4.5)])
def test_bits_for_each_weight(double: bool, bits: float) -> None:
    layer = NF4Linear(draw(1024, 2048), double_quant=double)
    stored = sum(t.nbytes for t in [*layer.parameters(), *layer.buffers()])
    assert stored * 8 / (1024 * 2048) == pytest.approx(bits, rel=1e-3)


def test_bytes_of_a_whole_model() -> None:
    model = tiny("llama", hidden_size=256, intermediate_size=1024)
    layers = quantisable(model)
    numbers = sum(layer.weight.numel() for layer in layers.values())  # type: ignore[union-attr, operator, misc]
    total, before = count(model), {n for n, m in model.named_modules() if isinstance(m, nn.Linear)} - set(layers)
    quantise(model)
    stored = sum(m.packed.nbytes for m in model.modules() if isinstance(m, NF4Linear))
    assert stored * 8 / numbers == pytest.approx(4.127, rel=1e-3)
    assert before == {"lm_head"}
    assert type(model.get_submodule("lm_head")) is nn.Linear
    assert count(model) == total, "parameters are counted as the numbers they stand for"
    assert sum(p.numel() for p in model.parameters()) < 0.7 * total


def test_an_evaluation_changes_no_later_gradient() -> None:
    """bitsandbytes' own layer repacks its weight when evaluated on AVX512-BF16; later gradients are wrong then."""
    model = tiny("llama")
    quantise(model)
    for path in list(quantisable(model)):
        model.set_submodule(path, LoRALinear(model.get_submodule(path), LoRAConfig(r=2)))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LoRALinear):
                module.lora_b["default"].normal_(generator=torch.Generator().manual_seed(1))
    ids = torch.arange(8, 24).view(2, 8)

    def gradients() -> dict[str, Tensor]:
        model.train().zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        stored = {n: p.clone() for n, p in model.named_parameters() if p.dtype == torch.uint8}
        before = gradients()
        model.eval()
        for context in (torch.no_grad(), torch.inference_mode()):
            with context:
                model(input_ids=ids[:1, :1])
                model(input_ids=ids)
        after = gradients()
        assert len(before) > 20
        assert before.keys() == after.keys()
        assert all(torch.equal(after[name], gradient) for name, gradient in before.items())
        assert all(torch.equal(p, stored[n]) for n, p in model.named_parameters() if n in stored)


def test_casts_copies_and_pickles_keep_the_weight() -> None:
    layer = NF4Linear(draw(48, 80), nn.Parameter(draw(48)))
    exact = layer.dequantised()
    x = draw(3, 80)
    y = layer(x)
    for changed in (copy.deepcopy(layer).to(torch.bfloat16), copy.deepcopy(layer).half()):
        assert changed.dtype == changed.bias.dtype != torch.float32
        assert torch.equal(changed.packed, layer.packed)
        assert torch.equal(changed.dequantised(torch.float32), exact)
        assert changed(x.to(changed.dtype)).dtype == changed.dtype
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    for same in (copy.deepcopy(layer), layer.to("cpu"), torch.load(stream, weights_only=False)):
        assert torch.equal(same(x), y)
        assert not same.packed.requires_grad
    other = NF4Linear(draw(48, 80, seed=5), nn.Parameter(draw(48, seed=6)))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), y)


def test_autocast_and_compile() -> None:
    adapter = LoRALinear(NF4Linear(draw(48, 64)), LoRAConfig(r=2))
    x = draw(2, 64).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        assert adapter(x).dtype == torch.bfloat16
    compiled: Callable[[Tensor], Tensor] = torch.compile(adapter, backend="aot_eager", fullgraph=True)
    compiled(x).sum().backward()
    found, x.grad = x.grad, None
    adapter(x).sum().backward()
    assert found is not None
    assert x.grad is not None
    assert torch.allclose(found, x.grad, atol=1e-5)


def test_fused_product_agrees() -> None:
    """The path of CUDA without gradients, which bitsandbytes can also take on CPU."""
    for shape in ((48, 64), (5, 192)):
        layer, x = NF4Linear(draw(*shape)), draw(2, 3, shape[1])
        bias = draw(shape[0], seed=4)
        assert torch.allclose(layer._fused(x, bias), layer(x) + bias, atol=1e-5)


def test_fsdp2_shards_the_bytes() -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    torch.manual_seed(0)
    model = nn.Sequential(*(LoRALinear(NF4Linear(draw(64, 64, seed=i)), LoRAConfig(r=2)) for i in range(2)))
    nn.init.normal_(model[1].lora_b["default"])  # type: ignore[union-attr, index, arg-type]
    plain, x = copy.deepcopy(model), draw(3, 64)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        first: Any = model[0]
        assert isinstance(first.base.packed, DTensor)
        assert torch.equal(first.base.dequantised(), plain[0].base.dequantised())  # type: ignore[operator, union-attr]
        y = model(x)
        y.float().sum().backward()
        expected = plain(x.bfloat16())
        expected.float().sum().backward()
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, expected)
        for found, wanted in zip(model.parameters(), plain.parameters(), strict=True):
            if wanted.grad is not None:
                assert found.grad is not None
                assert torch.allclose(found.grad.full_tensor().float(), wanted.grad.float(), rtol=2e-2, atol=2e-2)  # type: ignore[attr-defined]
        assert isinstance(first.base.packed, DTensor)
        assert count(model) == count(plain)
    finally:
        dist.destroy_process_group()


# Models --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "t5", "bert"])
def test_reading_equals_quantising_the_dense_model(kind: str, double: bool, tmp_path: Path) -> None:
    task: Any = "classification" if kind == "bert" else "lm"
    auto = AutoModelForSequenceClassification if kind == "bert" else None
    folder = save_tiny(kind, tmp_path, task=task)
    model = backbones.load_model(folder, auto=auto)
    quantise(model, double)
    read = backbones.load_model(folder, auto=auto, quantize="nf4", double_quant=double)
    ours, theirs = model.state_dict(), read.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert sum(isinstance(m, NF4Linear) for m in read.modules()) == len(quantisable(tiny(kind, task))) >= 8
    assert not any(p.is_meta for p in read.parameters())
    assert not hasattr(read.config, "quantization_config")
    table, head = read.get_input_embeddings(), read.get_output_embeddings()
    assert isinstance(table, nn.Embedding)
    if head is not None:
        assert type(head) is nn.Linear
        assert (head.weight is table.weight) == (kind in ("qwen2", "gpt2", "t5"))


def test_a_bias_that_the_file_lacks_is_zero(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path)
    config = (folder / "config.json").read_text().replace('"attention_bias": false', '"attention_bias": true')
    (folder / "config.json").write_text(config)
    model = backbones.load_model(folder, quantize="nf4")
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    assert isinstance(layer, NF4Linear)
    assert layer.bias is not None
    assert not layer.bias.any()


def test_conv1d_is_stored_the_other_way_round_and_given_back() -> None:
    model, plain = tiny("gpt2"), tiny("gpt2")
    quantise(model)
    layer = model.get_submodule("transformer.h.0.attn.c_attn")
    assert isinstance(layer, NF4Linear)
    assert (layer.out_features, layer.in_features) == (96, 32) == tuple(dense(layer).shape)
    old: Any = plain.get_submodule("transformer.h.0.attn.c_attn")
    assert torch.allclose(dense(layer).double(), reference(old.weight.t()), atol=1e-5)
    x = draw(2, 32)
    y = layer(x)
    assert len(dequantise(model)) == 8
    back = model.get_submodule("transformer.h.0.attn.c_attn")
    assert isinstance(back, Conv1D)
    assert torch.allclose(back(x), y, atol=1e-5)
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in plain.named_parameters()}


def test_memory_stays_far_below_the_dense_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny("llama", tmp_path, hidden_size=256, intermediate_size=1024, num_hidden_layers=12)
    seen: list[int] = []
    calls: list[int] = []
    encode = nf4.encode

    def watched(weight: Tensor, double_quant: bool = True) -> Tensor:
        calls.append(1)
        if len(calls) % 21 != 1:  # looking through everything alive takes long
            return encode(weight, double_quant)
        alive = [t for t in gc.get_objects() if type(t) in (Tensor, nn.Parameter) and t.device.type == "cpu"]
        seen.append(sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in alive}.values()))
        return encode(weight, double_quant)

    monkeypatch.setattr(nf4, "encode", watched)
    gc.collect()
    # in another dtype than the file's: else weights would be mapped from the file, which takes no memory
    model = backbones.load_model(folder, dtype="bfloat16", quantize="nf4")
    rest = seen[0]  # of other tests, and the first weight
    whole = 2 * count(model)
    assert len(calls) == 12 * 7
    assert len(seen) == 4
    assert max(seen) - rest < 0.4 * whole
    seen.clear()
    quantise(backbones.load_model(folder, dtype="bfloat16"))
    assert max(seen) - rest > 0.8 * whole, "the measurement sees a dense model"


def test_nothing_is_folded_into_four_bits() -> None:
    layer = NF4Linear(draw(8, 8))
    before = layer.packed.clone()
    with pytest.raises(TypeError, match=r"A 4-bit base cannot be merged into.*write_merged"):
        fold(layer, torch.ones(8, 8))
    with pytest.raises(KeyError):
        layer.weight = nn.Parameter(torch.ones(8, 8))
    assert torch.equal(layer.packed, before)


def test_error_of_requantising() -> None:
    weight = draw(96, 128)
    expected = float((reference(weight) - weight.double()).norm() / weight.double().norm())
    assert requantisation_error(weight) == pytest.approx(expected, rel=1e-3)
    assert requantisation_error(reference(weight, False).float(), False) < 1e-6, "NF4 numbers stay what they are"


def test_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny("llama", tmp_path)
    with pytest.raises(ValueError, match="quantize is 'int3'; it must be 'nf4'"):
        backbones.load_model(folder, quantize="int3")
    nf4.codec.cache_clear()
    for name in [name for name in sys.modules if name.startswith("bitsandbytes")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=r"needs bitsandbytes\. Run: pip install bitsandbytes"):
        backbones.load_model(folder, quantize="nf4")
    monkeypatch.undo()
    config = (folder / "config.json").read_text()
    quantised = '{"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": true},'
    (folder / "config.json").write_text(config.replace("{", quantised, 1))
    with pytest.raises(ValueError, match="is quantised already"):
        backbones.load_model(folder, quantize="nf4")
