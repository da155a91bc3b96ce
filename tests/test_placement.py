"""Block adapters in whole layers, pre-LN and post-LN, against the layers' formulas written out, in float64."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM

from lit_peft.adapter import innermost, named_adapters
from lit_peft.methods.bottleneck import BottleneckAcross
from lit_peft.methods.norms import NormChange, NormConfig
from lit_peft.named import adapters, disabled, routed
from lit_peft.sublayers import across, beside, norms, on_sum
from lit_peft.zoo import compose
from tests import models
from tests.models import save_tiny, tiny
from tests.test_methods import batch, gradients, shake

OPT = {
    "hidden_size": 32,
    "ffn_dim": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "word_embed_proj_dim": 32,
    "init_std": 0.2,
    "dropout": 0.0,
    "attention_dropout": 0.0,
}
BART = {
    "d_model": 32,
    **{f"{side}_layers": 2 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 64 for side in ("encoder", "decoder")},
    "max_position_embeddings": 256,
    "init_std": 0.2,
    "dropout": 0.0,
    "decoder_start_token_id": 0,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "opt": ("opt", OPT),
    "opt350": ("opt", {**OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    "mixtral": ("mixtral", {**models._ROPE, **EXPERTS}),
    "gpt_oss": ("gpt_oss", {**models._ROPE, **EXPERTS, "head_dim": 8}),
    "bart": ("bart", BART),
}
METHODS = ("houlsby", "pfeiffer", "parallel")


@pytest.fixture(autouse=True)
def kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, config in KINDS.items():
        monkeypatch.setitem(models.CONFIGS, kind, config)
    usual = models._auto
    monkeypatch.setattr(
        models, "_auto", lambda kind, task: AutoModelForSeq2SeqLM if kind == "bart" else usual(kind, task)
    )


def built(method: str, kind: str, folder: Path, **settings: Any) -> Any:
    torch.manual_seed(0)
    key = "compacter" if method == "compacter" else "bottleneck"
    own = {"phm_dim": 2, "reduction_factor": 8} if method == "compacter" else {"bottleneck_size": 4}
    if not (folder / kind).exists():
        save_tiny(kind, folder / kind)
    module: Any = compose(method, "sft")(str(folder / kind), **{key: {**own, **settings}})
    module.configure_model()
    shake(module)
    return module


# kind -> first layer, and in it: attention, its norm, feed-forward's norm, feed-forward itself, whether pre-LN
Parts = tuple[str, str, str, str, Callable[[nn.Module, Tensor], Tensor], bool]


def two_linears(act: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, Tensor], Tensor]:
    return lambda layer, x: innermost(layer.fc2)(act(innermost(layer.fc1)(x)))  # type: ignore[arg-type]


def block(layer: nn.Module, x: Tensor) -> Tensor:
    found: Any = innermost(layer.mlp)(x)  # type: ignore[arg-type]
    return found[0] if isinstance(found, tuple) else found


BARE = ("self_attn", "self_attn_layer_norm", "final_layer_norm")
LLAMA = ("self_attn", "input_layernorm", "post_attention_layernorm")
LAYERS: dict[str, Parts] = {
    "opt": ("model.decoder.layers.0", *BARE, two_linears(torch.relu), True),
    "opt350": ("model.decoder.layers.0", *BARE, two_linears(torch.relu), False),
    "bart": ("model.encoder.layers.0", *BARE, two_linears(nn.functional.gelu), False),
    "llama": ("model.layers.0", *LLAMA, block, True),
    "mixtral": ("model.layers.0", *LLAMA, block, True),
}


def written_out(
    method: str, layer: nn.Module, parts: Parts, h: Tensor, kwargs: dict[str, Any], f: list[Callable[[Tensor], Tensor]]
) -> Tensor:
    """One layer with the method's adapters f (in the order attention, feed-forward), after its paper."""
    _, attention, first, second, feed_forward, pre = parts
    norm1, norm2 = innermost(layer.get_submodule(first)), innermost(layer.get_submodule(second))
    attend = innermost(layer.get_submodule(attention))
    a = attend(hidden_states=norm1(h) if pre else h, **kwargs)[0]
    a = a + f[0](a) if method == "houlsby" else a
    h = h + a if pre else norm1(h + a)
    x = norm2(h) if pre else h
    y = feed_forward(layer, x)
    if method == "houlsby":
        y = y + f[1](y)
    elif method == "parallel":
        y = y + f[0](x)
    v = h + y
    if method == "pfeiffer":
        return v + f[0](v) if pre else norm2(v + f[0](norm2(v)))
    return v if pre else norm2(v)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("method", METHODS)
def test_a_layer_is_what_the_paper_writes(method: str, kind: str, tmp_path: Path) -> None:
    module = built(method, kind, tmp_path, activation="relu", scale=2.0)
    model = module.model.double().eval()
    model.config._experts_implementation = "eager"  # the usual one takes no float64
    path = LAYERS[kind][0]
    outer = model.get_submodule(path)
    caught: dict[str, Any] = {}
    outer.register_forward_pre_hook(
        lambda layer, args, kwargs: caught.update(args=args, kwargs=kwargs), with_kwargs=True
    )
    ids = torch.randint(8, 100, (2, 7))
    model(input_ids=ids, **({"decoder_input_ids": ids} if kind == "bart" else {}), use_cache=False)
    h = caught["args"][0].detach().requires_grad_()
    kwargs = {key: value for key, value in caught["kwargs"].items() if key != "past_key_values"}
    found = outer(h, *caught["args"][1:], **kwargs)
    found = found[0] if isinstance(found, tuple) else found
    own = [adapter for p, adapter in named_adapters(model) if p.startswith(path) and list(adapter.own_parameters())]
    assert len(own) == (2 if method == "houlsby" else 1)

    def written(adapter: Any) -> Callable[[Tensor], Tensor]:
        d, bd = adapter.bottleneck_down["default"], adapter.bottleneck_down_bias["default"]
        u, bu = adapter.bottleneck_up["default"], adapter.bottleneck_up_bias["default"]
        return lambda x: 2.0 * (torch.relu(x @ d.t() + bd) @ u.t() + bu)

    if caught["args"][1:]:
        kwargs["attention_mask"] = caught["args"][1]
    expected = written_out(method, innermost(outer), LAYERS[kind], h, kwargs, [written(adapter) for adapter in own])
    base = innermost(outer)
    with disabled(module):
        plain = outer(h, *caught["args"][1:], **caught["kwargs"])
    assert (found - (plain[0] if isinstance(plain, tuple) else plain)).abs().max() > 1e-2
    assert torch.allclose(found, expected, atol=1e-10), type(base).__name__
    weights = [h, *(p for adapter in own for _, p in adapter.own_parameters())]
    for mine, theirs in zip(
        torch.autograd.grad(found.square().sum(), weights),
        torch.autograd.grad(expected.square().sum(), weights),
        strict=True,
    ):
        assert torch.allclose(mine, theirs, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", [*METHODS, "compacter"])
def test_every_weight_learns_and_checkpointing_changes_nothing(method: str, kind: str, tmp_path: Path) -> None:
    module = built(method, kind, tmp_path, train_norms=True)
    rows = batch("sft")
    expected = gradients(module, rows)
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert expected.keys() == trained
    assert all(gradient.any() for gradient in expected.values())
    module.model.activation_checkpointing_enable({"use_reentrant": False})
    with adapters(module, "default"):  # which keeps the selection for the replay
        found = gradients(module, rows)
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, atol=1e-5), name


def test_no_input_is_remembered(tmp_path: Path) -> None:
    module = built("parallel", "opt", tmp_path)
    module.model(input_ids=torch.randint(8, 100, (1, 5)))
    inside = next(adapter for _, adapter in named_adapters(module.model) if isinstance(adapter, BottleneckAcross))
    with pytest.raises(TypeError, match="outside of its layer"):
        inside(torch.zeros(1, 64))


def test_tokens_without_rows_are_not_routed_in_silence(tmp_path: Path) -> None:
    module = built("parallel", "opt", tmp_path)
    with routed(module, ["default", None]), pytest.raises(ValueError, match="cannot be routed"):
        module.model(input_ids=torch.randint(8, 100, (2, 5)))


@pytest.mark.parametrize("method", ["houlsby", "compacter"])
def test_rows_are_routed_through_trained_norms(method: str, tmp_path: Path) -> None:
    module = built(method, "llama", tmp_path, train_norms=True)
    ids = torch.randint(8, 100, (3, 7))
    with torch.no_grad():
        alone = module.model(input_ids=ids).logits
        with disabled(module):
            base = module.model(input_ids=ids).logits
        with routed(module, ["default", None, "default"]):
            mixed = module.model(input_ids=ids).logits
    assert torch.allclose(mixed[[0, 2]], alone[[0, 2]], atol=1e-4)
    assert torch.allclose(mixed[1], base[1], atol=1e-4)
    assert (alone - base).abs().max() > 1e-2


def test_sets_side_by_side_on_opt(tmp_path: Path) -> None:
    module = built("parallel", "opt", tmp_path)
    ids = torch.randint(8, 100, (2, 5))
    with torch.no_grad():
        before = module.model(input_ids=ids).logits
        module.add_adapter("other", bottleneck={"bottleneck_size": 2, "leave_out": [0]})
        assert torch.equal(module.model(input_ids=ids).logits, before)
        shake(module)
        with adapters(module, "other"):
            other = module.model(input_ids=ids).logits
        with disabled(module):
            base = module.model(input_ids=ids).logits
        assert (other - base).abs().max() > 1e-3
        module.delete_adapter("other")
    assert len([a for _, a in named_adapters(module.model) if isinstance(a, BottleneckAcross)]) == 2


class Half(nn.Module):
    """A layer whose feed-forward ends in another width than it begins with."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({"q": nn.Linear(16, 16), "o": nn.Linear(16, 16)})
        self.up, self.down = nn.Linear(16, 48), nn.Linear(48, 24)


def test_half_a_feed_forward_is_refused() -> None:
    model = nn.Sequential(nn.Embedding(10, 16), nn.ModuleList([Half(), Half()]))
    with pytest.raises(ValueError, match=r"0\.up reads 16 numbers and 1\.0\.down writes 24\. Use houlsby"):
        beside(model)


def test_where_things_are() -> None:
    model = tiny("opt350")
    assert across(model) == {f"model.decoder.layers.{n}.fc2": f"model.decoder.layers.{n}.fc1" for n in (0, 1)}
    assert list(on_sum(model)) == [f"model.decoder.layers.{n}.final_layer_norm" for n in (0, 1)]
    assert list(on_sum(tiny("opt"))) == [f"model.decoder.layers.{n}" for n in (0, 1)]
    assert norms(tiny("opt"))["model.decoder.final_layer_norm"] == 1
    found = norms(tiny("bart"))
    assert (found["model.encoder.layernorm_embedding"], found["model.decoder.layernorm_embedding"]) == (0, 2)
    assert norms(tiny("t5"))["encoder.final_layer_norm"] == 1
    assert norms(tiny("bert", "classification"))["bert.embeddings.LayerNorm"] == 0
    assert norms(tiny("gpt_oss"), {0}) == {
        "model.layers.1.input_layernorm": 1,
        "model.layers.1.post_attention_layernorm": 1,
        "model.norm": 1,
    }


@pytest.mark.parametrize("kind", ["llama", "gemma"])  # Gemma multiplies by 1 + w
def test_trained_norms_are_the_norm_with_other_weights(kind: str) -> None:
    base: Any = next(m for m in tiny(kind).double().modules() if type(m).__name__.endswith("RMSNorm"))
    check(base, lambda x, w: x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * (w if kind == "llama" else 1 + w))


def test_trained_layer_norms() -> None:
    base = nn.LayerNorm(32).double()
    with torch.no_grad():
        base.bias.normal_()

    def formula(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + base.eps).sqrt() * w + b

    check(base, formula)


def check(base: nn.Module, formula: Callable[..., Tensor]) -> None:
    # transformers' RMSNorms compute in float32, whatever comes in
    close = {} if isinstance(base, nn.LayerNorm) else {"rtol": 1e-4, "atol": 1e-4}
    size = base.get_parameter("weight").numel()
    x = torch.randn(3, 4, size, dtype=torch.float64, requires_grad=True)
    adapter = NormChange(base, NormConfig(layer=0, default_lr=1e-3)).double()
    assert torch.equal(adapter(x), base(x))
    adapter.add("other", NormConfig(layer=0, default_lr=1e-3))
    adapter.double()
    with torch.no_grad():
        for _, p in adapter.own_parameters():
            p.normal_()
    keys = [key for key, _ in base.named_parameters()]
    weights = {name: [getattr(adapter, f"norm_{key}")[name] for key in keys] for name in ("default", "other")}
    frozen = [p for _, p in base.named_parameters()]
    for names in (("default",), ("other",), ("default", "other")):
        adapter.scope.active = names
        total = [p + sum(weights[name][i] for name in names) for i, p in enumerate(frozen)]
        found, expected = adapter(x), formula(x, *total)
        assert torch.allclose(found, expected, **close)
        inputs = [x, *(p for name in names for p in weights[name])]
        for mine, theirs in zip(
            torch.autograd.grad(found.square().sum(), inputs),
            torch.autograd.grad(expected.square().sum(), inputs),
            strict=True,
        ):
            assert torch.allclose(mine, theirs, **close)
    parts = [adapter_alone(adapter, x[:1], "default"), base(x[1:2]), adapter_alone(adapter, x[2:], "other")]
    with routed(adapter, ["default", None, "other"]):
        assert torch.allclose(adapter(x), torch.cat(parts), **close)


def adapter_alone(adapter: NormChange, x: Tensor, name: str) -> Tensor:
    with adapters(adapter, name):
        found: Tensor = adapter(x)
    return found


def test_norms_are_in_the_folder_and_step_aside(tmp_path: Path) -> None:
    module = built("houlsby", "opt", tmp_path, train_norms=True)
    module.save_adapter(tmp_path / "saved")
    again: Any = compose("houlsby", "sft")(str(tmp_path / "opt"), adapter=str(tmp_path / "saved"))
    again.configure_model()
    assert again.bottleneck.train_norms
    stored = {name for name, _ in again.model.named_parameters() if "norm_weight" in name or "norm_bias" in name}
    assert len(stored) == 2 * 5
    ids = torch.randint(8, 100, (2, 5))
    with torch.no_grad():
        assert torch.equal(again.model(input_ids=ids).logits, module.model(input_ids=ids).logits)
        with disabled(again), disabled(module):
            assert torch.equal(again.model(input_ids=ids).logits, module.model(input_ids=ids).logits)
    with pytest.raises(TypeError, match="cannot be merged"):
        again.merge_adapters()


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, str(root / "docs/placement.py"), str(tmp_path)], check=False)
    assert done.returncode == 0
    sizes = [plt.imread(folder / "placement.png").shape for folder in (tmp_path, root / "docs")]
    assert sizes[0] == sizes[1]
    assert "(placement.png)" in (root / "docs/methods.md").read_text()


@pytest.mark.parametrize("stack", ["houlsby+bitfit", "bitfit+houlsby", "parallel+bitfit", "pfeiffer+bitfit"])
def test_norms_that_other_methods_train_too(stack: str, tmp_path: Path) -> None:
    save_tiny("bert", tmp_path / "bert", "classification")
    settings = {"bottleneck": {"bottleneck_size": 4, "train_norms": True}, "labels": ["a", "b", "c"]}
    module: Any = compose(stack, "classification")(str(tmp_path / "bert"), **settings)
    module.configure_model()
    shake(module)
    rows = batch("classification")
    found = gradients(module, rows)
    silent = {name for name, p in module.named_parameters() if p.requires_grad and name not in found}
    assert not silent
    changes = {name: p for name, p in module.named_parameters() if ".norm_bias." in name}
    assert len(changes) == 5
    with torch.no_grad():  # what BitFit and the norm's own change add to the same bias is one sum
        before = module.model(input_ids=rows["input_ids"]).logits
        for name, change in changes.items():
            other = module.get_submodule(name.split(".norm_bias")[0])
            twin = next(p for n, p in other.named_parameters() if "bitfit_bias" in n) if stack[0] != "b" else None
            if twin is not None:
                twin.add_(change)
                change.zero_()
        assert torch.allclose(module.model(input_ids=rows["input_ids"]).logits, before, atol=1e-5)
