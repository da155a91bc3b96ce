"""The kernel of all penalties against float64, and AdaLoRA on kernels."""

import pytest
import torch
from torch import nn

from lit_peft import AdaLoRAConfig
from lit_peft.low_rank.singular import AdaLoRALinear, penalty
from lit_peft.ops.gram import orthogonality
from tests.kernels.where import DEVICE
from tests.ops.exact import agree, drawn
from tests.ops.test_gram import compare, problem


def test_float64() -> None:
    """Ranks 0 to 64 in one launch."""
    rows, columns = ([t.detach().to(DEVICE).requires_grad_() for t in side] for side in problem(torch.float32))
    compare(rows, columns, 2e-6, kernels=True)


def test_one_and_uneven_memory() -> None:
    row = drawn(9, 4, dtype=torch.float32, seed=0).detach().to(DEVICE).requires_grad_()
    compare([row.t()], [], 2e-6, kernels=True)
    compare([row[:, ::2]], [row[::2]], 2e-6, kernels=True)


def test_what_the_kernel_does_not_take_goes_the_plain_way() -> None:
    for shape, dtype in (((200, 3), torch.float32), ((3, 5), torch.float64)):
        compare([drawn(*shape, dtype=dtype, seed=0).detach().to(DEVICE).requires_grad_()], [], 2e-6, kernels=True)


def test_only_gradients_that_are_asked_for() -> None:
    row, still = (drawn(3, 4, dtype=torch.float32, seed=i).detach().to(DEVICE) for i in range(2))
    row.requires_grad_()
    orthogonality([still, row], [still.t()], kernels=True).backward()
    agree(row.grad, (4 * (row @ row.t() - torch.eye(3, device=DEVICE)) @ row).detach(), 2e-6)
    assert still.grad is None


def test_the_penalty_of_a_model_on_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [
        AdaLoRALinear(nn.Linear(wide, tall), AdaLoRAConfig(init_r=r, target_r=1)).to(DEVICE)
        for wide, tall, r in ((6, 6, 3), (9, 6, 4), (6, 9, 12))
    ]
    parameters = [p for layer in layers for p in (layer.adalora_p["default"], layer.adalora_q["default"])]
    found = []
    for forced in ("0", "1"):
        monkeypatch.setenv("LIT_PEFT_KERNELS", forced)
        value = penalty(layers)
        found.append([value, *torch.autograd.grad(value, parameters)])
    for one, other in zip(*found, strict=True):
        agree(one, other, 2e-6)


def test_registered() -> None:
    rows = [torch.randn(3, 8, device=DEVICE), torch.randn(8, 2, device=DEVICE)]
    torch.library.opcheck(torch.ops.lit_peft.gram, (rows, [False, True]))
    gaps, _ = torch.ops.lit_peft.gram(rows, [False, True])
    slope = torch.ones((), device=DEVICE)
    torch.library.opcheck(torch.ops.lit_peft.gram_backward, (rows, [False, True], gaps, slope))
