"""Prompt tuning (Lester et al. 2021, https://arxiv.org/abs/2104.08691).

    X -> [P ; emb(x)],    P (p, d)

Only P is trained. It enters in front of the text, or behind its first token (`after_bos`), and leaves again with the
last layer: labels, logits and tokens of the text keep their places.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from inspect import signature
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lit_peft.adapter import Adapter, innermost, named_adapters
from lit_peft.mixin import PEFT
from lit_peft.placing import join
from lit_peft.sites import geometry, stacks
from lit_peft.sublayers import hosts, is_causal

COMMONEST = 5000


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
    packs = False

    def add(self, name: str, config: PromptConfig) -> None:
        """Make P (p, d) of another named set."""
        super().add(name, config)
        if "prompt_embedding" not in self._modules:
            self.prompt_embedding = nn.ParameterDict()
            base = innermost(self.base)
            self.hidden_size = geometry(base).hidden
            self.takes_positions = "position_ids" in signature(base.forward).parameters
        device = next(innermost(self.base).parameters()).device
        rows = torch.zeros(config.num_virtual_tokens, self.hidden_size, device=device)
        if device.type != "meta":
            nn.init.uniform_(rows, -0.5, 0.5)
        self.prompt_embedding[name] = nn.Parameter(rows)

    def rows(self, name: str) -> Tensor:
        """Return the prompt of one named set, (p, d)."""
        rows: Tensor = self.prompt_embedding[name]
        return rows

    def prompt(self, shares: list[tuple[str, Tensor | None]], batch: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows in front of each text, (batch, p, d), and which of them it has, (batch, p).

        Rows of the batch with shorter prompts have theirs at the end, next to the text, as they would have alone.
        """
        sets = [(self.rows(name).to(like.dtype), chosen) for name, chosen in shares]
        if all(chosen is None for _, chosen in sets):
            whole = torch.cat([own for own, _ in sets])
            return whole.expand(batch, -1, -1), torch.ones(batch, len(whole), dtype=torch.bool, device=like.device)
        every = torch.arange(batch, device=like.device)
        length = torch.zeros(batch, dtype=torch.long, device=like.device)
        for own, chosen in sets:
            length[every if chosen is None else chosen] += len(own)
        p = int(length.max())
        start = p - length
        seen = torch.arange(p, device=like.device) >= start[:, None]
        prompt = like.new_zeros(batch, p, self.hidden_size)
        for own, chosen in sets:
            rows = every if chosen is None else chosen
            place = start[rows, None] + torch.arange(len(own), device=like.device)
            prompt = prompt.index_put((rows[:, None], place), own.expand(len(rows), -1, -1))
            start = start.index_add(0, rows, torch.full_like(rows, len(own)))
        return prompt, seen

    def forward(  # type: ignore[override]
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
        positions = kwargs.get("position_ids")
        if attention_mask is None and positions is not None and bool((positions[:, 1:] < positions[:, :-1]).any()):
            raise ValueError("Rows that pack several texts do not go with a prompt. Set packing: false.")
        if attention_mask is not None and attention_mask.ndim != 2:
            raise TypeError("A prompt needs a mask (batch, length), and a static cache has another. Use a dynamic one.")
        if inputs_embeds is None:
            inputs_embeds = self.embedding()(input_ids)
        batch, length = text.shape[:2]
        cache = kwargs.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        prompt, seen = self.prompt(shares, batch, inputs_embeds)
        p, at = prompt.shape[1], int(bool(self.configs[shares[0][0]].after_bos))
        if attention_mask is None and not bool(seen.all()):
            attention_mask = torch.ones(batch, length + max(past - p, 0), dtype=torch.long, device=text.device)
        # behind the row's padding on the left, so that the prompt is next to the text as it is without padding
        first = 0 if attention_mask is None else (attention_mask.cumsum(1) == 0).sum(1, keepdim=True)
        start = torch.full((batch, 1), at, device=text.device) + first

        def spread(own: Tensor, rows: Tensor) -> Tensor:
            """Put rows (batch, p, ...) into own (batch, n, ...), from each row's start on."""
            n = own.shape[1]
            column = torch.arange(n + p, device=own.device)[None]
            index = torch.where(column < start, column, torch.where(column < start + p, n + column - start, column - p))
            return torch.cat([own, rows], 1)[torch.arange(batch, device=own.device)[:, None], index]

        if attention_mask is not None:
            attention_mask = spread(attention_mask, seen.to(attention_mask))
        given = kwargs.get("position_ids")
        if given is None and self.takes_positions and not bool(seen.all()):
            # a row without a prompt starts at 0, beside one that starts at p
            given = torch.arange(length, device=text.device)[None] + max(past - p, 0)
        if given is not None:
            count = seen.sum(1, keepdim=True)
            given = given.expand(batch, -1)
            if past:
                kwargs["position_ids"] = given + count
            else:
                behind = torch.arange(length, device=text.device)[None] >= start
                own = (seen.long().cumsum(1) - 1).clamp(min=0) + at
                kwargs["position_ids"] = spread(torch.where(behind, given + count, given), own)
        if past:  # the prompt is in the cache
            return self.base(input_ids=None, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs)
        types = kwargs.get("token_type_ids")
        if types is not None:
            kwargs["token_type_ids"] = spread(types, types[:, :1].expand(-1, p))
        embeds = spread(inputs_embeds, prompt)
        out = self.base(input_ids=None, attention_mask=attention_mask, inputs_embeds=embeds, **kwargs)
        if self.keeps_prompt:
            return out

        def without(h: Tensor) -> Tensor:
            column = torch.arange(h.shape[1] - p, device=h.device)[None]
            index = torch.where(column < start, column, column + p)
            return h[torch.arange(batch, device=h.device)[:, None], index]

        if isinstance(out, tuple):
            return (without(out[0]), *out[1:])
        out.last_hidden_state = without(out.last_hidden_state)
        if getattr(out, "hidden_states", None) is not None:
            out.hidden_states = tuple(without(h) for h in out.hidden_states)
        return out

    def embedding(self) -> nn.Module:
        """Return what embeds the base's tokens."""
        return innermost(self.base).get_input_embeddings()  # type: ignore[operator, no-any-return]

    @property
    def keeps_prompt(self) -> bool:
        """Whether the prompt's outputs stay: a decoder attends to those of the encoder."""
        config: Any = getattr(innermost(self.base), "config", None)
        return bool(getattr(config, "is_encoder_decoder", False))


class PromptReader(Adapter):
    """Lets a decoder attend to the encoder's outputs for the prompt: extends the mask over them."""

    peft_type: ClassVar[str] = ""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the base with the mask over the encoder's outputs extended by the prompt."""
        mask, states = kwargs.get("encoder_attention_mask"), kwargs.get("encoder_hidden_states")
        if states is None:
            return self.base(*args, **kwargs)
        shares = self.shares(states)
        if mask is None:
            # without a mask the whole text is there; what is longer is the longest row's prompt
            own: dict[int, int] = {}
            for name, rows in shares:
                for row in range(states.shape[0]) if rows is None else rows.tolist():
                    own[row] = own.get(row, 0) + self.configs[name].num_virtual_tokens
            total = states.shape[1] - max(own.values(), default=0)
            mask = torch.ones(states.shape[0], total, dtype=torch.long, device=states.device)
        length = mask.new_zeros(mask.shape[0])
        for name, rows in shares:
            length[slice(None) if rows is None else rows] += self.configs[name].num_virtual_tokens
        p = states.shape[1] - mask.shape[1]
        prompt = (torch.arange(p, device=mask.device) >= p - length[:, None]).to(mask)
        # where the encoder put it: behind the padding on the left, and the first token where that is asked
        n, at = mask.shape[1], int(bool(next(iter(self.configs.values())).after_bos))
        start = (mask.cumsum(1) == 0).sum(1, keepdim=True) + at
        column = torch.arange(n + p, device=mask.device)[None]
        index = torch.where(column < start, column, torch.where(column < start + p, n + column - start, column - p))
        whole = torch.cat([mask, prompt], 1).gather(1, index)
        return self.base(*args, **{**kwargs, "encoder_attention_mask": whole})


class PromptTuning(PEFT):
    """Prompt tuning on the task's model.

    Args:
        prompt: length and start of the prompt.

    Example:
        >>> from lit_peft import PromptTuning, SFT
        >>> class Mine(PromptTuning, SFT): ...
    """

    method = "prompt"
    conflicts = ("prefix", "p_tuning_v2", "mam", "unipelt", "loreft", "direft")
    backbone_class: ClassVar[type[PromptBackbone]] = PromptBackbone

    def __init__(self, *args: Any, prompt: PromptConfig = PromptConfig(), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.prompt: PromptConfig = self.configured(PromptConfig, "prompt", prompt)

    def place_adapters(self) -> None:
        """Put a `PromptBackbone` around what reads the prompt, and a `PromptReader` around a decoder behind it."""
        super().place_adapters()
        assert self.model is not None
        paths = hosts(self.model)
        config: Any = getattr(self.model, "config", None)
        seq2seq = getattr(config, "is_encoder_decoder", False)
        encoder_only = not seq2seq and not is_causal(self.model, stacks(self.model)[0][0])
        after = encoder_only if self.prompt.after_bos is None else self.prompt.after_bos
        settings = replace(self.prompt, after_bos=after)
        join(self.model, {paths[0]: settings}, lambda base: self.backbone_class, self.placing)
        if len(paths) > 1:
            join(self.model, dict.fromkeys(paths[1:], settings), lambda base: PromptReader, self.placing)
        self.start_prompt()

    def start_prompt(self) -> None:
        """Fill the prompt with embeddings of words, unless it starts at random."""
        assert self.model is not None
        for _, adapter in named_adapters(self.model):
            if isinstance(adapter, PromptBackbone) and self.placing in adapter.configs and self.prompt.init != "random":
                table: Any = adapter.embedding()
                rows = adapter.prompt_embedding[self.placing]
                if rows.device.type == "meta":
                    continue
                if self.prompt.init == "text":
                    tokenizer: Any = self.tokenizer
                    ids = list(tokenizer(self.prompt.init_text, add_special_tokens=False)["input_ids"])
                    if not ids:
                        raise ValueError(f"prompt.init_text {self.prompt.init_text!r} has no tokens.")
                    chosen = torch.tensor([ids[i % len(ids)] for i in range(len(rows))])
                else:  # the commonest words have the lowest numbers in most tokenizers
                    chosen = torch.randint(0, min(COMMONEST, table.num_embeddings), (len(rows),))
                with torch.no_grad():
                    rows.copy_(table(chosen.to(table.weight.device)))

    def adopt(self, config: Mapping[str, Any]) -> None:
        """Take the settings from an adapter folder."""
        super().adopt(config)
        if config.get("peft_type") == self.backbone_class.peft_type:
            kind = type(self.prompt)
            known = {field.name for field in fields(kind)}
            self.prompt = self.configured(kind, "prompt", {k: v for k, v in config.items() if k in known})

    def parts(self) -> list[dict[str, Any]]:
        """Return the settings for `adapter_config.json`."""
        return [*super().parts(), {"peft_type": self.backbone_class.peft_type, **asdict(self.prompt)}]
