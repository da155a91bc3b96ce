"""`lit-peft inspect` says what is in a file, without the base model."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_peft import activate
from lit_peft import backbone as backbones
from lit_peft.adapter import Adapter, named_adapters
from lit_peft.methods.lora import LoRALinear
from lit_peft.verbs import inspect
from lit_peft.zoo import compose
from tests.models import save_tiny
from tests.test_restore import built, checkpoint
from tests.tiny_adapted import shake


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("bases") / "llama")


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Inspect a path and return the screen; loading a model is forbidden meanwhile."""
    monkeypatch.setenv("COLUMNS", "100")

    def show(path: Path) -> str:
        def forbidden(*args: object, **kwargs: object) -> None:
            raise AssertionError("inspect loaded a model")

        with monkeypatch.context() as patch:
            patch.setattr(backbones, "load_model", forbidden)
            patch.setattr(backbones, "load_config", forbidden)
            capsys.readouterr()
            inspect.run(str(path))
        return capsys.readouterr().out

    return show


def norm_of(screen: str, layer: int, column: str) -> float:
    lines = [line.split() for line in screen.splitlines()]
    head = next(line for line in lines if line[:1] == ["layer"] and column in line)
    return float(next(line for line in lines if line[:1] == [str(layer)])[head.index(column)])


def test_checkpoint_and_folder_agree(tmp_path: Path, base: Path, shown) -> None:  # type: ignore[no-untyped-def]
    module = built(compose("lora", "sft"), base, lora={"r": 4, "alpha": 12, "target_modules": ["q_proj", "down_proj"]})
    module.save_adapter(tmp_path / "a")
    (tmp_path / "run").mkdir()
    checkpoint(module, tmp_path / "run" / "best.ckpt")
    shutil.move(base, base.with_name("away"))  # only the files are read
    try:
        screens = [shown(tmp_path / "a"), shown(tmp_path / "run")]
    finally:
        shutil.move(base.with_name("away"), base)
    count = 4 * (32 + 32 + 64 + 32) * 2
    layer: LoRALinear = module.model.get_submodule("model.layers.1.self_attn.q_proj")
    for screen in screens:
        assert f"{count:,} parameters (float32); lora: 4 layers" in screen
        assert "q_proj 2/2" in screen
        assert "down_proj 2/2" in screen
        assert "sha " in screen
        assert norm_of(screen, 1, "q_proj") == pytest.approx(float(layer.delta("default").detach().norm()), rel=1e-2)
    assert "adapter" in screens[0]
    assert "checkpoint" in screens[1]
    assert "epoch 0, step 0" in screens[1]
    assert "lit_peft.zoo.LoRASFT" in screens[1]


def test_subset_of_layers(tmp_path: Path, base: Path, shown) -> None:  # type: ignore[no-untyped-def]
    module = built(compose("lora", "sft"), base, lora={"target_modules": r".*\.1\..*v_proj"})
    module.save_adapter(tmp_path / "a")
    assert "v_proj 1/2" in shown(tmp_path / "a")


def test_stack_and_in_place(tmp_path: Path, base: Path, shown) -> None:  # type: ignore[no-untyped-def]
    built(compose("lora+bitfit", "sft"), base).save_adapter(tmp_path / "stack")
    screen = shown(tmp_path / "stack")
    assert "bitfit: 14 layers; lora: 14 layers" in screen
    built(compose("freeze", "sft"), base, freeze={"last_layers": 1}).save_adapter(tmp_path / "freeze")
    screen = shown(tmp_path / "freeze")
    assert "trained in place" in screen
    assert "model.layers.1  " in screen
    assert "model.layers.0  " not in screen


def test_pefts_folder_even_of_a_method_unknown_here(tmp_path: Path, base: Path, shown) -> None:  # type: ignore[no-untyped-def]
    model = AutoModelForCausalLM.from_pretrained(base)
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2)).save_pretrained(tmp_path / "a")
    screen = shown(tmp_path / "a")
    assert "LlamaForCausalLM" in screen
    assert "peft 0.21.2" in screen
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "peft_type": "WARP"}))
    assert "WARP, which is not known here" in " ".join(shown(tmp_path / "a").split())


def test_named_sets_are_told_apart(tmp_path: Path, base: Path, shown) -> None:  # type: ignore[no-untyped-def]
    module = built(compose("lora+ia3", "sft"), base, lora={"r": 4, "target_modules": ["q_proj"]})
    module.add_adapter("small", lora={"r": 2, "alpha": 6, "target_modules": ["q_proj", "v_proj"]}, train=False)
    module.add_adapter("scaled", ia3={})
    shake(module)
    activate(module, "small", "scaled")
    with torch.no_grad():
        for name, parameter in module.model.named_parameters():
            if name.endswith("lora_b.small"):
                parameter.normal_()
    screen = shown(checkpoint(module, tmp_path / "a.ckpt"))
    assert "adapter small" in screen
    assert "lora: r 2; alpha 6; dropout 0.0; target_modules q_proj, v_proj" in screen
    assert "not trained" in screen
    assert "acts" in screen
    assert "small, scaled" in screen
    assert "lora: 2 layers" in screen
    assert "lora small: 4 layers" in screen
    assert "ia3 scaled: 6 layers" in screen
    below = screen.partition("lora small in")[2]
    layer = next(
        a for p, a in named_adapters(module.model) if p.endswith("1.self_attn.v_proj") and "small" in _names(a)
    )
    while not isinstance(layer, LoRALinear):
        layer = layer.base
    assert norm_of(below, 1, "v_proj") == pytest.approx(float(layer.delta("small").detach().norm()), rel=1e-2)
    factors = module.model.get_submodule("model.layers.1.mlp.down_proj").ia3_l["scaled"].detach()
    below = screen.partition("ia3 scaled in")[2]
    assert norm_of(below, 1, "down_proj") == pytest.approx(float((factors - 1).norm()), rel=1e-2)


def _names(adapter: Adapter | None) -> set[str]:
    """All sets of an adapter and of those below it."""
    found: set[str] = set()
    while isinstance(adapter, Adapter):
        found |= set(adapter.configs)
        adapter = adapter.base  # type: ignore[assignment]
    return found


def test_adalora_of_peft(tmp_path: Path, base: Path, shown) -> None:  # type: ignore[no-untyped-def]
    config = peft.AdaLoraConfig(target_modules=["q_proj"], init_r=4, target_r=2, total_step=10, lora_alpha=8)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    shake(model, size=0.5)
    model.save_pretrained(tmp_path / "a")
    layer = model.base_model.model.model.layers[1].self_attn.q_proj
    expected = float(layer.get_delta_weight("default").detach().norm())
    assert norm_of(shown(tmp_path / "a"), 1, "q_proj") == pytest.approx(expected, rel=1e-2)


def test_ia3_of_peft(tmp_path: Path, base: Path, shown) -> None:  # type: ignore[no-untyped-def]
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), peft.IA3Config())
    model.save_pretrained(tmp_path / "a")
    screen = shown(tmp_path / "a")
    assert "ia3: 6 layers" in screen
    assert norm_of(screen, 1, "k_proj") == 0.0 if "\n1 " in screen else "0-1" in screen


def test_whole_model(base: Path, shown) -> None:  # type: ignore[no-untyped-def]
    number = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).parameters())
    assert f"LlamaForCausalLM, {number:,} parameters, no adapter" in shown(base)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="There is nothing at"):
        inspect.run(str(tmp_path / "gone"))
    with pytest.raises(FileNotFoundError, match="holds no checkpoint, adapter or model"):
        inspect.run(str(tmp_path))


@pytest.mark.parametrize(
    ("method", "settings", "wanted"),
    [
        ("p_tuning", {}, ["prompt: 1 layers", "prompt outside"]),
        ("loreft", {}, ["reft in model.layers: layer 2/2."]),
        ("houlsby", {"bottleneck": {"train_norms": True}}, ["norm in model.layers: input_layernorm 2/2, post_att"]),
        ("unipelt", {}, ["lora in model.layers: q_proj 2/2, v_proj 2/2.", "bottleneck in model.layers: layer 2/2"]),
    ],
)
def test_one_table_for_a_method(  # type: ignore[no-untyped-def]
    method: str, settings: dict[str, object], wanted: list[str], tmp_path: Path, base: Path, shown
) -> None:
    module = built(compose(method, "sft"), base, **settings)
    checkpoint(module, tmp_path / "best.ckpt")
    module.save_adapter(tmp_path / "a")
    for path in (tmp_path / "best.ckpt", tmp_path / "a"):
        screen = shown(path)
        for text in wanted:
            assert text in screen or ("prompt" in text and path.name == "a"), screen
        assert "trained in place" not in screen
        assert ".default" not in screen
        assert " weight" not in screen.partition("weights ")[2]
