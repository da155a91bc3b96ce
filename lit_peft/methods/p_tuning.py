"""P-tuning (Liu et al. 2021, https://arxiv.org/abs/2103.10385): a prompt that comes out of a small network.

    P = MLP(biLSTM(E)),    E (p, d)

The LSTM has two layers of width d / 2 in each direction, the MLP is d -> d -> d with a ReLU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lit_peft.adapter import innermost
from lit_peft.methods.prompt import PromptBackbone, PromptConfig, PromptTuning


@dataclass(frozen=True, kw_only=True)
class PTuningConfig(PromptConfig):
    """Settings of P-tuning.

    Args:
        num_virtual_tokens: length p of the prompt.
        init: start E from `random` numbers, from sampled embeddings (`vocabulary`), or from those of a `text`.
        init_text: the text; repeated or cut to p tokens.
        after_bos: put the prompt behind the first token; None: for encoders.
        encoder: the network that the prompt comes out of: `lstm`, with the MLP behind it, or the `mlp` alone.
        encoder_dropout: dropout between the layers of the LSTM.

    Raises:
        ValueError: if a value is out of range.
    """

    init: Literal["random", "vocabulary", "text"] = "random"
    encoder: Literal["lstm", "mlp"] = "lstm"
    encoder_dropout: float = 0.0

    default_lr: ClassVar[float] = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.encoder_dropout < 1:
            raise ValueError(f"prompt.encoder_dropout is {self.encoder_dropout}; it must be at least 0 and below 1.")


class PTuningBackbone(PromptBackbone):
    """Puts the outputs of a prompt encoder into the input of a stack of layers."""

    peft_type: ClassVar[str] = "LIT_P_TUNING"

    def add(self, name: str, config: PTuningConfig) -> None:  # type: ignore[override]
        """Make E (p, d) and the encoder of another named set."""
        super().add(name, config)
        if "prompt_encoder" not in self._modules:
            self.prompt_encoder = nn.ModuleDict()
        d = self.hidden_size
        if config.encoder == "lstm" and d % 2:
            raise ValueError(f"P-tuning's LSTM needs an even hidden size, and this model has {d}. Use encoder: mlp.")
        parts = nn.ModuleDict()
        device = next(innermost(self.base).parameters()).device
        with torch.device(device):
            if config.encoder == "lstm":
                parts["lstm"] = nn.LSTM(
                    d, d // 2, num_layers=2, dropout=config.encoder_dropout, bidirectional=True, batch_first=True
                )
            parts["mlp"] = nn.Sequential(nn.Linear(d, d), nn.ReLU(), nn.Linear(d, d))
        self.prompt_encoder[name] = parts

    def rows(self, name: str) -> Tensor:
        """Return the prompt of one named set, (p, d)."""
        parts: Any = self.prompt_encoder[name]
        rows = self.prompt_embedding[name]
        if "lstm" in parts:
            rows = parts["lstm"](rows[None])[0][0]
        out: Tensor = parts["mlp"](rows)
        return out

    def remove(self, name: str) -> None:
        """Delete one named set."""
        super().remove(name)
        del self.prompt_encoder[name]

    def tensors(self, name: str = "default") -> dict[str, Tensor]:
        """Return E and the encoder's weights."""
        encoder = {
            f"prompt_encoder.{key}": value.detach() for key, value in self.prompt_encoder[name].named_parameters()
        }
        return {"prompt_embedding": self.prompt_embedding[name].detach(), **encoder}


class PTuning(PromptTuning):
    """P-tuning on the task's model.

    Args:
        prompt: length of the prompt, and its encoder.

    Example:
        >>> from lit_peft import PTuning, SFT
        >>> class Mine(PTuning, SFT): ...
    """

    method = "p_tuning"
    backbone_class: ClassVar[type[PromptBackbone]] = PTuningBackbone

    def __init__(self, *args: Any, prompt: PTuningConfig = PTuningConfig(), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.prompt = self.configured(PTuningConfig, "prompt", prompt)
