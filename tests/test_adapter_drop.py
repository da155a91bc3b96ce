"""AdapterDrop: below the first adapter that acts there is no backward pass, counted in operations and saved bytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lit_peft.adapter import named_adapters
from lit_peft.methods.bottleneck import Bottleneck, dropped
from lit_peft.sites import layers
from lit_peft.zoo import compose
from tests.models import save_tiny
from tests.test_methods import batch, gradients, shake

DEPTH = {"llama": "num_hidden_layers", "gpt2": "n_layer", "bert": "num_hidden_layers"}


def built(method: str, kind: str, folder: Path, depth: int, checkpointing: bool = False, **bottleneck: Any) -> Any:
    task = "classification" if kind == "bert" else "sft"
    path = folder / f"{kind}-{depth}"
    if not path.exists():
        save_tiny(kind, path, "classification" if kind == "bert" else "lm", **{DEPTH[kind]: depth})
    labels = {"labels": ["a", "b", "c"]} if kind == "bert" else {}
    settings = {"bottleneck_size": 4, **bottleneck}
    torch.manual_seed(1)
    module: Any = compose(method, task)(str(path), bottleneck=settings, gradient_checkpointing=checkpointing, **labels)
    module.configure_model()
    shake(module)
    return module.train()


def backward_work(module: Any, layers_dropped: int = 0) -> int:
    """Floating-point operations of one backward pass, with what is computed again in it."""
    rows = batch("classification" if "labels" in module.hparams else "sft")
    counter = FlopCounterMode(display=False)
    with dropped(layers_dropped) if layers_dropped else nullcontext():
        loss = module.training_step(rows, 0)
        with counter:
            loss.backward()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("method", ["houlsby", "pfeiffer", "parallel"])
def test_the_backward_pass_is_that_of_the_upper_layers_alone(
    method: str, kind: str, checkpointing: bool, tmp_path: Path
) -> None:
    work = {depth: backward_work(built(method, kind, tmp_path, depth, checkpointing)) for depth in (2, 3)}
    assert work[3] > 1.2 * work[2], "a layer has no work that could be saved"
    assert backward_work(built(method, kind, tmp_path, 3, checkpointing, leave_out=[0])) == work[2]
    assert backward_work(built(method, kind, tmp_path, 3, checkpointing, train_norms=False), 1) == work[2]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("settings", [{}, {"train_norms": True}], ids=["bottleneck", "norms"])
def test_nothing_below_needs_a_gradient_or_keeps_a_tensor(
    settings: dict[str, Any], checkpointing: bool, tmp_path: Path
) -> None:
    for how in ("left out", "dropped"):
        left = {"leave_out": [0, 1]} if how == "left out" else {}
        module = built("houlsby", "llama", tmp_path, 3, checkpointing, **settings, **left)
        needs, kept, now = {}, dict.fromkeys(layers(module.model), 0), [""]

        def enter(path: str, now: list[str] = now) -> Any:
            return lambda *_: now.__setitem__(0, path)

        def leave(path: str, needs: dict[str, bool] = needs, now: list[str] = now) -> Any:
            def hook(layer: Any, args: Any, out: Any) -> None:
                needs[path] = (out[0] if isinstance(out, tuple) else out).requires_grad
                now[0] = ""

            return hook

        for path in layers(module.model):
            module.model.get_submodule(path).register_forward_pre_hook(enter(path))
            module.model.get_submodule(path).register_forward_hook(leave(path))

        def pack(tensor: Tensor, kept: dict[str, int] = kept, now: list[str] = now) -> Tensor:
            if now[0]:
                kept[now[0]] += tensor.nbytes
            return tensor

        with dropped(2) if how == "dropped" else nullcontext(), torch.autograd.graph.saved_tensors_hooks(pack, keep):
            loss = module.training_step(batch("sft"), 0)
        assert list(needs.values()) == [False, False, True], how
        if not checkpointing:  # there the layers' own tensors are packed by the checkpoint
            assert [size > 0 for size in kept.values()] == [False, False, True], how
        loss.backward()
        found = {name for name, p in module.named_parameters() if p.grad is not None}
        assert found
        assert not {name for name in found if ".layers.0." in name or ".layers.1." in name}


def keep(tensor: Tensor) -> Tensor:
    return tensor


def test_checkpointing_keeps_every_gradient(tmp_path: Path) -> None:
    rows = batch("sft")
    plain = gradients(built("houlsby", "llama", tmp_path, 3, leave_out=[0]), rows)
    checked = gradients(built("houlsby", "llama", tmp_path, 3, True, leave_out=[0]), rows)
    assert plain.keys() == checked.keys()
    assert all(torch.allclose(checked[name], gradient, atol=1e-6) for name, gradient in plain.items())


def test_random_drop_draws_every_number_and_the_same_one_again(tmp_path: Path, monkeypatch: Any) -> None:
    module = built("pfeiffer", "llama", tmp_path, 3, random_drop=True)
    step = [0]
    monkeypatch.setattr(type(module), "global_step", property(lambda self: step[0]))
    module.__dict__["_trainer"] = object()
    drawn = []
    for step[0] in range(60):
        drawn.append(module.drawn())
        assert module.drawn() == drawn[-1]
    assert {drawn.count(n) > 8 for n in range(3)} == {True}
    assert sorted(set(drawn)) == [0, 1, 2]
    work = {}
    for step[0] in (drawn.index(0), drawn.index(1), drawn.index(2)):
        module.__dict__["_trainer"] = None
        monkeypatch.setattr(type(module), "drawn", lambda self: drawn[step[0]])
        work[drawn[step[0]]] = backward_work(module)
    assert work[0] > work[1] > work[2]


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_under_ddp_what_is_left_out_has_zeros_and_the_backward_pass_still_ends_early(
    tmp_path: Path, monkeypatch: Any
) -> None:
    module = built("houlsby", "llama", tmp_path, 3, random_drop=True, train_norms=True)
    monkeypatch.setattr(type(module), "drawn", lambda self: 2)
    plain = built("houlsby", "llama", tmp_path, 3, train_norms=True)
    with dropped(2):
        reached = gradients(plain, batch("sft"))  # nobody looks after the loss: the layers themselves reach all
    assert reached.keys() == {name for name, p in plain.named_parameters() if p.requires_grad}
    needs: list[bool] = []
    for path in layers(module.model):
        module.model.get_submodule(path).register_forward_hook(lambda layer, args, out: needs.append(out.requires_grad))
    found = gradients(module, batch("sft"))
    assert needs == [False, False, True]
    assert found.keys() == reached.keys()
    for name, gradient in found.items():
        assert torch.allclose(gradient, reached[name], atol=1e-6), name
        lower = ".layers.0." in name or ".layers.1." in name
        assert bool(gradient.any()) is not lower, name
    module._window = None  # the task's own part wants a Trainer
    module.on_before_optimizer_step(None)
    left = {name for name, p in module.named_parameters() if p.grad is not None}
    assert left == {name for name in found if not (".layers.0." in name or ".layers.1." in name)}


def test_layers_that_are_left_out_keep_their_norms(tmp_path: Path) -> None:
    module = built("houlsby", "llama", tmp_path, 3, leave_out=[0], train_norms=True)
    adapted = [path for path, adapter in named_adapters(module.model) if not isinstance(adapter, Bottleneck)]
    assert adapted == [
        *(f"model.layers.{n}.{norm}" for n in (1, 2) for norm in ("input_layernorm", "post_attention_layernorm")),
        "model.norm",
    ]


def test_a_further_adapter_cannot_drop_alone(tmp_path: Path) -> None:
    module = built("pfeiffer", "llama", tmp_path, 2)
    with pytest.raises(TypeError, match="random_drop of a further adapter"):
        module.add_adapter("other", bottleneck={"bottleneck_size": 4, "random_drop": True})
