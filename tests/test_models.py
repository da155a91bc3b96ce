import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tests.models import KINDS, VOCAB, save_tiny, tiny, tiny_tokenizer


@pytest.mark.parametrize("kind", KINDS)
def test_two_calls_give_equal_weights_and_leave_the_global_seed_alone(kind: str) -> None:
    before = torch.random.get_rng_state()
    one, two, other = tiny(kind), tiny(kind), tiny(kind, seed=1)
    assert torch.equal(before, torch.random.get_rng_state())
    assert not one.training
    assert {p.dtype for p in one.parameters()} == {torch.float32}
    pairs = zip(one.parameters(), two.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert one.config.vocab_size == VOCAB
    ids = torch.arange(12)[None] + 5
    extra = {"decoder_input_ids": ids} if kind == "t5" else {}
    with torch.no_grad():
        out = one(input_ids=ids, **extra).logits
        assert torch.equal(out, one.train()(input_ids=ids, **extra).logits)
    assert out.shape == (1, 12, VOCAB)
    assert out.std() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_classification_has_the_labels_asked_for(kind: str) -> None:
    ids = torch.arange(5, 17).view(2, 6)
    if kind == "t5":  # its classification head wants eos in every row
        ids[:, -1] = 4
    assert tiny(kind, "classification", num_labels=4)(input_ids=ids).logits.shape == (2, 4)


def test_tokenizer_round_trips_ascii_and_fits_the_models() -> None:
    tokenizer = tiny_tokenizer()
    assert len(tokenizer) == VOCAB
    text = "The answer is:\n\t{42} ~ <ok>!  two  spaces"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer(chat)["input_ids"].count(tokenizer.eos_token_id) == 1
    assert tiny_tokenizer(chat=False).chat_template is None


def test_saved_folder_loads_as_any_other(tmp_path) -> None:
    folder = save_tiny("llama", tmp_path / "a")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("hello there", return_tensors="pt")["input_ids"]
    assert torch.equal(model(ids).logits, tiny("llama")(ids).logits)
    assert tokenizer.chat_template == tiny_tokenizer().chat_template
    assert len(tokenizer) == model.config.vocab_size
    head = AutoModelForSequenceClassification.from_pretrained(save_tiny("bert", tmp_path / "b", "classification"))
    assert head.config.num_labels == 3
