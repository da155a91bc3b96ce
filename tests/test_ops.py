"""Ops against float64: values, every gradient, what they keep, and the modules that are put in a model's place."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lit_peft import LoRAConfig, place
from lit_peft.low_rank.linear import LoRALinear
from lit_peft.ops import low_rank, residual
from lit_peft.ops.blocks import Fused, FusedMLP, FusedNorm, fuse, unfuse
from lit_peft.ops.recipes import note, recipe_of

SIZES = [(5, 7, 3, 1), (1, 33, 65, 7), (17, 64, 31, 16), (0, 9, 9, 8), (70, 96, 80, 64)]  # rows, in, out, r
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def drawn(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def agree(got: Tensor | None, wanted: Tensor | None, tolerance: float) -> None:
    assert (got is None) == (wanted is None)
    if got is not None and wanted is not None and wanted.numel():
        wanted = wanted.double()
        assert (got.double() - wanted).norm() <= tolerance * max(float(wanted.detach().norm()), 1e-9)


def both(
    op: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    inputs: list[Tensor],
    tolerance: float,
    **settings: float,
) -> None:
    """Compares an op with its float64 reference: the value and the gradient of every input."""
    exact = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in inputs]
    got, wanted = op(*inputs, **settings), reference(*exact, **settings)
    assert got.dtype == inputs[0].dtype
    agree(got, wanted, tolerance)
    weight = torch.randn(wanted.shape, dtype=torch.float64)
    (got * weight.to(got.dtype)).sum().backward()
    (wanted * weight).sum().backward()
    for mine, theirs in zip(inputs, exact, strict=True):
        agree(mine.grad, theirs.grad, tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_low_rank_update(size: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    rows, wide, tall, r = size
    inputs = [
        drawn(rows, tall, dtype=dtype, seed=0),
        drawn(rows, wide, dtype=dtype, seed=1),
        drawn(r, wide, dtype=dtype, seed=2),
        drawn(tall, r, dtype=dtype, seed=3),
    ]
    both(low_rank.low_rank_update, low_rank.reference, inputs, TOLERANCE[dtype], scale=0.5)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_diagonal(size: tuple[int, int, int, int]) -> None:
    rows, wide, tall, r = size
    shapes = [(rows, tall), (rows, wide), (r, wide), (tall, r), (r,)]
    inputs = [drawn(*shape, dtype=torch.float64, seed=i) for i, shape in enumerate(shapes)]

    def op(y: Tensor, x: Tensor, a: Tensor, b: Tensor, diagonal: Tensor) -> Tensor:
        return low_rank.low_rank_update(y, x, a, b, 2.0, diagonal=diagonal)

    def plain(y: Tensor, x: Tensor, a: Tensor, b: Tensor, diagonal: Tensor) -> Tensor:
        return low_rank.reference(y, x, a, b, 2.0, diagonal)

    both(op, plain, inputs, 1e-12)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_residual_update(size: tuple[int, int, int, int]) -> None:
    rows, wide, tall, r = size
    shapes = [(rows, tall), (rows, wide), (r, wide), (tall, r), (r, wide), (tall, r)]
    inputs = [drawn(*shape, dtype=torch.float64, seed=i) for i, shape in enumerate(shapes)]
    for start in inputs[4:]:
        start.requires_grad_(False)
    both(residual.residual_update, residual.reference, inputs, 1e-12, scale=0.5)


def test_the_residual_is_nothing_at_the_start() -> None:
    a, b = drawn(2, 8, dtype=torch.bfloat16, seed=0).detach(), drawn(4, 2, dtype=torch.bfloat16, seed=1).detach()
    y, x = torch.randn(3, 4).bfloat16(), torch.randn(3, 8).bfloat16()
    assert residual.residual_update(y, x, a, b, a, b, 2.0).equal(y)


@pytest.mark.parametrize("r", [0, 3])
def test_without_gradients(r: int) -> None:
    shapes = [(2, 5, 7), (2, 5, 4), (r, 4), (7, r), (r,)]
    y, x, a, b, diagonal = (drawn(*shape, dtype=torch.float64, seed=i).detach() for i, shape in enumerate(shapes))
    with torch.no_grad():
        got = low_rank.low_rank_update(y, x, a, b, 0.5, diagonal=diagonal)
        agree(got, low_rank.reference(y, x, a, b, 0.5, diagonal), 1e-12)


def test_only_gradients_that_are_asked_for() -> None:
    y, x, b = (drawn(3, 4, dtype=torch.float32, seed=i).detach() for i in range(3))
    a = drawn(3, 4, dtype=torch.float32, seed=4)
    low_rank.low_rank_update(y, x, a, b.t().contiguous(), 1.0).sum().backward()
    assert a.grad is not None
    assert x.grad is None
    assert y.grad is None


def test_uneven_memory_and_several_dimensions() -> None:
    x = drawn(4, 6, 5, dtype=torch.float64, seed=0).transpose(0, 1)  # not contiguous
    y = drawn(6, 4, 3, dtype=torch.float64, seed=1)
    a, b = drawn(2, 5, dtype=torch.float64, seed=2), drawn(3, 2, dtype=torch.float64, seed=3)
    out = low_rank.low_rank_update(y, x, a, b, 1.0)
    agree(out, low_rank.reference(y, x, a, b, 1.0), 1e-12)
    mine = torch.autograd.grad(out.sin().sum(), [x, y, a, b])
    theirs = torch.autograd.grad(low_rank.reference(y, x, a, b, 1.0).sin().sum(), [x, y, a, b])
    for one, other in zip(mine, theirs, strict=True):
        agree(one, other, 1e-12)


def test_twice_in_one_graph() -> None:
    x, a, b = (drawn(4, 4, dtype=torch.float64, seed=i) for i in range(3))

    def run(op: Callable[..., Tensor]) -> Tensor:
        return op(op(x, x, a, b, 0.3), x, a, b, 0.3).pow(2).sum()

    mine = torch.autograd.grad(run(low_rank.low_rank_update), [x, a, b])
    theirs = torch.autograd.grad(run(low_rank.reference), [x, a, b])
    for one, other in zip(mine, theirs, strict=True):
        agree(one, other, 1e-12)


def test_a_second_derivative_is_refused() -> None:
    x, a, b = (drawn(4, 4, dtype=torch.float64, seed=i) for i in range(3))
    (first,) = torch.autograd.grad(low_rank.low_rank_update(x, x, a, b, 1.0).pow(2).sum(), [a], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("p", [0.3, 1.0])
def test_dropout_without_a_mask(p: float) -> None:
    """The mask of the backward pass is that of the forward pass, and about p of the entries are left out."""
    x, a, b = (drawn(64, 64, dtype=torch.float64, seed=i) for i in range(3))
    torch.manual_seed(7)
    out = low_rank.low_rank_update(torch.zeros_like(x), x, a, b, 1.0, dropout=p)
    torch.manual_seed(7)
    kept = low_rank.dropped(torch.ones_like(x), p, low_rank.drawn(p)).detach()
    wanted = low_rank.reference(torch.zeros_like(x), x * kept, a, b, 1.0)
    agree(out, wanted, 1e-12)
    for one, other in zip(
        torch.autograd.grad(out.sum(), [x, a, b]), torch.autograd.grad(wanted.sum(), [x, a, b]), strict=True
    ):
        agree(one, other, 1e-12)
    assert abs(float((kept == 0).double().mean()) - p) < 0.03
    assert set(kept.unique().tolist()) <= {0.0, 1 / (1 - p) if p < 1 else 0.0}


def test_dropout_differs_from_call_to_call_and_follows_the_seed() -> None:
    x = torch.ones(8, 8)
    once, again = (low_rank.dropped(x, 0.5, low_rank.drawn(0.5)) for _ in range(2))
    assert not once.equal(again)
    torch.manual_seed(1)
    first = low_rank.drawn(0.5)
    torch.manual_seed(1)
    assert first == low_rank.drawn(0.5)


def test_autocast_gives_gradients_in_the_parameters_dtype() -> None:
    layer = LoRALinear(nn.Linear(8, 4), LoRAConfig(r=2))
    nn.init.normal_(layer.lora_b["default"])
    x = torch.randn(3, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert layer.lora_a["default"].grad is not None
    assert layer.lora_a["default"].grad.dtype == torch.float32
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


# Blocks ---------------------------------------------------------------------------------------------------------------


def llama(**settings: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape: dict[str, object] = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "vocab_size": 64, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**(shape | settings))).double().requires_grad_(False)  # type: ignore[arg-type]
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            nn.init.normal_(module.weight, mean=1.0)  # type: ignore[arg-type]
    return model


def adapted(config: LoRAConfig | None = None, **settings: object) -> LlamaForCausalLM:
    model = llama(**settings)
    place(model, lambda path, m: path.endswith("_proj"), lambda base: LoRALinear(base, config or LoRAConfig(r=2)))
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.double()
            nn.init.normal_(module.lora_b["default"])
    return model


def gradients(model: nn.Module, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss, list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))


@contextmanager
def kept() -> Iterator[list[Tensor]]:
    """Lists what autograd keeps."""
    found: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


def test_fused_modules_give_the_same() -> None:
    plain, fused, ids = adapted(), adapted(), torch.arange(20).view(2, 10)
    assert fuse(fused) == 2 + 5
    wanted, wanted_gradients = gradients(plain, ids)
    got, got_gradients = gradients(fused, ids)
    agree(got, wanted, 1e-14)
    for one, other in zip(got_gradients, wanted_gradients, strict=True):
        agree(one, other, 1e-6)  # the plain norm works in float32


def test_fused_norm_is_exact() -> None:
    """Against the formula in float64, which the model's own norm only reaches to float32."""
    norm = llama().model.norm
    fused = FusedNorm(norm)
    x = drawn(3, 32, dtype=torch.float32, seed=0)
    y = x.detach().double().requires_grad_()
    wanted = norm.weight * y / (y.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
    got = fused.float()(x)
    agree(got, wanted, 1e-6)
    got.sin().sum().backward()
    wanted.sin().sum().backward()
    agree(x.grad, y.grad, 1e-6)


def test_names_and_weights_stay() -> None:
    model = adapted()
    names, own = list(model.state_dict()), dict(model.named_modules())
    fuse(model)
    assert list(model.state_dict()) == names
    assert isinstance(model.model.layers[0].mlp, FusedMLP)
    unfuse(model)
    assert dict(model.named_modules()) == own
    assert not any(isinstance(module, Fused) for module in model.modules())


def test_a_child_put_in_later_is_seen_by_both() -> None:
    model = llama()
    fuse(model)
    place(model, ["model.layers.0.mlp.up_proj"], lambda base: LoRALinear(base, LoRAConfig(r=2)))
    unfuse(model)
    assert isinstance(model.model.layers[0].mlp.up_proj, LoRALinear)


def test_what_is_kept() -> None:
    """Neither the activation, nor the product, nor the norms' outputs: 2 f + 2 d less a token and layer."""
    plain, fused, ids = adapted().float(), adapted().float(), torch.arange(20).view(2, 10)
    fuse(fused)
    weights = {p.untyped_storage().data_ptr() for m in (plain, fused) for p in [*m.parameters(), *m.buffers()]}
    sizes = []
    for model in (plain, fused):
        with kept() as found:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}
        sizes.append(sum(size for where, size in storages.items() if where not in weights))
        del loss
    width, inner, tokens, layers = 32, 48, 20, 2
    # the first norm's input needs no gradient, so that its output is kept as before
    assert sizes[0] - sizes[1] >= tokens * (layers * 2 * (inner + width) - width) * 4


def test_other_modules_are_left_alone() -> None:
    hooked = llama()
    hooked.model.layers[0].mlp.register_forward_hook(lambda module, args, out: out)
    assert fuse(hooked) == 1 + 5
    assert fuse(llama(hidden_act="gelu")) == 5
    assert fuse(fused := llama()) == fuse(fused) == 7


def test_checkpointing_and_dropout_give_the_same() -> None:
    ids = torch.arange(20).view(2, 10)
    results = []
    for checkpointing in (False, True):
        model = adapted(LoRAConfig(r=2, dropout=0.3))
        fuse(model)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(3)
        results.append(gradients(model, ids))
    agree(results[1][0], results[0][0], 1e-12)
    for one, other in zip(results[1][1], results[0][1], strict=True):
        agree(one, other, 1e-12)


def test_compiled_gives_the_same() -> None:
    model, ids = adapted(), torch.arange(20).view(2, 10)
    fuse(model)
    wanted, wanted_gradients = gradients(model, ids)
    got, got_gradients = gradients(torch.compile(model, backend="aot_eager"), ids)  # type: ignore[arg-type]
    agree(got, wanted, 1e-6)
    for one, other in zip(got_gradients, wanted_gradients, strict=True):
        agree(one, other, 1e-5)


def test_plain_operations_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = adapted(), torch.arange(20).view(2, 10)
    fuse(model)
    wanted, wanted_gradients = gradients(model, ids)
    monkeypatch.setenv("LIT_PEFT_KERNELS", "0")
    monkeypatch.delattr(low_rank, "_Update")  # would be missed
    got, got_gradients = gradients(model, ids)
    agree(got, wanted, 1e-12)
    for one, other in zip(got_gradients, wanted_gradients, strict=True):
        agree(one, other, 1e-6)


def test_a_recipe_is_void_when_its_tensor_is_changed() -> None:
    part = torch.ones(2)
    x = note(part * 2, part, make=lambda part: part * 2)
    assert recipe_of(x).make(*recipe_of(x).parts).equal(x)
    x.mul_(3)
    assert recipe_of(x).parts[0] is x
