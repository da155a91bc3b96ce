"""Attention over [prefix; text] in two parts, against one softmax in float64: values, every gradient, what is kept."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from lit_peft.ops.prefix_attention import merges, prefix_attention, reference
from lit_peft.ops.stock_attention import additive, attention, attention_backward
from tests.ops.exact import TOLERANCE, agree, drawn

# batch, heads, kv_heads, queries, keys, width, p, whether all texts share the prefix
SIZES = [
    (2, 4, 2, 7, 7, 8, 3, True),
    (1, 1, 1, 1, 1, 4, 1, False),
    (3, 6, 2, 33, 33, 5, 17, False),
    (2, 3, 3, 5, 11, 16, 64, True),
    (2, 2, 1, 1, 9, 16, 30, True),
]


def inputs(size: tuple[Any, ...], dtype: torch.dtype) -> list[Tensor]:
    batch, heads, kv, n, m, width, p, shared = size
    front = (1 if shared else batch, kv, p, width)
    shapes = [(batch, heads, n, width), (batch, kv, m, width), (batch, kv, m, width), front, front]
    return [drawn(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]


def exact(
    q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> Tensor:
    """One softmax over prefix and text, head by head."""
    q, k, v, pk, pv = (part.double() for part in (q, k, v, pk, pv))
    n, m, p, groups = q.shape[2], k.shape[2], pk.shape[2], q.shape[1] // k.shape[1]
    keys, values = (
        torch.cat([front.expand(len(q), *front.shape[1:]), part], 2)[:, torch.arange(q.shape[1]) // groups]
        for front, part in ((pk, k), (pv, v))
    )
    scores = torch.einsum("bhnd,bhmd->bhnm", q, keys) * (q.shape[-1] ** -0.5 if scale is None else scale)
    seen = torch.ones(n, m, dtype=torch.bool).tril() if is_causal else torch.ones(1, 1, dtype=torch.bool)
    text = scores[..., p:]
    if mask is not None and mask.dtype != torch.bool:
        text = text + mask.double()
    elif mask is not None:
        seen = mask
    scores = torch.cat([scores[..., :p], text.masked_fill(~seen, float("-inf"))], -1)
    return torch.einsum("bhnm,bhmd->bhnd", scores.softmax(-1), values)


def both(parts: list[Tensor], tolerance: float, mask: Tensor | None = None, **settings: Any) -> None:
    is_causal, scale = settings.get("is_causal", False), settings.get("scale")
    got = prefix_attention(*parts, mask=mask, **settings)
    copies = [part.detach().double().requires_grad_(part.requires_grad) for part in parts]
    wanted = exact(*copies, mask, is_causal, scale)  # type: ignore[arg-type]
    assert got.dtype == parts[0].dtype
    agree(got, wanted, tolerance)
    slope = torch.randn(wanted.shape, dtype=torch.float64).to(got.dtype)
    asked = [i for i, part in enumerate(parts) if part.requires_grad]
    mine = torch.autograd.grad(got, [parts[i] for i in asked], slope)
    theirs = torch.autograd.grad(wanted, [copies[i] for i in asked], slope.double())
    for found, right in zip(mine, theirs, strict=True):
        assert found.dtype == got.dtype
        agree(found, right, tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_against_one_softmax(size: tuple[Any, ...], dtype: torch.dtype) -> None:
    parts = inputs(size, dtype)
    both(parts, TOLERANCE[dtype])
    both(parts, TOLERANCE[dtype], scale=0.7)
    if size[3] == size[4]:
        both(parts, TOLERANCE[dtype], is_causal=True)


def padded(left: bool) -> Tensor:
    """Causal masks of three texts of which two are padded; padding sees nothing."""
    there = torch.arange(33)[None] < torch.tensor([[33], [20], [1]])
    there = there.flip(1) if left else there
    return (there[:, None, :, None] & there[:, None, None, :]) & torch.ones(33, 33, dtype=torch.bool).tril()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("low", [None, "min", "-inf"])
def test_masks(low: str | None, dtype: torch.dtype) -> None:
    parts = inputs(SIZES[2], dtype)
    blocks = torch.arange(33) // 10
    packed = ((blocks[:, None] == blocks) & torch.ones(33, 33, dtype=torch.bool).tril())[None, None]
    heads = torch.rand(1, 6, 33, 33, generator=torch.Generator().manual_seed(5)) > 0.5
    for mask in (padded(left=True), padded(left=False), packed, heads, padded(left=False)[:, :, :1]):
        if low is not None:
            hidden = float("-inf") if low == "-inf" else torch.finfo(dtype).min
            mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, hidden)
        both(parts, TOLERANCE[dtype], mask)


def test_bias() -> None:
    both(inputs(SIZES[2], torch.float32), 2e-6, torch.randn(1, 6, 33, 33))


@pytest.mark.parametrize("frozen", [(0, 1, 2), (1, 2), (3, 4), (0,), (0, 3, 4)], ids=str)
def test_only_gradients_that_are_asked_for(frozen: tuple[int, ...]) -> None:
    parts = inputs(SIZES[0], torch.float64)
    for i in frozen:
        parts[i].requires_grad_(False)
    both(parts, 1e-12, is_causal=True)


def test_uneven_memory() -> None:
    """Heads beside tokens as models have them, a last dimension that is not the innermost, gradients of size one."""
    q, k, v, pk, pv = inputs((2, 4, 2, 7, 7, 8, 3, True), torch.float64)
    table = drawn(3, 4, 2, 8, dtype=torch.float64, seed=9)
    rows = table.permute(1, 2, 0, 3)[:, None]  # P_K and P_V of two layers in one table
    turned = [part.detach().mT.contiguous().mT.requires_grad_() for part in (q, k, v)]
    spread = [part.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for part in (q, k, v)]
    for parts in (turned, spread):
        both([*parts, pk, pv], 1e-12)
    got, wanted = prefix_attention(q, k, v, rows[2], rows[3]), exact(q, k, v, rows[2], rows[3], None, False, None)
    agree(got, wanted, 1e-12)
    agree(torch.autograd.grad(got.sum(), table)[0], torch.autograd.grad(wanted.sum(), table)[0], 1e-12)


def test_twice_in_a_graph_and_checkpointed() -> None:
    parts = inputs(SIZES[0], torch.float64)

    def twice(*tensors: Tensor) -> Tensor:
        once = prefix_attention(*tensors, is_causal=True)  # type: ignore[misc]
        return prefix_attention(once, *tensors[1:], is_causal=True)  # type: ignore[misc]

    once = exact(*parts, None, True, None)  # type: ignore[arg-type]
    wanted = torch.autograd.grad(exact(once, *parts[1:], None, True, None).pow(2).sum(), parts)  # type: ignore[arg-type]
    plain = torch.autograd.grad(twice(*parts).pow(2).sum(), parts)
    again = torch.autograd.grad(checkpoint(twice, *parts, use_reentrant=False).pow(2).sum(), parts)
    for a, b, right in zip(plain, again, wanted, strict=True):
        agree(a, right, 1e-12)
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "size", [(0, 2, 1, 3, 3, 4, 2, True), (2, 2, 1, 3, 0, 4, 2, True), (2, 2, 1, 0, 3, 4, 2, True)]
)
def test_empty(size: tuple[Any, ...]) -> None:
    both(inputs(size, torch.float32), 2e-6)


def test_reference_is_one_softmax() -> None:
    parts = inputs(SIZES[2], torch.float64)
    mask = padded(left=True)
    agree(reference(*parts, mask), exact(*parts, mask, False, None), 1e-12)  # type: ignore[arg-type]
    agree(reference(*parts, None, True, 0.3), exact(*parts, None, True, 0.3), 1e-12)  # type: ignore[arg-type]


def test_no_rows_of_scores_and_no_copies_of_keys_are_kept() -> None:
    """What is kept is q, k, v, o and lse; of a first layer, whose q needs no gradient, not even k and v."""
    q, k, v, pk, pv = inputs((2, 6, 2, 64, 64, 8, 16, True), torch.float32)

    def kept(*parts: Tensor) -> int:
        storages: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = prefix_attention(*parts, is_causal=True)  # type: ignore[misc]
        assert out.requires_grad
        return sum(storages.values())

    lse = 4 * 2 * 6 * 64
    sizes = {name: part.untyped_storage().nbytes() for name, part in (("q", q), ("k", k), ("p", pk))}
    assert kept(q, k, v, pk, pv) == 2 * sizes["q"] + 2 * sizes["k"] + 2 * sizes["p"] + lse
    assert kept(*(part.detach() for part in (q, k, v)), pk, pv) == 2 * sizes["q"] + 2 * sizes["p"] + lse


def test_autocast() -> None:
    parts = inputs(SIZES[0], torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = prefix_attention(*parts, is_causal=True)  # type: ignore[misc]
        assert got.dtype == torch.bfloat16
        assert reference(*parts, None, True).dtype == torch.bfloat16  # type: ignore[arg-type]
    agree(got, exact(*parts, None, True, None), 3e-2)  # type: ignore[arg-type]
    assert all(grad.dtype == torch.float32 for grad in torch.autograd.grad(got.sum(), parts))


def test_where_two_parts_are_not_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, pk, pv = inputs(SIZES[0], torch.float32)
    assert merges(q, k, v, pk)
    assert not merges(q, k, v, pk, dropout=0.1)
    assert not merges(q, k, v, pk, torch.zeros(1, 1, 7, 7, requires_grad=True))
    assert not merges(q, k, v, pk.bfloat16())
    assert not merges(q, k, v[..., :4], pk)
    assert not merges(*(part.to("meta") for part in (q, k, v, pk)))
    bias = torch.zeros(1, 4, 7, 7, dtype=torch.float64, requires_grad=True)
    parts = [part.double() for part in (q, k, v, pk, pv)]
    found = torch.autograd.grad(prefix_attention(*parts, mask=bias).pow(2).sum(), bias)[0]  # type: ignore[misc]
    wanted = torch.autograd.grad(exact(*parts, bias, False, None).pow(2).sum(), bias)[0]  # type: ignore[arg-type]
    agree(found, wanted, 1e-12)
    monkeypatch.setenv("LIT_PEFT_KERNELS", "0")
    assert not merges(q, k, v, pk)


def test_compiled_it_is_the_plain_form() -> None:
    parts = inputs(SIZES[0], torch.float32)
    found = torch.compile(prefix_attention, backend="eager", fullgraph=True)(*parts, is_causal=True)
    agree(found, exact(*parts, None, True, None), 2e-6)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_stock_kernels_of_cuda_take_what_they_are_given(masked: bool, dtype: torch.dtype) -> None:
    """As far as fake tensors know: the arguments fit, and the gradients are like what they are of."""
    if torch.cuda.is_available():
        pytest.skip("the kernels themselves are tested there")
    with FakeTensorMode(), torch.no_grad():
        q, k, v = (torch.empty(2, 41, h, 64, device="cuda", dtype=dtype).transpose(1, 2) for h in (8, 2, 2))
        mask = torch.empty(2, 1, 41, 41, device="cuda", dtype=dtype) if masked else None
        o, lse, told = attention(q, k, v, mask, not masked, 0.1)
        assert (o.shape, o.stride(), o.dtype) == (q.shape, q.stride(), dtype)
        assert lse.shape[:2] == (2, 8)
        assert lse.shape[2] >= 41
        found = attention_backward(o, q, k, v, o, lse, told, mask, not masked, 0.1)
        assert [(part.shape, part.dtype) for part in found] == [(part.shape, dtype) for part in (q, k, v)]


def test_a_mask_is_made_once() -> None:
    mask = additive(torch.tensor([[True, False]]), torch.bfloat16)
    assert additive(mask, torch.bfloat16) is mask
    assert additive(mask, torch.float32) is not mask
    assert additive(torch.tensor([float("-inf")]), torch.float16).tolist() == [-32752.0]


@pytest.mark.parametrize("settings", [{"mask": torch.ones(1, 1, 5, 11, dtype=torch.bool)}, {}])
def test_causal_is_said_once(settings: dict[str, Any]) -> None:
    parts = inputs(SIZES[3], torch.float32)
    with pytest.raises(ValueError, match="is_causal is True and"):
        prefix_attention(*parts, is_causal=True, **settings)  # type: ignore[misc]
