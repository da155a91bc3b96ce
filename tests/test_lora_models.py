"""LoRA in models: slices, tables, tied heads, biases, whole modules, patterns; and what does not fit."""

from typing import Any

import pytest
import torch
from torch import nn

from lit_peft.adapter import named_adapters
from lit_peft.low_rank.convolution import LoRAConv
from lit_peft.low_rank.embedding import LoRAEmbedding
from lit_peft.low_rank.fused import LoRAFused, Slices, note_slices
from lit_peft.low_rank.linear import LoRALinear
from lit_peft.methods.lora import LoRAConfig
from lit_peft.named import add_adapter, disabled, routed
from lit_peft.sites import linears
from tests.models import tiny
from tests.tiny_adapted import LoRATiny, base_model, check_equal, logits, placed, shake

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


def test_rows_of_the_base_are_refused_where_the_base_is_trained() -> None:
    module = placed(LoRATiny, "gpt2", lora=LoRAConfig(r=2, bias="all"))
    with (
        pytest.raises(TypeError, match="cannot be answered by the base alone"),
        routed(module.model, ["default", None]),
    ):
        pass
    with routed(module.model, ["default", "default"]):
        logits(module.model, "gpt2")


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
    "enable and PiSSA": (
        {"enable_lora": [True] * 3, "init_lora_weights": "pissa"},
        "does not go with init_lora_weights='pissa'",
    ),
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
