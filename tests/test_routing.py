"""Rows of one batch under different adapters, forward and backward, against single passes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_peft import (
    IA3,
    LoRAConfig,
    adapters,
    disabled,
    routed,
)
from lit_peft.adapter import named_adapters
from lit_peft.selection import Rows
from lit_peft.targets import bare
from tests.many_adapters import LoRATiny, chosen, four, gradients, inputs, move
from tests.models import tiny
from tests.tiny_adapted import placed

MIXED = ["policy", "reward", None, "value", ("policy", "value"), "policy"]  # shuffled on purpose


SORTED = ["policy", "policy", "value", "reward", "reward", None]


def singles(model: Any, rows: dict[str, Tensor], names: list[Any]) -> Tensor:
    outputs = []
    for row, entry in enumerate(names):
        with chosen(model, entry):
            outputs.append(model(**{key: value[row : row + 1] for key, value in rows.items()}).logits[0])
    return torch.stack(outputs)


@pytest.mark.parametrize("names", [MIXED, SORTED], ids=["shuffled", "sorted"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "t5"])
def test_one_routed_pass_equals_single_passes(kind: str, names: list[Any]) -> None:
    module = four(kind)
    rows = inputs(kind)
    with torch.no_grad():
        expected = singles(module.model, rows, names)
        with routed(module, names):
            found = module.model(**rows).logits
        plain = module.model(**rows).logits
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert all((found[i] - plain[i]).abs().max() > 1e-2 for i in range(6)), "every row is under another choice"


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_routed_training_gives_each_set_its_own_gradient(kind: str, checkpointing: bool) -> None:
    module = four(kind).double()
    module.model.train()
    rows, names = inputs(kind), ["policy", "value", "default", "policy", None, "reward"]
    expected: dict[str, Tensor] = {}
    for row, entry in enumerate(names):
        with chosen(module, entry):
            loss = module.model(**{k: v[row : row + 1] for k, v in rows.items()}, use_cache=False).logits.sin().sum()
        if entry is None:
            continue
        loss.backward()
        for key, gradient in gradients(module.model).items():
            assert key.endswith(f".{entry}"), f"{key} got a gradient of {entry}"
            expected[key] = expected.get(key, torch.zeros_like(gradient)) + gradient
    if checkpointing:
        checkpointed(module)
    with routed(module, names):
        logits = module.model(**rows, use_cache=False).logits
    logits.sin().sum().backward()  # outside of the block: the choice was made by the call
    found = gradients(module.model)
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, atol=1e-9, rtol=1e-7, msg=key)
    with routed(module, ["policy", "value", "default", "policy", None, "reward"]):
        module.model(**rows, use_cache=False).logits[1].sin().sum().backward()
    for key, gradient in gradients(module.model).items():
        assert key.endswith(".value") or not gradient.any(), f"{key} got the gradient of another row"


def checkpointed(module: Any) -> None:
    from lit_peft.selection import keep_selection

    module.model.gradient_checkpointing_enable({"use_reentrant": False})
    keep_selection(module.model)
    assert module.model.is_gradient_checkpointing


def test_two_passes_one_backward_with_checkpointing_equals_without() -> None:
    """Where HF PEFT's global switch gives gradients that are 224 % off, without an error."""
    results = []
    for checkpointing in (False, True):
        module = four("llama").double()
        module.model.train()
        if checkpointing:
            checkpointed(module)
        rows = inputs("llama")
        with adapters(module, "value"):
            value = module.model(**rows, use_cache=False).logits.cos().sum()
        with adapters(module, "policy"):
            policy = module.model(**rows, use_cache=False).logits.sin().sum()
        with routed(module, MIXED):
            mixed = module.model(**rows, use_cache=False).logits.square().mean()
        (value + policy + mixed).backward()
        results.append(gradients(module.model))
    assert results[0].keys() == results[1].keys()
    assert {key.rpartition(".")[2] for key in results[0]} == {"policy", "value", "reward"}
    for key, gradient in results[0].items():
        torch.testing.assert_close(results[1][key], gradient, atol=1e-9, rtol=1e-9, msg=key)


def test_every_base_weight_has_one_storage() -> None:
    plain = tiny("llama")
    before = {name: p.data_ptr() for name, p in plain.named_parameters()}
    module = LoRATiny("llama")
    module.model = plain
    module.configure_model()
    module.add_adapter("two", lora=LoRAConfig(r=4))
    module.add_adapter("three", IA3)
    with disabled(module), routed(module, [None]):
        pass
    after = {bare(name): p.data_ptr() for name, p in module.named_parameters() if "lora_" not in name}
    after = {name.removeprefix("model."): pointer for name, pointer in after.items() if "ia3_l" not in name}
    assert {
        name if name == "lm_head.weight" else f"model.{name}".replace("model.model.", "model."): p
        for name, p in after.items()
    } == before
    assert len(set(before.values())) == len(before)


def test_beams_and_left_padding_generate_as_alone() -> None:
    module = four("llama")
    names: list[Any] = ["policy", "value", None, "reward", "default", "policy"]
    rows = inputs("llama")
    for beams in (1, 3):
        options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "pad_token_id": 0, "min_new_tokens": 6}
        with routed(module, names):
            together = module.model.generate(**rows, **options)
        seen = set()
        for row, entry in enumerate(names):
            with chosen(module, entry):
                alone = module.model.generate(**{k: v[row : row + 1] for k, v in rows.items()}, **options)
            assert torch.equal(together[row], alone[0]), (beams, entry)
            with disabled(module):
                base = module.model.generate(**{k: v[row : row + 1] for k, v in rows.items()}, **options)
            seen.add(torch.equal(base, alone))
        assert False in seen, "no adapter changed an answer"


def test_mistakes_in_routing_are_one_line() -> None:
    module = four("llama")
    rows = inputs("llama")
    with pytest.raises(ValueError, match=r"No adapter is named 'nobody'. This model has \['default', 'policy'"):
        routed(module, ["policy", "nobody"])
    with pytest.raises(ValueError, match="needs one name for each row"):
        routed(module, [])
    for wrong in (["policy"] * 5, ["policy"] * 7):
        with (
            pytest.raises(ValueError, match=f"routed to {len(wrong)} rows, but a layer was called with 6"),
            routed(module, wrong),
        ):
            module.model(**rows)
    with pytest.raises(ValueError, match="single tokens"), routed(module, ["policy"] * 2):
        next(a for _, a in named_adapters(module.model))(torch.randn(4, 32))


def test_compiled_code_follows_the_routing() -> None:
    module = placed(LoRATiny, "llama", lora=LoRAConfig(r=2))
    module.add_adapter("two", lora=LoRAConfig(r=3))
    move(module.model, "default", 1)
    move(module.model, "two", 2)
    block = module.model.model.layers[0].mlp
    x = torch.randn(3, 4, 32)
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    for names in (["two", "default", None], [None, "two", "two"]):
        with routed(module, names):
            torch.testing.assert_close(compiled(x), block(x))
    torch.testing.assert_close(compiled(x), block(x))
    torch._dynamo.reset()


def test_rows_are_sorted_once() -> None:
    x, y = torch.zeros(4, 3, 2), torch.zeros(4, 3, 5)
    groups, order = Rows(["a", "a", None, "b"]).grouped(x, y)
    assert groups == [(("a",), 2), ((), 1), (("b",), 1)]
    assert order is None, "nothing to sort"
    groups, order = Rows(["b", ("a", "b"), "b", "b"]).grouped(x, y)
    assert groups == [(("b",), 3), (("a", "b"), 1)]
    assert order is not None
    assert order.tolist() == [0, 2, 3, 1]
    with torch.no_grad():
        groups, order = Rows(["a", "b"]).grouped(x, y)  # two beams of each row
    assert groups == [(("a",), 2), (("b",), 2)]


def ddp_worker(folder: str) -> None:
    """One of two processes: its rows lack adapters that the other's have, and the other way round."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.set_num_threads(1)
    module = four("llama").double()
    module.model.train()
    wrapped = nn.parallel.DistributedDataParallel(module.model)
    rows = inputs("llama")
    names: list[Any] = ["policy", "policy", None, "value", "reward", "default"]
    mine = slice(3 * rank, 3 * rank + 3)
    with routed(module, names[mine]):
        logits = wrapped(**{k: v[mine] for k, v in rows.items()}, use_cache=False).logits
    logits.sin().sum().backward()
    if rank == 0:
        torch.save(gradients(module.model), Path(folder) / "found.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_with_different_adapters_in_their_rows(tmp_path: Path) -> None:
    module = four("llama").double()
    module.model.train()
    with routed(module, ["policy", "policy", None, "value", "reward", "default"]):
        logits = module.model(**inputs("llama"), use_cache=False).logits
    (logits.sin().sum() / 2).backward()  # DDP averages over the two
    expected = gradients(module.model)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = f"from tests.test_routing import ddp_worker; ddp_worker({str(tmp_path)!r})"
    started = []
    for rank in range(2):
        settings = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        environment = {**os.environ, **settings, "PYTHONPATH": str(Path(__file__).parents[1])}
        started.append(
            subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True)
        )
    for process in started:
        _, error = process.communicate(timeout=180)
        assert process.returncode == 0, error[-2000:]
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, atol=1e-9, rtol=1e-7, msg=key)
