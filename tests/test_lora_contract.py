"""The contract of `tests/test_methods.py` for what LoRA does beyond linear layers, on the models that have it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from lit_peft.sites import linears, widths
from tests import test_methods as contract
from tests.test_methods import Case, biases, folders, lora_count

__all__ = ["folders"]  # the fixture

TABLES = {"llama": "embed_tokens", "gpt2": "wte", "bert": "word_embeddings", "t5": "embed_tokens"}


def tables(r: int, name: str) -> Callable[[nn.Module], int]:
    """LoRA on every linear layer and on the tables of a name: r (vocabulary + width) each."""

    def count(model: nn.Module) -> int:
        named = [m for path, m in model.named_modules() if path.endswith(f".{name}")]
        return lora_count(r)(model) + sum(r * sum(module.get_parameter("weight").shape) for module in named)

    return count


def biases_inside(model: nn.Module) -> int:
    return sum(layer.get_parameter("bias").numel() for layer in linears(model).values())


def whole(model: nn.Module, *leaves: str) -> int:
    return sum(p.numel() for path, m in model.named_modules() if path.endswith(leaves) for p in m.parameters())


def sliced(r: int, slices: int) -> Callable[[nn.Module], int]:
    """GPT-2: for each slice of c_attn A (r, in) and B (a third of the outputs, r)."""

    def count(model: nn.Module) -> int:
        fused = [widths(m) for path, m in linears(model).items() if path.endswith("c_attn")]
        return sum(slices * r * (wide + tall // 3) for wide, tall in fused)

    return count


ALL = ["all-linear"]
CASES = [
    *[
        (Case("lora", tables(4, name), {"lora": {"r": 4, "target_modules": [*ALL, name]}}), kind, "classification")
        for kind, name in TABLES.items()
    ],
    (
        Case("lora", tables(4, "embed_tokens"), {"lora": {"r": 4, "target_modules": [*ALL, "embed_tokens"]}}),
        "t5",
        "sft",
    ),
    (Case("lora", tables(4, "wte"), {"lora": {"r": 4, "target_modules": [*ALL, "wte"]}}), "gpt2", "sft"),
    *[
        (Case("lora", lambda m: lora_count(4)(m) + biases(m), {"lora": {"r": 4, "bias": "all"}}), kind, task)
        for kind, task in [("gpt2", "sft"), ("bert", "classification")]
    ],
    (
        Case("lora", lambda m: lora_count(4)(m) + biases_inside(m), {"lora": {"r": 4, "bias": "lora_only"}}),
        "bert",
        "classification",
    ),
    (
        Case(
            "lora",
            lambda m: lora_count(4)(m) + whole(m, "lm_head", "model.norm"),
            {"lora": {"r": 4, "modules_to_save": ["lm_head", "norm"]}},
        ),
        "llama",
        "sft",
    ),
    (
        Case(
            "lora", lambda m: lora_count(4)(m) + whole(m, "lm_head"), {"lora": {"r": 4, "modules_to_save": ["lm_head"]}}
        ),
        "gpt2",  # tied: the head gets weights of its own
        "sft",
    ),
    (
        Case(
            "lora",
            sliced(3, 2),
            {"lora": {"r": 3, "target_modules": ["c_attn"], "enable_lora": [True, False, True], "use_rslora": True}},
        ),
        "gpt2",
        "sft",
    ),
]
NAMES = [
    f"{kind}-{task}-{'-'.join(key for key in case.settings['lora'] if key != 'r')}"
    + ("-all" if case.settings["lora"].get("bias") == "all" else "")
    for case, kind, task in CASES
]
CHECKS = [
    contract.test_starts_as_the_base_and_steps_aside,
    contract.test_only_what_is_declared_trains,
    contract.test_checkpoint_holds_only_what_is_trained_and_resumes_exactly,
    contract.test_merged_equals_unmerged,
    contract.test_saved_and_reloaded_equals_trained,
    contract.test_gradient_checkpointing_and_accumulation_change_no_gradient,
]


@pytest.mark.parametrize(("case", "kind", "task"), CASES, ids=NAMES)
@pytest.mark.parametrize("check", CHECKS, ids=[check.__name__.removeprefix("test_") for check in CHECKS])
def test_contract(check: Any, case: Case, kind: str, task: str, folders: Any, tmp_path: Path) -> None:
    more = {"tmp_path": tmp_path} if "tmp_path" in inspect.signature(check).parameters else {}
    check(case, kind, task, folders, **more)
