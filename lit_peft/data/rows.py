"""The data module under all others: reading, splitting, encoding once into a cache, and handing out batches."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import datasets
import torch
import transformers
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import LightningDataModule
from transformers import PreTrainedTokenizerBase

from lit_peft.data.collate import IGNORED
from lit_peft.data.encode import EncodeRow, encode_part, fingerprint, is_written, load_written, split_rows, write_once
from lit_peft.data.loader import EncodedRows, ResumableLoader, ShardedSampler
from lit_peft.data.read import Part, Paths, find_parts

CACHE_VERSION = 1
MIN_LENGTH = 8


class Learner(Protocol):
    """What a data module asks of the module being trained."""

    tokenizer: PreTrainedTokenizerBase
    encoder_decoder: bool


@rank_zero_only
def say(line: str) -> None:
    """Print one line to the error stream, from the first process only."""
    print(f"data: {line}", file=sys.stderr, flush=True)


class Rows(LightningDataModule):
    """Read rows, split them with a seed, encode them once into a cache keyed by content, and hand out batches.

    Subclasses say how a table is encoded (`encoder`), what else decides the outcome (`options`), and how rows become
    a batch (`collate`).
    """

    def __init__(
        self,
        path: Paths,
        *,
        batch_size: int,
        max_length: int,
        val_fraction: float,
        val_path: str | None,
        test_path: str | None,
        limit_test: int | None,
        num_workers: int,
        seed: int,
        shuffle_seed: int | None,
        cache_dir: str | None,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}.")
        if max_length < MIN_LENGTH:
            raise ValueError(f"max_length {max_length} is too small to hold a prompt and an answer: use 8 or more.")
        if not 0 <= val_fraction < 1:
            raise ValueError(f"val_fraction must be at least 0 and below 1, not {val_fraction}.")
        for name, value in (
            ("num_workers", num_workers),
            ("seed", seed),
            ("shuffle_seed", shuffle_seed or 0),
            ("limit_test", limit_test or 0),
        ):
            if value < 0:
                raise ValueError(f"{name} is {value}; it must be 0 or more.")
        self.path, self.val_path, self.test_path = path, val_path, test_path
        self.batch_size, self.max_length, self.val_fraction = batch_size, max_length, val_fraction
        self.limit_test, self.num_workers, self.seed = limit_test, num_workers, seed
        self.shuffle_seed = seed if shuffle_seed is None else shuffle_seed
        home = cache_dir or os.environ.get("LIT_PEFT_CACHE") or "~/.cache/lit_peft"
        self.cache = Path(home).expanduser() / "data"
        self.choices: list[str] | None = None
        self.report: dict[str, Any] = {}
        self.tables: dict[str, datasets.Dataset] = {}
        self._learner: tuple[PreTrainedTokenizerBase, bool] | None = None
        self._template = ""
        self._weights: list[float] | None = None
        self._counts: Counter[str] = Counter()

    # -- what the module being trained tells us

    def attach(
        self, tokenizer: PreTrainedTokenizerBase, encoder_decoder: bool = False, text_template: str = ""
    ) -> Rows:
        """Use this tokenizer (and template with pseudo tokens), without a Trainer; returns the data module itself."""
        self._learner = (tokenizer, encoder_decoder)
        self._template = text_template
        return self

    @property
    def text_template(self) -> str:
        """What each text is put into, with the pseudo tokens of a prompt; empty as a rule."""
        if self._learner is not None:
            return self._template
        return str(getattr(getattr(self.trainer, "lightning_module", None), "text_template", ""))

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the module being trained, or the one attached."""
        return self._asked()[0]

    @property
    def encoder_decoder(self) -> bool:
        """Whether the model reads the prompt in an encoder and writes the answer in a decoder."""
        return self._asked()[1]

    def _asked(self) -> tuple[PreTrainedTokenizerBase, bool]:
        if self._learner is not None:
            return self._learner
        module: Learner | None = getattr(self.trainer, "lightning_module", None)
        if module is None or not hasattr(module, "tokenizer"):
            raise TypeError(
                f"{type(self).__name__} needs a tokenizer: train a module that has `tokenizer`, "
                "or call attach(tokenizer) first."
            )
        return module.tokenizer, bool(getattr(module, "encoder_decoder", False))

    @property
    def pad_id(self) -> int:
        """The id written into padding: the pad token's, else the end token's, so that no vocabulary grows."""
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        return 0

    # -- what a subclass says

    @abstractmethod
    def encoder(self, tables: list[datasets.Dataset], parts: list[Part]) -> tuple[list[EncodeRow], dict[str, Any]]:
        """Return one row encoder per table, and what to set on the module after setup; `said` is printed."""

    @abstractmethod
    def options(self) -> dict[str, Any]:
        """Return every option that changes the encoded rows."""

    @abstractmethod
    def features(self) -> datasets.Features:
        """Return the columns of encoded rows."""

    @abstractmethod
    def collate(self, stage: str) -> Callable[[Any], Any]:
        """Return the function that turns a list of rows into a batch."""

    def prompt_lengths(self, split: str = "train") -> list[int]:
        """Return how many tokens come before the first one that is learned, for each encoded row."""
        table = self.tables.get(split)
        if table is None:
            return []
        if "labels" not in table.column_names or self.encoder_decoder:  # the whole text is the prompt
            return [len(ids) for ids in table["input_ids"]]
        return [next((i for i, label in enumerate(row) if label != IGNORED), len(row)) for row in table["labels"]]

    def bins(self, table: datasets.Dataset) -> list[list[int]] | None:
        """Return which rows share a training row, None for one each."""
        return None

    # -- reading and encoding

    def prepare_data(self) -> None:
        """Encode everything into the cache, unless it is there; runs on one process per machine."""
        parts, _ = self._parts()
        if not is_written(self._folder(parts)):
            self._build(parts)

    def setup(self, stage: str | None = None) -> None:
        """Load the encoded rows from the cache."""
        if self.tables:
            return
        parts, self._weights = self._parts()
        folder = self._folder(parts)
        if not is_written(folder):
            self._build(parts)
        self.tables, meta = load_written(folder)
        self.report = meta.pop("report")
        said = meta.pop("said")
        sizes = ", ".join(f"{len(table)} {name}" for name, table in self.tables.items() if len(table))
        for line in [*said[:-1], f"{said[-1]} Now {sizes}."]:
            say(line)
        for name, value in meta.items():
            setattr(self, name, value)

    def _parts(self) -> tuple[list[Part], list[float] | None]:
        parts, weights = find_parts(self.path)
        for path, split in ((self.val_path, "validation"), (self.test_path, "test")):
            if path is not None:
                parts = [part for part in parts if part.split != split] + find_parts(path, split)[0]
        return parts, weights

    def _folder(self, parts: list[Part]) -> Path:
        tokenizer = self.tokenizer
        said = {
            "version": CACHE_VERSION,
            "transformers": transformers.__version__,
            "class": type(self).__name__,
            "parts": [[p.name, p.digest, p.split, p.source, p.limit] for p in parts],
            "split": [self.val_fraction, self.seed],
            "max_length": self.max_length,
            "tokenizer": fingerprint(tokenizer),
            "encoder_decoder": self.encoder_decoder,
            "options": {**self.options(), **({"template": template} if (template := self.text_template) else {})},
        }
        return self.cache / hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:24]

    def _build(self, parts: list[Part]) -> None:
        self.cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".building-", dir=self.cache) as scratch:
            table, meta = self._encode(parts, Path(scratch))
            write_once(self._folder(parts), Path(scratch), table, meta)

    def _encode(self, parts: list[Part], scratch: Path) -> tuple[datasets.Dataset, dict[str, Any]]:
        tables = [part.rows(scratch) for part in parts]
        if not sum(len(table) for table, part in zip(tables, parts, strict=True) if part.split == "train"):
            raise ValueError(f"No rows to train on in {self.path!r}: it is empty.")
        pseudo = self.text_template.count("[P]")
        if pseudo + MIN_LENGTH > self.max_length:
            raise ValueError(
                f"max_length {self.max_length} leaves no room for a text beside {pseudo} pseudo tokens. Raise it, or "
                "use fewer."
            )
        encoders, meta = self.encoder(tables, parts)
        self._counts = Counter()
        split = split_rows(parts, [len(table) for table in tables], self.val_fraction, self.seed)
        done, first = [], 0
        for part, table, encode in zip(parts, tables, encoders, strict=True):
            done.append(encode_part(part, table, encode, self.features(), first, split, scratch))
            first += len(table)
        whole = datasets.concatenate_datasets(done)
        if 0 not in whole["split"][:]:
            raise ValueError(
                f"Every label is masked: none of the {first} rows of {self.path!r} has anything to learn. Check the "
                "roles and the format; answers must be the assistant's and not empty."
            )
        counts = self._counts
        counts["rows"] = first
        return whole, {**meta, "report": dict(counts), "said": [*meta["said"], self.summary(counts)]}

    def summary(self, counts: Counter[str]) -> str:
        """Return one line on what happened to the rows."""
        return (
            f"{counts['rows']} rows, {counts['truncated']} shortened to {self.max_length} tokens "
            f"({counts['answers_cut']} of them in the answer), {counts['dropped']} dropped with nothing to learn."
        )

    # -- handing out

    def rows(self, split: str = "train") -> EncodedRows:
        """Return the encoded rows of `train`, `validation` or `test`, one by one."""
        self.setup()
        table = self.tables[split]
        if split == "test":
            if not len(table):
                table = self.tables["validation"]
            if self.limit_test is not None:
                table = table.select(range(min(self.limit_test, len(table))))
        return EncodedRows(table)

    def train_dataloader(self) -> ResumableLoader:
        """Return shuffled training batches."""
        table = self.rows("train").table
        bins = self.bins(table)
        source = table["source"][:]
        groups = source if bins is None else [source[rows[0]] for rows in bins]
        return self._loader(EncodedRows(table, bins), "train", shuffle=True, groups=groups, weights=self._weights)

    def val_dataloader(self) -> ResumableLoader:
        """Return validation batches, in order."""
        return self._loader(self.rows("validation"), "validation")

    def test_dataloader(self) -> ResumableLoader:
        """Return test batches, in order; the validation rows where there is no test set."""
        return self._loader(self.rows("test"), "test")

    def predict_dataloader(self) -> ResumableLoader:
        """Return the test batches, in order."""
        return self._loader(self.rows("test"), "test")

    def _loader(self, rows: EncodedRows, stage: str, **sampling: Any) -> ResumableLoader:
        # The strategy knows how many processes hold different data: under tensor parallelism fewer than there are.
        shares = getattr(self.trainer, "distributed_sampler_kwargs", None) or {}
        sampler = ShardedSampler(
            rows, seed=self.shuffle_seed, replicas=shares.get("num_replicas"), rank=shares.get("rank"), **sampling
        )
        return ResumableLoader(
            rows,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=self.collate(stage),
            # Its own generator: starting workers must not move the random state that dropout uses.
            generator=torch.Generator().manual_seed(self.seed),
        )
