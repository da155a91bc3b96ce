"""P-tuning (Liu et al. 2021, https://arxiv.org/abs/2103.10385): a prompt that comes out of a small network.

    P = MLP(biLSTM(E)),    E (p, d)

The LSTM has two layers of width h in each direction, with 2 h = d as a rule; the MLP is 2 h -> 2 h -> d with a ReLU.
What is read in the end is P alone. With `tune_base` the model itself is trained too, as in the paper's second half.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lit_peft.adapter import innermost, named_adapters, remember, scope_of
from lit_peft.methods.prompt import PromptConfig, PromptTuning
from lit_peft.methods.prompt_adapters import PromptBackbone
from lit_peft.targets import KEYS, OWN
from lit_peft.virtual_tokens import TOKENS

NETWORK = "prompt_encoder."


@dataclass(frozen=True, kw_only=True)
class PTuningConfig(PromptConfig):
    """Settings of P-tuning.

    Args:
        num_virtual_tokens: length p of the prompt.
        init: start E from `random` numbers, from sampled embeddings (`vocabulary`), or from those of a `text`.
        init_text: the text; repeated or cut to p tokens.
        after_bos: put the prompt behind the first token; None: for encoders.
        template: put it inside of the text instead, at pseudo tokens: `[P][P]{text} It was [P]`. `{prompt:3}` is
            three of them, `{prompt}` all that are left. In a conversation the first question is the text.
        encoder: the network that the prompt comes out of: `lstm`, with an MLP of two layers behind it, the `mlp`
            alone, or `none`: the rows themselves, as they are read from a folder of HF PEFT.
        encoder_hidden_size: width h of the LSTM in each direction, or of the MLP alone; None: d / 2, or d.
        encoder_num_layers: layers of the LSTM, or linear layers of the MLP alone (HF PEFT has 3).
        encoder_dropout: dropout between the layers of the LSTM.
        tune_base: train the model's own weights too, at a learning rate of 1e-5 unless `lr` is set.
        keep_base: under `tune_base`, keep a copy of them in CPU memory, so that `disabled` can give the base back.

    Raises:
        ValueError: if a value is out of range.
    """

    init: Literal["random", "vocabulary", "text"] = "random"
    encoder: Literal["lstm", "mlp", "none"] = "lstm"
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0
    tune_base: bool = False
    keep_base: bool = False

    default_lr: ClassVar[float] = 1e-3
    base_lr: ClassVar[float] = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.encoder not in ("lstm", "mlp", "none"):
            raise ValueError(f"prompt.encoder is {self.encoder!r}; it must be 'lstm', 'mlp' or 'none'.")
        if not 0 <= self.encoder_dropout < 1:
            raise ValueError(f"prompt.encoder_dropout is {self.encoder_dropout}; it must be at least 0 and below 1.")
        if self.encoder_num_layers < 1:
            raise ValueError(f"prompt.encoder_num_layers is {self.encoder_num_layers}; it must be 1 or more.")
        if self.encoder_hidden_size is not None and self.encoder_hidden_size < 1:
            raise ValueError(f"prompt.encoder_hidden_size is {self.encoder_hidden_size}; it must be 1 or more.")
        if self.keep_base and not self.tune_base:
            raise ValueError("prompt.keep_base keeps what prompt.tune_base changes. Set both, or neither.")

    def to_peft(self) -> dict[str, Any]:
        """Return the settings as in `adapter_config.json` of HF PEFT."""
        return {
            "encoder_reparameterization_type": "LSTM" if self.encoder == "lstm" else "MLP",
            "encoder_hidden_size": self.encoder_hidden_size,
            "encoder_num_layers": self.encoder_num_layers if self.encoder == "lstm" else 2,
            "encoder_dropout": self.encoder_dropout,
        }


class PromptEncoder(nn.ModuleDict):
    """The network of P-tuning: (p, d) -> (p, d)."""

    def __init__(self, d: int, config: PTuningConfig) -> None:
        super().__init__()
        if config.encoder == "lstm":
            if config.encoder_hidden_size is None and d % 2:
                raise ValueError(
                    f"P-tuning's LSTM takes half the hidden size, and this model has {d}. Set encoder_hidden_size."
                )
            h = config.encoder_hidden_size or d // 2
            self["lstm"] = nn.LSTM(
                d,
                h,
                num_layers=config.encoder_num_layers,
                dropout=config.encoder_dropout,
                bidirectional=True,
                batch_first=True,
            )
            widths = [2 * h, 2 * h, d]
        else:
            widths = [d, *[config.encoder_hidden_size or d] * (config.encoder_num_layers - 1), d]
        parts: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            parts += [nn.Linear(before, after), nn.ReLU()]
        self["mlp"] = nn.Sequential(*parts[:-1])

    def forward(self, rows: Tensor) -> Tensor:
        """Return MLP(LSTM(E)), or MLP(E)."""
        if "lstm" in self:
            rows = self["lstm"](rows[None])[0][0]
        out: Tensor = self["mlp"](rows)
        return out


class PTuningBackbone(PromptBackbone):
    """Puts the outputs of a prompt encoder into the input of a stack of layers."""

    peft_type: ClassVar[str] = "P_TUNING"

    def add(self, name: str, config: PTuningConfig) -> None:
        """Make E (p, d) and the encoder of another named set."""
        super().add(name, config)
        if "prompt_encoder" not in self._modules:
            self.prompt_encoder = nn.ModuleDict()
        if config.encoder == "none":
            return
        with torch.device(next(innermost(self.base).parameters()).device):
            self.prompt_encoder[name] = PromptEncoder(self.hidden_size, config)

    def rows(self, name: str) -> Tensor:
        """Return the prompt of one named set, (p, d)."""
        rows: Tensor = self.prompt_embedding[name]
        return self.prompt_encoder[name](rows) if name in self.prompt_encoder else rows

    def remove(self, name: str) -> None:
        """Delete one named set."""
        super().remove(name)
        if name in self.prompt_encoder:
            del self.prompt_encoder[name]

    def tensors(self, name: str = "default") -> dict[str, Tensor]:
        """Return P, all that HF PEFT keeps, and the network that it comes out of."""
        if name not in self.prompt_encoder:
            return super().tensors(name)
        network = {key: _whole(value) for key, value in self._network(name).items()}
        weights = {key.removeprefix(NETWORK): value for key, value in network.items()}
        rows = weights.pop("embedding")
        encoder = self.prompt_encoder[name]
        training = encoder.training
        try:
            with torch.no_grad():  # dropout is for training
                out: Tensor = functional_call(encoder.eval(), weights, (rows,))
        finally:
            encoder.train(training)
        return {TOKENS: out, **network}

    def load_tensors(self, tensors: Mapping[str, Tensor], name: str = "default") -> None:
        """Copy the network, or P where none makes it."""
        if name not in self.prompt_encoder:
            super().load_tensors(tensors, name)
        for key, target in self._network(name).items():
            target.copy_(tensors[key])

    def shapes(self, tensors: Mapping[str, Tensor], name: str = "default") -> dict[str, tuple[int, ...]]:
        """Return the shapes of P and of the network's weights."""
        network = {key: tuple(tensor.shape) for key, tensor in self._network(name).items()}
        return {**super().shapes(tensors, name), **network}

    def _network(self, name: str) -> dict[str, Tensor]:
        """Return E and the encoder's weights, by their names in a folder; nothing where there is no network."""
        if name not in self.prompt_encoder:
            return {}
        weights = {f"{NETWORK}{key}": value.detach() for key, value in self.prompt_encoder[name].named_parameters()}
        return {f"{NETWORK}embedding": self.prompt_embedding[name].detach(), **weights}


def _whole(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor; every rank must come here together."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


class PTuning(PromptTuning):
    """P-tuning on the task's model.

    Args:
        prompt: length and place of the prompt, and its encoder.

    Example:
        >>> from lit_peft import PTuning, SFT
        >>> class Mine(PTuning, SFT): ...
    """

    method = "p_tuning"
    backbone_class: ClassVar[type[PromptBackbone]] = PTuningBackbone
    beyond: ClassVar[str] = "LIT_P_TUNING"
    prompt: PTuningConfig

    def __init__(self, *args: Any, prompt: PTuningConfig = PTuningConfig(), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.prompt = self.configured(PTuningConfig, "prompt", prompt)

    def place_adapters(self) -> None:
        """Put the prompt in, and keep the base or note why it cannot be given back, where it is trained too."""
        super().place_adapters()
        assert self.model is not None
        if self.prompt.keep_base:
            own = {id(p) for _, adapter in named_adapters(self.model) for _, p in adapter.own_parameters()}
            remember(self.model, ((n, p) for n, p in self.model.named_parameters() if id(p) not in own))
        elif self.prompt.tune_base:
            scope_of(
                self.model
            ).irreversible = (
                "prompt.tune_base overwrites the base, so it cannot be given back. Set prompt.keep_base=True."
            )

    def is_trainable(self, name: str, parameter: nn.Parameter) -> bool:
        """Everything is, under `tune_base`."""
        return self.prompt.tune_base or super().is_trainable(name, parameter)

    def learning_rate(self, name: str, parameter: nn.Parameter) -> float | None:
        """Return an adapter's or the task's own preference, else the paper's for the base."""
        return super().learning_rate(name, parameter) or (self.prompt.base_lr if self.prompt.tune_base else None)

    def preferred_dtype(self) -> str:
        """Train a base in float32: updates of 1e-5 vanish in bf16's 8 bits."""
        settings = getattr(self, "prompt", None)  # --print_config asks a class, not a module
        return "float32" if settings is not None and settings.tune_base else super().preferred_dtype()

    def _adopted(self, config: Mapping[str, Any]) -> PromptConfig | None:
        if not any(f".{NETWORK}" in f".{key}" for key in config.get(KEYS, ())):
            config = {**config, "encoder": "none"}  # what the network yields is all there is
            if config.get(OWN):
                config = {**config, OWN: {**config[OWN], "encoder": "none"}}
        return super()._adopted(config)
