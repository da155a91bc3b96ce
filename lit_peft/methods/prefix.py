"""Prefix tuning (Li and Liang 2021, https://arxiv.org/abs/2101.00190).

    K -> [P_K ; K],    V -> [P_V ; V]    in every attention, with p trained rows each

While training the rows come from a small network, P = W_2 tanh(W_1 E + b_1) + b_2 with E (p, d); trained directly they
were found unstable. The text's own tokens start at position p.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info

from lit_peft.adapter import named_adapters, scopes_of
from lit_peft.methods.prefix_config import PrefixConfig as PrefixConfig
from lit_peft.methods.prefix_layers import NETWORK
from lit_peft.methods.prefix_layers import PrefixBackbone as PrefixBackbone
from lit_peft.methods.prefix_layers import PrefixGate as PrefixGate
from lit_peft.mixin import PEFT
from lit_peft.placing import join
from lit_peft.selection import choose
from lit_peft.sites import geometry
from lit_peft.sublayers import attention_cores, hosts, is_causal
from lit_peft.targets import KEYS, OWN
from lit_peft.virtual_tokens import STORED


class PrefixTuning(PEFT):
    """Prefix tuning on the task's model.

    Args:
        prefix: length of the prefix, and the network that its rows are trained through.

    Example:
        >>> from lit_peft import PrefixTuning, SFT
        >>> class Mine(PrefixTuning, SFT): ...
    """

    method = "prefix"

    def __init__(self, *args: Any, prefix: PrefixConfig = PrefixConfig(), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.prefix: PrefixConfig = self.configured(PrefixConfig, "prefix", prefix)

    def place_adapters(self) -> None:
        """Put a `PrefixBackbone` around every stack of layers."""
        super().place_adapters()
        assert self.model is not None
        ids = self._text_ids() if self.prefix.init_text else []
        cores = {} if self.prefix.gate is False else dict.fromkeys(attention_cores(self.model), self.prefix)
        causal = {path: is_causal(self.model, path) for path in cores}
        join(self.model, dict.fromkeys(hosts(self.model), self.prefix), lambda base: PrefixBackbone, self.placing)
        for path in attention_cores(self.model) if cores else []:  # their paths have changed
            join(self.model, {path: self.prefix}, lambda base: PrefixGate, self.placing)
        gates = [adapter for _, adapter in named_adapters(self.model) if isinstance(adapter, PrefixGate)]
        for adapter, is_decoder in zip(gates, causal.values(), strict=True):
            adapter.causal = is_decoder
        if ids:
            self._start_from(torch.tensor([ids]))

    def _backbones(self, name: str) -> list[PrefixBackbone]:
        assert self.model is not None, "call configure_model() first"
        found = [adapter for _, adapter in named_adapters(self.model) if isinstance(adapter, PrefixBackbone)]
        return [adapter for adapter in found if name in adapter.configs]

    def _text_ids(self) -> list[int]:
        """Return the tokens of `init_text`, with what the tokenizer puts in front of a text, as many as the prefix."""
        tokenizer: Any = getattr(self.beside or self, "tokenizer", None)
        if tokenizer is None:
            kind = type(self.beside or self).__name__
            raise TypeError(
                f"prefix.init_text needs a tokenizer, and {kind} has no attribute `tokenizer`. Give it one."
            )
        text, p = self.prefix.init_text, self.prefix.num_virtual_tokens
        plain = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        if not plain:
            raise ValueError(f"prefix.init_text {text!r} has no tokens. Write a longer text.")
        whole = list(tokenizer(text)["input_ids"])
        first = whole[: whole.index(plain[0])] if plain[0] in whole else []  # such as BOS
        number = len(first) + len(plain)
        if number != p:
            rank_zero_info(
                f"prefix.init_text has {number} tokens and is {'cut' if p < number else 'repeated'} to {p}. Set "
                "num_virtual_tokens to that number for just this text."
            )
        return (first + plain * p)[:p]

    def _start_from(self, ids: torch.Tensor) -> None:
        """Let the prefix begin at the keys and values of a text, computed by the base alone."""
        assert self.model is not None
        backbones = self._backbones(self.placing)
        device = next(self.model.parameters()).device
        if device.type == "meta":  # a model that is only counted
            return
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        try:
            with torch.no_grad(), choose(dict.fromkeys(scopes_of(self.model), ())):
                encoded: dict[str, Any] = {}
                for backbone in backbones:  # the encoder first: a decoder reads what it made of the text
                    rows, out = backbone.recorded(input_ids=ids.to(device), use_cache=False, **encoded)
                    backbone.start(self.placing, rows)
                    encoded = {"encoder_hidden_states": out[0]}
        finally:
            for module in training:
                module.training = True

    def fold_prefix(self, name: str = "default") -> None:
        """Replace the network of a prefix by the rows that it yields, as HF PEFT's folders hold them.

        What is computed stays the same; training could go on, on the rows themselves.

        Args:
            name: which named set.

        Raises:
            ValueError: if there is no prefix of that name.
        """
        found = self._backbones(name)
        if not found:
            raise ValueError(f"No prefix is named {name!r}.")
        for backbone in found:
            backbone.fold(name)
        for placer in self._sets.get(name, [self]):
            if isinstance(placer, PrefixTuning):
                folded = replace(placer.prefix, prefix_projection=False)
                placer.prefix = placer.configured(type(folded), "prefix", folded)
        if name in self.named:
            self._note(name, {**self.named[name], "prefix": asdict(found[0].configs[name])})

    def adopt(self, config: Mapping[str, Any]) -> None:
        """Take the settings from an adapter folder."""
        super().adopt(config)
        kind = type(self.prefix)
        if config.get("peft_type") not in (kind.peft_type, self._stored_as()):
            return
        settings = {**config, **(config.get(OWN) or {})}
        if config["peft_type"] == "PREFIX_TUNING":
            # the file holds rows; the network is there only where it was written here
            settings["prefix_projection"] = f"prefix_{NETWORK[0]}" in config.get(KEYS, ())
        known = {field.name for field in fields(kind)} - {"init_text"}
        known = {key for key in known if settings.get(key) is not None}
        self.prefix = self.configured(kind, "prefix", {key: settings[key] for key in known})

    def _stored_as(self) -> str:
        """The type of a folder that HF PEFT could not read."""
        return "LIT_PREFIX" if self.prefix.peft_type == "PREFIX_TUNING" else self.prefix.peft_type

    def parts(self) -> list[dict[str, Any]]:
        """Return the settings for `adapter_config.json`: HF PEFT's, where it has such a prefix, and our own words."""
        assert self.model is not None, "call configure_model() first"
        own, kind = asdict(self.prefix), self.prefix.peft_type
        config: Any = getattr(self.model, "config", None)
        stacks = hosts(self.model)
        # PEFT knows no gates, and of an encoder-decoder only the decoder's own attention
        if self.prefix.gate is not False or len(stacks) > 1 or getattr(config, "is_encoder_decoder", False):
            return [*super().parts(), {**own, "peft_type": kind, STORED: self._stored_as()}]
        size = geometry(self.model)
        theirs = {
            "num_virtual_tokens": self.prefix.num_virtual_tokens,
            "token_dim": size.kv_heads * size.head_dim,
            "num_attention_heads": size.kv_heads,
            "num_layers": size.layers,
            "num_transformer_submodules": 1,
            "prefix_projection": False,  # the file holds rows
            "encoder_hidden_size": None,
        }
        return [*super().parts(), {"peft_type": kind, **theirs, OWN: {**own, "method": self.method}}]
