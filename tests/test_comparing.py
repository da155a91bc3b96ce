"""The parts of a comparison: sizes, runs, ranks, few-shot rows, labels."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from lit_peft.catalogue import FACTS, LARGEST, METHODS, SIZES
from lit_peft.comparing.job import chosen, number, rates, runs, settle, split
from lit_peft.comparing.labels import place_labels
from lit_peft.comparing.results import Row, front, ranked
from lit_peft.comparing.sizes import size, trained
from lit_peft.comparing.table import cells, columns
from lit_peft.comparing.warm import Warm
from lit_peft.data.instructions import Instructions
from lit_peft.module import init_parameters
from lit_peft.zoo import compose
from tests.models import tiny, tiny_tokenizer

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("method", [name for name in METHODS if not FACTS[name].needs])
def test_every_method_finds_its_size(method: str) -> None:
    """Within the budget where one more step would not be, or at its smallest or largest."""
    from lit_peft.comparing.sizes import _sizable

    model = tiny("llama", hidden_size=128).to("meta")  # a width that divides as methods' defaults ask
    cls: Any = compose(method, "sft")
    seen: dict[str, int] = {}

    def count(settings: Any) -> int:
        seen[json.dumps(settings)] = found = trained(cls, {"backbone": "base"}, settings, model)
        return found

    budget = 12_000
    chosen_size = size(count, _sizable(cls, {}), budget)
    assert chosen_size["trained"] is not None, chosen_size["note"]
    fits = [number for number in seen.values() if number <= budget]
    assert chosen_size["trained"] == (max(fits) if fits else min(seen.values()))
    if chosen_size["trained"] > budget:
        assert "above the budget" in chosen_size["note"]
    elif chosen_size["settings"] and not chosen_size["note"]:
        assert len(seen) > len(fits)  # something larger was tried, and was too large


def test_calls_have_processes_of_their_own(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    with Warm(["lit_peft.catalogue"]) as warm:
        assert warm("lit_peft.__main__:main", ["methods", "--json"], log=log) == 0
        assert json.loads(log.read_text()).keys() == METHODS.keys()
        assert warm("lit_peft.__main__:main", ["methods", "lroa"], log=log) == 2
        assert "Did you mean lora?" in log.read_text()
        assert warm("os:abort", log=log) == -6  # a crash is a number, and the next call works
        assert warm("lit_peft.__main__:main", ["--version"], log=log) == 0


def test_calls_where_forking_is_not_safe(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    order = {"function": "lit_peft.__main__:main", "arguments": [["methods", "lroa"]], "log": str(log)}
    command = [sys.executable, "-m", "lit_peft.comparing.warm", "--call", json.dumps(order)]
    assert subprocess.run(command, cwd=ROOT).returncode == 2
    assert "Did you mean lora?" in log.read_text()


def test_a_starter_that_cannot_start_says_why(tmp_path: Path) -> None:
    with Warm(["lit_peft.absent"]) as warm, pytest.raises(RuntimeError, match=r"ended: .*lit_peft\.absent"):
        warm("lit_peft.__main__:main", ["methods"], log=tmp_path / "log.txt")


def test_sizes_name_fields_that_exist() -> None:
    known: dict[str, set[str]] = {}
    for method in METHODS:
        for key, parameter in init_parameters(compose(method, "sft")).items():
            known.setdefault(key, set()).update(getattr(parameter.default, "__dataclass_fields__", ()))
    keywords = {facts.keyword for facts in FACTS.values()}
    for keyword, choices in SIZES.items():
        if keyword in keywords:
            for fields, needed in choices.items():
                assert {*fields, *needed} <= known[keyword], keyword
    assert set(LARGEST) <= {name for fields in known.values() for name in fields}


def test_sizes_grow_in_proportion() -> None:
    knobs = {"prefix": {"encoder_hidden_size": 100}, "bottleneck": {"bottleneck_size": 10}}

    def count(settings: Any) -> int:
        return 7 * settings["prefix"]["encoder_hidden_size"] ** 2 + 50 * settings["bottleneck"]["bottleneck_size"]

    found = size(count, knobs, 4000)
    assert found["settings"] == {"prefix": {"encoder_hidden_size": 23}, "bottleneck": {"bottleneck_size": 2}}
    assert found["trained"] == 7 * 23**2 + 100 <= 4000 < 7 * 24**2 + 100
    assert size(count, knobs, 1)["note"] == "its smallest size, above the budget"


def test_few_shot_rows_are_earlier_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_PEFT_CACHE", str(tmp_path / "cache"))
    tokenizer = tiny_tokenizer()
    system = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nHelp.<|im_end|>\n{% endif %}"
    rows = [{"prompt": f"q{i}", "completion": ["yes", "no"][i % 2]} for i in range(20)]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    for template in (tokenizer.chat_template, system + str(tokenizer.chat_template), None):
        tokenizer.chat_template = template
        plain = Instructions(str(path), max_length=64, val_fraction=0.2).attach(tokenizer)
        shown = Instructions(str(path), max_length=64, val_fraction=0.2, shots=2).attach(tokenizer)  # type: ignore[arg-type]
        before, after = plain.rows("test").table[0], shown.rows("test").table[0]
        text, alone = tokenizer.decode(after["input_ids"]), tokenizer.decode(before["input_ids"])
        head = alone.partition("q")[0]
        assert text.endswith(alone.removeprefix(head))
        assert text.count("Help.") == alone.count("Help.")
        assert sum(word in text for word in ("yes", "no")) == 2  # one example of each answer
        assert text.count("q") == 3
        learned = [[t for t in row["labels"] if t != -100] for row in (before, after)]
        assert learned[0] == learned[1]
        assert len(after["labels"]) == len(after["input_ids"])
        assert [len(r["input_ids"]) for r in plain.rows("train").table] == [
            len(r["input_ids"]) for r in shown.rows("train").table
        ]


def test_another_order_of_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_PEFT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"q{i}", "completion": "a"}) for i in range(20)) + "\n")
    orders = []
    for seed in (None, 0, 1):
        data: Any = Instructions(str(path), max_length=64, batch_size=1, shuffle_seed=seed).attach(tiny_tokenizer())
        orders.append([tuple(batch["input_ids"][0].tolist()) for batch in data.train_dataloader()])
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2])


def rows_of(**scores: tuple[int, float | None]) -> list[Row]:
    return [
        Row(name, trained=count, scores={} if mean is None else {"choice_accuracy": [mean], "perplexity": [mean]})
        for name, (count, mean) in scores.items()
    ]


def test_front_and_ranks() -> None:
    rows = [*rows_of(a=(10, 0.5), b=(20, 0.4), c=(30, 0.9), d=(30, 0.8), e=(40, 0.9), f=(5, None)), Row("base", True)]
    assert [row.name for row in front(rows, "choice_accuracy")] == ["a", "c"]
    assert [row.name for row in front(rows, "perplexity")] == ["a", "b"]
    assert [row.name for row in ranked(rows, "choice_accuracy")] == ["base", "c", "e", "d", "a", "b", "f"]
    assert [row.name for row in ranked(rows, "perplexity")] == ["base", "b", "a", "d", "c", "e", "f"]
    several = Row("g", scores={"f1": [1.0, 2.0, 3.0]})
    assert (several.mean("f1"), several.spread("f1")) == (2.0, 1.0)


def test_seeds_change_the_start_and_the_order_and_nothing_else(tmp_path: Path) -> None:
    data = {"class_path": "lit_peft.Instructions", "init_args": {"path": "x", "seed": 5}}
    job = settle({"model": {"init_args": {"backbone": "b", "lora": {"dropout": 0.1}}}, "data": data}, {})
    sizes = {"settings": {"lora": {"r": 2}}}
    note = {
        "methods": ["lora"],
        "seeds": 3,
        "shots": 4,
        "lr": {},
        "plan": {"methods": {"lora": sizes}, "encoder_decoder": False},
    }
    made = runs(job, note, tmp_path)
    assert [(run.name, run.seed) for run in made] == [("base", 0), ("4-shot", 0), ("lora", 1), ("lora", 2), ("lora", 3)]
    one, two, three = (dict(run.config) for run in made[2:])
    assert [c.pop("seed_everything") for c in (one, two, three)] == [42, 43, 44]
    assert [c.pop("data")["init_args"].get("shuffle_seed") for c in (one, two, three)] == [None, 6, 7]
    assert len({c.pop("run_dir") for c in (one, two, three)}) == 3
    assert one == two == three
    assert one["model"] == {"backbone": "b", "lora": {"dropout": 0.1, "r": 2}}
    assert made[1].config["data"]["init_args"]["shots"] == 4


def test_the_table_shows_the_spread() -> None:
    row = Row("lora", runs=3, trained=1000, scores={"choice_accuracy": [0.5, 0.6, 0.7]})
    assert cells(row, "choice_accuracy")[:3] == ["lora", "60.0 ± 10.0", "1,000"]
    row.scores["choice_accuracy"].pop()
    assert cells(row, "choice_accuracy")[1] == "55.0 ± 7.1 (2 of 3)"
    assert "mean ± std of 3" in columns([row], "choice_accuracy")[1]


def test_labels_of_one_budget_do_not_cover_each_other() -> None:
    figure = Figure(figsize=(9, 5.6), dpi=100)
    axes = figure.subplots()
    axes.plot([1, 2], [0, 1], label="front")
    axes.legend()
    spots = [(1.5, 0.5 + i / 1000, f"method {i}", i == 3) for i in range(20)] + [(1.1, 0.9, "apart", False)]
    place_labels(figure, axes, spots, "red")
    figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in axes.texts]
    assert len(boxes) == 21
    for i, box in enumerate(boxes):
        assert box.y0 >= axes.get_window_extent().y0 - 1
        for other in boxes[:i]:
            both = Bbox.intersection(box, other)
            assert both is None or both.width * both.height < 0.05 * box.width * box.height


def test_numbers_and_names() -> None:
    assert [number(text) for text in ("200k", "10m", "1.5M", "20_000", "7")] == [200_000, 10**7, 1_500_000, 20_000, 7]
    assert number(None) is None
    assert chosen("all") == [name for name in FACTS if name != "fusion"]  # it needs adapters that others have trained
    assert rates("1e-3,full=2e-5", ["lora", "full"]) == {"lora": 1e-3, "full": 2e-5}
    assert rates(None, ["lora"]) == {}


@pytest.mark.parametrize(("name", "task"), [("LoRASFT", "sft"), ("LoRABitFitClassification", "classification")])
def test_the_task_is_that_of_the_class(name: str, task: str) -> None:
    model = {"class_path": f"lit_peft.zoo.{name}", "init_args": {"backbone": "b"}}
    assert settle({"model": model, "data": {"class_path": "d", "init_args": {"path": "p"}}}, {})["task"] == task


def test_settings_of_single_methods_are_told_apart() -> None:
    rest, found = split(["-c", "a.yaml", "--model.lora.r", "4", "--model.prefix.dropout=0.1", "--model.lr", "1e-3"])
    assert rest == ["-c", "a.yaml", "--model.lr", "1e-3"]
    assert found == {"lora": {"r": 4}, "prefix": {"dropout": 0.1}}


@pytest.mark.parametrize(
    ("resolved", "expected"),
    [
        ({"model": {"class_path": "mine.Module"}}, "compare puts method and task together. Leave --model out."),
        ({"ckpt_path": "x.ckpt"}, "starts every run from the base. Leave ckpt_path and model.adapter out."),
        ({"model": {"init_args": {"adapter": "folder"}}}, "Leave ckpt_path and model.adapter out."),
        ({}, "--model.backbone is missing"),
        ({"model": {"init_args": {"backbone": "b"}}}, "--data.path is missing"),
    ],
)
def test_jobs_that_cannot_be_compared(resolved: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected.replace(".", r"\.")):
        settle(resolved, {})
