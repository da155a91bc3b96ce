"""Prompt tuning (Lester et al. 2021, https://arxiv.org/abs/2104.08691).

    X -> [P ; emb(x)],    P (p, d)

Only P is trained. It enters in front of the text, or behind its first token (`after_bos`), and leaves again with the
last layer: labels, logits and tokens of the text keep their places.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lit_peft.adapter import Adapter, innermost
from lit_peft.sites import geometry


@dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """Settings of prompt tuning.

    Args:
        num_virtual_tokens: length p of the prompt.
        init: start from `random` numbers between -0.5 and 0.5, from embeddings sampled from the `vocabulary`, or from
            those of a `text`.
        init_text: the text; repeated or cut to p tokens.
        after_bos: put the prompt behind the first token. None: for encoders such as BERT, whose first token is the
            one that a classifier reads.

    Raises:
        ValueError: if a value is out of range.
    """

    num_virtual_tokens: int = 20
    init: Literal["random", "vocabulary", "text"] = "vocabulary"
    init_text: str = ""
    after_bos: bool | None = None

    default_lr: ClassVar[float] = 1e-2

    def __post_init__(self) -> None:
        if self.num_virtual_tokens < 1:
            raise ValueError(f"prompt.num_virtual_tokens is {self.num_virtual_tokens}; it must be 1 or more.")
        if (self.init == "text") != bool(self.init_text):
            raise ValueError(f"prompt.init is {self.init!r} and init_text {self.init_text!r}; a text needs both.")


class PromptBackbone(Adapter):
    """Puts p trained embeddings into the input of a stack of layers, and takes their outputs away again.

    It sits around what embeds the tokens and holds the layers: the decoder of a Llama, the encoder of a T5. A cache
    holds the prompt's keys and values; masks and positions of later calls are extended to match.
    """

    peft_type: ClassVar[str] = "LIT_PROMPT"

    def add(self, name: str, config: PromptConfig) -> None:
        """Make P (p, d) of another named set."""
        super().add(name, config)
        if "prompt_embedding" not in self._modules:
            self.prompt_embedding = nn.ParameterDict()
            size = geometry(innermost(self.base))
            self.hidden_size = size.hidden
        device = next(innermost(self.base).parameters()).device
        rows = torch.zeros(config.num_virtual_tokens, self.hidden_size, device=device)
        if device.type != "meta":
            nn.init.uniform_(rows, -0.5, 0.5)
        self.prompt_embedding[name] = nn.Parameter(rows)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Call the base on [P ; emb(x)] and return its answer for x."""
        text = input_ids if input_ids is not None else inputs_embeds
        assert text is not None
        shares = self.shares(text)
        if not shares:
            return self.base(input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs)
        base: Any = innermost(self.base)
        batch, length = text.shape[:2]
        if inputs_embeds is None:
            inputs_embeds = base.get_input_embeddings()(input_ids)
        cache = kwargs.get("past_key_values")
        past = 0 if cache is None else cache.get_seq_length()
        prompt, seen = self.prompt(shares, batch, inputs_embeds)
        p = prompt.shape[1]
        at = int(bool(next(iter(self.configs.values())).after_bos))
        routed = any(rows is not None for _, rows in shares)
        if attention_mask is None and routed:
            attention_mask = text.new_ones((batch, length + max(past - p, 0)), dtype=torch.long)
        if attention_mask is not None:
            attention_mask = torch.cat([attention_mask[:, :at], seen.to(attention_mask), attention_mask[:, at:]], 1)
        if "position_ids" in kwargs and kwargs["position_ids"] is not None:
            given = kwargs["position_ids"].expand(batch, -1)
            moved = given + seen.sum(1, keepdim=True)
            if not past:
                own = torch.arange(p, device=given.device)[None] + given[:, :1] * 0 + at
                moved = torch.cat([given[:, :at], own.expand(batch, -1), moved[:, at:]], 1)
            kwargs["position_ids"] = moved
        if past:
            return self.base(input_ids=None, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs)
        if kwargs.get("token_type_ids") is not None:
            types = kwargs["token_type_ids"]
            kwargs["token_type_ids"] = torch.cat([types[:, :at], types[:, :1].expand(-1, p), types[:, at:]], 1)
        embeds = torch.cat([inputs_embeds[:, :at], prompt, inputs_embeds[:, at:]], 1)
        return self.base(input_ids=None, attention_mask=attention_mask, inputs_embeds=embeds, **kwargs), at, p
