"""Back through the gated product and the updates around it, against autograd in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lit_peft.ops.gated_back import Found, fits, gated_back
from tests.ops.exact import TOLERANCE, agree, drawn

NAMES = "d", "p_d", "a_d", "e", "g", "h_e", "b_e", "s_e", "h_g", "b_g", "s_g"
RANKS = [(1, 7, 8), (16, 16, 16), (64, 64, None), (None, 32, 32), (3, None, 2), (2, 3, None), (None, None, None)]


def problem(
    rows: int,
    f: int,
    ranks: tuple[int | None, ...],
    dtype: torch.dtype,
    low: torch.dtype | None = None,
    device: Any = "cpu",
) -> dict[str, Any]:
    """Draw all arguments but the last, with updates about as large as what they are added to, and B and A in `low`."""

    def there(*shape: int, seed: int, kind: torch.dtype = dtype) -> Tensor:
        return drawn(*shape, dtype=kind, seed=seed).detach().to(device)

    def pair(r: int | None, seed: int) -> tuple[Tensor | None, Tensor | None]:
        if r is None:
            return None, None
        return there(r, rows, seed=seed), there(f, r, seed=seed + 1, kind=low or dtype) / r**0.5

    p_d, b_d = pair(ranks[0], 3)
    e, g = there(rows, 2 * f, seed=1).split(f, 1)  # as the product with both weights gives them
    found = (
        there(rows, f, seed=0),
        p_d,
        None if b_d is None else b_d.t(),
        e,
        g,
        *pair(ranks[1], 5),
        1.5,
        *pair(ranks[2], 7),
    )
    return dict(zip(NAMES, (*found, 0.5), strict=True))


def exact(given: dict[str, Any]) -> list[Tensor]:
    """Return all results by autograd through the formulas in float64."""
    given = {name: value.double() if isinstance(value, Tensor) else value for name, value in given.items()}
    t = given["d"] if given["p_d"] is None else given["d"] + given["p_d"].t() @ given["a_d"]
    made, leaves = [], []
    for name in "eg":
        y, h, b = (given[key] for key in (name, f"h_{name}", f"b_{name}"))
        leaf, x = y.clone().requires_grad_(), y.new_zeros(len(y), 0 if h is None else len(h), requires_grad=True)
        b = y.new_zeros(y.shape[1], 0, requires_grad=True) if b is None else b.requires_grad_()
        # x stands for what H is made of: its gradient is P
        made.append(leaf + given[f"s_{name}"] * ((x if h is None else x + h.t()) @ b.t()))
        leaves += [leaf, x, b]
    out = made[0] * torch.sigmoid(made[0]) * made[1]
    de, p_e, db_e, dg, p_g, db_g = torch.autograd.grad(out, leaves, t)
    return [torch.cat((de, dg), 1), out.detach(), torch.cat((p_e.t(), p_g.t())), db_e, db_g]


def check(found: Found, given: dict[str, Any], again: bool = True) -> None:
    e, wanted = given["e"], exact(given)
    if not again:
        wanted[1] = e.new_empty(0)
    sums = torch.promote_types(e.dtype, torch.float32)
    for i, (got, right) in enumerate(zip(found, wanted, strict=True)):
        assert (got.numel(), got.dtype, got.device) == (right.numel(), e.dtype if i < 3 else sums, e.device)
        assert got.is_contiguous()
        if right.numel():
            assert got.shape == right.shape
        agree(got, right, TOLERANCE[e.dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("ranks", RANKS, ids=str)
def test_the_reference(ranks: tuple[int | None, ...], dtype: torch.dtype) -> None:
    low = torch.float32 if ranks[0] == 16 and dtype != torch.float64 else dtype
    given = problem(9, 11, ranks, dtype, low)
    check(gated_back(**given, again=True), given)
    check(gated_back(**given, again=False, kernels=False), given, again=False)


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(rows: int) -> None:
    given = problem(rows, 5, (2, 3, 1), torch.float64)
    found = gated_back(**given, again=True, kernels=True)  # float64 is not for the kernel
    check(found, given)
    assert found[2].shape == (4, rows)
    assert found[3].shape == (5, 3)


def test_what_the_kernel_takes() -> None:
    d = torch.ones(2, 3)
    assert fits(d, 64, 64, 0)
    assert fits(d.half(), 0, 0, 0)
    assert not fits(d, 65, 1, 1)
    assert not fits(d, 1, 33, 32)
    assert not fits(d.double(), 1, 1, 1)
