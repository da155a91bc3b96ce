"""LoRA's layers against float64 formulas written from the paper: values, all gradients, merges; and bad input."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lit_peft.adapter import Adapter
from lit_peft.low_rank.convolution import LoRAConv
from lit_peft.low_rank.embedding import LoRAEmbedding
from lit_peft.low_rank.fused import LoRAFused, Slices
from lit_peft.low_rank.linear import LoRALinear
from lit_peft.methods.lora import LoRAConfig
from lit_peft.named import add_adapter, disabled, routed
from lit_peft.ops import low_rank

Formula = Callable[[nn.Module, Tensor, Tensor], Tensor]  # base, A, B -> the changed weight


class Scaled(nn.Embedding):
    """Gemma's table: rows times a constant."""

    embed_scale = 3.0

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale


def fused(rows: tuple[int, ...], turns: int = 1, kind: type[nn.Module] = nn.Linear) -> nn.Module:
    linear = kind(6, sum(rows)) if kind is nn.Linear else kind(sum(rows), 6)
    linear.__dict__["qkv_slices"] = Slices(rows, turns)
    return linear


def by_hand(chosen: list[int], places: list[list[int]], rank: int) -> Formula:
    """W + s B_i A_i for the rows of each chosen slice, one row after the other."""

    def weight(base: nn.Module, a: Tensor, b: Tensor) -> Tensor:
        w = base.weight.t().clone() if isinstance(base, Conv1D) else base.weight.clone()
        start = 0
        for number, index in enumerate(chosen):
            mine = a[number * rank : (number + 1) * rank]
            for offset, row in enumerate(places[index]):
                w[row] = w[row] + S * (b[start + offset] @ mine)
            start += len(places[index])
        return w.t() if isinstance(base, Conv1D) else w

    return weight


def kernel(base: Any, a: Tensor, b: Tensor) -> Tensor:
    """W + s B_g A_g for each group of a convolution, one output channel after the other."""
    w = base.weight.clone()
    out, ranks = w.shape[0] // base.groups, a.shape[0] // base.groups
    for channel in range(w.shape[0]):
        group = channel // out
        for k in range(ranks):
            w[channel] = w[channel] + S * b[channel, k].squeeze() * a[group * ranks + k]
    return w


RANK, ALPHA = 4, 6
S = ALPHA / RANK
CHUNKS = [[0, 1, 2, 3], [4, 5], [6, 7]]  # grouped queries: twice as many as keys
TURNS = [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]  # NeoX: head by head
IDS = torch.tensor([[1, 4, 2, 0, 4]])

LAYERS: dict[str, tuple[Callable[[], nn.Module], Any, Formula, Callable[[], Tensor], dict[str, Any]]] = {
    "linear": (lambda: nn.Linear(5, 7), LoRALinear, lambda m, a, b: m.weight + S * b @ a, lambda: rand(2, 3, 5), {}),
    "no bias": (
        lambda: nn.Linear(5, 7, bias=False),
        LoRALinear,
        lambda m, a, b: m.weight + S * b @ a,
        lambda: rand(2, 5),
        {},
    ),
    "Conv1D": (
        lambda: Conv1D(7, 5),
        LoRALinear,
        lambda m, a, b: m.weight + S * (b @ a).t(),
        lambda: rand(2, 3, 5),
        {},
    ),
    "embedding": (
        lambda: nn.Embedding(6, 5),
        LoRAEmbedding,
        lambda m, a, b: m.weight + S * (b @ a).t(),
        lambda: IDS,
        {},
    ),
    "padded embedding": (
        lambda: nn.Embedding(6, 5, padding_idx=0),
        LoRAEmbedding,
        lambda m, a, b: m.weight + S * (b @ a).t(),
        lambda: IDS[:, :3],
        {},
    ),
    "scaled embedding": (
        lambda: Scaled(6, 5),
        LoRAEmbedding,
        lambda m, a, b: m.weight + S * (b @ a).t(),
        lambda: IDS,
        {},
    ),
    "conv 1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), LoRAConv, kernel, lambda: rand(2, 4, 9), {}),
    "conv 2d strides": (
        lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0)),
        LoRAConv,
        kernel,
        lambda: rand(2, 4, 7, 8),
        {},
    ),
    "conv 2d dilation": (lambda: nn.Conv2d(4, 6, 3, dilation=2), LoRAConv, kernel, lambda: rand(2, 4, 7, 8), {}),
    "conv 2d groups": (
        lambda: nn.Conv2d(4, 6, 3, groups=2, dilation=(1, 2), bias=False),
        LoRAConv,
        kernel,
        lambda: rand(2, 4, 7, 8),
        {},
    ),
    "conv 2d circular": (
        lambda: nn.Conv2d(4, 6, 3, padding=2, padding_mode="circular"),
        LoRAConv,
        kernel,
        lambda: rand(2, 4, 5, 5),
        {},
    ),
    "conv 2d same": (
        lambda: nn.Conv2d(4, 6, (3, 2), padding="same", padding_mode="reflect"),
        LoRAConv,
        kernel,
        lambda: rand(2, 4, 5, 5),
        {},
    ),
    "conv 3d": (lambda: nn.Conv3d(4, 2, 2, groups=2), LoRAConv, kernel, lambda: rand(1, 4, 3, 3, 4), {}),
    "fused": (
        lambda: fused((4, 2, 2)),
        LoRAFused,
        by_hand([0, 1, 2], CHUNKS, RANK),
        lambda: rand(2, 3, 6),
        {"enable_lora": [True, True, True]},
    ),
    "fused q, v": (
        lambda: fused((4, 2, 2), kind=Conv1D),
        LoRAFused,
        by_hand([0, 2], CHUNKS, RANK),
        lambda: rand(2, 3, 6),
        {"enable_lora": [True, False, True]},
    ),
    "fused by head": (
        lambda: fused((4, 4, 4), turns=2),
        LoRAFused,
        by_hand([0, 1, 2], TURNS, RANK),
        lambda: rand(2, 3, 6),
        {"enable_lora": [True, True, True]},
    ),
    "fused by head, k": (
        lambda: fused((4, 4, 4), turns=2),
        LoRAFused,
        by_hand([1], TURNS, RANK),
        lambda: rand(2, 3, 6),
        {"enable_lora": [False, True, False]},
    ),
}


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def made(name: str, **settings: Any) -> tuple[nn.Module, Adapter, Tensor]:
    """A base, the same adapted with random A and B, and an input; all in float64."""
    torch.manual_seed(3)
    make, kind, _, inputs, own = LAYERS[name]
    base = make().double()
    if isinstance(base, nn.Embedding):  # the padding row too: a lookup of it must not be zero by chance
        nn.init.normal_(base.weight)
    layer = kind(copy.deepcopy(base), LoRAConfig(**{"r": RANK, "alpha": ALPHA, **own, **settings})).double()
    for _, parameter in layer.own_parameters():
        nn.init.normal_(parameter)
    return base, layer, inputs()


@pytest.mark.parametrize("name", LAYERS)
def test_layer_is_the_paper_s_formula(name: str) -> None:
    base, layer, x = made(name)
    floating = x.is_floating_point()
    a, b = (layer.get_parameter(f"lora_{k}.default").detach().clone().requires_grad_() for k in "ab")
    expected_x = x.clone().requires_grad_(floating)
    weight = LAYERS[name][2](base, a, b)
    expected = torch.func.functional_call(base, {"weight": weight}, (expected_x,))
    found_x = x.clone().requires_grad_(floating)
    found = layer(found_x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(found, base(x)), "the change is nothing, so that nothing was compared"
    upstream = rand(*expected.shape)
    wanted = torch.autograd.grad(expected, [a, b, *([expected_x] if floating else [])], upstream)
    mine = [
        layer.get_parameter("lora_a.default"),
        layer.get_parameter("lora_b.default"),
        *([found_x] if floating else []),
    ]
    for gradient, reference in zip(torch.autograd.grad(found, mine, upstream), wanted, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-11, atol=1e-11)
        assert reference.abs().max() > 0


@pytest.mark.parametrize("name", LAYERS)
def test_merge_is_exact_and_of_low_rank(name: str) -> None:
    base, layer, x = made(name)
    layer.float(), base.float()
    x = x.float() if x.is_floating_point() else x
    expected = layer(x)
    change = layer.delta("default").double()
    pairs = sum(layer.configs["default"].enable_lora or [True])
    if not isinstance(layer, LoRAConv):
        assert torch.linalg.matrix_rank(change, atol=1e-4) <= RANK * pairs
    merged = layer.merge()
    assert merged is layer.base
    torch.testing.assert_close(merged(x), expected, rtol=1e-5, atol=1e-5)
    assert merged.weight.shape == base.weight.shape


@pytest.mark.parametrize("r", [1, 3])
def test_rank_of_the_change_is_r(r: int) -> None:
    _, layer, _ = made("linear", r=r)
    assert torch.linalg.matrix_rank(layer.delta("default").double(), atol=1e-5) == r


@pytest.mark.parametrize("name", LAYERS)
def test_starts_as_the_base_and_rows_are_routed(name: str) -> None:
    torch.manual_seed(0)
    make, kind, _, inputs, own = LAYERS[name]
    base = make().double()
    model = nn.Sequential(kind(base, LoRAConfig(r=RANK, **own)))
    x = inputs()
    x = torch.cat([x, x, x])[:3]  # three equal rows or, for images, three images
    assert torch.equal(model(x), base(x))
    add_adapter(model, "b")
    for _, parameter in model[0].own_parameters():
        nn.init.normal_(parameter)
    single = {}
    with routed(model, ["default", "b", None]):
        together = model(x)
    with disabled(model):
        single[2] = model(x[2:])
    for row, name_ in enumerate(["default", "b"]):
        with routed(model, [name_]):
            single[row] = model(x[row : row + 1])
    for row, expected in single.items():
        torch.testing.assert_close(together[row : row + 1], expected)
    assert not torch.equal(together[0], together[1])


def test_dropout_acts_on_the_adapter_s_input_only() -> None:
    for name in ("linear", "conv 2d groups", "fused by head"):
        _, layer, x = made(name, dropout=0.5)
        layer.train()
        torch.manual_seed(1)
        found = layer(x)
        torch.manual_seed(1)
        seeded = not name.startswith("conv")  # these draw the mask again from its seed
        dropped = low_rank.dropped(x, 0.5, low_rank.drawn(0.5)) if seeded else F.dropout(x, 0.5)
        layer.eval()
        expected = layer.base(x) + layer(dropped) - layer.base(dropped)
        torch.testing.assert_close(found, expected)


def test_rslora_keeps_the_gradients_over_ranks_where_lora_loses_them() -> None:
    norms: dict[bool, list[float]] = {True: [], False: []}
    for stable in norms:
        for r in (4, 16, 64, 256):
            torch.manual_seed(0)
            layer = LoRALinear(nn.Linear(256, 256), LoRAConfig(r=r, alpha=16, use_rslora=stable))
            # after one step of equal size for each entry, as Adam takes it: B has left zero
            nn.init.normal_(layer.lora_b["default"], std=0.01)
            layer(torch.randn(64, 256)).square().sum().backward()
            norms[stable].append(math.sqrt(sum(float(p.grad.square().sum()) for _, p in layer.own_parameters())))  # type: ignore[union-attr]
    assert max(norms[True]) <= 2 * min(norms[True]), norms
    assert norms[False][-1] < norms[False][0] / 4, norms


def test_counts_of_the_models_in_the_literature() -> None:
    """LoRA at rank 8 on all linear layers of Llama-2-7B, and on queries and values (Hu et al. count so)."""

    def count(d: int, layers: int, kv: int, f: int, targets: tuple[str, ...]) -> int:
        shapes = {"q": (d, d), "k": (d, kv), "v": (d, kv), "o": (d, d), "gate": (d, f), "up": (d, f), "down": (f, d)}
        with torch.device("meta"):
            made = [LoRALinear(nn.Linear(*shapes[name]), LoRAConfig(r=8)) for name in targets]
        return layers * sum(p.numel() for layer in made for _, p in layer.own_parameters())

    every = ("q", "k", "v", "o", "gate", "up", "down")
    assert count(4096, 32, 4096, 11008, every) == 19_988_480
    assert count(4096, 32, 4096, 11008, ("q", "v")) == 4_194_304
    assert count(576, 30, 192, 1536, every) == 2_442_240
    assert count(576, 30, 192, 1536, ("q", "v")) == 460_800


def test_settings_of_a_layer_keep_its_scale() -> None:
    for stable in (False, True):
        _, layer, _ = made("fused q, v", use_rslora=stable)
        found = layer.layer_settings("default")
        root = math.sqrt(found["r"]) if stable else found["r"]
        assert found["r"] == 2 * RANK
        assert found["lora_alpha"] / root == pytest.approx(layer.configs["default"].scale)
