"""Whole decoder layers on kernels against float64, and when they take another way."""

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_peft import LoRAConfig, place
from lit_peft.low_rank.linear import LoRALinear
from lit_peft.ops import fused_layer, lean_layer
from lit_peft.ops.lean import make_lean
from tests.kernels.test_spread import deterministic
from tests.kernels.where import DEVICE
from tests.ops.exact import TOLERANCE, agree
from tests.ops.test_packed import IDS, adapted, results, same, tiny


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lists the layers that run on kernels."""
    found: list[int] = []
    own = fused_layer.leave

    def leave(*args: Any) -> Tensor:
        found.append(1)
        return own(*args)

    monkeypatch.setenv("LIT_PEFT_KERNELS", "1")
    monkeypatch.setattr(lean_layer.fused_layer, "leave", leave)
    return found


def rounded(model: Any, dtype: torch.dtype) -> Any:
    """Returns a copy on the device, in a dtype but for its adapters; and rounds the model's own weights to it."""
    for name, parameter in model.named_parameters():
        kind = torch.float32 if "lora" in name else dtype
        parameter.data = (parameter.data * (0.1 if "lora" in name else 1)).to(kind).double()
    other = copy.deepcopy(model).to(DEVICE, dtype)
    for name, parameter in other.named_parameters():
        if "lora" in name:
            parameter.data = parameter.data.float()
    make_lean(other)
    return other


def gradients(model: Any, x: Tensor, slope: Tensor) -> list[Tensor]:
    """Returns the first layer's output, and the gradients of its input and adapters, at places of their own."""
    layer = model.model.layers[0]
    turns = model.model.rotary_emb(x, torch.arange(x.shape[1], device=x.device)[None])
    y = layer(x, position_embeddings=tuple(part.to(x.dtype) for part in turns))
    return [y, *torch.autograd.grad(y, [x, *(p for p in layer.parameters() if p.requires_grad)], slope.to(y))]


def check(exact: Any, dtype: torch.dtype, calls: list[int], shape: tuple[int, int] = (2, 5)) -> None:
    model = rounded(exact, dtype)
    x = torch.randn(*shape, 32, device=DEVICE, dtype=dtype).requires_grad_()
    slope = torch.randn(*shape, 32, dtype=dtype)
    got = gradients(model, x, slope.to(DEVICE))
    assert len(calls) == 1
    wanted = gradients(exact, x.detach().cpu().double().requires_grad_(), slope)
    for one, other in zip(got, wanted, strict=True):
        agree(one.cpu(), other, 4 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("r", [1, 7, 8, 16])
def test_against_float64(r: int, dtype: torch.dtype, calls: list[int]) -> None:
    check(adapted(tiny(num_hidden_layers=1), LoRAConfig(r=r, alpha=1)), dtype, calls)


@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (3, 33)], ids=str)
def test_rows(shape: tuple[int, int], staged: bool, calls: list[int]) -> None:
    with deterministic(True) if staged else nullcontext():
        check(adapted(tiny(num_hidden_layers=1)), torch.float32, calls, shape)


@pytest.mark.parametrize("without", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
def test_layers_without_an_adapter(without: str, calls: list[int]) -> None:
    model = tiny(num_hidden_layers=1, attention_bias=True, mlp_bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    place(
        model,
        lambda path, _: path.endswith("_proj") and not path.endswith(without),
        lambda base: LoRALinear(base, LoRAConfig(r=2)),
    )
    for module in model.modules():
        if isinstance(module, LoRALinear):
            nn.init.normal_(module.double().lora_b["default"])
    check(model, torch.float32, calls)


@pytest.mark.parametrize(
    ("kind", "settings", "config", "fused"),
    [
        ("llama", {}, LoRAConfig(r=2), 2),
        ("mistral", {}, LoRAConfig(r=2), 2),
        ("qwen2", {}, LoRAConfig(r=2), 2),
        ("qwen3", {}, LoRAConfig(r=2), 0),  # normalises queries and keys before they are turned
        ("llama", {}, LoRAConfig(r=2, dropout=0.1), 0),
        ("llama", {}, LoRAConfig(r=40), 0),  # more than the registers hold, of three
    ],
    ids=str,
)
def test_which_models_are(
    kind: str, settings: dict[str, Any], config: LoRAConfig, fused: int, calls: list[int], monkeypatch: Any
) -> None:
    model = adapted(tiny(kind, num_attention_heads=2, num_key_value_heads=1, **settings), config).to(DEVICE)
    model.eval()
    for module in model.modules():
        if isinstance(module, LoRALinear) and config.dropout:
            module.train()
    monkeypatch.setenv("LIT_PEFT_KERNELS", "0")
    exact = results(model)
    make_lean(model.float())
    monkeypatch.setenv("LIT_PEFT_KERNELS", "1")
    got = results(model)
    assert len(calls) == fused
    if not config.dropout:
        same(got, exact, 4e-4)


def test_twice_in_one_graph_and_checkpointed(calls: list[int]) -> None:
    model = adapted(tiny()).float().to(DEVICE)
    make_lean(model)
    wanted = results(model)
    ids = IDS.to(DEVICE)
    losses = [model(input_ids=ids, labels=ids, use_cache=False).loss for _ in range(2)]
    trained = [p for p in model.parameters() if p.requires_grad]
    for _ in range(2):
        got = torch.autograd.grad(sum(losses), trained, retain_graph=True)
        same([sum(losses), *got], [2 * value for value in wanted], 1e-5)
    assert len(calls) == 6
    model.gradient_checkpointing_enable({"use_reentrant": False})
    same(results(model), wanted, 1e-5)
    assert len(calls) == 10
