"""Folders of other libraries that have no equal here, or are damaged: one line that names the way out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_peft import load
from tests import foreign_folders as made
from tests.foreign_folders import BOTTLENECK, COMPACTER, PREFIX, REFT, D, base_of
from tests.models import save_tiny

WRONG = 9  # a width that the bottlenecks do not have


def test_mean_gates_on_a_decoder_are_refused(tmp_path: Path) -> None:
    base, config = base_of("llama", tmp_path), {**BOTTLENECK, "use_gating": True}
    folder = made.write_adapters(tmp_path / "a", "llama", base, config, made.bottleneck("llama", config))
    with pytest.raises(ValueError, match=r"a token sees those behind it.*--method unipelt"):
        load(folder, device="cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ln_after": True}, "ln_after=True"),
        ({"inv_adapter": "nice"}, "inv_adapter='nice'"),
        ({"mh_adapter": True}, "places bottlenecks in a way"),
        ({**COMPACTER, "mh_adapter": False, "original_ln_before": True}, "places Compacter in a way"),
        ({"architecture": "prompt_tuning"}, "holds prompt_tuning"),
        ({"architecture": "lora"}, "use_gating"),
        ({**PREFIX, "leave_out": [1]}, "leave_out"),
        ({**PREFIX, "use_gating": True, "shared_gating": False}, "shared_gating"),
        ({**REFT, "orthogonality": False}, "subtract_projection"),
        ({**REFT, "non_linearity": "relu"}, "non_linearity"),
        ({"non_linearity": "zelu"}, "unknown"),
        ({"leave_out": [0]}, "no place"),
    ],
    ids=str,
)
def test_settings_without_an_equal_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    base = base_of("llama", tmp_path)
    config = {**BOTTLENECK, **change} if "architecture" not in change else {**change}
    if config.get("architecture") == "lora":
        config["use_gating"] = False
    tensors = made.bottleneck("llama", BOTTLENECK)
    if config.get("architecture") == "reft":
        tensors, _ = made.reft("llama", config)
    folder = made.write_adapters(tmp_path / "a", "llama", base, config, tensors)
    with pytest.raises(ValueError, match=message) as caught:
        load(folder, task="sft", device="cpu")
    assert "\n" not in str(caught.value)


def test_wrong_and_missing_tensors(tmp_path: Path) -> None:
    base, config = base_of("llama", tmp_path), {**BOTTLENECK}
    whole = made.bottleneck("llama", config)
    some = next(iter(whole))
    for tensors, message in (
        ({key: value for key, value in whole.items() if key != some}, "lacks"),
        ({**whole, "model.layers.0.strange": torch.ones(1)}, "does not explain"),
        ({**whole, f"{some}.more": torch.ones(1)}, "which none here has"),
        ({**whole, some.replace("layers.0", "layers.7"): whole[some]}, r"layer_sum\.7"),
        ({**whole, some: torch.ones(WRONG, D)}, "Shapes differ"),
    ):
        folder = made.write_adapters(tmp_path / "a", "llama", base, config, tensors)
        with pytest.raises(ValueError, match=message):
            load(folder, device="cpu")
    (folder / "pytorch_adapter.bin").write_bytes(b"no pickle")
    with pytest.raises(ValueError, match="damaged"):
        load(folder, device="cpu")
    torch.save({"a": Path("x")}, folder / "pytorch_adapter.bin")
    with pytest.raises(ValueError, match="could run code"):
        load(folder, device="cpu")
    (folder / "pytorch_adapter.bin").unlink()
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load(folder, device="cpu")
    t5 = save_tiny("t5", tmp_path / "t5")
    folder = made.write_adapters(tmp_path / "a", "llama", t5, config, whole)
    with pytest.raises(ValueError, match="encoder-decoder"):
        load(folder, task="sft", device="cpu")


def test_pyreft_folders_that_cannot_be_read(tmp_path: Path) -> None:
    base = base_of("llama", tmp_path)
    folder = tmp_path / "a"

    def note(**changes: Any) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    def refused(message: str, kind: type[Exception] = ValueError) -> None:
        with pytest.raises(kind, match=message) as caught:
            load(folder, task="sft", backbone=str(base), device="cpu")
        assert "\n" not in str(caught.value)

    made.write_pyreft(folder, "llama", "LoreftIntervention")
    note(intervention_types=["<class 'pyreft.interventions.ConsreftIntervention'>"] * 2)
    refused("ConsreftIntervention")
    note(intervention_types=["__import__('os').system('true')"] * 2)
    refused("names a class as")
    note(intervention_types=["<class 'pyreft.interventions.LoreftIntervention'>"] * 2, sorted_keys=["a#0"])
    refused("lists 2 edits and 1 files")
    made.write_pyreft(folder, "llama", "LoreftIntervention")
    note(sorted_keys=["layer_0_comp_mlp_output_unit_pos_nunit_1#0"] * 2)
    refused("behind whole layers")
    made.write_pyreft(folder, "llama", "LoreftIntervention")
    file = folder / "intkey_layer_1_comp_block_output_unit_pos_nunit_1#0.bin"
    torch.save({"weight": torch.ones(3, D)}, file)
    refused("lacks weight or bias")
    torch.save({"weight": Path("x")}, file)
    refused("could run code")
    file.unlink()
    refused("does not exist", FileNotFoundError)
    made.write_pyreft(folder, "llama", "LoreftIntervention")
    with pytest.raises(ValueError, match="Pass backbone=NAME"):
        load(folder, task="sft", device="cpu")
