"""The modules that are put in a model's place: same values, names and gradients, and less kept."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BartConfig, BartForConditionalGeneration

from lit_peft import LoRAConfig, place
from lit_peft.low_rank.linear import LoRALinear
from lit_peft.ops import low_rank
from lit_peft.ops.lean import Lean, LeanMLP, LeanNorm, make_lean, make_plain, scored
from lit_peft.ops.recipes import note, recipe_of
from tests.ops.exact import adapted, agree, drawn, gradients, llama


@contextmanager
def kept() -> Iterator[list[Tensor]]:
    """Lists what autograd keeps."""
    found: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


def test_lean_modules_give_the_same() -> None:
    plain, lean, ids = adapted(), adapted(), torch.arange(20).view(2, 10)
    assert make_lean(lean) == 2 + 2 + 2 + 5 + 1
    wanted, wanted_gradients = gradients(plain, ids)
    got, got_gradients = gradients(lean, ids)
    agree(got, wanted, 1e-14)
    for one, other in zip(got_gradients, wanted_gradients, strict=True):
        agree(one, other, 1e-6)  # the plain norm works in float32


def test_lean_norm_is_exact() -> None:
    """Against the formula in float64, which the model's own norm only reaches to float32."""
    norm = llama().model.norm
    lean = LeanNorm(norm)
    x = drawn(3, 32, dtype=torch.float32, seed=0)
    y = x.detach().double().requires_grad_()
    wanted = norm.weight * y / (y.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
    got = lean.float()(x)
    agree(got, wanted, 1e-6)
    got.sin().sum().backward()
    wanted.sin().sum().backward()
    agree(x.grad, y.grad, 1e-6)


def test_names_and_weights_stay() -> None:
    model = adapted()
    names, own = list(model.state_dict()), dict(model.named_modules())
    make_lean(model)
    assert list(model.state_dict()) == names
    assert isinstance(model.model.layers[0].mlp, LeanMLP)
    make_plain(model)
    assert dict(model.named_modules()) == own
    assert not any(isinstance(module, Lean) for module in model.modules())


def test_a_child_put_in_later_is_seen_by_both() -> None:
    model = llama()
    make_lean(model)
    place(model, ["model.layers.0.mlp.up_proj"], lambda base: LoRALinear(base, LoRAConfig(r=2)))
    make_plain(model)
    assert isinstance(model.model.layers[0].mlp.up_proj, LoRALinear)


def test_what_is_kept() -> None:
    """Neither the activation, nor the product, nor the norms' outputs: 2 f + 2 d less a token and layer."""
    plain, lean, ids = adapted().float(), adapted().float(), torch.arange(20).view(2, 10)
    make_lean(lean)
    weights = {p.untyped_storage().data_ptr() for m in (plain, lean) for p in [*m.parameters(), *m.buffers()]}
    sizes = []
    for model in (plain, lean):
        with kept() as found:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}
        sizes.append(sum(size for where, size in storages.items() if where not in weights))
        del loss
    width, inner, tokens, layers = 32, 48, 20, 2
    # the first norm's input needs no gradient, so that its output is kept as before
    assert sizes[0] - sizes[1] >= tokens * (layers * 2 * (inner + width) - width) * 4


def test_other_modules_are_left_alone() -> None:
    hooked = llama()
    hooked.model.layers[0].mlp.register_forward_hook(lambda module, args, out: out)
    assert make_lean(hooked) == 1 + 1 + 2 + 5 + 1
    assert make_lean(llama(hidden_act="gelu")) == 2 + 5 + 1
    assert make_lean(lean := llama()) == make_lean(lean) == 12


def test_checkpointing_and_dropout_give_the_same() -> None:
    ids = torch.arange(20).view(2, 10)
    results = []
    for checkpointing in (False, True):
        model = adapted(LoRAConfig(r=2, dropout=0.3))
        make_lean(model)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(3)
        results.append(gradients(model, ids))
    agree(results[1][0], results[0][0], 1e-12)
    for one, other in zip(results[1][1], results[0][1], strict=True):
        agree(one, other, 1e-12)


def test_compiled_gives_the_same() -> None:
    model, ids = adapted(), torch.arange(20).view(2, 10)
    make_lean(model)
    wanted, wanted_gradients = gradients(model, ids)
    got, got_gradients = gradients(torch.compile(model, backend="aot_eager"), ids)  # type: ignore[arg-type]
    agree(got, wanted, 1e-6)
    for one, other in zip(got_gradients, wanted_gradients, strict=True):
        agree(one, other, 1e-5)


def test_plain_operations_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = adapted(), torch.arange(20).view(2, 10)
    make_lean(model)
    wanted, wanted_gradients = gradients(model, ids)
    monkeypatch.setenv("LIT_PEFT_KERNELS", "0")
    monkeypatch.delattr(low_rank, "_Update")  # would be missed
    got, got_gradients = gradients(model, ids)
    agree(got, wanted, 1e-12)
    for one, other in zip(got_gradients, wanted_gradients, strict=True):
        agree(one, other, 1e-6)


def test_a_recipe_is_void_when_its_tensor_is_changed() -> None:
    part = torch.ones(2)
    x = note(part * 2, part, make=lambda part: part * 2)
    assert recipe_of(x).make(*recipe_of(x).parts).equal(x)
    x.mul_(3)
    assert recipe_of(x).parts[0] is x


def test_the_head_hands_over_its_input_only_where_asked() -> None:
    model, ids = adapted(), torch.arange(20).view(2, 10)
    plain = model(input_ids=ids).logits
    make_lean(model)
    assert model(input_ids=ids).logits.equal(plain)
    hidden, head = scored(model, {"input_ids": ids})
    assert head is model.lm_head
    agree(head(hidden), plain, 1e-6)
    assert model(input_ids=ids).logits.equal(plain)


def test_a_model_that_changes_its_logits_keeps_them() -> None:
    """Gemma 2 caps them: seen at the first call, and then not asked again."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    shape = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = Gemma2ForCausalLM(Gemma2Config(vocab_size=64, num_hidden_layers=2, head_dim=8, **shape)).eval()
    model.requires_grad_(False)
    ids = torch.arange(20).view(2, 10)
    wanted = model(input_ids=ids).logits
    assert make_lean(model) == 2 + 1
    for _ in range(2):
        got, head = scored(model, {"input_ids": ids})
        assert head is None
        assert got.equal(wanted)
    assert model.lm_head.refused


def test_a_model_that_adds_to_its_logits_keeps_them() -> None:
    """BART has a bias of the vocabulary's length, to which hidden states cannot be added."""
    shape = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    model = BartForConditionalGeneration(BartConfig(vocab_size=64, **shape, **heads)).eval().requires_grad_(False)
    ids = torch.arange(20).view(2, 10)
    wanted = model(input_ids=ids).logits
    assert make_lean(model) == 1
    got, head = scored(model, {"input_ids": ids})
    assert head is None
    assert got.equal(wanted)
    with pytest.raises(IndexError):  # an error of the model's own comes through
        scored(model, {"input_ids": ids + 1000})


def test_a_trained_or_adapted_head_gives_logits() -> None:
    ids = torch.arange(20).view(2, 10)
    for change in (
        lambda model: model.lm_head.requires_grad_(),
        lambda model: place(model, ["lm_head"], lambda base: LoRALinear(base, LoRAConfig(r=2))),
        lambda model: setattr(model, "lm_head", torch.compile(model.lm_head, backend="eager")),
    ):
        model = llama()
        make_lean(model)
        change(model)
        out, head = scored(model, {"input_ids": ids})
        assert head is None
        assert out.shape[-1] == 64


def test_an_activation_that_is_exchanged_or_hooked_later_acts() -> None:
    for change in (
        lambda mlp: setattr(mlp, "act_fn", torch.nn.GELU()),
        lambda mlp: mlp.act_fn.register_forward_hook(lambda module, args, out: out * 2),
    ):
        plain, lean, ids = adapted(), adapted(), torch.arange(20).view(2, 10)
        make_lean(lean)
        for model in (plain, lean):
            change(model.model.layers[0].mlp)
        agree(lean(input_ids=ids).logits, plain(input_ids=ids).logits, 1e-6)


def test_hooks_and_attributes_outlive_both_changes() -> None:
    model, ids, seen = adapted(tie_word_embeddings=True), torch.arange(20).view(2, 10), []
    norm = model.model.norm
    norm.register_state_dict_post_hook(lambda *_: seen.append("state"))
    make_lean(model)
    norm.register_forward_hook(lambda *_: seen.append("before"))
    model.model.norm.register_forward_hook(lambda *_: seen.append("after"))
    model.model.layers[0].mlp.up_proj.eval()
    model.resize_token_embeddings(70, mean_resizing=False)
    model.state_dict()
    model(input_ids=ids)
    assert seen == ["state", "before", "after"]
    make_plain(model)
    model(input_ids=ids)
    assert seen[3:] == ["before", "after"]
    assert not model.model.layers[0].mlp.up_proj.training
    assert model.lm_head.out_features == 70


class Changing(torch.nn.Module):
    """A model that changes its logits in place, as Chameleon does."""

    def __init__(self, model: Any, column: int) -> None:
        super().__init__()
        self.model, self.column = model, column

    def get_output_embeddings(self) -> Any:
        return self.model.lm_head

    def forward(self, **inputs: Any) -> Any:
        output = self.model(**inputs)
        output.logits[..., [self.column]] = -1e9
        return output


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("column", [3, 60])  # 60 is no column of hidden states
def test_logits_changed_in_place_are_kept(column: int, inference: bool) -> None:
    model, ids = adapted(), torch.arange(20).view(2, 10)
    with torch.inference_mode(inference):
        wanted = Changing(model, column)(input_ids=ids).logits
        make_lean(model)
        got, head = scored(Changing(model, column), {"input_ids": ids})
    assert head is None
    assert got.equal(wanted)


@pytest.mark.parametrize("place_of_hook", ["", "lm_head"])
def test_hooks_see_logits(place_of_hook: str) -> None:
    model, seen = adapted(), []
    make_lean(model)
    hooked = model.get_submodule(place_of_hook)
    hooked.register_forward_hook(lambda module, args, out: seen.append(getattr(out, "logits", out).shape[-1]))
    scored(model, {"input_ids": torch.arange(20).view(2, 10)})
    assert seen == [64]


def test_another_thread_gets_logits() -> None:
    model, ids, found = adapted(), torch.arange(20).view(2, 10), []
    make_lean(model)
    with model.lm_head.opened():
        thread = Thread(target=lambda: found.append(model(input_ids=ids).logits.shape[-1]))
        thread.start()
        thread.join()
    assert found == [64]


def test_a_recipe_is_void_when_its_part_is_changed() -> None:
    part = torch.ones(2)
    x = note(part * 2, part, make=lambda part: part * 2)
    part.add_(1)
    assert recipe_of(x).parts[0] is x


def test_hidden_states_are_saved_without_their_recipe(tmp_path: Path) -> None:
    model = adapted()
    make_lean(model)
    hidden = model.model(input_ids=torch.arange(20).view(2, 10)).last_hidden_state
    torch.save(hidden, tmp_path / "hidden.pt")
    again = torch.load(tmp_path / "hidden.pt")  # refuses other classes than tensors
    assert again.equal(hidden)
    assert recipe_of(again).parts[0] is again


def test_a_trace_takes_any_length() -> None:
    mlp = adapted().float().model.layers[0].mlp
    lean, x = LeanMLP(mlp), torch.randn(1, 5, 32)
    for record in (False, True):
        with torch.set_grad_enabled(record):
            agree(torch.jit.trace(lean, (torch.randn(1, 3, 32),))(x), mlp(x), 1e-5)
