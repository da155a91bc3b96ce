"""Each test has its own cache and its own folder."""

from pathlib import Path

import pytest
from tiny_data import make_tokenizer, write_jsonl
from transformers import PreTrainedTokenizerBase


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return make_tokenizer()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_PEFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    """Forty prompts and answers of different lengths."""
    words = ["one", "two", "three", "four", "five", "six", "seven"]
    rows = [{"prompt": f"Add {words[i % 7]} " * (1 + i % 5), "completion": f"{words[i % 6]} {i}"} for i in range(40)]
    return write_jsonl(tmp_path / "pairs.jsonl", rows)
