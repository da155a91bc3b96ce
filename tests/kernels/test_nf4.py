"""The NF4 kernel: every bit as bitsandbytes has it, and layers that decode with it against float64."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lit_peft.ops import nf4
from lit_peft.ops.low_rank import drawn as seed_of
from lit_peft.ops.low_rank import dropped, reference
from lit_peft.ops.nf4 import decode, scratch
from lit_peft.ops.nf4_linear import nf4_linear
from lit_peft.ops.nf4_lora import nf4_lora_linear
from lit_peft.quantised.linear import NF4Linear, encode
from lit_peft.zoo import compose
from tests.kernels.where import DEVICE
from tests.models import save_tiny
from tests.ops.exact import TOLERANCE, agree, drawn
from tests.ops.test_low_rank import both
from tests.ops.test_nf4 import by_hand
from tests.ops.test_nf4_lora import gradients, qlora
from tests.test_methods import batch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# whole blocks; several programs and groups; blocks that end inside of a row; bytes that do; a weight of one number
SHAPES = [(7, 64), (300, 192), (5, 130), (33, 31), (1, 1)]


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_bit(shape: tuple[int, int], dtype: torch.dtype, double: bool) -> None:
    packed = encode(drawn(*shape, dtype=torch.float32, seed=0).detach().to(DEVICE), double)
    found = decode(packed, *shape, double, dtype, kernels=True)
    assert found.equal(decode(packed, *shape, double, dtype, kernels=False))
    if DEVICE.type == "cpu":
        assert found.equal(by_hand(packed, *shape, double).to(dtype))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", [(9, 192), (5, 130), (33, 31), (3, 5)], ids=str)
def test_into_a_buffer_with_a_border(shape: tuple[int, int], double: bool, scaled: bool) -> None:
    packed = encode(drawn(*shape, dtype=torch.float32, seed=0).detach().to(DEVICE), double)
    rows = torch.rand(shape[0], device=DEVICE) if scaled else None
    wanted = decode(packed, *shape, double, torch.bfloat16, rows=rows, kernels=False)
    buffer = torch.full((shape[0] + 2, shape[1] + 3), 7.0, dtype=torch.bfloat16, device=DEVICE)
    corner = buffer[: shape[0], : shape[1]]
    decode(packed, *shape, double, torch.bfloat16, rows=rows, into=corner, kernels=True)
    assert corner.equal(wanted)
    assert bool((buffer[shape[0] :] == 7).all() and (buffer[:, shape[1] :] == 7).all())
    if scaled:
        assert decode(packed, *shape, double, torch.bfloat16, rows=rows, kernels=True).equal(wanted)


def test_other_dtypes_and_columns_that_lie_apart_take_the_plain_path() -> None:
    packed = encode(torch.eye(4, device=DEVICE))
    assert decode(packed, 4, 4, True, torch.float64, kernels=True).equal(torch.eye(4, dtype=torch.float64).to(DEVICE))
    columns = torch.zeros(4, 4, device=DEVICE).t()
    assert decode(packed, 4, 4, True, torch.float32, into=columns, kernels=True).equal(torch.eye(4).to(DEVICE))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "size", [(5, 64, 12, 1), (1, 33, 65, 7), (6, 96, 40, 8), (3, 70, 9, 16), (0, 9, 9, 1)], ids=str
)
def test_layer(size: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    rows, wide, tall, _ = size
    base = NF4Linear(drawn(tall, wide, dtype=torch.float32, seed=0).detach().to(DEVICE))
    weight = base.dequantised(torch.float32).double()
    x = drawn(rows, wide, dtype=dtype, seed=1).detach().to(DEVICE).requires_grad_()
    both(
        lambda x: nf4_linear(x, base.packed, None, (tall, wide, True), kernels=True),
        lambda x: x @ weight.t(),
        [x],
        TOLERANCE[dtype],
    )


# rows, in, out, r: with a border in both passes, in the forward pass alone, in the backward pass alone
UPDATED = [(6, 96, 80, 7), (1, 33, 65, 8), (4, 64, 64, 64), (3, 32, 96, 16), (5, 64, 12, 1), (3, 70, 9, 16)]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", UPDATED, ids=str)
def test_layer_with_an_update(size: tuple[int, int, int, int], dtype: torch.dtype, dropout: float) -> None:
    rows, wide, tall, r = size
    c = nn.Parameter(drawn(tall, dtype=dtype, seed=8).detach().to(DEVICE), requires_grad=False)
    base = NF4Linear(drawn(tall, wide, dtype=torch.float32, seed=0).detach().to(DEVICE), c)
    weight = base.dequantised(torch.float32).double()
    shapes = [(rows, wide), (r, wide), (tall, r), (r,)]
    inputs = [drawn(*s, dtype=dtype, seed=i).detach().to(DEVICE).requires_grad_() for i, s in enumerate(shapes)]
    torch.manual_seed(0)
    kept = dropped(torch.ones(rows, wide, dtype=dtype, device=DEVICE), dropout, seed_of(dropout)).double()

    def op(x: Tensor, a: Tensor, b: Tensor, diagonal: Tensor) -> Tensor:
        torch.manual_seed(0)
        return nf4_lora_linear(x, base, a, b, 0.5, dropout=dropout, diagonal=diagonal, kernels=True)

    def plain(x: Tensor, a: Tensor, b: Tensor, diagonal: Tensor) -> Tensor:
        return reference(x @ weight.t() + c.double(), x * kept, a, b, 0.5, diagonal)

    both(op, plain, inputs, TOLERANCE[dtype])


def test_the_border_holds_nothing_of_the_layer_before() -> None:
    """The memory of a wide update, full of numbers that are not finite, is used for a narrow one."""
    base = NF4Linear(torch.eye(64, device=DEVICE))
    x, a, b = (torch.ones(*shape, device=DEVICE, requires_grad=True) for shape in ((2, 64), (1, 64), (64, 1)))
    with scratch(64 * 256, torch.float32, x.device) as memory:
        memory.fill_(torch.nan)
    out = nf4_lora_linear(x, base, a, b, 1.0, kernels=True)
    agree(out, torch.full((2, 64), 65.0), 1e-6)
    agree(torch.autograd.grad(out.sum(), x)[0], torch.full((2, 64), 65.0), 1e-6)


def test_again_in_one_graph_under_checkpointing_and_from_uneven_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory that a weight is decoded into is used again by every layer."""
    layers = nn.Sequential(qlora(64, 64), qlora(64, 64)).to(DEVICE)
    for number, layer in enumerate(layers):
        layer.base = NF4Linear(drawn(64, 64, dtype=torch.float32, seed=number).detach().to(DEVICE))
    x = drawn(2, 3, 64, dtype=torch.float32, seed=2).detach().transpose(0, 1).to(DEVICE).requires_grad_()

    def run(x: Tensor) -> Tensor:
        for layer in layers:
            x = checkpoint(layer, x, use_reentrant=False) / 9
        return layers[0](x)  # type: ignore[no-any-return]

    monkeypatch.setenv("LIT_PEFT_KERNELS", "1")
    nf4._FREE.clear()
    found = gradients(run, layers, x)
    assert [memory.numel() for memory in nf4._FREE.values()] == [64 * (64 + 64)]  # with the border
    monkeypatch.setenv("LIT_PEFT_KERNELS", "0")
    for got, wanted in zip(found, gradients(run, layers, x), strict=True):
        agree(got, wanted, 1e-5)


def test_a_second_derivative(monkeypatch: pytest.MonkeyPatch) -> None:
    base = NF4Linear(drawn(5, 64, dtype=torch.float32, seed=0).detach().to(DEVICE))
    x = drawn(3, 64, dtype=torch.float32, seed=1).detach().to(DEVICE).requires_grad_()
    found = []
    for forced in "10":
        monkeypatch.setenv("LIT_PEFT_KERNELS", forced)
        (first,) = torch.autograd.grad(base(x).pow(3).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.pow(2).sum(), x)[0])
    agree(found[0], found[1], 1e-6)


@pytest.mark.parametrize("method", ["qlora", "adalora"])
def test_a_model_learns_the_same(method: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, found = str(save_tiny("llama", tmp_path, num_hidden_layers=1)), []
    options: dict[str, Any] = {"lora": {"r": 4, "dropout": 0.0}} if method == "qlora" else {}
    for forced in "10":
        monkeypatch.setenv("LIT_PEFT_KERNELS", forced)
        nf4._FREE.clear()
        torch.manual_seed(0)
        module: Any = compose(method, "sft")(folder, quantize="nf4", dtype="float32", **options)
        module.configure_model()
        module.model.to(DEVICE)
        trained = [p for p in module.model.parameters() if p.requires_grad]
        with torch.no_grad():
            for parameter in trained:
                parameter.normal_(std=0.1)
        inputs = {key: value.to(DEVICE) for key, value in batch("sft").items()}
        loss = module.training_step(inputs, 0)
        found.append([loss, *torch.autograd.grad(loss, trained)])
        assert bool(nf4._FREE) == (forced == "1")
    for got, wanted in zip(*found, strict=True):
        agree(got, wanted, 1e-5)


def test_a_compiler_sees_the_plain_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_PEFT_KERNELS", "1")
    layer, x = qlora(64, 64).to(DEVICE), drawn(3, 64, dtype=torch.float32, seed=1).detach().to(DEVICE).requires_grad_()
    compiled: Any = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for got, wanted in zip(gradients(compiled, layer, x), gradients(layer, layer, x), strict=True):
        agree(got, wanted, 1e-5)


def test_registered() -> None:
    """Shapes, strides and devices of the fake operation are those of the launch; `out` alone is written to."""
    for double, rows in ((True, None), (False, torch.rand(5, device=DEVICE))):
        packed = encode(torch.randn(5, 64, device=DEVICE), double)
        out = torch.empty(5, 70, device=DEVICE)[:, :64]
        torch.library.opcheck(torch.ops.lit_peft.nf4_decode, (out, packed, double, rows))
