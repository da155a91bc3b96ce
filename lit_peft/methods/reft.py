"""ReFT: low-rank edits of the residual stream at a few prompt positions (Wu et al. 2024, https://arxiv.org/abs/2404.03592).

    LoReFT:  h -> h + R^T (W h + b - R h),    R (r, d) with orthonormal rows
    DiReFT:  h -> h + W_2^T (W_1 h + b)

behind chosen layers, at the first f and the last l tokens of the prompt. Tokens that are generated are never edited, so
a step of generation costs what the base costs. R stays orthonormal by construction: it is the Q factor of a trained
matrix, and d r numbers are stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lit_peft.adapter import Adapter, innermost
from lit_peft.methods.bottleneck import first, with_first
from lit_peft.methods.reft_positions import EDIT, Edit, edited, prompt_is, prompt_of, prompts_now, texts_of
from lit_peft.mixin import PEFT
from lit_peft.ops.reft import Rotations, edit_rows, orthonormal, unshared
from lit_peft.placing import join
from lit_peft.sites import geometry, stacks
from lit_peft.sublayers import hosts

__all__ = [
    "EDIT",
    "Edit",
    "ReFTConfig",
    "edited",
    "orthonormal",
    "prompt_is",
    "prompt_of",
]  # where others look for them


@dataclass(frozen=True, kw_only=True)
class ReFTConfig:
    """Settings of LoReFT and DiReFT.

    Args:
        r: rank of an edit.
        first: f, how many tokens at the start of the prompt are edited.
        last: l, how many at its end.
        layers_to_transform: numbers of the layers; None: all (of the encoder, where there is one).
        short_prompts: what to do with training prompts of fewer than f + l tokens: `refuse` stops before training,
            `share` lets no more than half of such a prompt count as first, and the rest as last.
        tied: the same edit for the first and the last tokens; else one each.
        dropout: dropout on the edit.
        start_at_identity: LoReFT: start with W = R and b = 0, that is, as the base; else W is random as in the paper's
            code.
        hidden_size: width d of the residual stream; None: the model's.

    Raises:
        ValueError: if a value is out of range.
    """

    r: int = 8
    first: int = 7
    last: int = 7
    layers_to_transform: list[int] | None = None
    short_prompts: Literal["refuse", "share"] = "refuse"
    tied: bool = True
    dropout: float = 0.0
    start_at_identity: bool = True
    hidden_size: int | None = None

    default_lr: ClassVar[float] = 9e-4

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"reft.r is {self.r}; the rank must be 1 or more.")
        if self.first < 0 or self.last < 0 or self.first + self.last == 0:
            raise ValueError(f"reft.first is {self.first} and last {self.last}; edit at least one token.")
        if self.short_prompts not in ("refuse", "share"):
            raise ValueError(f"reft.short_prompts is {self.short_prompts!r}; it must be 'refuse' or 'share'.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"reft.dropout is {self.dropout}; it must be at least 0 and below 1.")


class ReFTStack(Adapter):
    """Tells the layers inside which positions to edit; has no parameters of its own."""

    peft_type: ClassVar[str] = ""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the base with the marks of the prompt's first and last tokens, in a prompt pass."""
        text = next(t for t in (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if t is not None)
        shares = self.shares(text if text.ndim > 2 else text[..., None])  # (rows, length, width), as layers have it
        cache = kwargs.get("past_key_values")
        if not shares or (cache is not None and cache.get_seq_length()):
            return self.base(*args, **kwargs)
        mask = kwargs.get("attention_mask")
        there = prompts_now(text, mask)
        texts = texts_of(kwargs.get("position_ids")) if mask is None else None
        configs: dict[str, ReFTConfig] = {name: self.configs[name] for name, _ in shares}
        edit = Edit({name: edited(there, config.first, config.last, texts) for name, config in configs.items()})
        out = self.base(*args, **{**kwargs, EDIT: edit})
        if not torch.compiler.is_compiling() and not edit.used:
            raise TypeError(
                f"{type(innermost(self.base)).__name__} does not pass keyword arguments down to its layers, so edits "
                "would be without effect. Use another method, such as lora."
            )
        return out


class LoReFTLayer(Adapter):
    """Edits a layer's output h (batch, length, d) at the marked positions: h + R^T (W h + b - R h).

    Example:
        >>> import torch
        >>> layer = LoReFTLayer(torch.nn.Identity(), ReFTConfig(r=2, hidden_size=8))
        >>> sum(p.numel() for _, p in layer.own_parameters())  # of first and last tokens together
        34
    """

    peft_type: ClassVar[str] = "LIT_LOREFT"
    site = ("hidden_size",)

    def add(self, name: str, config: ReFTConfig) -> None:
        """Make R (places, d, r), W (places, r, d) and b (places, r); one place, or first and last where untied."""
        super().add(name, config)
        if "reft_rotation" not in self._modules:
            self.reft_rotation = nn.ParameterDict()
            self.reft_source = nn.ParameterDict()
            self.reft_bias = nn.ParameterDict()
        assert config.hidden_size is not None, "fill in the model's hidden size first"
        places, d, r = 1 if config.tied else 2, config.hidden_size, config.r
        if r > d:
            raise ValueError(f"reft.r is {r}, but the hidden size is {d}; there are no {r} orthonormal directions.")
        device = next((p.device for p in self.base.parameters()), torch.device("cpu"))
        rotation, source = torch.empty(places, d, r, device=device), torch.empty(places, r, d, device=device)
        if device.type != "meta":
            self.start(rotation, source, config)
        self.reft_rotation[name] = nn.Parameter(rotation)
        self.reft_source[name] = nn.Parameter(source)
        self.reft_bias[name] = nn.Parameter(torch.zeros(places, r, device=device))

    def start(self, rotation: Tensor, source: Tensor, config: ReFTConfig) -> None:
        """Fill R with random orthonormal columns, and W with R^T (no edit) or as `nn.Linear` starts."""
        for q, w in zip(rotation, source, strict=True):
            q.copy_(nn.init.orthogonal_(torch.empty_like(q, dtype=torch.float32)))  # no QR in half precision
            if config.start_at_identity:
                w.copy_(orthonormal(q).t())
            else:
                nn.init.uniform_(w, -(w.shape[1] ** -0.5), w.shape[1] ** -0.5)

    def parts(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """Return E (places, r, d), b (places, r) and Q (places, d, r) of the edit Q (E h + b)."""
        matrix = self.reft_rotation[name]
        kept: dict[str, Rotations] = self.__dict__.setdefault("rotations", {})
        q = kept.setdefault(name, Rotations())(matrix)
        return self.reft_source[name].to(q.dtype) - q.transpose(1, 2), self.reft_bias[name], q

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the base and edit its (first) output."""
        edit: Edit | None = kwargs.pop(EDIT, None)
        out = self.base(*args, **kwargs)
        if edit is None:
            return out
        edit.used = True
        h = first(out)
        mine = unshared(h, held=2)  # by `out` and `h`
        for name, rows in self.shares(h):
            if name not in edit.marks:
                continue
            config: ReFTConfig = self.configs[name]
            matrix, bias, rotation = self.parts(name)
            for number, place in enumerate([0] if config.tied else [1, 2]):
                where = edit.rows(name, place, h.device, rows)
                dropout = config.dropout if self.training else 0.0
                parts = matrix[number], bias[number], rotation[number]
                h = edit_rows(h, where, *parts, dropout=dropout, in_place=mine)
                mine = True  # a copy, or what nobody else holds
        return with_first(out, h)


class DiReFTLayer(LoReFTLayer):
    """Edits a layer's output h (batch, length, d) at the marked positions: h + W_2^T (W_1 h + b)."""

    peft_type: ClassVar[str] = "LIT_DIREFT"

    def start(self, rotation: Tensor, source: Tensor, config: ReFTConfig) -> None:
        """Fill W_1 as `nn.Linear` starts; W_2 with zeros (no edit), or with orthonormal columns."""
        for w2, w1 in zip(rotation, source, strict=True):
            nn.init.uniform_(w1, -(w1.shape[1] ** -0.5), w1.shape[1] ** -0.5)
            w2.copy_(torch.zeros_like(w2) if config.start_at_identity else nn.init.orthogonal_(w2.float()))

    def parts(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """Return W_1 (places, r, d), b (places, r) and W_2^T (places, d, r)."""
        return self.reft_source[name], self.reft_bias[name], self.reft_rotation[name]


class ReFT(PEFT):
    """What LoReFT and DiReFT share: placement, and telling the model which tokens are the prompt."""

    reft: ReFTConfig
    layer: ClassVar[type[LoReFTLayer]]

    def place_adapters(self) -> None:
        """Put an edit behind every chosen layer, and around each stack what tells them where to act.

        Raises:
            ValueError: if there is no such layer.
        """
        super().place_adapters()
        assert self.model is not None
        stack = stacks(self.model)[0]  # of an encoder-decoder: the encoder, which holds the prompt
        chosen = range(len(stack)) if self.reft.layers_to_transform is None else self.reft.layers_to_transform
        unknown = sorted(set(chosen) - set(range(len(stack))))
        if unknown:
            raise ValueError(f"reft.layers_to_transform names layer {unknown[0]}; layers are 0 to {len(stack) - 1}.")
        config = replace(self.reft, hidden_size=geometry(self.model).hidden)
        join(self.model, {stack[number]: config for number in chosen}, lambda base: self.layer, self.placing)
        join(self.model, {hosts(self.model)[0]: config}, lambda base: ReFTStack, self.placing)

    def on_fit_start(self) -> None:
        """See that the training prompts are long enough, where the data module can tell.

        Raises:
            ValueError: if one has fewer tokens than are to be edited.
        """
        super().on_fit_start()
        assert self.model is not None
        stacks = [module for module in self.model.modules() if isinstance(module, ReFTStack)]
        trained = {name: c for m in stacks for name, c in m.configs.items() if name in (m.scope.trained or m.configs)}
        strict = {name: config for name, config in trained.items() if config.short_prompts == "refuse"}
        lengths = getattr(getattr(self.trainer, "datamodule", None), "prompt_lengths", None)
        if not strict or lengths is None:
            return
        shortest = min(lengths(), default=None)
        widest = max(strict.values(), key=lambda config: config.first + config.last)
        if shortest is not None and shortest < widest.first + widest.last:
            raise ValueError(
                f"reft.first {widest.first} and last {widest.last} are {widest.first + widest.last} tokens, and the "
                f"shortest training prompt has {shortest}. Lower them, or set reft.short_prompts: share."
            )

    def training_step(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the task's step; tokens without a label, in front of the answer, are the prompt."""
        with self.prompting(batch):
            return super().training_step(batch, *args, **kwargs)

    def validation_step(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the task's step as in training."""
        with self.prompting(batch):
            return super().validation_step(batch, *args, **kwargs)

    def test_step(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the task's step as in training."""
        with self.prompting(batch):
            return super().test_step(batch, *args, **kwargs)

    def prompting(self, batch: Any) -> AbstractContextManager[None]:
        """Say which tokens of a batch are the prompt; all of the encoder's, where there is one."""
        config: Any = getattr(self.model, "config", None)
        return prompt_is(None if getattr(config, "is_encoder_decoder", False) else prompt_of(batch))

    def adopt(self, config: Mapping[str, Any]) -> None:
        """Take the settings from an adapter folder."""
        super().adopt(config)
        if config.get("peft_type") == self.layer.peft_type:
            known = {field.name for field in fields(ReFTConfig)}
            stored = {key: value for key, value in config.items() if key in known}
            if "first" not in stored:  # pyreft
                stored |= {"first": self.reft.first, "last": self.reft.last}
                rank_zero_warn(
                    f"This adapter's folder does not say which tokens it edits; taken: the first {self.reft.first} and "
                    f"the last {self.reft.last} of the prompt. Set reft.first and reft.last as they were in training."
                )
            self.reft = self.configured(ReFTConfig, "reft", stored)

    def parts(self) -> list[dict[str, Any]]:
        """Return the settings for `adapter_config.json`."""
        return [*super().parts(), {"peft_type": self.layer.peft_type, **asdict(self.reft)}]
