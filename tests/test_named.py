"""Many adapters on one base: rows routed in one pass, forward and backward; sets added, frozen, saved, rebuilt."""

from __future__ import annotations

import copy
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lit_peft import (
    IA3,
    BitFit,
    BitFitConfig,
    Freeze,
    Full,
    IA3Config,
    LoRA,
    LoRAConfig,
    activate,
    adapters,
    add_adapter,
    disabled,
    hub,
    load,
    place,
    routed,
    train_adapters,
)
from lit_peft.adapter import adapter_names, named_adapters
from lit_peft.methods.lora import LoRALinear
from lit_peft.selection import Rows
from lit_peft.tasks.sft import SFT
from tests.models import save_tiny, tiny
from tests.test_methods import batch, loader, quick_trainer
from tests.tiny_adapted import Tiny, check_equal, in_peft, placed, shake


class Many(LoRA, IA3, BitFit, Tiny): ...


class LoRATiny(LoRA, Tiny): ...


class LoRASFT(LoRA, SFT): ...


ROLES = ("policy", "value", "reward", "default")
MIXED = ["policy", "reward", None, "value", ("policy", "value"), "policy"]  # shuffled on purpose
SORTED = ["policy", "policy", "value", "reward", "reward", None]


def four(kind: str, **config: Any) -> Any:
    """One base under LoRA of two ranks and other targets, BitFit, (IA)3, and a stack of all three."""
    torch.manual_seed(0)
    module = placed(Many, kind, lora=LoRAConfig(r=3), **config)
    module.add_adapter("policy", lora=LoRAConfig(r=4, target_modules="attention"))
    module.add_adapter("value", bitfit=BitFitConfig())
    module.add_adapter("reward", ia3=IA3Config(), lora=LoRAConfig(r=2))
    for index, name in enumerate(adapter_names(module.model)):
        move(module.model, name, index)
    return module


def move(model: nn.Module, name: str, seed: int, size: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in own(model, name).items():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=size)
            assert key


def own(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    return {key: p for key, p in model.named_parameters() if key.endswith(f".{name}")}


def inputs(kind: str, rows: int = 6) -> dict[str, Tensor]:
    """Rows of several lengths, padded on the left."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(8, 120, (rows, 9), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : row % 4] = 0
    found = {"input_ids": ids * mask, "attention_mask": mask}
    return found | ({"decoder_input_ids": ids[:, :5]} if kind == "t5" else {})


def chosen(model: nn.Module, entry: Any) -> Any:
    return adapters(model, *(() if entry is None else (entry,) if isinstance(entry, str) else entry))


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


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


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
    after = {hub.bare(name): p.data_ptr() for name, p in module.named_parameters() if "lora_" not in name}
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
    groups, order = Rows(["a", "b"]).grouped(x, y)  # two beams of each row
    assert groups == [(("a",), 2), (("b",), 2)]


class Nameless(LoRA):
    """A method that was written before there were names."""

    def place_adapters(self) -> None:
        assert self.model is not None
        place(self.model, ["model.layers.0.mlp.up_proj"], lambda base: LoRALinear(base, LoRAConfig()))


# Sets of a module -----------------------------------------------------------------------------------------------------


def test_sets_have_their_own_targets_ranks_and_methods() -> None:
    module = four("llama")
    sets: dict[str, dict[str, int]] = {}
    for path, adapter in named_adapters(module.model):
        for name in adapter.configs:
            sets.setdefault(name, {}).setdefault(type(adapter).__name__, 0)
            sets[name][type(adapter).__name__] += 1
        assert path
    assert sets == {
        "default": {"LoRALinear": 14, "IA3Linear": 6, "BitFitBias": 14},
        "policy": {"LoRALinear": 8},
        "value": {"BitFitBias": 14},
        "reward": {"LoRALinear": 14, "IA3Linear": 6},
    }
    ranks = {adapter.configs["policy"].r for _, adapter in named_adapters(module.model) if "policy" in adapter.configs}
    assert ranks == {4}
    module.delete_adapter("reward")
    assert adapter_names(module.model) == ["default", "policy", "value"]
    assert not own(module.model, "reward")
    assert "reward" not in module.hparams["named"]
    with pytest.raises(ValueError, match="first adapter is the module's own"):
        module.delete_adapter("default")


def test_each_set_is_saved_alone_and_loads_elsewhere(tmp_path: Path) -> None:
    module = four("llama")
    module.save_adapter(tmp_path / "policy", "policy")
    check_equal(_active(module, "policy"), in_peft(tmp_path / "policy", "llama"), "llama")
    module.save_adapter(tmp_path / "reward", "reward")
    assert sorted(p.name for p in (tmp_path / "reward").iterdir() if p.is_dir()) == ["ia3", "lora"]
    fresh = placed(LoRATiny, "llama", lora=LoRAConfig(r=7, target_modules=["q_proj"]))
    fresh.load_adapter(tmp_path / "policy", "mine")
    assert torch.equal(out(fresh, "mine"), out(module, "policy"))
    with pytest.raises(ValueError, match=r"holds IA3 \+ LORA, and no method here reads IA3. Name its class"):
        fresh.load_adapter(tmp_path / "reward", "other")
    assert adapter_names(fresh.model) == ["default", "mine"]
    fresh.add_adapter("other", LoRA, IA3, folder=tmp_path / "reward")
    assert torch.allclose(out(fresh, "other"), out(module, "reward"), atol=1e-5)
    move(fresh.model, "mine", 9)
    fresh.load_adapter(tmp_path / "policy", "mine")  # filled again
    assert torch.equal(out(fresh, "mine"), out(module, "policy"))


def _active(module: Any, name: str) -> nn.Module:
    model = copy.deepcopy(module.model)
    activate(model, name)
    return model


@torch.no_grad()
def out(module: Any, *names: str) -> Tensor:
    with adapters(module, *names):
        return module.model(**inputs("llama")).logits  # type: ignore[no-any-return]


def test_mistakes_in_adding_change_nothing(tmp_path: Path) -> None:
    module = placed(LoRATiny, "llama", lora=LoRAConfig(r=2))
    shake(module)
    module.save_adapter(tmp_path / "a")
    module.add_adapter("two")
    before = {key: p.clone() for key, p in module.model.named_parameters()}

    class Other(LoRA, Freeze, Full, Tiny): ...

    other = Other("llama")
    other.configure_model()
    (tmp_path / "a" / hub.WEIGHTS).rename(tmp_path / "kept")
    cases: list[tuple[Any, type[Exception], str]] = [
        (lambda: module.add_adapter("two"), ValueError, "already has an adapter named 'two'"),
        (lambda: module.add_adapter("default"), ValueError, "already has an adapter named 'default'"),
        (lambda: module.add_adapter("keys"), ValueError, "'keys' cannot be the name of an adapter"),
        (lambda: module.add_adapter("a.b"), ValueError, "'a.b' cannot be the name of an adapter"),
        (lambda: add_adapter(module, "a b"), ValueError, "'a b' cannot be the name of an adapter"),
        (
            lambda: module.add_adapter("new", ia3=IA3Config()),
            TypeError,
            r"no setting 'ia3'; these methods take \['lora'",
        ),
        (
            lambda: module.add_adapter("new", lora=LoRAConfig(target_modules=["nope"])),
            ValueError,
            "No module path ends",
        ),
        (lambda: module.add_adapter("new", folder=tmp_path / "a"), FileNotFoundError, "does not exist"),
        (lambda: module.save_adapter(tmp_path / "b", "nobody"), ValueError, "No adapter is named 'nobody'"),
        (lambda: module.delete_adapter("nobody"), ValueError, "No adapter is named 'nobody'"),
        (lambda: train_adapters(module, "nobody"), ValueError, "No adapter is named 'nobody'"),
        (lambda: module.add_adapter("new", Nameless), TypeError, "Nameless does not place under a name"),
        (lambda: other.add_adapter("new", freeze={"last_layers": 1}), TypeError, "Freeze trains existing weights"),
    ]
    for act, kind, message in cases:
        with pytest.raises(kind, match=message) as raised:
            act()
        assert "\n" not in str(raised.value)
    after = dict(module.model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(p, before[key]) for key, p in after.items())
    assert adapter_names(module.model) == ["default", "two"]


def test_a_shared_head_is_not_replaced_by_another_adapters(tmp_path: Path) -> None:
    one = placed(LoRATiny, "bert")
    shake(one)
    one.save_adapter(tmp_path / "a")
    with pytest.raises(ValueError, match="which all adapters share"):
        placed(LoRATiny, "bert").load_adapter(tmp_path / "a", "two")
    one.load_adapter(tmp_path / "a", "two")  # the same head
    assert adapter_names(one.model) == ["default", "two"]


# Training -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("bases") / "llama")


def built(base: Path, **settings: Any) -> Any:
    torch.manual_seed(1)
    return LoRASFT(str(base), lr=1e-2, scheduler="constant", **{"lora": {"r": 2}, **settings})


def test_a_frozen_adapter_acts_under_a_trained_one(base: Path, tmp_path: Path) -> None:
    first = built(base)
    quick_trainer(tmp_path, max_steps=3).fit(first, loader("sft", 3))
    first.save_adapter(tmp_path / "sft")
    second = built(base, named={"sft": {"adapter": str(tmp_path / "sft"), "train": False}}, active=["sft", "default"])
    second.configure_model()
    frozen = {key: p.detach().clone() for key, p in own(second.model, "sft").items()}
    assert not any(p.requires_grad for p in own(second.model, "sft").values())
    rows = {key: value for key, value in batch("sft").items() if key != "labels"}
    with torch.no_grad():
        start, learned = second.model(**rows).logits, first.model(**rows).logits
    torch.testing.assert_close(start, learned)  # the trained one is the identity yet
    trainer = quick_trainer(tmp_path, max_steps=3)
    trainer.fit(second, loader("sft", 3))
    optimised = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert optimised == {id(p) for p in own(second.model, "default").values()}
    assert all(torch.equal(p, frozen[key]) for key, p in own(second.model, "sft").items())
    with torch.no_grad():
        assert not torch.allclose(second.model(**rows).logits, start)
    train_adapters(second, "sft")
    assert {key.rpartition(".")[2] for key, p in second.model.named_parameters() if p.requires_grad} == {"sft"}


class Routed(LoRASFT):
    """Trains each row of the batch under another adapter."""

    def training_step(self, rows: dict[str, Tensor], index: int) -> Tensor:
        with routed(self, ["default", "two", "three", "two"]):
            return super().training_step(rows, index)


def many(base: Path, tmp_path: Path, **settings: Any) -> Any:
    torch.manual_seed(1)
    named = {"two": {"lora": {"r": 3}}, "three": {"lora": {"r": 1, "target_modules": "attention"}, "train": True}}
    return Routed(str(base), lr=1e-2, scheduler="constant", **{"lora": {"r": 2}, "named": named, **settings})


def test_a_checkpoint_with_several_names_resumes_exactly_and_is_rebuilt(base: Path, tmp_path: Path) -> None:
    straight = many(base, tmp_path)
    quick_trainer(tmp_path, max_epochs=2).fit(straight, loader("sft", 3))
    first = many(base, tmp_path)
    trainer = quick_trainer(tmp_path, max_epochs=1)
    trainer.fit(first, loader("sft", 3))
    activate(first, "two")
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    second = many(base, tmp_path)
    quick_trainer(tmp_path, max_epochs=2).fit(
        second, loader("sft", 3), ckpt_path=tmp_path / "a.ckpt", weights_only=True
    )
    expected = dict(straight.named_parameters())
    assert {key.rpartition(".")[2] for key in expected} >= {"default", "two", "three"}
    for name, parameter in second.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    again = load(tmp_path / "a.ckpt", device="cpu")  # from the file alone
    assert adapter_names(again.model) == ["default", "three", "two"]
    with torch.no_grad():
        for names in (["two"], ["three"], ["default", "two"]):
            rows = {k: v for k, v in batch("sft").items() if k != "labels"}
            with adapters(again, *names), adapters(first, *names):
                torch.testing.assert_close(again.model(**rows).logits, first.model(**rows).logits)
        torch.testing.assert_close(again.model(**rows).logits, first.model(**rows).logits)  # "two" acts in both


def test_what_was_added_later_is_in_the_checkpoint_too(base: Path, tmp_path: Path) -> None:
    source = built(base)
    source.configure_model()
    shake(source)
    source.save_adapter(tmp_path / "folder")
    module = built(base)
    module.add_adapter("early", lora=LoRAConfig(r=1))  # before there is a model
    module.configure_model()
    module.add_adapter("scaled", IA3)
    module.add_adapter("read", folder=tmp_path / "folder", train=False)
    module.combine_adapters(["default", "read"], [0.5, 2.0], "both", "cat")
    for index, name in enumerate(("default", "early", "scaled", "both")):
        move(module.model, name, index)
    activate(module, "both", "scaled")
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    for file in (tmp_path / "folder").iterdir():
        file.unlink()
    again = load(tmp_path / "a.ckpt", device="cpu")
    assert adapter_names(again.model) == ["both", "default", "early", "read", "scaled"]
    assert not any(p.requires_grad for p in own(again.model, "read").values())
    for names in (["early"], ["scaled"], ["read"], ["both"], ["both", "scaled"]):
        assert torch.equal(out(again, *names), out(module.eval(), *names)), names
    with torch.no_grad():
        assert torch.equal(again.model(**inputs("llama")).logits, out(again, "both", "scaled"))


def test_the_page_runs(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = built(base)
    source.configure_model()
    source.save_adapter("adapter")
    page = (Path(__file__).parents[1] / "docs" / "named_adapters.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len(blocks) == 3
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block.replace("Qwen/Qwen3-0.6B", str(base)), names)
    assert adapter_names(names["module"].model) == ["both", "default", "reward", "sft"]


def test_the_command_line_takes_named_adapters(base: Path) -> None:
    given = ["--model.named", '{"two": {"lora": {"r": 3}, "train": false}}', "--model.active", "[two, default]"]
    fit = [
        "fit",
        "--method",
        "lora",
        "--task",
        "sft",
        "--model.backbone",
        str(base),
        "--data.path",
        "x",
        "--print_config",
    ]
    command = [sys.executable, "-m", "lit_peft", *fit, *given]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]).stdout
    settings = yaml.safe_load(shown)["model"]
    settings = settings.get("init_args", settings)
    assert settings["named"] == {"two": {"lora": {"r": 3}, "train": False}}
    assert settings["active"] == ["two", "default"]


def test_merging_chosen_names() -> None:
    module = four("llama")
    expected = out(module, "policy", "reward")
    plain = copy.deepcopy(module).merge_adapters("policy", "reward")
    with torch.no_grad():
        found = plain(**inputs("llama")).logits
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


# Two processes --------------------------------------------------------------------------------------------------------


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
    code = f"from tests.test_named import ddp_worker; ddp_worker({str(tmp_path)!r})"
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
