"""What AdapterRestart refuses, before anything is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from lit_peft import LoRA, LoRAConfig, ReLoRA, place
from lit_peft.callbacks.adapter_restart import AdapterRestart
from lit_peft.methods.bitfit import BitFitBias, BitFitConfig
from lit_peft.methods.relora import ReLoRALinear
from lit_peft.named import add_adapter
from lit_peft.rewriting import restartable
from lit_peft.zoo import compose
from tests.test_adapter_restart import Exponential, run


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"every": 0}, "every is 0"),
        ({"warmup": -1}, "warmup is -1"),
        ({"every": 5, "warmup": 5}, "must be below every, which is 5"),
    ],
)
def test_numbers_out_of_range(settings: dict[str, int], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        AdapterRestart(**settings)


def test_what_cannot_be_restarted_is_named_before_training(tmp_path: Path) -> None:
    class Plain(LoRA, Exponential):
        """LoRA that has no restart."""

    with pytest.raises(TypeError, match=r"Nothing here can be restarted \(LoRALinear\). Use --method relora"):
        run(Plain("none", lora={"r": 1}), tmp_path, 2, AdapterRestart(every=1, warmup=0))
    with pytest.raises(ValueError, match="ReLoRA restarts plain LoRA only"):
        compose("relora", "sft")("none", lora={"use_dora": True})

    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    def around(base: nn.Module) -> ReLoRALinear:
        return ReLoRALinear(base, LoRAConfig(r=1))

    stacked = model()
    place(stacked, ["0"], lambda base: BitFitBias(base, BitFitConfig()))
    place(stacked, ["0"], around)
    with pytest.raises(TypeError, match=r"0 has a BitFitBias below .* last in the stack"):
        restartable(stacked)
    tied = model()
    tied[1].weight = tied[0].weight
    place(tied, ["0"], around)
    with pytest.raises(TypeError, match="tied to 0"):
        restartable(tied)
    two = model()
    place(two, ["0"], around)
    add_adapter(two, "other")
    with pytest.raises(TypeError, match=r"below all of \['default', 'other'\]"):
        restartable(two)
    bnb = pytest.importorskip("bitsandbytes")
    quantised = nn.Sequential(bnb.nn.Linear4bit(64, 64)).to("cpu")
    place(quantised, ["0"], around)
    with pytest.raises(TypeError, match=r"cannot fold into 0, which is quantised. Load the base unquantised"):
        restartable(quantised)


def test_a_run_without_end_needs_a_number(tmp_path: Path) -> None:
    class Endless(ReLoRA, Exponential):
        """Trains until it is stopped."""

    module = Endless("none", lora={"r": 1})
    with pytest.raises(ValueError, match=r"this run has no end\. Set every"):
        run(module, tmp_path, -1)


def test_a_warmup_as_long_as_a_cycle(tmp_path: Path) -> None:
    class Slow(ReLoRA, Exponential):
        """Would never reach its learning rate."""

    with pytest.raises(ValueError, match=r"warmup is 30; it must be below the 20 steps"):
        run(Slow("none", lora={"r": 1}, restart_warmup=30), tmp_path, 40)
