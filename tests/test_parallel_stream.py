"""Parallel adapters that read the residual stream: what they compute is compared in tests/test_foreign.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lit_peft.zoo import compose
from tests.models import save_tiny
from tests.test_methods import batch, gradients, shake


def test_goes_with_gradient_checkpointing(tmp_path: Path) -> None:
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        module: Any = compose("parallel", "sft")(
            str(save_tiny("llama", tmp_path / str(checkpointing))),
            bottleneck={"bottleneck_size": 4, "reads_stream": True},
            gradient_checkpointing=checkpointing,
        )
        module.configure_model()
        shake(module)
        found.append(gradients(module, batch("sft")))
    assert found[0].keys() == found[1].keys()
    assert all(torch.allclose(found[1][name], gradient, atol=1e-5) for name, gradient in found[0].items())
    assert all(gradient.any() for gradient in found[0].values())


def test_layers_with_other_norms_are_refused(tmp_path: Path) -> None:
    settings = {"bottleneck_size": 4, "reads_stream": True}
    module: Any = compose("parallel", "sft")(str(save_tiny("gemma", tmp_path / "m")), bottleneck=settings)
    with pytest.raises(ValueError, match=r"two norms, and model.layers.0 of Gemma3ForCausalLM has 4"):
        module.configure_model()
