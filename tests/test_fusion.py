"""AdapterFusion as a method: the two stages, folders, checkpoints, metrics, stacks, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_peft import AdapterFusion, Fuse, Stack, adapters, delete_adapter, disabled, load, routed
from lit_peft.adapter import adapter_names, named_adapters
from lit_peft.blocks import Average
from lit_peft.callbacks.fusion_map import FusionMap, draw
from lit_peft.methods.bottleneck import dropped
from lit_peft.methods.fusion import by_name
from lit_peft.methods.fusion_site import FusionBottleneck, FusionConfig
from lit_peft.zoo import compose
from tests.models import save_tiny
from tests.test_methods import batch, gradients, loader, outputs, quick_trainer, same, shake

NAMES = ["a", "b"]


def adapter_set(method: str = "pfeiffer.Pfeiffer", **settings: Any) -> dict[str, Any]:
    own = {"bottleneck_size": 4, **settings}
    return {"methods": [f"lit_peft.methods.{method}"], "bottleneck": own}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("fusion") / "llama")


@pytest.fixture(scope="module")
def trained(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Stage one: two Pfeiffer adapters, each saved as a folder of its own."""
    home, found = tmp_path_factory.mktemp("stage"), {}
    for seed, name in enumerate(NAMES):
        module: Any = compose("pfeiffer", "sft")(str(llama), bottleneck={"bottleneck_size": 3 + seed})
        module.configure_model()
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape), alpha=0.3)
        found[name] = str(module.save_adapter(home / name / "adapter"))
    return found


def stage_two(folder: Path, given: Any, **more: Any) -> Any:
    torch.manual_seed(5)
    module: Any = compose("fusion", "sft")(str(folder), fusion={"adapters": given}, **more)
    module.configure_model()
    return module


def test_two_stages_from_folders_saved_and_loaded(llama: Path, trained: dict[str, str], tmp_path: Path) -> None:
    module = stage_two(llama, trained, lr=1e-2)
    training = {n for n, p in module.named_parameters() if p.requires_grad}
    assert training
    assert all("fusion_" in name for name in training)
    before = {n: p.clone() for n, p in module.named_parameters()}
    trainer = quick_trainer(tmp_path, max_steps=3)
    trainer.fit(module, loader("sft", 3))
    moved = {n for n, p in module.named_parameters() if not torch.equal(p, before[n])}
    assert moved == training
    rows = batch("sft")
    expected = outputs(module, rows)
    with adapters(module, Fuse("b", "a")):
        assert torch.equal(outputs(module, rows), expected)
    # a folder by itself, with the adapters inside
    module.save_adapter(tmp_path / "fused")
    again = load(tmp_path / "fused", device="cpu")
    assert torch.equal(outputs(again, rows), expected)
    assert sorted(again.named) == NAMES
    for name in NAMES:  # each of them alone is what its folder holds
        alone: Any = compose("pfeiffer", "sft")(str(llama), adapter=trained[name])
        alone.configure_model()
        with adapters(again, name):
            assert same(outputs(again, rows), outputs(alone, rows))
        again.save_adapter(tmp_path / name, name)
    # a checkpoint by itself, without the folders of stage one
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    content = torch.load(tmp_path / "run.ckpt", weights_only=True)
    content["hyper_parameters"]["fusion"]["adapters"] = {name: "gone" for name in NAMES}
    torch.save(content, tmp_path / "run.ckpt")
    assert torch.equal(outputs(load(tmp_path / "run.ckpt", device="cpu"), rows), expected)


def test_folders_get_names(tmp_path: Path, llama: Path, trained: dict[str, str]) -> None:
    assert by_name(list(trained.values()), []) == trained
    module = stage_two(llama, list(trained.values()))
    site = next(adapter for _, adapter in named_adapters(module.model) if isinstance(adapter, FusionBottleneck))
    assert site.configs["default"].names == NAMES


def test_rows_bases_and_blocks(llama: Path, trained: dict[str, str]) -> None:
    module = stage_two(llama, trained)
    shake(module)
    rows = batch("sft")
    inputs = {key: rows[key] for key in ("input_ids", "attention_mask")}
    base: Any = compose("full", "sft")(str(llama))
    base.configure_model()

    def logits(*chosen: Any) -> Tensor:
        module.eval()
        with torch.no_grad(), adapters(module, *chosen):
            found: Tensor = module.model(**inputs).logits
        return found

    wanted = ["default", None, "a", Stack("a", Fuse("a", "b"))]
    module.eval()
    with torch.no_grad(), routed(module, wanted):
        mixed = module.model(**inputs).logits
    for row, entry in enumerate(wanted):
        alone = logits(entry) if entry else base.model.eval()(**inputs).logits
        assert same(mixed[row], alone[row]), entry
    with disabled(module):
        assert torch.equal(outputs(module, rows), outputs(base, rows))
    half = logits(Average("a", Fuse("a", "b")))
    assert not same(half, logits("a"), 1e-4)


def test_metrics_the_picture_and_the_penalty(llama: Path, trained: dict[str, str], tmp_path: Path) -> None:
    module = stage_two(llama, trained)
    plain = stage_two(llama, trained)
    plain.fusion = FusionConfig(adapters=trained, penalty=0.0)
    shake(module)
    shake(plain)
    rows = batch("sft")
    one, other = gradients(module, rows), gradients(plain, rows)
    counted = float(module.counted)
    for name, parameter in module.named_parameters():
        if "fusion_value" in name:
            assert same(one[name] - other[name], 2 * 0.01 * counted * parameter.detach(), 1e-4)
    trainer = quick_trainer(tmp_path, max_steps=2)
    trainer.fit(module, loader("sft", 2), loader("sft", 1))
    shares = [float(trainer.callback_metrics[f"{stage}_fusion_{name}"]) for stage in ("train", "val") for name in NAMES]
    assert shares[0] + shares[1] == pytest.approx(1, abs=1e-5)
    assert shares[2] + shares[3] == pytest.approx(1, abs=1e-5)
    (callback,) = [c for c in trainer.callbacks if isinstance(c, FusionMap)]  # type: ignore[attr-defined]
    layers = callback.shares()["default"]
    assert len(layers) == 2
    assert sum(share[0] for share in layers.values()) / 2 == pytest.approx(shares[2], abs=1e-5)
    assert (tmp_path / "fusion.png").stat().st_size > 5000
    draw(tmp_path / "b.png", "t", ["x", "y"], {"enc.0.att.base": [0.2, 0.8], "enc.0.mlp": [1.0, 0.0], "head": [0, 1]})
    assert (tmp_path / "b.png").is_file()


def test_copies_and_deletion(llama: Path, trained: dict[str, str]) -> None:
    module = stage_two(llama, trained)
    rows = batch("sft")
    twin = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.ndim == 2 and parameter.requires_grad:
                parameter.add_(0.1)
    assert not same(outputs(twin, rows), outputs(module, rows), 1e-4)
    site = next(a for _, a in named_adapters(twin.model) if isinstance(a, FusionBottleneck))
    assert site.fused in twin.model.modules()
    with pytest.raises(ValueError, match=r"'a' is part of the fusion 'default'\. Activate or delete that first"):
        delete_adapter(module, "a")


def test_a_second_fusion_beside_the_first(llama: Path, trained: dict[str, str], tmp_path: Path) -> None:
    module = stage_two(llama, trained)
    module.add_adapter("both", fusion={"adapters": NAMES})
    shake(module)
    rows = batch("sft")
    with adapters(module, "both"):
        expected = outputs(module, rows)
    assert not same(expected, outputs(module, rows), 1e-4)
    with pytest.raises(TypeError, match="could be any of"), adapters(module, Fuse("a", "b")):
        pass
    module.save_adapter(tmp_path / "both", "both")
    module.delete_adapter("both")
    assert torch.equal(outputs(load(tmp_path / "both", device="cpu"), rows), expected)
    module.add_adapter("again", folder=tmp_path / "both")
    with adapters(module, "again"):
        assert torch.equal(outputs(module, rows), expected)
    other = stage_two(llama, trained)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "bottleneck_up.a" in name:
                parameter.add_(1.0)
    with pytest.raises(ValueError, match="another adapter 'a'"):
        other.add_adapter("again", folder=tmp_path / "both")
    assert "again" not in other.named
    assert all("again" not in adapter.configs for _, adapter in named_adapters(other.model))


def test_beside_a_method_that_does_not_train_it(llama: Path, trained: dict[str, str]) -> None:
    """The penalty and the picture are the module's: another one says so, and is left as it was."""
    module: Any = compose("pfeiffer", "sft")(str(llama), bottleneck={"bottleneck_size": 4})
    module.configure_model()
    before = {n: (id(p), p.requires_grad) for n, p in module.named_parameters()}
    with pytest.raises(TypeError, match=r"AdapterFusion takes part in the training.*class Mine\(AdapterFusion, "):
        module.add_adapter("both", AdapterFusion, fusion={"adapters": trained})
    assert {n: (id(p), p.requires_grad) for n, p in module.named_parameters()} == before
    assert module.named == {}
    assert adapter_names(module.model) == ["default"]


@pytest.mark.parametrize("stack", ["fusion+lora", "lora+fusion"])
def test_with_lora_on_the_same_layers(stack: str, tmp_path: Path) -> None:
    """In BERT a Houlsby adapter sits around a linear layer, where LoRA sits too."""
    folder = save_tiny("bert", tmp_path / "bert", task="classification")
    named = {name: adapter_set("houlsby.Houlsby", scale=3000.0) for name in NAMES}
    settings: dict[str, Any] = {"labels": ["a", "b", "c"], "lora": {"r": 2}}
    given = {"fusion": {"adapters": NAMES}, "named": named}
    module: Any = compose(stack, "classification")(str(folder), **settings, **given)
    module.configure_model()
    shake(module)
    rows = batch("classification")
    found = gradients(module, rows)
    assert {"lora_a", "fusion_query"} <= {piece for name in found for piece in name.split(".")}
    assert not any("bottleneck" in name for name in found)
    module.save_adapter(tmp_path / "saved")
    again: Any = compose(stack, "classification")(str(folder), adapter=str(tmp_path / "saved"), **settings)
    again.configure_model()
    expected = outputs(module, rows)
    assert same(outputs(again, rows), expected)
    with dropped(9):  # AdapterDrop leaves fused adapters out too
        assert not same(outputs(module, rows), expected, 1e-4)


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        (None, ValueError, "names no adapters, and attention needs two or more"),
        ({"a": "FIRST"}, ValueError, "names only 'a', and attention needs two or more"),
        (["a", "nowhere"], ValueError, "There is no adapter 'nowhere' to fuse"),
        ({"a": "FIRST", "b": "absent/folder"}, FileNotFoundError, "absent/folder is no adapter folder"),
        ({"a": "FIRST", "default": "SECOND"}, ValueError, "'default' is the fusion's own name"),
        ({"a": "FIRST", "b": "LORA"}, TypeError, "holds a LORA adapter, which cannot be fused"),
        ({"a": "FIRST", "h": "HOULSBY"}, ValueError, "'a' and 'h' sit at different places"),
        (["a", "a"], ValueError, "has 'a' twice"),
    ],
)
def test_what_cannot_be_fused(
    given: Any, kind: type[Exception], message: str, llama: Path, trained: dict[str, str], tmp_path: Path
) -> None:
    words = {"FIRST": trained["a"], "SECOND": trained["b"]}
    for word, method, settings in (("LORA", "lora", {"lora": {"r": 2}}), ("HOULSBY", "houlsby", {})):
        if isinstance(given, dict) and word in given.values():
            module: Any = compose(method, "sft")(str(llama), **settings)
            module.configure_model()
            words[word] = str(module.save_adapter(tmp_path / word))
    given = {k: words.get(v, v) for k, v in given.items()} if isinstance(given, dict) else given
    with pytest.raises(kind, match=message) as caught:
        stage_two(llama, given, named={"a": adapter_set()} if isinstance(given, list) else None)
    assert "\n" not in str(caught.value)


def test_bad_penalty() -> None:
    with pytest.raises(ValueError, match=r"fusion\.penalty is -1"):
        FusionConfig(penalty=-1)


def test_replays_see_the_fusion_of_their_call(llama: Path, trained: dict[str, str]) -> None:
    """Houlsby adapters lie inside the layers that are run again in the backward pass."""
    given = {"named": {name: adapter_set("houlsby.Houlsby", scale=3000.0) for name in NAMES}}
    found = []
    for again in (False, True):
        module = stage_two(llama, NAMES, gradient_checkpointing=again, **given)
        shake(module)
        module.train()
        rows = batch("sft")
        inputs = {key: rows[key] for key in ("input_ids", "attention_mask")}
        with adapters(module, Fuse("a", "b")):
            one = module.model(**inputs).logits.logsumexp(-1).sum()
        with adapters(module, "a"):
            other = module.model(**inputs).logits.logsumexp(-1).sum()
        (one + 2 * other).backward()
        found.append({n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert any("fusion_query" in name for name in found[0])
    for name, gradient in found[0].items():
        assert same(found[1][name], gradient), name
