"""The rotation's kernel against float64, and the models' own functions, which it stands for."""

import pytest
import torch
from torch import Tensor
from transformers.models.cohere.modeling_cohere import CohereAttention
from transformers.models.llama import modeling_llama
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from lit_peft.ops.rotary import reference, rotate, turning
from tests.kernels.test_gated import DTYPES, there
from tests.kernels.where import DEVICE
from tests.ops.exact import TOLERANCE, agree
from tests.ops.test_packed import same


def both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    q_exact, k_exact = (x.detach().double().requires_grad_() for x in (q, k))
    got = rotate(q, k, cos, sin, kernels=True)
    wanted = modeling_llama.apply_rotary_pos_emb(q_exact, k_exact, cos.double(), sin.double())
    slopes = [torch.randn_like(y) for y in wanted]
    same(list(got), list(wanted), TOLERANCE[q.dtype])
    mine = torch.autograd.grad(got, (q, k), [slope.to(q.dtype) for slope in slopes])
    same(list(mine), list(torch.autograd.grad(wanted, (q_exact, k_exact), slopes)), TOLERANCE[q.dtype])
    same(list(reference(q_exact, k_exact, cos.double(), sin.double())), list(wanted), 1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("width", [2, 6, 10])
def test_both_are_turned(width: int, batches: int, dtype: torch.dtype) -> None:
    q, k = (there(2, 3, heads, width, dtype=dtype, seed=heads) for heads in (3, 1))
    cos, sin = (there(batches, 3, width, dtype=dtype, seed=seed) for seed in (5, 6))  # halves of their own
    both(q.transpose(1, 2).requires_grad_(), k.transpose(1, 2).requires_grad_(), cos, sin)


def test_slices_and_other_layouts() -> None:
    whole = there(2, 3, 4 * 6, dtype=torch.float32, seed=0)
    q, k = (part.unflatten(-1, (2, 6)).transpose(1, 2).requires_grad_() for part in whole.split(12, 2))
    cos, sin = (there(1, 3, 6, dtype=torch.float32, seed=seed) for seed in (5, 6))
    both(q, k, cos, sin)
    both(*(x.detach().transpose(2, 3).contiguous().transpose(2, 3).requires_grad_() for x in (q, k)), cos, sin)


def test_what_does_not_fit_is_turned_by_plain_operations() -> None:
    q = there(2, 3, 4, 6, dtype=torch.float32, seed=0)
    cos, sin = (there(2, 3, 6, dtype=torch.float32, seed=seed) for seed in (5, 6))
    got = rotate(q, q, cos, sin, 2, kernels=True)  # heads behind the places
    agree(got[0], modeling_llama.apply_rotary_pos_emb(q, q, cos, sin, 2)[0], 1e-6)


def test_a_forward_is_told_by_what_it_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    own = modeling_llama.LlamaAttention.forward
    for forward in (own, Qwen3Attention.forward):
        assert turning(forward) is not forward
        assert turning(forward).__code__ is forward.__code__
    assert turning(CohereAttention.forward) is CohereAttention.forward  # it turns neighbours, not halves
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k, cos, sin: (q, k))
    assert turning(own) is own


def test_registered() -> None:
    q, k, angles = torch.randn(2, 3, 4, 6), torch.randn(2, 1, 4, 6), torch.randn(1, 4, 6)
    arguments = [x.to(DEVICE) for x in (q, k, angles, angles)]
    for backward in (True, False):
        torch.library.opcheck(torch.ops.lit_peft.rotary, (*arguments, backward))
