"""What the catalogue says a method supports is so, and what it says a method does not support is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_peft import hub, load
from lit_peft.adapter import named_adapters
from lit_peft.catalogue import FACTS, METHODS
from lit_peft.forks import kind_of
from lit_peft.named import adapters, add_adapter, disabled, routed
from lit_peft.saved import methods_of
from tests import foreign_folders as made
from tests.distributed.worker import SETTINGS
from tests.models import save_tiny
from tests.test_methods import CASES, Case, batch, build, gradients, outputs, same, shake

each = pytest.mark.parametrize("name", FACTS)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("support") / "llama")


def case_of(name: str) -> Case:
    return next(case for case in CASES if case.method == name)


def two_sets(name: str, folder: Path) -> Any:
    """A module with the sets `default` and `other`, far from their start and from each other."""
    module = build(case_of(name), folder, "sft")
    add_adapter(module.model, "other")  # type: ignore[arg-type]
    for _, adapter in named_adapters(module.model):  # type: ignore[arg-type]
        for _, parameter in adapter.trained_parameters():
            parameter.requires_grad_()
    shake(module)
    return module


def under(module: Any, choose: Callable[[], Any], rows: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits (rows, length, vocabulary) of one call inside the given context."""
    inputs = {key: rows[key] for key in ("input_ids", "attention_mask")}
    module.eval()
    with torch.no_grad(), choose():
        found: torch.Tensor = module.model(**inputs, use_cache=False).logits
    return found


@each
def test_named_sets(name: str, llama: Path) -> None:
    if not FACTS[name].sets:
        module = build(case_of(name), llama, "sft")
        with pytest.raises(ValueError, match="adapter"):
            add_adapter(module.model, "other")  # type: ignore[arg-type]
        return
    module = two_sets(name, llama)
    choices = [lambda: adapters(module, "default"), lambda: adapters(module, "other"), lambda: disabled(module)]
    found = [under(module, choose, batch("sft")) for choose in choices]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert not same(found[one], found[other], 1e-3)


@each
def test_rows_of_one_batch(name: str, llama: Path) -> None:
    facts, rows = FACTS[name], batch("sft")
    wanted = ["other", "default", None, "other"]
    if not facts.sets:
        assert not facts.rows
        return
    module = two_sets(name, llama)
    if not facts.rows:
        with pytest.raises(TypeError, match="cannot be routed"):
            under(module, lambda: routed(module, wanted), rows)
        return
    together = under(module, lambda: routed(module, wanted), rows)
    for index, choice in enumerate(wanted):
        single = {key: value[index : index + 1] for key, value in rows.items()}
        alone = under(module, lambda: adapters(module, *filter(None, [choice])), single)  # noqa: B023
        assert same(together[index : index + 1], alone), (index, choice)


@each
@pytest.mark.skipif("qlora" not in METHODS, reason="nothing in this version holds a base in 4 bits")
def test_base_in_four_bits(name: str, llama: Path) -> None:
    case = case_of(name)
    wanted = {"quantize": "nf4"}
    if not FACTS[name].four_bit:
        with pytest.raises((TypeError, ValueError)):
            build(case, llama, "sft", **wanted)
        return
    module = build(case, llama, "sft", **{} if "quantize" in case.settings else wanted)
    assert sum(p.dtype == torch.uint8 for p in module.model.parameters()) == 2 * 7  # type: ignore[union-attr]
    shake(module)
    found = gradients(module, batch("sft"))
    trained = {key for key, parameter in module.named_parameters() if parameter.requires_grad}
    assert found.keys() == trained
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert sum(bool(gradient.any()) for gradient in found.values()) > 0.7 * len(found)
    assert outputs(module, batch("sft")).isfinite().all()


@each
def test_several_processes(name: str) -> None:
    """`tests/distributed` compares the losses of what is listed there with those of one process."""
    assert (FACTS[name].ddp or FACTS[name].fsdp2) == (name in SETTINGS)


@each
def test_file_type(name: str, llama: Path) -> None:
    facts = FACTS[name]
    assert facts.peft == (facts.peft_type in set(peft.PeftType))
    parts = build(case_of(name), llama, "sft").parts()
    assert " + ".join(part["peft_type"] for part in reversed(parts)) == facts.peft_type  # the outermost first


@each
def test_what_is_written_is_what_the_facts_say_and_who_they_say_can_read_it(
    name: str, llama: Path, tmp_path: Path
) -> None:
    facts = FACTS[name]
    module: Any = build(case_of(name), llama, "sft")
    shake(module)
    folder = module.save_adapter(tmp_path / "a")
    kinds = [config["peft_type"] for config in hub.read_configs(folder)]
    assert " + ".join(reversed(kinds)) == facts.peft_type
    assert ("HF PEFT" in facts.reads) == facts.peft
    if not facts.peft:
        with pytest.raises((KeyError, ValueError, TypeError)):
            peft.PeftConfig.from_pretrained(str(folder))
        return
    module.eval()
    rows = batch("sft")
    inputs = {key: rows[key] for key in ("input_ids", "attention_mask")}
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), str(folder)).eval()
    with torch.no_grad():
        if name == "qlora":  # HF PEFT has the base as it is stored, not in four bits
            module = load(folder, quantize="none", device="cpu")
        mine = module.model(**inputs, use_cache=False).logits
        found = theirs(**inputs, use_cache=False).logits[:, -rows["input_ids"].shape[1] :]  # not those of a prompt
    there = rows["attention_mask"].bool()
    assert same(mine[there], found[there])


def test_other_libraries_folders(tmp_path: Path) -> None:
    """Every folder that is read belongs to the methods that say so, and to no other."""
    bert = tmp_path / "bert"  # which no one looks at
    bottleneck, prefix = made.BOTTLENECK, made.PREFIX
    gated = [{**prefix, "use_gating": True}, {**bottleneck, "use_gating": True}, made.LORA]
    unions = [{"architecture": "union", "configs": c} for c in ([prefix, {**bottleneck, **made.PARALLEL}], gated)]
    changes = ({}, made.HOULSBY, made.PARALLEL, made.COMPACTER)
    found: dict[str, set[str]] = {"adapters": set(), "pyreft": set()}

    def note(library: str, folder: Path) -> None:
        found[library].update(methods_of([kind_of(config) for config in hub.read_configs(folder)], folder))

    direft = {**made.REFT, "orthogonality": False, "subtract_projection": False}
    for number, config in enumerate([*({**bottleneck, **c} for c in changes), prefix, made.REFT, direft, *unions]):
        tensors: dict[str, torch.Tensor] = {}
        for part in config.get("configs", [config]):
            build_part: dict[str, Callable[..., Any]] = {
                "prefix_tuning": made.prefix,
                "lora": made.gated_lora,
                "reft": lambda kind, part: made.reft(kind, part)[0],
            }
            tensors |= build_part.get(str(part.get("architecture")), made.bottleneck)("bert", part)
        note("adapters", made.write_adapters(tmp_path / f"{number}", "bert", bert, config, tensors))
    for kind in ("LoreftIntervention", "DireftIntervention"):
        made.write_pyreft(tmp_path / kind, "llama", kind)
        note("pyreft", tmp_path / kind)
    for library, methods in found.items():
        assert methods == {name for name, facts in FACTS.items() if library in facts.reads}
