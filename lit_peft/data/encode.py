"""From raw tables to one encoded table on disk: splitting, encoding row by row, writing all or nothing."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from lit_peft.data.read import Part, quiet

SPLIT_NAMES = ("train", "validation", "test")
EncodeRow = Callable[[dict[str, Any]], Iterator[dict[str, Any]]]
Splits = np.ndarray[Any, Any]


def split_rows(parts: list[Part], sizes: list[int], val_fraction: float, seed: int) -> Splits:
    """Return the split of every raw row in reading order, as an index into `SPLIT_NAMES`.

    Validation rows are drawn from the training rows unless some part already is validation. They are drawn by raw
    row, so that two pieces of one long text never fall on both sides.
    """
    split = np.repeat([SPLIT_NAMES.index(part.split) for part in parts], sizes)
    if val_fraction and not any(part.split == "validation" for part in parts):
        free = np.flatnonzero(split == 0)
        count = max(round(len(free) * val_fraction), 1) if len(free) > 1 else 0
        split[np.random.default_rng(seed).permutation(free)[:count]] = SPLIT_NAMES.index("validation")
    return split


def encode_part(
    part: Part,
    table: datasets.Dataset,
    encode: EncodeRow,
    features: datasets.Features,
    first: int,
    split: Splits,
    scratch: Path,
) -> datasets.Dataset:
    """Return the encoded rows of one part; a raw row may give none, one or several.

    Args:
        part: Where the rows come from.
        table: The raw rows.
        encode: Turns one raw row into encoded rows.
        features: Columns of the result.
        first: Number of raw rows in the parts before this one.
        split: Split of every raw row of all parts.
        scratch: Folder for the Arrow file.

    Raises:
        ValueError: If a row is malformed, with its file and line.
    """

    def batch(columns: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        out: dict[str, list[Any]] = {name: [] for name in features}
        for at, index in enumerate(indices):
            try:
                made = list(encode({name: values[at] for name, values in columns.items()}))
            except ValueError as error:
                raise ValueError(f"{part.place_of(index)}: {error}.") from None
            fixed = {"id": first + index, "split": int(split[first + index]), "source": part.source}
            for row in made:
                for name, value in (row | fixed).items():
                    out[name].append(value)
        return out

    with quiet():
        return table.map(
            batch,
            batched=True,
            batch_size=256,
            with_indices=True,
            remove_columns=table.column_names,
            features=features,
            cache_file_name=str(scratch / f"{uuid.uuid4().hex}.arrow"),
            new_fingerprint=uuid.uuid4().hex,
        )


def write_once(folder: Path, scratch: Path, table: datasets.Dataset, meta: dict[str, Any]) -> None:
    """Write the encoded table so that `folder` is either whole or not there, whoever else writes it too."""
    made = scratch / "made"
    with quiet():
        table.save_to_disk(str(made / "rows"))
    (made / "meta.json").write_text(json.dumps(meta))
    if folder.exists() and not is_written(folder):
        shutil.rmtree(folder, ignore_errors=True)
    try:
        os.replace(made, folder)
    except OSError:  # another process was faster; its rows are the same
        if not is_written(folder):
            raise


def is_written(folder: Path) -> bool:
    """Say whether the folder holds a whole encoded table."""
    return (folder / "meta.json").is_file()


def load_written(folder: Path) -> tuple[dict[str, datasets.Dataset], dict[str, Any]]:
    """Return the table of each split, and what was remembered beside them."""
    whole = datasets.load_from_disk(str(folder / "rows"))
    split = np.asarray(whole["split"][:])
    tables = {
        name: whole.select(np.flatnonzero(split == at)).remove_columns("split") for at, name in enumerate(SPLIT_NAMES)
    }
    return tables, json.loads((folder / "meta.json").read_text())


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of everything in a tokenizer that changes token ids: vocabulary, merges, chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # Padding and truncation are left behind by whoever called the tokenizer last.
        inner = {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("padding", "truncation")}
    else:
        inner = {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab()}
    inner |= {"chat_template": tokenizer.chat_template, "special": str(tokenizer.special_tokens_map)}
    return hashlib.sha256(json.dumps(inner, sort_keys=True, default=str).encode()).hexdigest()
