"""LoRA's layers against float64 formulas written from the paper: values, all gradients, merges; and bad input."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lit_peft.adapter import Adapter, named_adapters
from lit_peft.low_rank.convolution import LoRAConv
from lit_peft.low_rank.embedding import LoRAEmbedding
from lit_peft.low_rank.fused import LoRAFused, Slices, note_slices
from lit_peft.low_rank.linear import LoRALinear
from lit_peft.methods.lora import LoRAConfig
from lit_peft.named import add_adapter, disabled, routed
from lit_peft.sites import linears
from tests.models import tiny
from tests.tiny_adapted import LoRATiny, base_model, check_equal, logits, placed, shake

Formula = Callable[[nn.Module, Tensor, Tensor], Tensor]  # base, A, B -> the changed weight


class Scaled(nn.Embedding):
    """Gemma's table: rows times a constant."""

    embed_scale = 3.0

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale


def fused(rows: tuple[int, ...], turns: int = 1, kind: type[nn.Module] = nn.Linear) -> nn.Module:
    linear = kind(6, sum(rows)) if kind is nn.Linear else kind(sum(rows), 6)
    linear.__dict__["qkv_slices"] = Slices(rows, turns)
    return linear


def by_hand(chosen: list[int], places: list[list[int]], rank: int) -> Formula:
    """W + s B_i A_i for the rows of each chosen slice, one row after the other."""

    def weight(base: nn.Module, a: Tensor, b: Tensor) -> Tensor:
        w = base.weight.t().clone() if isinstance(base, Conv1D) else base.weight.clone()
        start = 0
        for number, index in enumerate(chosen):
            mine = a[number * rank : (number + 1) * rank]
            for offset, row in enumerate(places[index]):
                w[row] = w[row] + S * (b[start + offset] @ mine)
            start += len(places[index])
        return w.t() if isinstance(base, Conv1D) else w

    return weight


def kernel(base: Any, a: Tensor, b: Tensor) -> Tensor:
    """W + s B_g A_g for each group of a convolution, one output channel after the other."""
    w = base.weight.clone()
    out, ranks = w.shape[0] // base.groups, a.shape[0] // base.groups
    for channel in range(w.shape[0]):
        group = channel // out
        for k in range(ranks):
            w[channel] = w[channel] + S * b[channel, k].squeeze() * a[group * ranks + k]
    return w


RANK, ALPHA = 4, 6
S = ALPHA / RANK
CHUNKS = [[0, 1, 2, 3], [4, 5], [6, 7]]  # grouped queries: twice as many as keys
TURNS = [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]  # NeoX: head by head
IDS = torch.tensor([[1, 4, 2, 0, 4]])

LAYERS: dict[str, tuple[Callable[[], nn.Module], Any, Formula, Callable[[], Tensor], dict[str, Any]]] = {
    "linear": (lambda: nn.Linear(5, 7), LoRALinear, lambda m, a, b: m.weight + S * b @ a, lambda: rand(2, 3, 5), {}),
    "no bias": (
        lambda: nn.Linear(5, 7, bias=False),
        LoRALinear,
        lambda m, a, b: m.weight + S * b @ a,
        lambda: rand(2, 5),
        {},
    ),
    "Conv1D": (
        lambda: Conv1D(7, 5),
        LoRALinear,
        lambda m, a, b: m.weight + S * (b @ a).t(),
        lambda: rand(2, 3, 5),
        {},
    ),
    "embedding": (
        lambda: nn.Embedding(6, 5),
        LoRAEmbedding,
        lambda m, a, b: m.weight + S * (b @ a).t(),
        lambda: IDS,
        {},
    ),
    "padded embedding": (
        lambda: nn.Embedding(6, 5, padding_idx=0),
        LoRAEmbedding,
        lambda m, a, b: m.weight + S * (b @ a).t(),
        lambda: IDS[:, :3],
        {},
    ),
    "scaled embedding": (
        lambda: Scaled(6, 5),
        LoRAEmbedding,
        lambda m, a, b: m.weight + S * (b @ a).t(),
        lambda: IDS,
        {},
    ),
    "conv 1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), LoRAConv, kernel, lambda: rand(2, 4, 9), {}),
    "conv 2d strides": (
        lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0)),
        LoRAConv,
        kernel,
        lambda: rand(2, 4, 7, 8),
        {},
    ),
    "conv 2d dilation": (lambda: nn.Conv2d(4, 6, 3, dilation=2), LoRAConv, kernel, lambda: rand(2, 4, 7, 8), {}),
    "conv 2d groups": (
        lambda: nn.Conv2d(4, 6, 3, groups=2, dilation=(1, 2), bias=False),
        LoRAConv,
        kernel,
        lambda: rand(2, 4, 7, 8),
        {},
    ),
    "conv 2d circular": (
        lambda: nn.Conv2d(4, 6, 3, padding=2, padding_mode="circular"),
        LoRAConv,
        kernel,
        lambda: rand(2, 4, 5, 5),
        {},
    ),
    "conv 2d same": (
        lambda: nn.Conv2d(4, 6, (3, 2), padding="same", padding_mode="reflect"),
        LoRAConv,
        kernel,
        lambda: rand(2, 4, 5, 5),
        {},
    ),
    "conv 3d": (lambda: nn.Conv3d(4, 2, 2, groups=2), LoRAConv, kernel, lambda: rand(1, 4, 3, 3, 4), {}),
    "fused": (
        lambda: fused((4, 2, 2)),
        LoRAFused,
        by_hand([0, 1, 2], CHUNKS, RANK),
        lambda: rand(2, 3, 6),
        {"enable_lora": [True, True, True]},
    ),
    "fused q, v": (
        lambda: fused((4, 2, 2), kind=Conv1D),
        LoRAFused,
        by_hand([0, 2], CHUNKS, RANK),
        lambda: rand(2, 3, 6),
        {"enable_lora": [True, False, True]},
    ),
    "fused by head": (
        lambda: fused((4, 4, 4), turns=2),
        LoRAFused,
        by_hand([0, 1, 2], TURNS, RANK),
        lambda: rand(2, 3, 6),
        {"enable_lora": [True, True, True]},
    ),
    "fused by head, k": (
        lambda: fused((4, 4, 4), turns=2),
        LoRAFused,
        by_hand([1], TURNS, RANK),
        lambda: rand(2, 3, 6),
        {"enable_lora": [False, True, False]},
    ),
}


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def made(name: str, **settings: Any) -> tuple[nn.Module, Adapter, Tensor]:
    """A base, the same adapted with random A and B, and an input; all in float64."""
    torch.manual_seed(3)
    make, kind, _, inputs, own = LAYERS[name]
    base = make().double()
    if isinstance(base, nn.Embedding):  # the padding row too: a lookup of it must not be zero by chance
        nn.init.normal_(base.weight)
    layer = kind(copy.deepcopy(base), LoRAConfig(**{"r": RANK, "alpha": ALPHA, **own, **settings})).double()
    for _, parameter in layer.own_parameters():
        nn.init.normal_(parameter)
    return base, layer, inputs()


@pytest.mark.parametrize("name", LAYERS)
def test_layer_is_the_paper_s_formula(name: str) -> None:
    base, layer, x = made(name)
    floating = x.is_floating_point()
    a, b = (layer.get_parameter(f"lora_{k}.default").detach().clone().requires_grad_() for k in "ab")
    expected_x = x.clone().requires_grad_(floating)
    weight = LAYERS[name][2](base, a, b)
    expected = torch.func.functional_call(base, {"weight": weight}, (expected_x,))
    found_x = x.clone().requires_grad_(floating)
    found = layer(found_x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(found, base(x)), "the change is nothing, so that nothing was compared"
    upstream = rand(*expected.shape)
    wanted = torch.autograd.grad(expected, [a, b, *([expected_x] if floating else [])], upstream)
    mine = [
        layer.get_parameter("lora_a.default"),
        layer.get_parameter("lora_b.default"),
        *([found_x] if floating else []),
    ]
    for gradient, reference in zip(torch.autograd.grad(found, mine, upstream), wanted, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-11, atol=1e-11)
        assert reference.abs().max() > 0


@pytest.mark.parametrize("name", LAYERS)
def test_merge_is_exact_and_of_low_rank(name: str) -> None:
    base, layer, x = made(name)
    layer.float(), base.float()
    x = x.float() if x.is_floating_point() else x
    expected = layer(x)
    change = layer.delta("default").double()
    pairs = sum(layer.configs["default"].enable_lora or [True])
    if not isinstance(layer, LoRAConv):
        assert torch.linalg.matrix_rank(change, atol=1e-4) <= RANK * pairs
    merged = layer.merge()
    assert merged is layer.base
    torch.testing.assert_close(merged(x), expected, rtol=1e-5, atol=1e-5)
    assert merged.weight.shape == base.weight.shape


@pytest.mark.parametrize("r", [1, 3])
def test_rank_of_the_change_is_r(r: int) -> None:
    _, layer, _ = made("linear", r=r)
    assert torch.linalg.matrix_rank(layer.delta("default").double(), atol=1e-5) == r


@pytest.mark.parametrize("name", LAYERS)
def test_starts_as_the_base_and_rows_are_routed(name: str) -> None:
    torch.manual_seed(0)
    make, kind, _, inputs, own = LAYERS[name]
    base = make().double()
    model = nn.Sequential(kind(base, LoRAConfig(r=RANK, **own)))
    x = inputs()
    x = torch.cat([x, x, x])[:3]  # three equal rows or, for images, three images
    assert torch.equal(model(x), base(x))
    add_adapter(model, "b")
    for _, parameter in model[0].own_parameters():
        nn.init.normal_(parameter)
    single = {}
    with routed(model, ["default", "b", None]):
        together = model(x)
    with disabled(model):
        single[2] = model(x[2:])
    for row, name_ in enumerate(["default", "b"]):
        with routed(model, [name_]):
            single[row] = model(x[row : row + 1])
    for row, expected in single.items():
        torch.testing.assert_close(together[row : row + 1], expected)
    assert not torch.equal(together[0], together[1])


def test_dropout_acts_on_the_adapter_s_input_only() -> None:
    for name in ("linear", "conv 2d groups", "fused by head"):
        _, layer, x = made(name, dropout=0.5)
        layer.train()
        torch.manual_seed(1)
        found = layer(x)
        torch.manual_seed(1)
        dropped = F.dropout(x, 0.5)
        layer.eval()
        expected = layer.base(x) + layer(dropped) - layer.base(dropped)
        torch.testing.assert_close(found, expected)


def test_rslora_keeps_the_gradients_over_ranks_where_lora_loses_them() -> None:
    norms: dict[bool, list[float]] = {True: [], False: []}
    for stable in norms:
        for r in (4, 16, 64, 256):
            torch.manual_seed(0)
            layer = LoRALinear(nn.Linear(256, 256), LoRAConfig(r=r, alpha=16, use_rslora=stable))
            # after one step of equal size for each entry, as Adam takes it: B has left zero
            nn.init.normal_(layer.lora_b["default"], std=0.01)
            layer(torch.randn(64, 256)).square().sum().backward()
            norms[stable].append(math.sqrt(sum(float(p.grad.square().sum()) for _, p in layer.own_parameters())))  # type: ignore[union-attr]
    assert max(norms[True]) <= 2 * min(norms[True]), norms
    assert norms[False][-1] < norms[False][0] / 4, norms


def test_counts_of_the_models_in_the_literature() -> None:
    """LoRA at rank 8 on all linear layers of Llama-2-7B, and on queries and values (Hu et al. count so)."""

    def count(d: int, layers: int, kv: int, f: int, targets: tuple[str, ...]) -> int:
        shapes = {"q": (d, d), "k": (d, kv), "v": (d, kv), "o": (d, d), "gate": (d, f), "up": (d, f), "down": (f, d)}
        with torch.device("meta"):
            made = [LoRALinear(nn.Linear(*shapes[name]), LoRAConfig(r=8)) for name in targets]
        return layers * sum(p.numel() for layer in made for _, p in layer.own_parameters())

    every = ("q", "k", "v", "o", "gate", "up", "down")
    assert count(4096, 32, 4096, 11008, every) == 19_988_480
    assert count(4096, 32, 4096, 11008, ("q", "v")) == 4_194_304
    assert count(576, 30, 192, 1536, every) == 2_442_240
    assert count(576, 30, 192, 1536, ("q", "v")) == 460_800


# In models ------------------------------------------------------------------------------------------------------------

FUSED_LAYERS = {"gpt2": "c_attn", "gpt_neox": "query_key_value"}


@pytest.mark.parametrize("kind", FUSED_LAYERS)
@pytest.mark.parametrize("slice_", range(3))
def test_slices_are_those_that_attention_cuts(kind: str, slice_: int) -> None:
    """Where only values are changed, attention's scores stay; where only keys or queries are, they do not."""
    model = tiny(kind, attn_implementation="eager")
    paths = [path for path in linears(model) if path.endswith(FUSED_LAYERS[kind]) and ".0." in path]
    note_slices(model, paths)
    enabled = [index == slice_ for index in range(3)]
    ids = torch.arange(5, 17)[None]
    before = model(ids, output_attentions=True)
    from lit_peft import place

    place(model, paths, lambda base: LoRAFused(base, LoRAConfig(r=2, enable_lora=enabled)))
    shake(model.get_submodule(paths[0]).lora_b)  # type: ignore[arg-type]
    after = model(ids, output_attentions=True)
    assert not torch.allclose(before.logits, after.logits)
    assert torch.equal(before.attentions[0], after.attentions[0]) == (slice_ == 2)


def test_phi3_shares_its_rows_as_grouped_queries_do() -> None:
    from transformers import Phi3Config, Phi3ForCausalLM

    config = Phi3Config(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    model = Phi3ForCausalLM(config)
    note_slices(model, ["model.layers.0.self_attn.qkv_proj"])
    assert model.model.layers[0].self_attn.qkv_proj.qkv_slices == Slices((32, 16, 16))


def test_enable_lora_leaves_other_layers_plain() -> None:
    module = placed(LoRATiny, "gpt2", lora=LoRAConfig(r=2, enable_lora=[True, False, True]))
    kinds = {path.rpartition(".")[2]: type(a) for path, a in named_adapters(module.model)}
    assert kinds == {"c_attn": LoRAFused, "c_proj": LoRALinear, "c_fc": LoRALinear}


def test_tied_head_is_adapted_alone() -> None:
    module = placed(LoRATiny, "gpt2", lora=LoRAConfig(r=2, target_modules=["lm_head"]))
    shake(module)
    table = module.model.transformer.wte.weight
    kept = table.detach().clone()
    expected = logits(module.model, "gpt2")
    merged = module.merge_adapters()
    assert torch.equal(merged.transformer.wte.weight, kept)
    assert not torch.equal(merged.lm_head.weight, kept)
    assert (logits(merged, "gpt2") - expected).abs().max() < 1e-4


EMBEDDINGS = {"llama": "embed_tokens", "gpt2": "wte", "bert": "word_embeddings", "t5": "embed_tokens"}


@pytest.mark.parametrize("kind", EMBEDDINGS)
def test_embedding_merges_and_leaves_a_tied_head_alone(kind: str) -> None:
    module = placed(LoRATiny, kind, lora=LoRAConfig(r=2, target_modules=[EMBEDDINGS[kind]]))
    assert {type(a) for _, a in named_adapters(module.model)} == {LoRAEmbedding}
    shake(module)
    expected = logits(module.model, kind)
    assert (expected - logits(base_model(kind), kind)).abs().max() > 1e-2
    merged = module.merge_adapters()
    assert (logits(merged, kind) - expected).abs().max() < 1e-4 * max(1, expected.abs().max())


def test_one_adapter_at_every_place_of_a_shared_table() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Embedding(8, 4)
            self.two = self.one

    from lit_peft import place

    model = Both()
    place(model, ["one"], lambda base: LoRAEmbedding(base, LoRAConfig(r=2)))
    assert model.one is model.two
    assert isinstance(model.two, LoRAEmbedding)


# Weights of the base that are trained too -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_train_and_step_aside(kind: str, bias: Any) -> None:
    base = base_model(kind)
    module = placed(LoRATiny, kind, lora=LoRAConfig(r=2, bias=bias))
    wrapped = {path for path, _ in named_adapters(module.model)}
    trained = {name for name, p in module.model.named_parameters() if p.requires_grad and name.endswith(".bias")}
    inside = {name for name in trained if name.removesuffix(".base.bias") in wrapped}
    assert inside == {f"{path}.base.bias" for path in wrapped}
    every = {name for name, _ in module.model.named_parameters() if name.endswith(".bias")}
    head = {"classifier.bias"} & every
    assert trained == (every if bias == "all" else inside | head)
    with torch.no_grad():  # as training would
        for name, parameter in module.model.named_parameters():
            if name in trained - head:
                parameter.add_(0.3)
    assert (logits(module.model, kind) - logits(base, kind)).abs().max() > 1e-2
    with disabled(module):
        assert torch.equal(logits(module.model, kind), logits(base, kind))


def test_modules_to_save_train_whole_and_step_aside() -> None:
    base = base_model("llama")
    module = placed(LoRATiny, "llama", lora=LoRAConfig(r=2, modules_to_save=["lm_head", "layers.0.mlp"]))
    saved = {n for n, p in module.model.named_parameters() if p.requires_grad and "lora_" not in n}
    mlp = {f"model.layers.0.mlp.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")}
    assert saved == {"lm_head.weight", *mlp}
    assert not any("layers.0.mlp" in path for path, _ in named_adapters(module.model))
    shake(module)
    assert (logits(module.model, "llama") - logits(base, "llama")).abs().max() > 1e-2
    with disabled(module):
        assert torch.equal(logits(module.model, "llama"), logits(base, "llama"))


def test_names_end_at_a_dot() -> None:
    with pytest.raises(ValueError, match=r"modules_to_save has 'head', which names no module.*'lm_head'"):
        placed(LoRATiny, "llama", lora=LoRAConfig(modules_to_save=["head"]))


def test_a_tied_module_to_save_gets_weights_of_its_own() -> None:
    module = placed(LoRATiny, "gpt2", lora=LoRAConfig(r=2, modules_to_save=["lm_head"]))
    table = module.model.transformer.wte.weight
    assert module.model.lm_head.weight is not table
    assert module.model.lm_head.weight.requires_grad
    assert not table.requires_grad


def test_layers_to_transform() -> None:
    module = placed(LoRATiny, "llama", lora=LoRAConfig(r=2, target_modules=["q_proj"], layers_to_transform=[1]))
    assert [path for path, _ in named_adapters(module.model)] == ["model.layers.1.self_attn.q_proj"]


# Patterns -------------------------------------------------------------------------------------------------------------


def test_patterns_set_rank_and_scale() -> None:
    settings = {"rank_pattern": {"q_proj": 2, r".*\.1\.mlp\.up_proj": 3}, "alpha_pattern": {"q_proj": 8.0}}
    module = placed(LoRATiny, "llama", lora=LoRAConfig(r=4, alpha=16, **settings))
    found = {path: (a.configs["default"].r, a.configs["default"].scale) for path, a in named_adapters(module.model)}
    assert found["model.layers.0.self_attn.q_proj"] == (2, 4.0)
    assert found["model.layers.1.mlp.up_proj"] == (3, 16 / 3)
    assert found["model.layers.0.mlp.up_proj"] == (4, 4.0)


BAD_SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "rank 0": ({"r": 0}, "lora.r is 0; the rank must be 1 or more."),
    "negative rank": ({"r": -3}, "lora.r is -3; the rank must be 1 or more."),
    "alpha": ({"alpha": 0}, "lora.alpha is 0; it must be above 0."),
    "pattern of rank 0": ({"rank_pattern": {"q": 0}}, r"lora.rank_pattern\['q'\] is 0; the rank"),
    "pattern of alpha": ({"alpha_pattern": {"q": -1.0}}, r"lora.alpha_pattern\['q'\] is -1.0; it must"),
    "no expression": ({"rank_pattern": {"q(": 2}}, r"lora.rank_pattern has 'q\(', no regular expression"),
    "bias": ({"bias": "some"}, "lora.bias is 'some'; it must be"),
    "enable none": ({"enable_lora": [False] * 3}, "lora.enable_lora is "),
    "enable two": ({"enable_lora": [True, True]}, "lora.enable_lora is "),
    "enable and DoRA": ({"enable_lora": [True] * 3, "use_dora": True}, "enable_lora does not go with use_dora"),
    "one name": ({"modules_to_save": "lm_head"}, "it must be a list of names"),
}


@pytest.mark.parametrize(("settings", "message"), BAD_SETTINGS.values(), ids=BAD_SETTINGS)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        LoRAConfig(**settings)
    assert "\n" not in str(caught.value)


BAD_FITS: dict[str, tuple[str, dict[str, Any], str]] = {
    "pattern fits nothing": (
        "llama",
        {"rank_pattern": {"qq_proj": 2}},
        r"rank_pattern has 'qq_proj', which fits none of the 14 adapted layers; they end in \['down_proj'",
    ),
    "pattern at no dot": ("llama", {"alpha_pattern": {"proj": 2.0}}, "alpha_pattern has 'proj', which fits none"),
    "overlap": (
        "llama",
        {"rank_pattern": {"q_proj": 2, r".*\.0\.self_attn\.q_proj": 3}},
        r"rank_pattern has both 'q_proj' \(2\) and '.*' \(3\) for 'model.layers.0.self_attn.q_proj'",
    ),
    "target of nothing": ("llama", {"target_modules": ["qq_proj"]}, "No module path ends in 'qq_proj'"),
    "some layers": ("llama", {"target_modules": ["layers.0.self_attn.q_proj", "warp"]}, "ends in 'warp'"),
    "layer": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [2]}, "this model's layers are 0 to 1"),
    "no bias": ("llama", {"bias": "all"}, "lora.bias is 'all', but this model has no bias"),
    "no bias inside": ("t5", {"bias": "lora_only"}, "none of the adapted layers has a bias"),
    "module of nothing": ("llama", {"modules_to_save": ["lm_heads"]}, "'lm_heads', which names no module"),
    "nothing left": ("llama", {"modules_to_save": ["layers"]}, "leaves no layer to adapt"),
    "no fused layer": ("llama", {"enable_lora": [True] * 3}, "none of the 14 adapted layers of this llama model is"),
    "unused table": ("t5", {"target_modules": ["shared"]}, "'shared' only keeps the weight of .* Name 'embed_tokens'"),
    "unused module": ("t5", {"modules_to_save": ["shared"]}, "'shared' only keeps the weight of"),
    "no adaptable module": ("llama", {"target_modules": ["norm"]}, "'norm' names LlamaRMSNorm modules"),
}


@pytest.mark.parametrize(("kind", "settings", "message"), BAD_FITS.values(), ids=BAD_FITS)
def test_what_does_not_fit_is_refused_before_anything_changes(
    kind: str, settings: dict[str, Any], message: str
) -> None:
    module = LoRATiny(kind, lora=LoRAConfig(**settings))
    with pytest.raises(ValueError, match=message) as caught:
        module.configure_model()
    assert "\n" not in str(caught.value)
    assert module.model is not None
    assert not list(named_adapters(module.model))
    check_equal(module.model, base_model(kind), kind)


def test_groups_that_cannot_share_the_rank() -> None:
    with pytest.raises(
        ValueError, match=r"lora\.r is 3, which 2 groups of a Conv2d cannot share. Choose a multiple of 2"
    ):
        LoRAConv(nn.Conv2d(4, 6, 3, groups=2), LoRAConfig(r=3))


@pytest.mark.parametrize("settings", [{"bias": "lora_only"}, {"modules_to_save": ["ln_f"]}])
def test_what_all_sets_would_share_is_refused(settings: dict[str, Any]) -> None:
    module = placed(LoRATiny, "gpt2", lora=LoRAConfig(r=2, **settings))
    with pytest.raises(ValueError, match="train the base itself, which all named adapters share: 'b' cannot stand"):
        add_adapter(module.model, "b")
    plain = placed(LoRATiny, "gpt2", lora=LoRAConfig(r=2))
    with pytest.raises(ValueError, match="which all named adapters share"):
        add_adapter(plain.model, "b", LoRAConfig(r=2, **settings))
    assert all(list(a.configs) == ["default"] for _, a in named_adapters(plain.model))


def test_settings_of_a_layer_keep_its_scale() -> None:
    for stable in (False, True):
        _, layer, _ = made("fused q, v", use_rslora=stable)
        found = layer.settings("default")
        root = math.sqrt(found["r"]) if stable else found["r"]
        assert found["r"] == 2 * RANK
        assert found["lora_alpha"] / root == pytest.approx(layer.configs["default"].scale)
