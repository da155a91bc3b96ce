"""The adapters of prompt tuning and P-tuning: one puts the prompt into the text, one lets a decoder attend to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from inspect import signature
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lit_peft.adapter import Adapter, innermost
from lit_peft.methods.prompt_layout import Layout, block, padded_starts, rows_of, text_starts
from lit_peft.methods.reft import ReFTStack
from lit_peft.methods.reft_positions import EDIT, Edit, prompt_is, prompts_now
from lit_peft.sites import geometry
from lit_peft.template import SLOT
from lit_peft.virtual_tokens import TOKENS

Share = tuple[str, Tensor | None]


class PromptBackbone(Adapter):
    """Puts p trained embeddings into the input of a stack of layers, and takes their outputs away again.

    It sits around what embeds the tokens and holds the layers: the decoder of a Llama, the encoder of a T5. A cache
    holds the prompt's keys and values; masks and positions of later calls are extended to match.
    """

    peft_type: ClassVar[str] = "PROMPT_TUNING"
    reads_first: bool = False  # whether a head behind it reads the first output, as an encoder's classifiers do

    def add(self, name: str, config: Any) -> None:
        """Make P (p, d) of another named set.

        Raises:
            ValueError: if it is longer than the model has positions.
        """
        base = innermost(self.base)
        limit = getattr(getattr(base, "config", None), "max_position_embeddings", None)
        if limit is not None and config.num_virtual_tokens >= limit:
            raise ValueError(
                f"prompt.num_virtual_tokens is {config.num_virtual_tokens}, and this model has {limit} positions for "
                "prompt and text together. Use fewer."
            )
        super().add(name, config)
        if "prompt_embedding" not in self._modules:
            self.prompt_embedding = nn.ParameterDict()
            self.hidden_size = geometry(base).hidden
            self.takes_positions = "position_ids" in signature(base.forward).parameters
            self.room = learned_positions(base)
        device = next(base.parameters()).device
        rows = torch.zeros(config.num_virtual_tokens, self.hidden_size, device=device)
        if device.type != "meta":
            nn.init.uniform_(rows, -0.5, 0.5)
        self.prompt_embedding[name] = nn.Parameter(rows)

    def rows(self, name: str) -> Tensor:
        """Return the prompt of one named set, (p, d)."""
        rows: Tensor = self.prompt_embedding[name]
        return rows

    # Folders ---------------------------------------------------------------------------------------------------------

    def tensors(self, name: str = "default") -> dict[str, Tensor]:
        """Return P as HF PEFT stores it."""
        return {TOKENS: self.prompt_embedding[name].detach()}

    def shapes(self, tensors: Mapping[str, Tensor], name: str = "default") -> dict[str, tuple[int, ...]]:
        """Return the shape of P: PEFT stores it twice for a seq2seq model, and reads the first half."""
        rows, stored = self.prompt_embedding[name], tensors.get(TOKENS)
        twice = self.keeps_prompt and stored is not None and len(stored) == 2 * len(rows)
        return {TOKENS: (len(rows) * (2 if twice else 1), rows.shape[1])}

    def load_tensors(self, tensors: Mapping[str, Tensor], name: str = "default") -> None:
        """Copy P."""
        rows = self.prompt_embedding[name]
        super().load_tensors({TOKENS: tensors[TOKENS][: len(rows)]}, name)

    # The call --------------------------------------------------------------------------------------------------------

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Call the base on [P ; emb(x)] and return its answer for x.

        Raises:
            ValueError: if pseudo tokens are missing, or prompt and text are longer than the model has positions.
            TypeError: if the mask has another shape, as with a static cache.
        """
        text = input_ids if input_ids is not None else inputs_embeds
        assert text is not None
        shares = self.shares(text)
        cache = kwargs.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        if past == 0 and input_ids is not None and any(config.template for config in self.configs.values()):
            inside = [share for share in shares if self.configs[share[0]].template]
            input_ids, attention_mask, inputs_embeds, kwargs = self.fill(inside, input_ids, attention_mask, kwargs)
        shares = [share for share in shares if not self.configs[share[0]].template]
        if not shares:
            return self.base(input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs)
        if attention_mask is not None and attention_mask.ndim != 2:
            raise TypeError(
                "A prompt in front of the text needs a mask (batch, length), and a static cache has another. Use a "
                "dynamic one, or a prompt.template, whose pseudo tokens are part of the text."
            )
        batch, length = text.shape[:2]
        sides = [
            [share for share in shares if bool(self.configs[share[0]].after_bos) is later] for later in (False, True)
        ]
        front, behind = (
            block([(self.configs[name].num_virtual_tokens, rows) for name, rows in side], batch, text.device)
            for side in sides
        )
        everywhere = front.seen is None and behind.seen is None
        given = kwargs.get("position_ids")
        if attention_mask is None and not everywhere and (past or not self._packed(given)):
            seen = past - front.length - behind.length if past else 0
            attention_mask = torch.ones(batch, length + max(seen, 0), dtype=torch.long, device=text.device)
        if given is None and self.takes_positions and not everywhere:
            # a row without a prompt starts at 0, beside one that starts at p
            moved = max(past - front.length - behind.length, 0)
            given = torch.arange(length, device=text.device)[None] + moved
        if past:  # the prompt is in the cache
            if attention_mask is not None:
                starts = padded_starts(attention_mask)
                attention_mask = Layout(batch, attention_mask.shape[1], front, behind, starts).mask(attention_mask)
            if given is not None:
                kwargs["position_ids"] = given + front.count() + behind.count()
            return self.base(input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs)
        starts = None if attention_mask is None else padded_starts(attention_mask)
        if attention_mask is None and given is not None and self._packed(given):
            if behind.seen is not None:
                raise ValueError(
                    "Rows of several texts cannot have different prompts behind their first tokens. Route "
                    "them without packing."
                )
            starts = text_starts(given.expand(batch, -1))
        layout = Layout(batch, length, front, behind, starts)
        if self.room is not None and layout.total > self.room and not self._packed(given):
            raise ValueError(
                f"A text of {length} tokens and a prompt of {layout.total - length} are more than the {self.room} "
                f"positions of this model. Set data.max_length to {self.room - layout.total + length} or less."
            )
        if inputs_embeds is None:
            inputs_embeds = self.embedding()(input_ids)
        made = [
            rows_of([(self.rows(name).to(inputs_embeds.dtype), rows) for name, rows in side], place, batch)
            for side, place in zip(sides, (front, behind), strict=True)
        ]
        said = prompts_now(text, attention_mask) if self._inside(ReFTStack) else None
        if attention_mask is not None:
            attention_mask = layout.mask(attention_mask)
        if given is not None:
            kwargs["position_ids"] = layout.positions(given.expand(batch, -1))
        types = kwargs.get("token_type_ids")
        if types is not None:  # the first part's, as in HF PEFT
            none = (types.new_zeros(batch, place.length) for place in (front, behind))
            kwargs["token_type_ids"] = layout.numbers(types, *(layout.per_text(part) for part in none))
        embeds = layout.embeds(inputs_embeds, *made)
        with self._prompt_of_the_text(layout, said, kwargs.get(EDIT)):
            out = self.base(input_ids=None, attention_mask=attention_mask, inputs_embeds=embeds, **kwargs)
        if self.keeps_prompt:
            return out
        if isinstance(out, tuple):
            return (self._read(layout, out[0]), *out[1:])
        out.last_hidden_state = self._read(layout, out.last_hidden_state)
        if getattr(out, "hidden_states", None) is not None:
            out.hidden_states = tuple(layout.text(h) for h in out.hidden_states)
        return out

    def _read(self, layout: Layout, whole: Tensor) -> Tensor:
        """Return the text's outputs; where a head reads the first, that of [P ; x], which is P's, as in HF PEFT."""
        text = layout.text(whole)
        if not self.reads_first or not layout.front.length or layout.starts is not None:
            return text
        first = layout.front.length - torch.as_tensor(layout.front.count(), device=whole.device).expand(len(whole), 1)
        rows = torch.arange(len(whole), device=whole.device)
        return torch.cat([whole[rows, first[:, 0]][:, None], text[:, 1:]], 1)

    def _prompt_of_the_text(
        self, layout: Layout, said: Tensor | None, edit: Edit | None
    ) -> AbstractContextManager[object]:
        """Let ReFT, whose edits are at tokens of the text, find them where virtual tokens have moved them.

        Args:
            layout: where the text's tokens are now.
            said: (batch, length), which of them are of the prompt; None: nothing inside asks.
            edit: what ReFT around this has chosen already.
        """

        def moved(marks: Tensor) -> Tensor:
            none = (marks.new_zeros(layout.batch, place.length) for place in (layout.front, layout.behind))
            return layout.numbers(marks, *(layout.per_text(part) for part in none))

        if edit is not None:
            edit.marks = {name: moved(marks) for name, marks in edit.marks.items()}
        return nullcontext() if said is None else prompt_is(moved(said.long()))

    def _inside(self, kind: type[Adapter]) -> bool:
        """Whether an adapter of a kind sits around the same stack of layers, inside of this one."""
        module = self.base
        while isinstance(module, Adapter) and not isinstance(module, kind):
            module = module.base
        return isinstance(module, kind)

    @staticmethod
    def _packed(positions: Tensor | None) -> bool:
        return positions is not None and bool((positions[:, 1:] < positions[:, :-1]).any())

    def fill(
        self, shares: Sequence[Share], ids: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, dict[str, Any]]:
        """Put the prompt's rows at the pseudo tokens of the text; hide those of rows whose prompt does not act.

        Returns:
            The call's `input_ids`, `attention_mask`, `inputs_embeds` and other arguments.

        Raises:
            ValueError: if a row has another number of pseudo tokens than its prompt, or they cannot be hidden.
        """
        slots = ids == SLOT
        batch = ids.shape[0]
        place = block([(self.configs[name].num_virtual_tokens, rows) for name, rows in shares], batch, ids.device)
        wanted = place.visible(batch, ids.device).sum(1)
        found = slots.sum(1)
        wrong = (found % wanted.clamp(min=1) != 0) | ((wanted > 0) & (found == 0))
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise ValueError(
                f"Row {row} of a batch has {int(found[row])} pseudo tokens, and its prompt {int(wanted[row])}. Put the "
                "text into prompt.template, as the data modules of lit_peft do."
            )
        if not shares and not bool(found.any()):
            return ids, mask, None, kwargs
        embeds = self.embedding()(ids.masked_fill(slots, 0))
        rows = rows_of([(self.rows(name).to(embeds.dtype), own) for name, own in shares], place, batch)
        if rows is not None:
            where, columns = (slots & (wanted > 0)[:, None]).nonzero(as_tuple=True)
            number = slots.long().cumsum(1)[where, columns] - 1  # a packed row has the prompt once for each text
            order = place.length - wanted[where] + number % wanted[where]
            if place.seen is None:
                values = rows[0].index_select(0, order)
            else:
                values = rows.flatten(0, 1).index_select(0, where * place.length + order)
            embeds = embeds.index_put((where, columns), values)
        hidden = slots & (wanted == 0)[:, None]
        if bool(hidden.any()):
            given = kwargs.get("position_ids")
            if self.keeps_prompt or kwargs.get("past_key_values") is not None or (mask is None and self._packed(given)):
                raise ValueError(
                    "Pseudo tokens of a prompt that does not act can only be hidden in a plain call of a decoder or "
                    "an encoder. Leave them out of the text: lit_peft.template.without_slots(ids)."
                )
            mask = (torch.ones_like(ids) if mask is None else mask).masked_fill(hidden, 0)
            if self.takes_positions:
                every = torch.arange(ids.shape[1], device=ids.device)[None]
                kwargs = {**kwargs, "position_ids": (every if given is None else given) - hidden.long().cumsum(1)}
                kwargs["position_ids"] = kwargs["position_ids"].clamp(min=0)
        return None, mask, embeds, kwargs

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
        ids = kwargs.get("input_ids")
        if ids is not None and any(config.template for config in self.configs.values()) and bool((ids == SLOT).any()):
            # a classifier's decoder is given the encoder's text: there the pseudo tokens say nothing
            seen = (ids != SLOT).long()
            own = kwargs.get("attention_mask")
            kwargs = {**kwargs, "input_ids": ids * seen, "attention_mask": seen if own is None else own * seen}
        if states is None:
            return self.base(*args, **kwargs)
        batch = states.shape[0]
        shares = [share for share in self.shares(states) if not self.configs[share[0]].template]
        front, behind = (
            block(
                [
                    (self.configs[name].num_virtual_tokens, rows)
                    for name, rows in shares
                    if bool(self.configs[name].after_bos) is later
                ],
                batch,
                states.device,
            )
            for later in (False, True)
        )
        total = states.shape[1] - front.length - behind.length
        if mask is None:  # then the whole text is there
            mask = torch.ones(batch, total, dtype=torch.long, device=states.device)
        whole = Layout(batch, total, front, behind, padded_starts(mask)).mask(mask)
        return self.base(*args, **{**kwargs, "encoder_attention_mask": whole})


def learned_positions(base: nn.Module) -> int | None:
    """Return how many positions a model has an embedding for; None where it computes them (RoPE, relative ones)."""
    for path, module in base.named_modules():
        leaf = path.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and (leaf == "wpe" or leaf.startswith(("position_emb", "embed_pos"))):
            # RoBERTa counts from behind its padding's number
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return None
