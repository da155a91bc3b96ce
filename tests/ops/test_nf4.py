"""Weights in NF4 decoded bit for bit as bitsandbytes decodes them, and layers of them against float64."""

import threading

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lit_peft.ops import choice, nf4
from lit_peft.ops.nf4 import codec, decode, parts, scratch
from lit_peft.ops.nf4_linear import nf4_linear, reference, takes_few
from lit_peft.quantised.linear import NF4Linear, encode
from tests.ops.exact import TOLERANCE, agree, drawn
from tests.ops.test_low_rank import both

SHAPES = [(64, 64), (16, 32), (5, 130), (3, 5), (33, 31), (1, 1), (7, 64), (9, 192), (300, 64)]  # out, in
SIZES = [(5, 7, 3, 1), (1, 33, 65, 7), (17, 64, 31, 16), (8, 9, 9, 8), (70, 96, 80, 64)]  # rows, in, out, r
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def by_hand(packed: Tensor, out: int, wide: int, double: bool) -> Tensor:
    """Decodes level by level: (out, wide) in float32."""
    levels, small, numbers = parts(out, wide, double)
    halves = torch.stack([packed[levels] >> 4, packed[levels] & 15], dim=1).flatten().int()
    c = packed[numbers].view(torch.float32)
    if double:
        groups = c[:-1].repeat_interleave(256)[: small.stop - small.start]
        c = codec().create_dynamic_map()[packed[small].int()] * groups + c[-1]
    c = c.repeat_interleave(64)[: out * wide]
    known: Tensor = codec().get_4bit_type("nf4", device="cpu")
    return (known[halves[: out * wide]] * c).view(out, wide)


def weight_of(layer: NF4Linear) -> Tensor:
    """Returns the float64 weight that a layer stands for."""
    return by_hand(layer.packed.detach(), layer.out_features, layer.in_features, layer.double_quant).double()


# Decoding ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_bit_is_bitsandbytes(shape: tuple[int, int], dtype: torch.dtype, double: bool) -> None:
    weight = drawn(*shape, dtype=dtype, seed=0).detach()
    packed = encode(weight, double)
    found = decode(packed, *shape, double, dtype)
    assert found.equal(by_hand(packed, *shape, double).to(dtype))
    if shape[1] % 64 == 0:  # else it is wrong itself, on CPUs
        levels, state = codec().quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=double)
        assert found.equal(codec().dequantize_4bit(levels, state))


@pytest.mark.parametrize("shape", [(9, 192), (5, 130)], ids=str)
def test_rows_with_factors_into_a_buffer_with_a_border(shape: tuple[int, int]) -> None:
    packed, rows = encode(drawn(*shape, dtype=torch.float32, seed=0).detach()), torch.rand(shape[0])
    buffer = torch.full((shape[0] + 2, shape[1] + 3), 7.0, dtype=torch.bfloat16)
    corner = buffer[: shape[0], : shape[1]]
    found = decode(packed, *shape, True, torch.bfloat16, rows=rows, into=corner)
    wanted = (by_hand(packed, *shape, True) * rows[:, None]).bfloat16()
    assert found.data_ptr() == buffer.data_ptr()
    assert corner.equal(wanted)
    assert bool((buffer[shape[0] :] == 7).all() and (buffer[:, shape[1] :] == 7).all())


def test_shapes_can_be_had_without_numbers() -> None:
    nf4._VALUES.clear()
    with FakeTensorMode():
        packed = torch.empty(parts(48, 64, True)[2].stop, dtype=torch.uint8)
        assert decode(packed, 48, 64, True, torch.bfloat16).shape == (48, 64)
        x = torch.empty(2, 64, requires_grad=True)
        assert nf4_linear(x, packed, None, (48, 64, True)).shape == (2, 48)
    layer = NF4Linear(torch.ones(3, 4))  # what was made there was not kept
    assert layer.dequantised().equal(torch.ones(3, 4))


# One piece of memory for one weight after the other ------------------------------------------------------------------


def test_memory_is_lent_to_one_block_at_a_time() -> None:
    nf4._FREE.clear()
    where = (torch.float32, torch.device("cpu"))
    with scratch(8, *where) as outer, scratch(4, *where) as inner:
        assert outer.data_ptr() != inner.data_ptr()
    with scratch(6, *where) as again:
        assert again.data_ptr() == outer.data_ptr()
        assert again.shape == (6,)
    with scratch(6, torch.bfloat16, where[1]) as other:
        assert other.dtype == torch.bfloat16
    assert {key[1]: memory.numel() for key, memory in nf4._FREE.items()} == {torch.float32: 8, torch.bfloat16: 6}


def test_threads_and_inference_share_it_without_harm() -> None:
    nf4._FREE.clear()
    wrong = []

    def work(number: int) -> None:
        for _ in range(200):
            with scratch(64, torch.float32, torch.device("cpu")) as memory:
                memory.fill_(number)
                if not bool((memory == number).all()):
                    wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    nf4._FREE.clear()
    with torch.inference_mode(), scratch(4, torch.float32, torch.device("cpu")) as memory:
        memory.zero_()
    with scratch(4, torch.float32, torch.device("cpu")) as memory:
        assert not memory.is_inference()
        memory.fill_(1.0)


# Layers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("size", [*SIZES, (0, 9, 9, 8)], ids=str)
def test_layer(size: tuple[int, int, int, int], dtype: torch.dtype, bias: bool) -> None:
    rows, wide, tall, _ = size
    layer = NF4Linear(drawn(tall, wide, dtype=torch.float32, seed=0).detach())
    weight = weight_of(layer)
    inputs = [drawn(rows, wide, dtype=dtype, seed=1), *([drawn(tall, dtype=dtype, seed=2)] if bias else [])]

    def op(x: Tensor, c: Tensor | None = None) -> Tensor:
        return nf4_linear(x, layer.packed, c, (tall, wide, True))

    def plain(x: Tensor, c: Tensor | None = None) -> Tensor:
        return nn.functional.linear(x, weight, c)

    both(op, plain, inputs, TOLERANCE[dtype])
    c = inputs[1] if bias else None
    agree(reference(inputs[0], layer.packed, c, (tall, wide, True)), op(*inputs), TOLERANCE[dtype])


def test_a_second_derivative_of_the_layer() -> None:
    layer = NF4Linear(drawn(5, 64, dtype=torch.float32, seed=0).detach())
    x = drawn(3, 64, dtype=torch.float32, seed=1)
    exact = x.detach().double().requires_grad_()
    found = []
    for value, call in ((x, layer), (exact, lambda x: x @ weight_of(layer).t())):
        (first,) = torch.autograd.grad(call(value).pow(3).sum(), value, create_graph=True)
        found.append(torch.autograd.grad(first.pow(2).sum(), value)[0])
    agree(found[0], found[1], 1e-5)


def test_few_tokens_are_left_to_bitsandbytes_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """For generating: without gradients, where blocks are whole, and up to the rows that were measured."""
    monkeypatch.delenv("LIT_PEFT_KERNELS", raising=False)
    table: dict[str, dict[str, int]] = {}
    monkeypatch.setattr(choice, "measured", lambda: {"a GPU": table})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    with FakeTensorMode():
        x = torch.empty(4, 16, 64, device="cuda", dtype=torch.bfloat16)
        assert takes_few(x, (48, 64, True))
        assert not takes_few(x, (48, 64, False))
        assert not takes_few(x, (48, 96, True))
        assert not takes_few(x.requires_grad_(), (48, 64, True))
        with torch.no_grad():
            assert takes_few(x, (48, 64, True))
            table["nf4_product"] = {"rows": 65}
            assert takes_few(x, (48, 64, True))
            table["nf4_product"] = {"rows": 64}
            assert not takes_few(x, (48, 64, True))
    assert not takes_few(torch.empty(1, 64), (48, 64, True)), "on CPUs it repacks weights in place"
