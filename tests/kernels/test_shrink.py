"""The narrow products' kernels against float64, and the functions that are made of them, gradients included."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lit_peft import LoRAConfig, make_lean
from lit_peft.kernels.shrink import shrink as launched
from lit_peft.low_rank.linear import LoRALinear
from lit_peft.ops import border, low_rank, shrink
from lit_peft.ops.lora_linear import lora_linear
from lit_peft.ops.low_rank import low_rank_update
from tests.kernels.where import DEVICE
from tests.ops.exact import TOLERANCE, adapted, agree, drawn, gradients
from tests.ops.test_lora_linear import Counted

SIZES = [(5, 7, 3, 1), (1, 33, 65, 7), (35, 36, 40, 8), (9, 140, 12, 16), (3, 20, 24, 64)]  # rows, in, out, r
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# every size in the dtype of training, two of them in the others
PAIRS = [(size, torch.bfloat16) for size in SIZES] + [(SIZES[i], dtype) for i in (0, 2) for dtype in DTYPES[::2]]


def made(*shapes: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    found = (drawn(*shape, dtype=dtype, seed=i).detach().to(DEVICE) for i, shape in enumerate(shapes))
    return [tensor.requires_grad_() for tensor in found]


def kept(p: float, seed: int, rows: int, wide: int) -> Tensor:
    """Returns which entries the kernels keep, times 1 / (1 - p): what D makes of ones."""
    eye = torch.eye(wide, device=DEVICE)
    return shrink.shrink(torch.ones(rows, wide, device=DEVICE), eye, None, 1.0, p, seed, 0)[0].double()


@pytest.mark.parametrize(("size", "dtype"), PAIRS, ids=str)
@pytest.mark.parametrize("split", [1, 2])
def test_shrink_and_pack(size: tuple[int, int, int, int], dtype: torch.dtype, split: int) -> None:
    rows, wide, _, r = size
    x, a = made((rows, wide), (r, wide), dtype=dtype)
    gain = torch.linspace(-1, 2, r, device=DEVICE)
    h, packed = launched(x.detach(), a.detach(), gain, 0.5, 0.0, 0, 64, split)
    exact = x.detach().double() @ a.detach().double().t()
    agree(h, exact, TOLERANCE[dtype])
    assert packed[:, :wide].equal(x)
    agree(packed[:, wide : wide + r], 0.5 * exact * gain.double(), TOLERANCE[dtype])
    assert not packed[:, wide + r :].any()


def test_uneven_memory_and_parameters_in_float32() -> None:
    x = torch.randn(9, 40, device=DEVICE).bfloat16()
    a = torch.randn(3, 20, device=DEVICE)
    for view in (x[:, :20], x[:, ::2], x.t()[:20, :9].t()):
        h, packed = shrink.shrink(view, a, None, 2.0, 0.0, 0, 64)
        agree(h, view.double() @ a.double().t(), TOLERANCE[torch.bfloat16])
        assert packed[:, :20].equal(view)


def test_what_is_dropped_hangs_on_the_seed_and_the_place_alone() -> None:
    """In blocks of any size, and in about p of all places; so do all that draw it again."""
    one, other = kept(0.3, 5, 40, 50), kept(0.3, 6, 40, 50)
    assert one.equal(kept(0.3, 5, 70, 50)[:40])
    assert not one.equal(other)
    assert kept(0.3, 2**62 - 1, 8, 50)[:8].any()
    assert abs(float((one == 0).double().mean()) - 0.3) < 0.05
    assert (one - one.round(decimals=4)).abs().max() < 1e-3
    ones = torch.ones(40, 40, device=DEVICE)
    again = shrink.taken(torch.ones(40, 50, device=DEVICE), torch.eye(40, device=DEVICE), 0.3, 5)
    agree(again.t(), one, 1e-6)
    dx = torch.ones(40, 50, device=DEVICE)
    shrink.spread(dx, ones[:, :1].contiguous(), torch.ones(1, 50, device=DEVICE), 0.3, 5)
    agree(dx, one + 1, 1e-6)


def both(
    op: Callable[..., Tensor], inputs: list[Tensor], tolerance: float, plain: Callable[..., Tensor], mask: Tensor | None
) -> None:
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    got, wanted = op(*inputs), plain(*exact, mask)
    agree(got, wanted, tolerance)
    slope = torch.linspace(-1, 1, wanted.numel(), device=DEVICE, dtype=torch.float64).view_as(wanted)
    mine, theirs = torch.autograd.grad(got, inputs, slope.to(got.dtype)), torch.autograd.grad(wanted, exact, slope)
    for one, other in zip(mine, theirs, strict=True):
        agree(one, other, tolerance)


@pytest.mark.parametrize("lined", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("size", "dtype"), PAIRS, ids=str)
def test_lora_linear(size: tuple[int, int, int, int], dtype: torch.dtype, dropout: float, lined: bool) -> None:
    rows, wide, tall, r = size
    layer = nn.Linear(wide, tall).to(DEVICE, dtype).requires_grad_(False)
    weight, bias = layer.weight.double(), layer.bias.double()
    if lined:
        border.surround(layer, r)
    inputs = made((rows, wide), (r, wide), (tall, r), *([(r,)] if r == 8 else []), dtype=dtype)
    torch.manual_seed(3)
    mask = kept(dropout, low_rank.drawn(dropout), rows, wide) if dropout else None

    def op(x: Tensor, a: Tensor, b: Tensor, diagonal: Tensor | None = None) -> Tensor:
        torch.manual_seed(3)
        return lora_linear(x, layer, a, b, 0.5, dropout=dropout, diagonal=diagonal, kernels=True)

    def plain(x: Tensor, a: Tensor, b: Tensor, *rest: Tensor | None) -> Tensor:
        diagonal, mask = rest if len(rest) == 2 else (None, rest[0])
        y = nn.functional.linear(x, weight, bias)
        return low_rank.reference(y, x if mask is None else x * mask, a, b, 0.5, diagonal)

    both(op, inputs, TOLERANCE[dtype], plain, mask)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_low_rank_update(dtype: torch.dtype, dropout: float) -> None:
    inputs = made((2, 5, 12), (2, 5, 20), (7, 20), (12, 7), dtype=dtype)
    torch.manual_seed(3)
    mask = kept(dropout, low_rank.drawn(dropout), 10, 20).view(2, 5, 20) if dropout else None

    def op(y: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        torch.manual_seed(3)
        return low_rank_update(y, x, a, b, 0.5, dropout=dropout, kernels=True)

    def plain(y: Tensor, x: Tensor, a: Tensor, b: Tensor, mask: Tensor | None) -> Tensor:
        return low_rank.reference(y, x if mask is None else x * mask, a, b, 0.5)

    both(op, inputs, TOLERANCE[dtype], plain, mask)


@pytest.mark.parametrize("lined", [False, True])
def test_twice_in_one_graph_and_checkpointed(lined: bool) -> None:
    layer = nn.Linear(8, 8).to(DEVICE).requires_grad_(False)
    inputs = made((6, 8), (2, 8), (8, 2), dtype=torch.float32)

    def run(kernels: bool, again: bool) -> tuple[Tensor, ...]:
        def step(x: Tensor) -> Tensor:
            return lora_linear(x, layer, inputs[1], inputs[2], 0.5, kernels=kernels).tanh()

        h = step(inputs[0])
        h = checkpoint(step, h, use_reentrant=False) if again else step(h)
        return torch.autograd.grad(h.sum(), inputs)

    wanted = run(False, False)
    if lined:
        border.surround(layer, 2)
    for again in (False, True):
        for mine, theirs in zip(run(True, again), wanted, strict=True):
            agree(mine, theirs, 1e-5)


def test_nothing_and_ranks_beyond_the_kernels() -> None:
    x, a, b = made((0, 8), (2, 8), (4, 2), dtype=torch.float32)
    y = torch.zeros(0, 4, device=DEVICE)
    out = low_rank_update(y, x, a, b, 1.0, kernels=True)
    out.sum().backward()
    assert a.grad is not None
    assert not a.grad.any()
    x, a, b = made((2, 8), (shrink.MOST + 1, 8), (4, shrink.MOST + 1), dtype=torch.float32)
    y = torch.zeros(2, 4, device=DEVICE)
    agree(low_rank_update(y, x, a, b, 1.0, kernels=True), low_rank.reference(y, x, a, b, 1.0), 1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_registered(dropout: float) -> None:
    """Shapes, strides and devices of the fake operations are those of the launches."""
    x, a = torch.randn(3, 16, device=DEVICE), torch.randn(2, 16, device=DEVICE)
    g, b, h = torch.randn(3, 8, device=DEVICE), torch.randn(8, 2, device=DEVICE), torch.randn(3, 2, device=DEVICE)
    gain = torch.ones(2, device=DEVICE)
    ops = torch.ops.lit_peft
    pad, there = (64, True) if dropout else (0, False)
    torch.library.opcheck(ops.shrink, (x, a, gain if there else None, 0.5, dropout, 7, pad))
    torch.library.opcheck(ops.dyb_db, (g, b, h if there else None, gain if there else None, 0.5, pad))
    torch.library.opcheck(ops.taken, (x, h, dropout, 7))
    torch.library.opcheck(ops.spread, (x, h, a, dropout, 7))


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_model_trains_alike_with_kernels_and_without(monkeypatch: pytest.MonkeyPatch, dropout: float) -> None:
    """Under the environment's choice, bordered where the weight is wide enough."""
    model = adapted(LoRAConfig(r=2, dropout=dropout), num_hidden_layers=1).float().to(DEVICE).train()
    make_lean(model)
    ids = torch.randint(64, (1, 9), device=DEVICE)
    found = {}
    for choice in ("0", "1", ""):
        monkeypatch.setenv("LIT_PEFT_KERNELS", choice)
        torch.manual_seed(0)
        found[choice] = gradients(model, ids)
    lined = {
        path.rpartition(".")[2]
        for path, module in model.named_modules()
        if isinstance(module, LoRALinear) and border.bordered(module.base) is not None
    }
    # without dropout, they are parts of a layer that needs no borders
    every = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert lined == (every if dropout else set())
    if dropout:  # the kernels drop other entries
        assert not found["1"][0].equal(found[""][0])
        return
    for choice in ("1", ""):
        agree(found[choice][0], found["0"][0], 1e-5)
        for mine, theirs in zip(found[choice][1], found["0"][1], strict=True):
            agree(mine, theirs, 2e-4)


@pytest.mark.parametrize(("lined", "forward", "backward"), [(True, 2, 4), (False, 4, 6)])
def test_launches(lined: bool, forward: int, backward: int) -> None:
    """Bordered: shrink, a product | dyb_db, a product, dA and its cast. Else two products and casts."""
    layer = nn.Linear(8, 8, bias=False).to(DEVICE, torch.bfloat16).requires_grad_(False)
    x, a, b = (part.detach().requires_grad_() for part in made((5, 8), (2, 8), (8, 2), dtype=torch.float32))
    x = x.detach().bfloat16().requires_grad_()
    if lined:
        border.surround(layer, 2).hold(layer.weight, a, b)
    with Counted() as there:
        out = lora_linear(x, layer, a, b, 0.5, kernels=True)
    slope = torch.ones_like(out)
    with Counted() as back:
        torch.autograd.grad(out, [x, a, b], slope)
    assert len(there.seen) <= forward, there.seen
    assert len(back.seen) <= backward, back.seen
