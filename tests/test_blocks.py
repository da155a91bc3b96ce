"""Stacks and averages of named adapters: by hand in float64, nested, routed, replayed, saved; and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_peft import IA3, Average, BitFit, Fuse, LoRA, Pfeiffer, Stack, activate, adapters, delete_adapter, load, routed
from lit_peft.blocks import plain, read
from lit_peft.methods.bottleneck import Bottleneck, BottleneckConfig, BottleneckInNorm
from lit_peft.methods.lora import LoRAConfig, LoRALinear
from lit_peft.placing import place
from lit_peft.zoo import compose
from tests.models import save_tiny
from tests.test_methods import batch, outputs, same, shake

BLOCKS = [
    Stack("a", "b"),
    Stack("b", "a"),
    Average("a", "b", weights=[0.25, 0.75]),
    Stack("c", Average("a", "b", weights=[1, 3])),
    Average(Stack("a", "b"), "c", weights=[2, 3]),
]


def bottlenecks(kind: Any, base: nn.Module) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(base)
    place(model, ["0"], lambda inner: kind(inner, BottleneckConfig(bottleneck_size=3, hidden_size=8), "a"))
    adapter: Any = model[0]
    for name, size in (("b", 2), ("c", 1)):
        adapter.add(name, BottleneckConfig(bottleneck_size=size, hidden_size=8, scale=0.5))
    model.double()
    with torch.no_grad():
        for _, parameter in adapter.own_parameters():
            parameter.copy_(torch.randn(parameter.shape))
    return model


def f(model: Any, name: str, h: Tensor) -> Tensor:
    a = model[0]
    inner = (h @ a.bottleneck_down[name].t() + a.bottleneck_down_bias[name]).clamp(min=0)
    out = inner @ a.bottleneck_up[name].t() + a.bottleneck_up_bias[name]
    return out if name == "a" else 0.5 * out


def by_hand(model: Any, block: Any, total: Tensor, reads: Any) -> Tensor:
    """The sum in the end, where a set adds f of what `reads` makes of the sum."""
    if isinstance(block, str):
        return total + f(model, block, reads(total))
    if isinstance(block, Stack):
        for part in block.parts:
            total = by_hand(model, part, total, reads)
        return total
    changes = [by_hand(model, part, total, reads) - total for part in block.parts]
    return total + sum(w * change for w, change in zip(block.weights, changes, strict=True))


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_bottlenecks_by_hand(block: Any) -> None:
    x = torch.randn(3, 4, 8).double().requires_grad_()
    for kind, base in ((Bottleneck, nn.Linear(8, 8)), (BottleneckInNorm, nn.LayerNorm(8))):
        model = bottlenecks(kind, base)
        inner = model[0].base
        if kind is Bottleneck:
            expected = by_hand(model, block, inner(x), lambda total: total)
        else:
            expected = inner(by_hand(model, block, x, inner))
        with adapters(model, block):
            found = model(x)
        with routed(model, ["a", block, None]):
            mixed = model(x)
        assert torch.allclose(found, expected, atol=1e-10)
        assert torch.allclose(mixed[1], expected[1], atol=1e-10)
        own = [x, *(p for n, p in model[0].own_parameters() if n.rpartition(".")[2] in block.names)]
        mine = torch.autograd.grad(found.square().sum(), own)
        theirs = torch.autograd.grad(expected.square().sum(), own)
        for one, other in zip(mine, theirs, strict=True):
            assert torch.allclose(one, other, atol=1e-9)


def test_layers_that_read_their_input_are_averaged() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6))
    place(model, ["0"], lambda base: LoRALinear(base, LoRAConfig(r=2, alpha=2), "a"))
    layer: Any = model[0]
    layer.add("b", LoRAConfig(r=3, alpha=6))
    model.double()
    with torch.no_grad():
        for _, parameter in layer.own_parameters():
            parameter.copy_(torch.randn(parameter.shape))
    x = torch.randn(3, 4, 8).double()
    one, two = (x @ layer.lora_a[n].t() @ layer.lora_b[n].t() for n in "ab")
    with adapters(model, Average("a", "b", weights=[1, 3])):
        assert torch.allclose(model(x), layer.base(x) + 0.25 * one + 0.75 * 2 * two)
    with routed(model, [None, Average("a", "b"), "b"]):
        found = model(x)
    assert torch.allclose(found[0], layer.base(x)[0])
    assert torch.allclose(found[1], (layer.base(x) + 0.5 * one + two)[1])
    assert torch.allclose(found[2], (layer.base(x) + 2 * two)[2])
    with torch.no_grad():
        layer.add("c", LoRAConfig(r=2, alpha=2))
        layer.lora_a["c"], layer.lora_b["c"] = layer.lora_a["a"], layer.lora_b["a"]
    with adapters(model, Average("a", "c", weights=[0.5, 0.5])):
        mean = model(x)
    with adapters(model, "a"):
        assert torch.equal(mean, model(x))
    assert f"{model[0](x).dtype}" == "torch.float64"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("blocks") / "llama")


def module_of(method: str, folder: Path, **more: Any) -> Any:
    settings: dict[str, Any] = {"lora": {"lora": {"r": 2}}, "dora": {"lora": {"r": 2}}, "ia3": {}, "bitfit": {}}.get(
        method, {"bottleneck": {"bottleneck_size": 4}}
    )
    torch.manual_seed(1)
    module: Any = compose(method, "sft")(str(folder), **settings, **more)
    module.configure_model()
    module.add_adapter("b")
    shake(module)
    return module


@pytest.mark.parametrize("method", ["lora", "dora", "houlsby", "pfeiffer", "parallel"])
def test_average_of_equal_adapters_is_one_of_them(method: str, llama: Path) -> None:
    module = module_of(method, llama)
    rows = batch("sft")
    alone = outputs(module, rows)
    with adapters(module, Average("default", "b")):
        assert not same(outputs(module, rows), alone, 1e-4)
    with torch.no_grad():
        mine = dict(module.named_parameters())
        for name, parameter in mine.items():
            if name.endswith(".b"):
                parameter.copy_(mine[f"{name.removesuffix('.b')}.default"])
    with adapters(module, Average("default", "b", weights=[2, 5])):
        assert same(outputs(module, rows), alone)


@pytest.mark.parametrize("method", ["lora", "houlsby"])
def test_replays_see_the_block_of_their_call(method: str, llama: Path) -> None:
    block: Any = Average("default", "b", weights=[1, 4]) if method == "lora" else Stack("default", "b")
    found = []
    for again in (False, True):
        module = module_of(method, llama, gradient_checkpointing=again)
        module.train()
        rows = batch("sft")
        inputs = {key: rows[key] for key in ("input_ids", "attention_mask")}
        with adapters(module, block):
            one = module.model(**inputs).logits.logsumexp(-1).sum()
        with routed(module, ["b", block, None, "default"]):
            other = module.model(**inputs).logits.logsumexp(-1).sum()
        (one + 2 * other).backward()
        found.append({n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert same(found[1][name], gradient), name


def test_compiled_code_sees_another_block() -> None:
    model = bottlenecks(Bottleneck, nn.Linear(8, 8))
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(2, 3, 8).double()
    for block in (Stack("a", "b"), Average("a", "b"), Average("a", "b", weights=[1, 9]), "c", Stack("b", "a")):
        with adapters(model, block), torch.no_grad():
            assert torch.allclose(compiled(x), model(x)), block


def test_active_blocks_are_kept_in_checkpoints_and_written_in_yaml(llama: Path, tmp_path: Path) -> None:
    from tests.test_methods import loader, quick_trainer

    wanted = {"stack": ["default", {"average": ["b", "c"], "weights": [1, 3]}]}
    small = {"bottleneck": {"bottleneck_size": 4, "init": "houlsby", "scale": 3000.0}}
    named = {"b": dict(small), "c": dict(small)}
    module: Any = compose("pfeiffer", "sft")(str(llama), **small, named=named, active=[wanted])
    trainer = quick_trainer(tmp_path, max_steps=2)
    trainer.fit(module, loader("sft", 2))
    expected = outputs(module, batch("sft"))
    with adapters(module, Stack("default", Average("b", "c", weights=[0.25, 0.75]))):
        assert torch.equal(outputs(module, batch("sft")), expected)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    again = load(tmp_path / "run.ckpt", device="cpu")
    assert torch.equal(outputs(again, batch("sft")), expected)
    activate(again, Stack("b", "c"))
    with pytest.raises(ValueError, match=r"'b' is part of Stack\('b', 'c'\)\. Activate or delete that first"):
        delete_adapter(again, "b")
    with pytest.raises(TypeError, match="Choose names"):
        again.merge_adapters()


def test_plain_and_read() -> None:
    for block in [*BLOCKS, Fuse("a", "b")]:
        assert read(plain(block)) == block
        assert hash(read(plain(block))) == hash(block)
    assert Stack("a", "b") != Stack("b", "a")
    assert Stack("a", "b") != Fuse("a", "b")
    assert Average("a", "b") != Average("a", "b", weights=[1, 2])
    assert Stack("a", Average("b", "a")).names == ("a", "b")


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: Stack("a"), ValueError, "given the adapter 'a' alone"),
        (lambda: Average(), ValueError, "was given none"),
        (lambda: Stack("a", None), TypeError, "not None"),  # type: ignore[arg-type]
        (lambda: Average("a", "b", weights=[1]), ValueError, "2 parts and 1 weights"),
        (lambda: Average("a", "b", weights=[1, -1]), ValueError, "the weight -1"),
        (lambda: Average("a", "b", weights=[0, 0]), ValueError, "weights that are all 0"),
        (lambda: Average("a", "b", weights=[float("nan"), 0]), ValueError, "the weight nan"),
        (lambda: Fuse("a", "a"), ValueError, "names the adapter 'a' twice"),
        (lambda: Fuse("a", Stack("b", "c")), TypeError, "trained over adapters, not over Stack"),
        (lambda: read({"mix": ["a", "b"]}), ValueError, "neither the name of an adapter nor a block"),
        (lambda: read({"stack": ["a", "b"], "weights": [1, 2]}), ValueError, "neither"),
        (lambda: read({"stack": 3}), ValueError, "neither"),
    ],
)
def test_blocks_that_are_none(make: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_combinations_that_cannot_be(llama: Path) -> None:
    lora = module_of("lora", llama)
    lora.add_adapter("p", Pfeiffer, bottleneck={"bottleneck_size": 4})
    lora.add_adapter("scales", IA3)
    lora.add_adapter("biases", BitFit, bitfit={"create_missing": True})
    parallel = module_of("parallel", llama)
    pfeiffer = module_of("pfeiffer", llama)
    pfeiffer.add_adapter("l", LoRA, lora={"r": 2})
    prefix: Any = compose("prefix", "sft")(str(llama), prefix={"num_virtual_tokens": 2})
    prefix.configure_model()
    prefix.add_adapter("b")
    for module, block, message in (
        (lora, Stack("default", "b"), "LoRALinear cannot apply Stack.* reads its layer's input"),
        (lora, Average("p", Stack("default", "b")), "LoRALinear cannot apply Stack"),
        (lora, Fuse("default", "b"), "only bottleneck adapters are fused"),
        (lora, Stack("default", "p"), "no layer with two of its adapters"),
        (lora, Average("default", "scales"), "IA3Linear cannot apply Average.* works inside its layer"),
        (lora, Average("default", "biases"), "BitFitBias cannot apply Average"),
        (parallel, Stack("default", "b"), "BottleneckBeside cannot apply Stack.* stands beside its layer"),
        (pfeiffer, Fuse("default", "b"), r"No fusion of 'default' and 'b' was trained \(fusions here: none\)"),
        (pfeiffer, Stack("l", "b"), "no layer with two"),
        (prefix, Average("default", "b"), "works inside its layer"),
    ):
        for choose in (lambda: adapters(module, block), lambda: routed(module, [None, block])):  # noqa: B023
            with pytest.raises(TypeError, match=message) as caught, choose():
                pass
            assert "\n" not in str(caught.value)
        with pytest.raises(TypeError, match=message):
            activate(module, block)
    with pytest.raises(ValueError, match="No adapter is named 'x'"), adapters(lora, Average("default", "x")):
        pass
    with adapters(lora, Average("default", "p")):  # different places: each is halved where it is
        assert outputs(lora, batch("sft")).isfinite().all()


class Reads(Bottleneck):
    """An adapter of one's own that goes by its sets, as those written before there were blocks."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        y = self.base(*args, **kwargs)
        for name, _ in self.shares(y):
            y = y + self.branch(name, y)
        return y


def test_an_adapter_that_knows_no_blocks_does_not_ignore_them() -> None:
    from lit_peft.selection import choose

    model = bottlenecks(Reads, nn.Linear(8, 8))
    with choose({model[0].scope: (Average("a", "b"),)}), pytest.raises(TypeError, match="needs adapters by name"):
        model(torch.randn(1, 2, 8).double())


def test_two_places_of_one_stack_are_the_layers_order() -> None:
    """A stack over both reads what the layer in front has made, as each alone would."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    config = BottleneckConfig(bottleneck_size=3, hidden_size=8, init="houlsby", scale=1e4)
    place(model, ["0", "1"], lambda base: Bottleneck(base, config, "a"))
    model[0].add("b", config)  # type: ignore[operator]
    x = torch.randn(2, 3, 8)
    with torch.no_grad(), adapters(model, Stack("b", "a")):
        found = model(x)
    with torch.no_grad():
        with adapters(model, Stack("b", "a")):
            inner = model[0](x)
        with adapters(model, "a"):
            assert torch.allclose(found, model[1](inner))
