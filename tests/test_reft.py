"""LoReFT and DiReFT against the paper's formulas in float64; which positions are edited, and when."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lit_peft import hub
from lit_peft.adapter import named_adapters
from lit_peft.data.collate import Collate, CollatePacked
from lit_peft.data.instructions import Instructions
from lit_peft.data.pack import cannot_pack
from lit_peft.methods.compacter import CompacterConfig
from lit_peft.methods.pfeiffer import PfeifferConfig
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
from lit_peft.methods.reft_positions import texts_of
from lit_peft.named import adapters, add_adapter, disabled, routed
from lit_peft.zoo import compose
from tests.models import VOCAB, save_tiny
from tests.test_methods import batch, gradients, loader, quick_trainer, shake


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


def test_deaf_models_are_refused(tmp_path: Path) -> None:
    folder = str(save_tiny("llama", tmp_path / "m"))
    module: Any = compose("loreft", "sft")(folder)
    module.configure_model()
    for layer in module.model.model.layers:
        layer.forward = lambda h, reft_edit=None, layer=layer, **kwargs: layer.base(h, **kwargs)
    with pytest.raises(TypeError, match="without effect"):
        module.model(input_ids=torch.full((1, 9), 9))


@pytest.mark.parametrize("stack", ["houlsby+pfeiffer", "unipelt+lora", "prefix+p_tuning_v2", "prompt+loreft"])
def test_stacks_that_would_lose_a_method_are_refused(stack: str) -> None:
    with pytest.raises(TypeError, match=r"fight for one place|does not go with|is prefix already"):
        compose(stack, "sft")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["loreft", "direft"])
def test_packed_rows_equal_the_texts_alone(method: str, kind: str, tmp_path: Path) -> None:
    """Values and gradients: each text in a row has a prompt of its own, with its own first and last tokens."""
    generator = torch.Generator().manual_seed(2)
    rows = []
    for length, prompt in ((9, 4), (5, 3), (12, 7), (7, 3), (8, 6)):
        ids = torch.randint(8, VOCAB, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    module: Any = compose(method, "sft")(
        str(save_tiny(kind, tmp_path / "m")), reft={"r": 2, "first": 2, "last": 2, "tied": False}
    )
    module.configure_model()
    assert cannot_pack(module.model) is None
    shake(module)
    alone, packed = Collate(pad=0)(rows), CollatePacked(pad=0)([rows[:2], rows[2:3], rows[3:]])
    flat = CollatePacked(pad=0, flat=True)([rows[:2], rows[2:]])
    expected = gradients(module, alone)
    losses = [float(module.training_step(batch, 0)) for batch in (alone, packed, flat)]
    for batch_, loss in zip((packed, flat), losses[1:], strict=True):
        assert loss == pytest.approx(losses[0], rel=1e-6)
        found = gradients(module, batch_)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert gradient.abs().max() > 0
            assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max())), name
    marks = edited(prompt_of(packed), 2, 2, texts_of(packed["position_ids"]))  # type: ignore[arg-type]
    assert marks[0, :14].tolist() == [1, 1, 2, 2, 0, 0, 0, 0, 0, 1, 2, 2, 0, 0]  # behind it padding, a text of its own


def test_short_prompts_are_refused_before_training(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": "a fairly long question, this one", "completion": "yes"}, {"prompt": "no", "completion": "n"}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = save_tiny("llama", tmp_path / "m", chat=False)

    def fit(**reft: Any) -> Any:
        module: Any = compose("loreft", "sft")(str(folder), reft={"r": 2, **reft})
        rows = Instructions(str(data), val_fraction=0.0, batch_size=2, cache_dir=str(tmp_path / "cache"))
        quick_trainer(tmp_path, max_steps=1).fit(module, rows)
        return module, rows

    with pytest.raises(
        ValueError, match=r"first 20 and last 30 are 50 tokens, and the shortest.*has \d+\. Lower"
    ) as caught:
        fit(first=20, last=30)
    assert "\n" not in str(caught.value)
    assert fit(first=20, last=30, short_prompts="share")[0].trainer.global_step == 1
    _, made = fit(first=2, last=2)
    lengths = made.prompt_lengths()
    assert len(lengths) == 2
    assert min(lengths) < 50 < max(lengths) + 50
    assert lengths == [sum(label == -100 for label in row) for row in made.tables["train"]["labels"]]


@torch.no_grad()
def test_rows_are_routed_with_beams(tmp_path: Path) -> None:
    module: Any = compose("loreft", "sft")(
        str(save_tiny("llama", tmp_path / "m")), reft={"r": 2, "first": 1, "last": 1}
    )
    module.configure_model()
    module.add_adapter("wide", reft=ReFTConfig(r=2, first=4, last=4))
    shake(module)
    module.eval()
    ids = torch.randint(8, VOCAB, (3, 9), generator=torch.Generator().manual_seed(1))
    names = ["wide", None, "default"]
    for cached in (True, False):
        options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": 3, "use_cache": cached}
        with routed(module, names), prompt_is(torch.ones_like(ids)):
            together = module.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        for row, name in enumerate(names):
            one = ids[row : row + 1]
            with adapters(module, *filter(None, [name])), prompt_is(torch.ones_like(one)):
                alone = module.model.generate(input_ids=one, attention_mask=torch.ones_like(one), **options)
            assert torch.equal(together[row], alone[0]), (cached, name)


def test_a_set_added_to_the_model_takes_its_sizes_from_its_place(tmp_path: Path) -> None:
    for method, config in (
        ("loreft", ReFTConfig(r=3, first=1, last=1)),
        ("pfeiffer", PfeifferConfig(bottleneck_size=3)),
        ("compacter", CompacterConfig(reduction_factor=4)),
    ):
        module: Any = compose(method, "sft")(str(save_tiny("llama", tmp_path / method)), **SMALL.get(method, {}))
        module.configure_model()
        add_adapter(module.model, "other", config)
        found = [adapter for _, adapter in named_adapters(module.model) if adapter.tensors("other")]
        for adapter in found:
            mine, first = adapter.configs["other"], adapter.configs["default"]
            assert all(getattr(mine, key) == getattr(first, key) for key in adapter.site)
        shake(module)
        with adapters(module, "other"), torch.no_grad():
            assert module.model(input_ids=torch.full((1, 5), 9)).logits.isfinite().all()


SMALL: dict[str, dict[str, Any]] = {"compacter": {"compacter": {"reduction_factor": 8}}}


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_rotation_stays_orthonormal_in_bfloat16_and_after_a_resume(precision: Any, tmp_path: Path) -> None:
    folder = str(save_tiny("llama", tmp_path / "m"))

    def made() -> Any:
        return compose("loreft", "sft")(
            folder, reft={"r": 4, "first": 1, "last": 1}, lr=1e-2, scheduler="constant", dtype="bfloat16"
        )

    def error(module: Any) -> float:
        matrices = [
            layer.reft_rotation["default"][0] for layer in module.model.modules() if hasattr(layer, "reft_bias")
        ]
        assert {m.numel() for m in matrices} == {4 * 32}
        rotations = [orthonormal(matrix) for matrix in matrices]
        return max(float((q.t() @ q - torch.eye(4)).abs().max()) for q in rotations)

    first = made()
    trainer = quick_trainer(tmp_path, max_steps=20, max_epochs=20, precision=precision)
    trainer.fit(first, loader("sft", 4))
    assert error(first) < 1e-5
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    second = made()
    trainer = quick_trainer(tmp_path, max_steps=40, max_epochs=20, precision=precision)
    trainer.fit(second, loader("sft", 4), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert trainer.global_step == 40
    assert error(second) < 1e-5
    stored = hub.contents(second.save_adapter(tmp_path / "out"))[0][1]
    assert sum(tensor.numel() for tensor in stored.values()) == 2 * (2 * 4 * 32 + 4)
