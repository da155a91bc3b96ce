"""Updates of several sets in one batch against float64: every form, values and every gradient."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_peft.ops import routed
from lit_peft.ops.routed import routed_linear, routed_update
from lit_peft.ops.routed_forms import ByRun, Stacked
from lit_peft.ops.routing import Routing
from tests.ops.exact import TOLERANCE, agree
from tests.ops.routed_batches import BATCHES, TOGETHER, check, tensors

FORMS = {"stacked": Stacked, "by run": ByRun}


@pytest.fixture(params=FORMS)
def form(request: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(routed, "_form", lambda *_: FORMS[request.param])
    return str(request.param)


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", [*BATCHES, "together"])
def test_both_plain_forms(name: str, dtype: torch.dtype, joined: bool, form: str) -> None:
    check((BATCHES | {"together": TOGETHER})[name], dtype, None, joined=joined)


def test_parameters_in_float32_get_gradients_in_float32(form: str) -> None:
    for joined in (False, True):
        check(BATCHES["shuffled"], torch.bfloat16, None, pairs=torch.float32, joined=joined)


def test_only_gradients_that_are_asked_for(form: str) -> None:
    y, x, *pairs = tensors(BATCHES["shuffled"], torch.float32, torch.float32)
    for tensor in (y, x, pairs[0], pairs[4]):
        tensor.requires_grad_(False)
    routed_update(y, x, pairs[:3], pairs[3:], [1.0] * 3, Routing(BATCHES["shuffled"][0])).sum().backward()
    assert [tensor.grad is None for tensor in (y, x, *pairs)] == [True, True, True, False, False, False, True, False]


def test_a_set_without_rows_has_a_gradient_of_zeros(form: str) -> None:
    y, x, *pairs = tensors(BATCHES["shuffled"], torch.float32, torch.float32)
    rows = Routing([(0,), (0,), (), (2,), (2,)])
    routed_update(y, x, pairs[:3], pairs[3:], [1.0] * 3, rows).sum().backward()
    for number, part in enumerate(pairs):
        assert part.grad is not None
        assert bool(part.grad.any()) == (number % 3 != 1)


def test_twice_in_one_graph_and_replayed(form: str) -> None:
    from torch.utils.checkpoint import checkpoint

    _, x, *pairs = tensors(BATCHES["shuffled"], torch.float64, torch.float64)
    base, rows = nn.Linear(33, 33).double().requires_grad_(False), Routing(BATCHES["shuffled"][0])
    b = [torch.cat([part, part])[:33] for part in pairs[3:]]

    def run(x: Tensor) -> Tensor:
        return routed_linear(routed_linear(x, base, pairs[:3], b, [1.0] * 3, rows), base, pairs[:3], b, [2.0] * 3, rows)

    wanted = torch.autograd.grad(run(x).sin().sum(), [x, *pairs])
    found = torch.autograd.grad(checkpoint(run, x, use_reentrant=False).sin().sum(), [x, *pairs])
    for one, other in zip(found, wanted, strict=True):
        assert one.equal(other)

    def plain(x: Tensor) -> Tensor:
        for scale in (1.0, 2.0):
            x = routed.reference(base(x), x, pairs[:3], b, [scale] * 3, rows)
        return x

    for one, other in zip(wanted, torch.autograd.grad(plain(x).sin().sum(), [x, *pairs]), strict=True):
        agree(one, other, 1e-12)


def test_uneven_memory(form: str) -> None:
    rows, tokens, wide, tall, ranks = BATCHES["shuffled"]
    given = tensors(BATCHES["shuffled"], torch.float64, torch.float64)
    given[1] = given[1].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    given[0] = given[0].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    assert not given[0].is_contiguous()
    assert not given[1].is_contiguous()
    check((rows, tokens, wide, tall, ranks), torch.float64, None, inputs=given)


def test_without_gradients_and_without_tokens(form: str) -> None:
    y, x, *pairs = tensors(BATCHES["shuffled"], torch.float64, torch.float64)
    rows = Routing(BATCHES["shuffled"][0])
    with torch.inference_mode():
        out = routed_update(y, x, pairs[:3], pairs[3:], [1.0] * 3, rows)
    again = routed_update(y, x, pairs[:3], pairs[3:], [1.0] * 3, rows)  # what inference left behind can be trained with
    assert out.equal(again)
    again.sum().backward()
    assert routed_update(y[:, :0], x[:, :0], pairs[:3], pairs[3:], [1.0] * 3, rows).shape == (5, 0, 17)


def test_the_result_can_be_changed_in_place(form: str) -> None:
    y, x, *pairs = tensors(BATCHES["shuffled"], torch.float64, torch.float64)
    routed_update(y, x, pairs[:3], pairs[3:], [1.0] * 3, Routing(BATCHES["shuffled"][0])).clamp_(-1, 1).sum().backward()


def test_a_wrong_number_of_rows() -> None:
    with pytest.raises(ValueError, match="x has 2 rows and 1 are routed"):
        routed_update(torch.ones(2, 3), torch.ones(2, 3), [], [], [], Routing([()]))


def test_a_broken_set_reaches_no_other_row_run_by_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routed, "_form", lambda *_: ByRun)
    y, x, *pairs = tensors(BATCHES["shuffled"], torch.float32, torch.float32)
    with torch.no_grad():
        pairs[4].fill_(torch.nan)
    out = routed_update(y, x, pairs[:3], pairs[3:], [1.0] * 3, Routing(BATCHES["shuffled"][0]))
    assert [bool(row.isnan().any()) for row in out] == [True, False, False, False, True]


def test_few_tokens_are_stacked_and_many_are_not() -> None:
    def form(rows: int, tokens: int, sets: int) -> Any:
        x = torch.empty(rows, tokens, 64)
        pairs = routed.Sets([x.new_empty(8, 64)] * sets, [x.new_empty(64, 8)] * sets, [1.0] * sets, Routing(each))
        return routed._form(x, x.dtype, pairs, None)

    each = [(row % 4,) for row in range(16)]
    assert form(16, 1, 4) is Stacked
    assert form(16, 4096, 4) is ByRun
    assert form(16, 1, 100) is ByRun, "H would hold 800 numbers a token"
    each = [(0,)] * 16
    assert form(16, 1, 1) is ByRun, "one set alone has nothing to stack"


def test_nothing_of_x_is_copied_and_little_is_kept(form: str) -> None:
    """Kept: x itself, H, and the parameters."""
    y, x, *pairs = tensors(BATCHES["sorted"], torch.float32, torch.float32)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        routed_update(y, x, pairs[:2], pairs[2:], [1.0] * 2, Routing(BATCHES["sorted"][0]))
    own = {tensor.data_ptr() for tensor in (x, *pairs)}
    others = [tensor.numel() for tensor in kept if tensor.data_ptr() not in own]
    assert others == [{"stacked": 16 * 80, "by run": 8 * 16 + 4 * 64}[form]]
