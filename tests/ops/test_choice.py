"""Which path an op takes: the caller's choice, then the environment's, then what was measured on this GPU."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_peft.ops import choice
from lit_peft.ops.choice import kernels_run, takes_kernel

pytest.importorskip("triton")


class OnGPU:
    """Stands for a tensor on a GPU."""

    device, is_meta = torch.device("cuda:0"), False

    def numel(self) -> int:
        return 1


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("LIT_PEFT_KERNELS", raising=False)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(choice, "measured", lambda: {"a GPU": {"norm": {"rows": 512, "width": 64}}})
    return OnGPU()


def test_measured_sizes_decide(gpu: Any) -> None:
    assert takes_kernel("norm", gpu, rows=512, width=64)
    assert not takes_kernel("norm", gpu, rows=511, width=64)
    assert not takes_kernel("norm", gpu, rows=512, width=63)
    assert not takes_kernel("another", gpu, rows=512)


def test_what_was_not_measured_is_plain(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "another GPU")
    assert not takes_kernel("norm", gpu, rows=2**20, width=2**12)


CHOICES = [("0", None, False), ("1", None, True), ("0", True, True), ("1", False, False)]


@pytest.mark.parametrize(("forced", "asked", "taken"), CHOICES)
def test_the_caller_beats_the_environment(
    gpu: Any, forced: str, asked: bool | None, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIT_PEFT_KERNELS", forced)
    assert takes_kernel("norm", gpu, asked, rows=1, width=1) is taken


def test_only_on_the_current_device(gpu: Any) -> None:
    assert kernels_run(torch.device("cuda:0"))
    assert not kernels_run(torch.device("cuda:1"))


def test_asked_for_where_they_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="on cpu"):
        takes_kernel("norm", torch.ones(1), True, rows=1)


def test_what_is_measured_is_names_and_sizes() -> None:
    found = json.loads((Path(choice.__file__).parent / "crossovers.json").read_text())
    for ops in found.values():
        assert all(isinstance(least, int) for sizes in ops.values() for least in sizes.values())
