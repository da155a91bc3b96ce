"""For every method: a cache changes nothing, padding left equals padding right, merging into bf16 is close."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_peft.methods.reft import prompt_is
from tests.models import VOCAB, save_tiny
from tests.test_methods import CASES, HEADS, Case, batch, build, outputs, same, shake
from tests.tiny_adapted import shake as shake_gently

DECODERS = ("llama", "gpt2", "t5")


def over(*kinds: str) -> pytest.MarkDecorator:
    """Every case of the contract on these models."""
    found = [
        pytest.param(case, kind, id=f"{case.method}{'-kept' if 'keep_base' in case.settings else ''}-{kind}")
        for case in CASES
        for kind in kinds
    ]
    return pytest.mark.parametrize(("case", "kind"), found)


Folders = Callable[[str], Path]
LENGTH = 9


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    home = tmp_path_factory.mktemp("decoders")
    return lru_cache(None)(lambda kind: save_tiny(kind, home / kind, task="classification" if kind == "bert" else "lm"))


def shaken(case: Case, folder: Path) -> Any:
    module = build(case, folder, "sft")
    shake(module)
    return module.eval()


@over(*DECODERS)
def test_cache_changes_nothing(case: Case, kind: str, folders: Folders) -> None:
    module = shaken(case, folders(kind))
    ids = torch.randint(8, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(3))
    found = []
    for cached in (True, False):
        module.model.generation_config.eos_token_id = None  # both write all the tokens
        with prompt_is(torch.ones_like(ids)):  # ReFT edits the prompt: without a cache it has to be told where it ends
            found.append(
                module.model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=False,
                    max_new_tokens=6,
                    use_cache=cached,
                    return_dict_in_generate=True,
                    output_logits=True,
                )
            )
    with_cache, without = found
    assert torch.equal(with_cache.sequences, without.sequences)
    assert same(torch.stack(with_cache.logits), torch.stack(without.logits))


@over(*DECODERS)
def test_padding_left_equals_right(case: Case, kind: str, folders: Folders) -> None:
    module = shaken(case, folders(kind))
    ids = torch.randint(8, VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(4))
    lengths = (LENGTH, 5, 7)
    right, left = (_padded(ids, lengths, side, kind) for side in ("right", "left"))
    with torch.no_grad():
        one, other = module.model(**right).logits, module.model(**left).logits
    if kind == "t5":  # the decoder's rows are not padded
        assert same(one, other)
        return
    for row, length in enumerate(lengths):
        assert same(one[row, :length], other[row, -length:])


def _padded(ids: Tensor, lengths: tuple[int, ...], side: str, kind: str) -> dict[str, Tensor]:
    """The first tokens of each row, filled up with padding on one side."""
    places = torch.arange(LENGTH)
    mask = torch.stack([places < n if side == "right" else places >= LENGTH - n for n in lengths])
    filled = torch.zeros_like(ids)
    for row, n in enumerate(lengths):
        filled[row, mask[row]] = ids[row, :n]
    found = {"input_ids": filled, "attention_mask": mask.long()}
    if kind == "t5":
        return {**found, "decoder_input_ids": ids[:, :4]}
    return {**found, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


@over(*DECODERS, "bert")
def test_merging_into_bf16_is_close(case: Case, kind: str, folders: Folders) -> None:
    """Within 2e-2 of the largest logit: what rounding every merged weight once to 8 bits may cost.

    Both are computed in float32. In bf16 the products alone move these logits by up to 3e-2, merged or not.
    """
    task = "classification" if kind == "bert" else "sft"
    module = build(replace(case, settings={**case.settings, "dtype": "bfloat16"}), folders(kind), task)
    shake_gently(module, size=0.02)  # OLoRA's orthonormal start makes large changes of small ones
    if not case.merges:
        with pytest.raises(TypeError, match="cannot be merged"):
            module.merge_adapters()
        return
    rows, merged = batch(task), copy.deepcopy(module)
    merged.merge_adapters()
    names = {name for name, parameter in merged.model.named_parameters() if parameter.dtype != torch.bfloat16}  # type: ignore[union-attr]
    assert all(name.startswith(HEADS) for name in names), names
    expected = outputs(module.float(), rows)
    assert (outputs(merged.float(), rows) - expected).abs().max() <= 2e-2 * expected.abs().max()
