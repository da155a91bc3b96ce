"""LoReFT and DiReFT against the paper's formulas in float64; which positions are edited, and when."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lit_peft.data.pack import cannot_pack
from lit_peft.methods.reft import (
    EDIT,
    DiReFTLayer,
    Edit,
    LoReFTLayer,
    ReFTConfig,
    edited,
    orthonormal,
    prompt_is,
    prompt_of,
)
from lit_peft.named import adapters, disabled, routed
from lit_peft.zoo import compose
from tests.models import save_tiny
from tests.test_methods import batch, loader, quick_trainer, shake


class Stream(nn.Module):
    """A layer that adds nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, h: Tensor) -> Tensor:
        return h


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", [LoReFTLayer, DiReFTLayer])
def test_edits_as_in_the_paper(kind: Any, tied: bool) -> None:
    torch.manual_seed(0)
    layer = kind(Stream(), ReFTConfig(r=3, tied=tied, hidden_size=8)).double()
    with torch.no_grad():
        for _, parameter in layer.own_parameters():
            parameter.copy_(torch.randn(parameter.shape))
    h = torch.randn(2, 6, 8, dtype=torch.float64)
    marks = torch.tensor([[1, 1, 0, 0, 2, 0], [0, 1, 0, 2, 2, 0]])
    rotation, source, bias = (layer.get_parameter(f"reft_{part}.default") for part in ("rotation", "source", "bias"))
    expected = h.clone()
    for b, t in marks.nonzero().tolist():
        place = 0 if tied else int(marks[b, t]) - 1
        row, w, c = h[b, t], source[place], bias[place]
        if kind is LoReFTLayer:
            q, upper = torch.linalg.qr(rotation[place])
            r = (q * upper.diagonal().sign()).t()
            expected[b, t] = row + r.t() @ (w @ row + c - r @ row)
        else:
            expected[b, t] = row + rotation[place] @ (w @ row + c)
    found = layer(h, **{EDIT: Edit({"default": marks})})
    assert torch.allclose(found, expected, atol=1e-6)
    assert torch.equal(found[marks == 0], h[marks == 0])


def test_marks() -> None:
    prompt = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0]])
    assert edited(prompt, 2, 1).tolist() == [
        [1, 1, 0, 0, 0, 2],
        [0, 0, 1, 1, 2, 0],
        [0, 0, 0, 0, 2, 0],
        [0, 0, 0, 0, 0, 0],
    ]
    assert edited(prompt, 0, 2)[0].tolist() == [0, 0, 0, 0, 2, 2]
    assert edited(prompt, 2, 0)[1].tolist() == [0, 0, 1, 1, 0, 0]
    labels = torch.tensor([[-100, -100, 5, 6], [-100, 5, -100, 6]])
    assert prompt_of({"labels": labels, "input_ids": labels}).tolist() == [  # type: ignore[union-attr]
        [True, True, False, False],
        [True, False, False, False],
    ]


def test_rotation_stays_orthonormal_while_it_learns(tmp_path: Path) -> None:
    module: Any = compose("loreft", "sft")(
        str(save_tiny("llama", tmp_path / "m")), reft={"r": 4, "first": 2, "last": 2}, lr=1e-2, scheduler="constant"
    )
    quick_trainer(tmp_path, max_steps=60, max_epochs=20).fit(module, loader("sft", 4))
    layers = [m for m in module.model.modules() if isinstance(m, LoReFTLayer)]
    assert len(layers) == 2
    for layer in layers:
        matrix = layer.reft_rotation["default"][0]
        q = orthonormal(matrix)
        assert (q.t() @ q - torch.eye(4)).abs().max() < 1e-5
        assert matrix.numel() == 4 * 32


@torch.no_grad()
def test_only_the_prompt_pass_is_edited(tmp_path: Path) -> None:
    module: Any = compose("loreft", "sft")(
        str(save_tiny("llama", tmp_path / "m")), reft={"r": 2, "first": 1, "last": 1}
    )
    module.configure_model()
    shake(module)
    module.eval()
    rows = batch("sft", rows=2)
    ids, mask = rows["input_ids"], rows["attention_mask"]
    prompt = prompt_of(rows)
    assert prompt is not None
    layer = module.model.model.layers[0]
    seen: list[Tensor] = []
    handle = layer.base.register_forward_hook(lambda m, a, out: seen.append(out[0] if isinstance(out, tuple) else out))
    edits: list[Tensor] = []
    other = layer.register_forward_hook(lambda m, a, out: edits.append(out[0] if isinstance(out, tuple) else out))
    with prompt_is(prompt):
        module.model(input_ids=ids, attention_mask=mask)
    changed = (seen[0] != edits[0]).any(-1)
    assert torch.equal(changed, edited(mask * prompt, 1, 1) > 0)
    assert changed.sum() == 4  # two a row
    handle.remove()
    other.remove()
    ones = torch.ones_like(ids)
    for use_cache in (True, False):
        out = module.model.generate(input_ids=ids, attention_mask=ones, max_new_tokens=1, use_cache=use_cache)
        with disabled(module):
            assert out.shape == (2, ids.shape[1] + 1)
    calls: list[bool] = []
    spy = layer.register_forward_pre_hook(lambda m, a, k: calls.append(EDIT in k), with_kwargs=True)
    module.model.generate(input_ids=ids, attention_mask=ones, max_new_tokens=4, do_sample=False, use_cache=True)
    spy.remove()
    assert calls == [True, False, False, False]


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"r": 0}, "1 or more"), ({"first": 0, "last": 0}, "at least one"), ({"first": -1}, "at least one")],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReFTConfig(**settings)


def test_layers_and_rank_that_are_not_there(tmp_path: Path) -> None:
    folder = str(save_tiny("llama", tmp_path / "m"))
    for settings, message in (({"layers_to_transform": [9]}, "layer 9"), ({"r": 64}, "no 64 orthonormal")):
        module: Any = compose("loreft", "sft")(folder, reft=settings)
        with pytest.raises(ValueError, match=message):
            module.configure_model()


def test_each_set_has_its_own_positions_and_every_step_knows_the_prompt(tmp_path: Path) -> None:
    folder = str(save_tiny("llama", tmp_path / "m"))
    module: Any = compose("loreft", "sft")(folder, reft={"r": 2, "first": 1, "last": 1})
    module.configure_model()
    module.add_adapter("wide", reft=ReFTConfig(r=2, first=4, last=4))
    assert sum(type(m).__name__ == "ReFTStack" for m in module.model.modules()) == 1
    shake(module)
    module.eval()
    ids = batch("sft", rows=2)["input_ids"]
    with torch.no_grad():
        with routed(module, ["default", "wide"]):
            mixed = module.model(input_ids=ids).logits
        for row, name in enumerate(("default", "wide")):
            with adapters(module, name):
                assert torch.allclose(mixed[row], module.model(input_ids=ids).logits[row], atol=1e-5)
    rows = batch("sft")
    seen: list[Any] = []
    stack = next(m for m in module.model.modules() if type(m).__name__ == "ReFTStack")
    handle = stack.base.register_forward_pre_hook(lambda m, a, k: seen.append(k.get(EDIT)), with_kwargs=True)
    module.training_step(rows, 0)
    quick_trainer(tmp_path).test(module, DataLoader([rows], batch_size=None), verbose=False)  # type: ignore[arg-type]
    handle.remove()
    assert torch.equal(seen[0].marks["default"], seen[1].marks["default"])


def test_packed_rows_and_deaf_models_are_refused(tmp_path: Path) -> None:
    folder = str(save_tiny("llama", tmp_path / "m"))
    for method in ("loreft", "prompt"):
        module: Any = compose(method, "sft")(folder)
        module.configure_model()
        positions = torch.cat([torch.arange(4), torch.arange(5)])[None]
        with pytest.raises(ValueError, match="packing: false"):
            module.model(input_ids=torch.full((1, 9), 9), position_ids=positions)
        assert cannot_pack(module.model)
    module = compose("loreft", "sft")(folder)  # type: ignore[assignment]
    module.configure_model()
    for layer in module.model.model.layers:
        layer.forward = lambda h, reft_edit=None, layer=layer, **kwargs: layer.base(h, **kwargs)
    with pytest.raises(TypeError, match="without effect"):
        module.model(input_ids=torch.full((1, 9), 9))


@pytest.mark.parametrize("stack", ["houlsby+pfeiffer", "unipelt+lora", "prefix+p_tuning_v2", "prompt+loreft"])
def test_stacks_that_would_lose_a_method_are_refused(stack: str) -> None:
    with pytest.raises(TypeError, match=r"fight for one place|does not go with"):
        compose(stack, "sft")
