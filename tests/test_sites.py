from typing import Any

import peft
import pytest
import torch
from torch import nn

from lit_peft import sites
from tests.models import KINDS, tiny


class Wrapper(nn.Module):
    """Stands for any adapter: around a module, with linear layers of its own that nobody may find."""

    is_adapter = True

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(32, 2)
        self.q_proj = nn.Linear(32, 2)


def wrap(model: nn.Module, path: str) -> None:
    parent, _, key = path.rpartition(".")
    setattr(model.get_submodule(parent), key, Wrapper(model.get_submodule(path)))


class OwnBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.att = nn.ModuleDict({"wq": nn.Linear(16, 16), "wkv": nn.Linear(16, 16), "wo": nn.Linear(16, 16)})
        self.norm = nn.LayerNorm(16)
        self.up = nn.Linear(16, 48)
        self.down = nn.Linear(48, 16)


class OwnDecoder(nn.Module):
    """A user's own model: no config, layers in a Sequential, the feed-forward not in a module of its own."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.tokens = nn.Embedding(50, 16)
        self.positions = nn.Embedding(9, 16)
        self.body = nn.Sequential(*(OwnBlock() for _ in range(depth)))
        self.mix = nn.Linear(16, 16)
        self.logits = nn.Linear(16, 50)


# kind -> (first layer of each stack, attention blocks, feed-forward blocks, embedding, output, linear layers per stack)
EXPECTED: dict[str, tuple[list[str], list[str], list[str], str, str, str]] = {
    **{
        kind: (
            ["model.layers.0"],
            ["model.layers.0.self_attn"],
            ["model.layers.0.mlp"],
            "model.embed_tokens",
            "lm_head",
            "q_proj 2/2, k_proj 2/2, v_proj 2/2, o_proj 2/2, gate_proj 2/2, up_proj 2/2, down_proj 2/2",
        )
        for kind in ("llama", "qwen2", "gemma")
    },
    "gpt2": (
        ["transformer.h.0"],
        ["transformer.h.0.attn"],
        ["transformer.h.0.mlp"],
        "transformer.wte",
        "lm_head",
        "c_attn 2/2, attn.c_proj 2/2, c_fc 2/2, mlp.c_proj 2/2",
    ),
    "gpt_neox": (
        ["gpt_neox.layers.0"],
        ["gpt_neox.layers.0.attention"],
        ["gpt_neox.layers.0.mlp"],
        "gpt_neox.embed_in",
        "lm_head",
        "query_key_value 2/2, dense 2/2, dense_h_to_4h 2/2, dense_4h_to_h 2/2",
    ),
    **{
        kind: (
            [f"{kind}.encoder.layer.0"],
            [f"{kind}.encoder.layer.0.attention"],
            [f"{kind}.encoder.layer.0.intermediate", f"{kind}.encoder.layer.0.output"],
            f"{kind}.embeddings.word_embeddings",
            output,
            "query 2/2, key 2/2, value 2/2, attention.output.dense 2/2, intermediate.dense 2/2, output.dense 2/2, "
            f"{beside} 1/1",
        )
        for kind, output, beside in (
            ("bert", "cls.predictions.decoder", "cls.predictions.transform.dense"),
            ("roberta", "lm_head.decoder", "lm_head.dense"),
        )
    },
    "t5": (
        ["encoder.block.0", "decoder.block.0"],
        [
            "encoder.block.0.layer.0.SelfAttention",
            "decoder.block.0.layer.0.SelfAttention",
            "decoder.block.0.layer.1.EncDecAttention",
        ],
        ["encoder.block.0.layer.1.DenseReluDense", "decoder.block.0.layer.2.DenseReluDense"],
        "shared",
        "lm_head",
        "SelfAttention.q 4/4, SelfAttention.k 4/4, SelfAttention.v 4/4, SelfAttention.o 4/4, wi 4/4, wo 4/4, "
        "EncDecAttention.q 2/2, EncDecAttention.k 2/2, EncDecAttention.v 2/2, EncDecAttention.o 2/2",
    ),
}


def first(paths: list[str]) -> list[str]:
    return [path for path in paths if sites.layer_index(path) == 0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("known", [True, False], ids=["table", "structure"])
def test_roles(kind: str, known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(kind)
    stacks, attention, feed_forward, embedding, output, covered = EXPECTED[kind]
    if not known:
        # the fallback for strangers must find the same
        monkeypatch.setattr(model.config, "model_type", "never seen")
        if kind == "t5":  # but for T5's blocks, which it takes with the norm around them
            attention = [path.rpartition(".")[0] for path in attention]
            feed_forward = [path.rpartition(".")[0] for path in feed_forward]
    assert [stack[0] for stack in sites.stacks(model)] == stacks
    assert [len(stack) for stack in sites.stacks(model)] == [2] * len(stacks)
    assert first(sites.attention(model)) == attention
    assert len(sites.attention(model)) == 2 * len(attention)
    assert first(sites.feed_forward(model)) == feed_forward
    assert sites.input_embedding(model) == embedding
    assert sites.output_embedding(model) == output
    assert sites.classification_head(model) is None
    assert sites.describe_coverage(sites.linears(model), model) == covered
    assert sites.find(model, "residual") == [path for stack in sites.stacks(model) for path in stack]
    assert sites.find(model, "embedding") == [embedding]
    inside = [
        path for path in sites.linears(model) if any(path.startswith(block + ".") for block in sites.layers(model))
    ]
    assert sorted(sites.match(model, "attention") + sites.match(model, "feed-forward")) == sorted(inside)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", ["lm", "classification"])
def test_all_linear_is_what_peft_adapts(kind: str, task: str) -> None:
    model = tiny(kind, task)  # type: ignore[arg-type]
    mine = sites.match(model, "ALL-linear")
    assert mine == list(sites.linears(model)) == sites.match(model)
    head = sites.classification_head(model)
    assert (head is None) == (task == "lm")
    seq_cls: dict[str, Any] = {"task_type": "SEQ_CLS"} if task == "classification" else {}
    theirs = peft.LoraModel(model, peft.LoraConfig(target_modules="all-linear", **seq_cls), "default")
    # heads of two layers: PEFT adapts their inside, though it also trains the head whole
    names = [name for name in theirs.targeted_module_names if head is None or not name.startswith(head)]
    assert sorted(mine) == sorted(names)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["list", "regex", "layers", "exclude"])
def test_the_grammar_is_what_peft_understands(kind: str, how: str) -> None:
    model = tiny(kind)
    leaves = {"gpt2": ["c_proj", "c_attn"], "gpt_neox": ["query_key_value"], "t5": ["q", "v"]}.get(kind)
    leaves = leaves or (["query", "value"] if kind in ("bert", "roberta") else ["q_proj", "v_proj"])
    options: dict[str, Any] = {"target_modules": leaves}
    if how == "regex":
        options = {"target_modules": rf".*\.({'|'.join(leaves)})"}
    if how == "layers":
        options["layers_to_transform"] = [1]
    if how == "exclude":
        options["exclude_modules"] = leaves[:1] if len(leaves) > 1 else r".*\.0\..*"
    mine = sites.match(model, **options)
    theirs = peft.LoraModel(model, peft.LoraConfig(**options), "default").targeted_module_names
    assert mine
    assert sorted(mine) == sorted(theirs)


def test_roles_mix_with_names() -> None:
    model = tiny("llama")
    both = sites.match(model, ["attention", "down_proj"])
    assert sites.describe_coverage(both, model) == "q_proj 2/2, k_proj 2/2, v_proj 2/2, o_proj 2/2, down_proj 2/2"
    some = sites.match(model, "attention", layers_to_transform=1, exclude_modules=["k_proj", "o_proj"])
    assert some == ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]
    assert sites.match(model, ["lm_head"]) == ["lm_head"]
    assert sites.coverage(["lm_head"], model) == {"lm_head": (1, 1)}
    assert sites.describe_coverage(sites.attention(model)[:1], model) == "self_attn 1/2"
    assert sites.describe_coverage(sites.layers(model), model) == "LlamaDecoderLayer 2/2"
    embedding = sites.match(model, ["embed_tokens"], kinds=lambda module: isinstance(module, nn.Embedding))
    assert embedding == ["model.embed_tokens"]


def test_a_head_trained_whole_is_adapted_only_by_its_full_path() -> None:
    model = tiny("roberta", "classification")
    assert not [path for path in sites.match(model, ["dense"]) if path.startswith("classifier")]
    assert not [path for path in sites.match(model, r".*dense") if path.startswith("classifier")]
    assert sites.match(model, ["classifier.dense"]) == ["classifier.dense"]


LEAVES = r"\['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj'\]"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"target_modules": ["q_prj"]},
            rf"^No module path ends in 'q_prj'\. This model's linear layers end in {LEAVES}\. Did you mean 'q_proj'\?$",
        ),
        ({"target_modules": ["q_proj", "zzzz"]}, rf"ends in 'zzzz'\. .* {LEAVES}\.$"),
        ({"target_modules": "q_proj"}, r"give a list: \['q_proj'\]"),
        ({"target_modules": ".*q_prj"}, r"matches the regular expression '\.\*q_prj'"),
        ({"target_modules": "(q_proj"}, "is no regular expression"),
        ({"target_modules": []}, "empty list"),
        ({"target_modules": ["self_attn"]}, "'self_attn' names LlamaAttention modules"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["v_prj"]}, r"'v_prj'.*Did you mean 'v_proj'"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "Nothing is left"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0, 2]}, r"\[0, 2\]: this model's layers are 0 to 1"),
        ({"target_modules": ["q_proj"], "layers_to_transform": []}, "layers are 0 to 1"),
        ({"target_modules": ".*q_proj", "layers_to_transform": 0}, "does not go with a regular expression"),
        ({"target_modules": ["lm_head"], "layers_to_transform": [5]}, "layers are 0 to 1"),
    ],
)
def test_what_matches_nothing_is_an_error_of_one_line(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as raised:
        sites.match(tiny("llama"), **options)
    assert "\n" not in str(raised.value)


def test_a_target_in_some_layers_only_is_an_error_unless_asked_so() -> None:
    model = tiny("llama")
    model.model.layers[1].self_attn.extra = nn.Linear(32, 32)
    path = "model.layers.1.self_attn.extra"
    with pytest.raises(ValueError, match=r"^'extra' is in only 1 of 2 layers \(not in layer 0\)\. Name the layers"):
        sites.match(model, ["q_proj", "extra"])
    assert sites.match(model, ["extra"], layers_to_transform=[1]) == [path]
    with pytest.raises(ValueError, match=r"none of the layers \[0\]"):
        sites.match(model, ["extra"], layers_to_transform=[0])
    assert sites.match(model, ["extra"], partial=True) == sites.match(model, [path]) == [path]
    assert sites.match(model, ["1.self_attn.extra"]) == [path]
    assert path in sites.match(model)
    assert sites.coverage([path], model) == {"extra": (1, 2)}
    # what only a decoder has is whole where the decoder has it
    assert len(sites.match(tiny("t5"), ["EncDecAttention.q"])) == 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("around", ["linears", "attention", "residual", "embedding", "twice"])
def test_placed_adapters_are_looked_through(kind: str, around: str) -> None:
    plain, model = tiny(kind), tiny(kind)
    paths = {
        "linears": list(sites.linears(model)),
        "attention": sites.attention(model),
        "residual": sites.layers(model),
        "embedding": [str(sites.input_embedding(model)), str(sites.output_embedding(model))],
        "twice": [path for path in sites.linears(model) for _ in range(2)],
    }[around]
    for path in paths:
        wrap(model, path)

    def bare(found: list[str]) -> list[str]:
        return [path.replace(".base", "") for path in found]

    for finder in (sites.layers, sites.attention, sites.feed_forward, sites.match):
        found = finder(model)
        assert bare(found) == finder(plain)
        assert not [path for path in found if path.endswith((".base", ".down")) or "base.base" in path]
        for path in found:
            assert (path in paths) == isinstance(model.get_submodule(path), Wrapper)
    assert sites.input_embedding(model) == sites.input_embedding(plain)
    assert sites.output_embedding(model) == sites.output_embedding(plain)
    assert sites.coverage(sites.match(model), model) == sites.coverage(sites.match(plain), plain)
    assert sites.geometry(model) == sites.geometry(plain)


def test_patterns_do_not_see_the_adapter_around_a_block() -> None:
    model = tiny("llama")
    wrap(model, "model.layers.0.self_attn")
    expected = ["model.layers.0.self_attn.base.q_proj", "model.layers.1.self_attn.q_proj"]
    assert sites.match(model, ["q_proj"]) == expected
    assert sites.match(model, ["self_attn.q_proj"]) == expected
    assert sites.match(model, r"model\.layers\.\d\.self_attn\.q_proj") == expected


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_users_own_module(wrapped: bool) -> None:
    model = OwnDecoder()
    if wrapped:
        for path in sites.linears(model):
            wrap(model, path)
    assert sites.layers(model) == ["body.0", "body.1", "body.2"]
    assert sites.attention(model) == ["body.0.att", "body.1.att", "body.2.att"]
    assert first(sites.feed_forward(model)) == ["body.0.up", "body.0.down"]
    assert sites.input_embedding(model) == "tokens"
    assert sites.output_embedding(model) == "logits"
    covered = "att.wq 3/3, att.wkv 3/3, att.wo 3/3, up 3/3, down 3/3, mix 1/1".replace("att.", "")
    assert sites.describe_coverage(sites.match(model), model) == covered
    assert sites.match(model, ["up"], layers_to_transform=[2]) == ["body.2.up"]
    geometry = sites.geometry(model)
    assert geometry == sites.Geometry(
        hidden=16, layers=3, heads=0, kv_heads=0, head_dim=0, feed_forward=48, vocabulary=50
    )


def test_a_module_without_layers() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    assert sites.layers(model) == []
    assert sites.match(model) == ["0", "2"]
    assert sites.coverage(["0", "2"], model) == {"0": (1, 1), "2": (1, 1)}
    with pytest.raises(ValueError, match="Found no attention module in Sequential"):
        sites.find(model, "attention")
    with pytest.raises(ValueError, match="Unknown role 'mlp'"):
        sites.find(model, "mlp")
    with pytest.raises(ValueError, match="Found no linear layers for 'attention'"):
        sites.match(model, "attention")


def test_pytorchs_own_layers() -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    assert sites.attention(model) == ["layers.0.self_attn", "layers.1.self_attn"]
    # the projection in MultiheadAttention is never called, so an adapter there would never learn
    assert first(sites.match(model)) == ["layers.0.linear1", "layers.0.linear2"]
    geometry = sites.geometry(model)
    assert (geometry.hidden, geometry.heads, geometry.head_dim, geometry.feed_forward) == (16, 4, 4, 24)


def test_experts_count_by_layer_and_towers_by_text() -> None:
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.self_attn = OwnBlock().att
            self.experts = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(4, 4)}) for _ in range(5))

    model = nn.ModuleDict(
        {
            "visual": nn.ModuleDict({"blocks": nn.ModuleList(OwnBlock() for _ in range(9))}),
            "language_model": nn.ModuleDict({"layers": nn.ModuleList(Mixture() for _ in range(2))}),
        }
    )
    assert sites.layers(model) == ["language_model.layers.0", "language_model.layers.1"]
    experts = [path for path in sites.linears(model) if "experts" in path]
    assert len(experts) == 10
    assert sites.coverage(experts, model) == {"up": (2, 2)}


def test_layers_of_several_classes_are_layers() -> None:
    class Recurrent(OwnBlock):
        pass

    model = nn.ModuleDict({"layers": nn.ModuleList([OwnBlock(), Recurrent(), OwnBlock()])})
    assert len(sites.layers(model)) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_geometry(kind: str) -> None:
    geometry = sites.geometry(tiny(kind))
    assert geometry == sites.Geometry(
        hidden=32,
        layers=4 if kind == "t5" else 2,
        heads=4,
        kv_heads=2 if kind in ("llama", "qwen2", "gemma") else 4,
        head_dim=8,
        feed_forward=128 if kind == "gpt2" else 64,
        vocabulary=128,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_widths_are_what_goes_in_and_comes_out(kind: str) -> None:
    for linear in sites.linears(tiny(kind)).values():
        inputs, outputs = sites.widths(linear)
        assert linear(torch.zeros(1, inputs)).shape == (1, outputs)


@pytest.mark.parametrize(
    ("path", "index"),
    [("model.layers.11.mlp", 11), ("layers.3", 3), ("encoder.block.1.layer.0.SelfAttention.q", 1), ("lm_head", None)],
)
def test_layer_index(path: str, index: int | None) -> None:
    assert sites.layer_index(path) == index
