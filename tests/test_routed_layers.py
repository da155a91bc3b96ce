"""Rows under different low-rank adapters in one function: as one set after the other, in every form, and leaner."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lit_peft import Average, LoRAConfig, adapters, disabled, place, routed
from lit_peft.low_rank.dora import DoRALinear
from lit_peft.low_rank.linear import LoRALinear
from lit_peft.low_rank.residual import ResidualLinear
from lit_peft.ops import routed as ops
from lit_peft.ops.grouped import Grouped
from lit_peft.ops.lean import make_lean
from lit_peft.ops.routed_forms import ByRun, Stacked
from lit_peft.quantised.linear import NF4Linear
from tests.ops.exact import agree, llama
from tests.test_routing import checkpointed

FORMS: dict[str, Any] = {"stacked": Stacked, "by run": ByRun, "grouped": Grouped}
NAMES: list[Any] = ["b", "default", None, "c", "b", None]


def model(kind: type[LoRALinear] = LoRALinear, layers: int = 2, **settings: Any) -> Any:
    """A Llama under three sets of ranks 2, 3 and 5, with other scales."""
    made = llama(num_hidden_layers=layers)

    def adapter(base: nn.Module) -> LoRALinear:
        layer = kind(base, LoRAConfig(r=2, **settings))
        for name, r in (("b", 3), ("c", 5)):
            layer.add(name, LoRAConfig(r=r, alpha=7, **settings))
        return layer.double()

    place(made, lambda path, m: path.endswith("_proj"), adapter)
    generator = torch.Generator().manual_seed(1)
    for parameter in made.parameters():
        if parameter.requires_grad:
            with torch.no_grad():
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype), alpha=0.1)
    return made.train()


def step(made: Any, names: list[Any]) -> tuple[Tensor, dict[str, Tensor]]:
    ids = torch.arange(6 * 5).view(6, 5)
    with routed(made, names):
        logits = made(input_ids=ids, use_cache=False).logits
    made.zero_grad()
    logits.float().sin().sum().backward()
    return logits.detach(), {key: p.grad for key, p in made.named_parameters() if p.grad is not None}


def as_before(made: Any, names: list[Any], monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, dict[str, Tensor]]:
    """What one set after the other gives."""
    with monkeypatch.context() as plain:
        plain.setenv("LIT_PEFT_KERNELS", "0")
        return step(made, names)


@pytest.fixture
def forms(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The forms that were used."""
    used: list[Any] = []
    choose: Callable[..., Any] = ops._form
    monkeypatch.setattr(ops, "_form", lambda *args: used.append(choose(*args)) or used[-1])  # type: ignore[func-returns-value]
    return used


def same(found: tuple[Tensor, dict[str, Tensor]], wanted: tuple[Tensor, dict[str, Tensor]], most: float) -> None:
    agree(found[0], wanted[0], most)
    assert found[1].keys() == wanted[1].keys()
    for key, gradient in wanted[1].items():
        agree(found[1][key], gradient, most)


@pytest.mark.parametrize("form", ["stacked", "by run"])
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"init_lora_weights": "pissa"}], ids=str)
@pytest.mark.parametrize("names", [NAMES, ["c", "c", None, ("b", "c"), "b", "default"], [None] * 5 + ["b"]], ids=str)
def test_as_one_set_after_the_other(
    names: list[Any], settings: dict[str, Any], form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = model(ResidualLinear if "init_lora_weights" in settings else LoRALinear, **settings)
    wanted = as_before(made, names, monkeypatch)
    monkeypatch.setattr(ops, "_form", lambda *_: FORMS[form])
    same(step(made, names), wanted, 1e-12)
    make_lean(made)
    same(step(made, names), wanted, 1e-6)  # the plain norms work in float32


@pytest.mark.parametrize("kind", [LoRALinear, ResidualLinear])
def test_kernels_give_the_same(kind: type[LoRALinear], monkeypatch: pytest.MonkeyPatch, forms: list[Any]) -> None:
    settings = {"init_lora_weights": "pissa"} if kind is ResidualLinear else {}
    made = model(kind, 1, **settings).float()
    wanted = as_before(made, NAMES, monkeypatch)
    assert not forms
    monkeypatch.setenv("LIT_PEFT_KERNELS", "1")
    same(step(made, NAMES), wanted, 2e-5)
    assert set(forms) == {Grouped}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_under_none_are_the_base_to_the_bit(
    form: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, ids = model(layers=1).to(dtype), torch.arange(6 * 5).view(6, 5)
    monkeypatch.setattr(ops, "_form", lambda *_: FORMS[form])
    with disabled(made):
        base = made(input_ids=ids).logits
    for recorded in (True, False):
        with torch.set_grad_enabled(recorded), routed(made, NAMES):
            found = made(input_ids=ids).logits
        for row, name in enumerate(NAMES):
            assert found[row].equal(base[row]) == (name is None)


@pytest.mark.parametrize("form", ["stacked", "by run"])
def test_a_replay_sees_the_choice_of_its_own_call(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_form", lambda *_: FORMS[form])
    made, ids = model(), torch.arange(6 * 5).view(6, 5)
    results = []
    for replayed in (False, True):
        if replayed:
            checkpointed(type("Module", (), {"model": made}))
        total = torch.zeros((), dtype=torch.float64)
        for names in (NAMES, NAMES[::-1]):
            with routed(made, names):
                total = total + made(input_ids=ids, use_cache=False).logits.sin().sum()
        with adapters(made, "c"):
            made.zero_grad()
            total.backward()
        results.append((total.detach(), {key: p.grad for key, p in made.named_parameters() if p.grad is not None}))
    same(results[1], results[0], 1e-12)


@pytest.mark.parametrize("form", ["stacked", "by run"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_quantised_base_and_autocast(form: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    base = nn.Linear(64, 48)
    layer = LoRALinear(NF4Linear(base.weight, base.bias), LoRAConfig(r=2))
    layer.add("b", LoRAConfig(r=4))
    for part in (*layer.lora_a.values(), *layer.lora_b.values()):
        nn.init.normal_(part)
    monkeypatch.setattr(ops, "_form", lambda *_: FORMS[form])
    found = []
    for forced in ("0", ""):
        monkeypatch.setenv("LIT_PEFT_KERNELS", forced)
        x = torch.randn(4, 3, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with (
            routed(layer, ["b", "default", None, "b"]),
            torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32),
        ):
            out = layer(x)
            below = layer.base(x)
        assert out.dtype == dtype
        assert out[2].equal(below[2])
        found.append([out, *torch.autograd.grad(out.sum(), [x, *layer.lora_a.values(), *layer.lora_b.values()])])
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype
        agree(one, other, 1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize(
    ("kind", "settings", "names"),
    [
        (LoRALinear, {"dropout": 0.5}, NAMES),
        (DoRALinear, {"use_dora": True}, NAMES),
        (LoRALinear, {}, [Average("b", "c"), *NAMES[1:]]),
    ],
    ids=["dropout", "dora", "average"],
)
def test_others_go_one_after_the_other(
    kind: type[LoRALinear], settings: dict[str, Any], names: list[Any], forms: list[Any]
) -> None:
    step(model(kind, **settings), names)
    assert not forms


def test_dropout_is_no_hindrance_where_nothing_is_dropped(forms: list[Any]) -> None:
    made = model(dropout=0.5).eval()
    step(made, NAMES)
    assert forms


def test_fewer_operations_and_less_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    made, ids = model().float(), torch.arange(6 * 5).view(6, 5)

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            Count.calls += func not in (torch.ops.aten.detach.default, torch.ops.aten.view.default)
            return func(*args, **(kwargs or {}))

    weights = {p.untyped_storage().data_ptr() for p in [*made.parameters(), *made.buffers()]}
    counts = []
    for one_by_one in (True, False):
        kept: dict[int, int] = {}

        def pack(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        Count.calls = 0
        with monkeypatch.context() as patched:
            if one_by_one:
                patched.setattr(LoRALinear, "change_rows", lambda *_: None)
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), Count(), routed(made, NAMES):
                made(input_ids=ids, use_cache=False).logits.sum().backward()
        counts.append((Count.calls, sum(kept.values())))
    assert counts[1][0] < 0.65 * counts[0][0]
    assert counts[1][1] < 0.9 * counts[0][1]
