"""From messages to token ids and the mask of what is learned, only ever through the tokenizer's chat template.

The template decides what the model sees. What is learned is found in its output: `{% generation %}` spans where the
template has them; else by rendering up to each answer with and without it and comparing token prefixes; else, where a
template rewrites earlier turns, by the place of the answer's text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

import jinja2
from transformers import PreTrainedTokenizerBase

from lit_peft.data.formats import Message
from lit_peft.template import filled, marked, slotted

PLAIN_TEMPLATE = (
    "{{ bos_token or '' }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ m.content }}\n\n"
    "{% elif m.role == 'assistant' %}### Answer:\n{% generation %}{{ m.content }}{{ eos_token or '' }}"
    "{% endgeneration %}\n\n"
    "{% else %}### Question:\n{{ m.content }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### Answer:\n{% endif %}"
)
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
TrainOn = Literal["all", "last"]
Tokens = tuple[list[int], list[bool]]


def template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the tokenizer's chat template, or `PLAIN_TEMPLATE` where it has none."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default") or next(iter(template.values()))
    return template or PLAIN_TEMPLATE


class Renderer:
    """Render conversations with one tokenizer and mark what is learned.

    Args:
        tokenizer: The tokenizer whose chat template is used.
        train_on: Learn `all` assistant turns or only the `last`.
        text_template: What the first question of a conversation is put into, with pseudo tokens (see
            `lit_peft.template`); empty for the question as it is.

    Example:
        >>> ids, learned = Renderer(tokenizer)([{"role": "user", "content": "2+2?"},
        ...                                     {"role": "assistant", "content": "4"}])  # doctest: +SKIP
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, train_on: TrainOn = "all", text_template: str = "") -> None:
        self.tokenizer, self._mark = marked(tokenizer) if text_template else (tokenizer, -1)
        self.train_on = train_on
        self.text_template = text_template
        self.template = template_of(tokenizer)
        self.marked = bool(_GENERATION.search(self.template)) and tokenizer.is_fast
        self._special = set(tokenizer.all_special_ids)

    def text(self, messages: Sequence[Message], cue: bool = False) -> str:
        """Return the conversation as text; `cue` adds the opening of the assistant's turn.

        Raises:
            ValueError: If the template refuses the conversation.
        """
        return self._text(self.wrapped(messages), cue)

    def ids(self, messages: Sequence[Message], cue: bool = False) -> list[int]:
        """Return the conversation as token ids; `cue` adds the opening of the assistant's turn."""
        return self._ids(self.wrapped(messages), cue)

    def wrapped(self, messages: Sequence[Message]) -> list[Message]:
        """Return the conversation with its first question inside the template.

        Raises:
            ValueError: If there is a template and no question.
        """
        found = list(messages)
        if not self.text_template:
            return found
        at = next((i for i, message in enumerate(found) if message["role"] == "user"), None)
        if at is None:
            raise ValueError(f"prompt.template {self.text_template!r} needs a user's turn to go around, and has none")
        found[at] = {**found[at], "content": filled(self.text_template, found[at]["content"])}
        return found

    def wrapped_ids(self, messages: Sequence[Message], cue: bool = False) -> list[int]:
        """Return the token ids of a conversation that is wrapped already."""
        return self._ids(messages, cue)

    def pieces(self, text: str) -> list[int]:
        """Return the token ids of a piece of text, with `SLOT` for each pseudo token."""
        return self._encode(text)

    def plain_ids(self, text: str) -> list[int]:
        """Return the token ids of a text that is given to a model as it is, with `SLOT` for each pseudo token."""
        return slotted(self.tokenizer(text, verbose=False)["input_ids"], self._mark)

    def __call__(self, messages: Sequence[Message]) -> Tokens:
        """Return the token ids of a conversation and, for each, whether it is learned.

        Raises:
            ValueError: If an answer cannot be found in what the template renders.
        """
        answers = self.answers(messages)
        messages = self.wrapped(messages)
        if not answers:
            ids = self._ids(messages)
            return ids, [False] * len(ids)
        messages = messages[: answers[-1] + 1]  # nothing after the last answer can teach anything
        if self.marked:
            ids, spans = self._by_marks(messages)
        else:
            ids, spans = self._by_prefix(messages, answers) or self._by_offset(messages, answers)
        if self.train_on == "last":
            spans = spans[-1:]
        if not spans:
            return ids, [False] * len(ids)
        mask = [False] * len(ids)
        for index, (start, end) in enumerate(spans):
            start, end = self._close(ids, start, end)
            mask[start:end] = [True] * (end - start)
            if index == len(spans) - 1 and not self._ends(ids[start:end]) and self.tokenizer.eos_token_id is not None:
                # A template without an end of turn would never teach the model to stop.
                ids, mask = [*ids[:end], self.tokenizer.eos_token_id], [*mask[:end], True]
        last = len(mask) - mask[::-1].index(True)  # what follows the last answer is never learned, nor read
        return ids[:last], mask[:last]

    def answers(self, messages: Sequence[Message]) -> list[int]:
        """Return the indices of the assistant turns that are learned from."""
        found = [i for i, m in enumerate(messages) if m["role"] == "assistant" and m["content"].strip()]
        return found[-1:] if self.train_on == "last" else found

    def _apply(self, messages: Sequence[Message], cue: bool, **options: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), chat_template=self.template, add_generation_prompt=cue, **options
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template refuses it ({error})") from None

    def _encode(self, text: str) -> list[int]:
        return slotted(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], self._mark)

    def _text(self, messages: Sequence[Message], cue: bool = False) -> str:
        return str(self._apply(messages, cue, tokenize=False))

    def _ids(self, messages: Sequence[Message], cue: bool = False) -> list[int]:
        return self._encode(self._text(messages, cue))

    def _by_marks(self, messages: Sequence[Message]) -> tuple[list[int], list[tuple[int, int]]]:
        made = self._apply(messages, False, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        mask = made["assistant_masks"]
        edges = [i for i in range(len(mask) + 1) if (i < len(mask) and mask[i]) != (i > 0 and mask[i - 1])]
        spans = list(zip(edges[::2], edges[1::2], strict=True))
        # The mark may stop just before the end of turn, which must be learned.
        return slotted(made["input_ids"], self._mark), [
            (s, e + 1 if self._ends(made["input_ids"][e : e + 1]) else e) for s, e in spans
        ]

    def _by_prefix(
        self, messages: Sequence[Message], answers: Sequence[int]
    ) -> tuple[list[int], list[tuple[int, int]]] | None:
        whole = self._ids(messages)
        spans = []
        for k in answers:
            before = self._ids(messages[:k], cue=True)
            upto = whole if k == len(messages) - 1 else self._ids(messages[: k + 1])
            if whole[: len(upto)] != upto or upto[: len(before)] != before or len(before) == len(upto):
                return None
            spans.append((len(before), len(upto)))
        return whole, spans

    def _by_offset(
        self, messages: Sequence[Message], answers: Sequence[int]
    ) -> tuple[list[int], list[tuple[int, int]]]:
        text = self._text(messages)
        spans, cursor = [], 0
        for k, message in enumerate(messages):
            content = message["content"].strip()
            start = text.find(content, cursor)
            if start < 0 and k in answers:
                raise ValueError(
                    f"the chat template does not show answer {k + 1} as written, so it cannot be told what to learn; "
                    "use a template with {% generation %} or --data.train_on last"
                )
            if start >= 0:
                cursor = start + len(content)
            if k in answers:
                spans.append((start, cursor))
        made = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, offsets = slotted(made["input_ids"], self._mark), made["offset_mapping"]
        found = []
        for start, end in spans:
            inside = [i for i, (a, b) in enumerate(offsets) if a < end and b > start]
            stop = inside[-1] + 1
            # The end of turn follows the answer, perhaps after white space.
            ahead = next((i for i in range(stop, min(stop + 3, len(ids))) if ids[i] in self._special), None)
            found.append((inside[0], stop if ahead is None else ahead + 1))
        return ids, found

    def _ends(self, ids: Sequence[int]) -> bool:
        return bool(ids) and ids[-1] in self._special

    def _close(self, ids: list[int], start: int, end: int) -> tuple[int, int]:
        """Stop learning at the end of turn: the line break that templates put after it is never generated."""
        for stop in range(end, start, -1):
            if ids[stop - 1] in self._special:
                return start, stop
            if self.tokenizer.decode(ids[stop - 1 : stop]).strip():
                break
        return start, end
