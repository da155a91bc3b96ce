"""Answers of a language model: splitting them off a batch, generating them, choosing among known ones."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from lit_peft.data.render import Renderer
from lit_peft.template import without_slots

if TYPE_CHECKING:
    from lit_peft.tasks.sft import SFT


@dataclass(frozen=True)
class Row:
    """One row of a batch as token ids: the prompt, and the answer with its end of turn."""

    prompt: list[int]
    answer: list[int]


def split(batch: dict[str, Tensor], encoder_decoder: bool) -> list[Row]:
    """Split each row into its prompt and its last trained span; rows with nothing trained (fillers) are left out."""
    rows = []
    for i, labels in enumerate(batch["labels"]):
        trained = (labels != -100).nonzero().squeeze(1).tolist()
        if not trained:
            continue
        ids = batch["input_ids"][i]
        if encoder_decoder:
            rows.append(Row(ids[batch["attention_mask"][i].bool()].tolist(), labels[trained].tolist()))
            continue
        start = trained[-1]
        while start - 1 in trained:
            start -= 1
        rows.append(Row(ids[:start].tolist(), ids[start : trained[-1] + 1].tolist()))
    return rows


def text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Return an answer's text without special tokens and outer white space."""
    return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()


def render(task: SFT, messages: list[dict[str, str]]) -> list[int]:
    """Return the token ids of a conversation up to where the answer begins, as in training."""
    renderer = Renderer(task.tokenizer, "all", getattr(task, "text_template", ""))
    if task.encoder_decoder and not task.tokenizer.chat_template:
        return renderer.plain_ids("\n".join(message["content"] for message in renderer.wrapped(messages)))
    return renderer.ids(messages, cue=True)


def readable(task: SFT, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return prompts as the model reads them: without pseudo tokens where nothing acts that fills them."""
    kept = getattr(task, "text_template", "")
    return [list(prompt) if kept else without_slots(prompt) for prompt in prompts]


def _padded(prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pad on the left: what is generated follows each prompt directly."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    return ids, mask


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0):
        if candidate is not None:
            return int(candidate)
    return 0


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def generate(
    task: SFT, prompts: Sequence[Sequence[int]], max_new_tokens: int, streamer: BaseStreamer | None = None
) -> list[str]:
    """Continue each prompt greedily until its end of turn and return the texts; a streamer sees one prompt's tokens."""
    assert task.model is not None
    if not prompts:
        return []
    tokenizer, model = task.tokenizer, task.model
    pad = _pad_id(tokenizer)
    ids, mask = _padded(readable(task, prompts), pad, task.device)
    ends = {tokenizer.eos_token_id, *_as_list(getattr(model.generation_config, "eos_token_id", None))} - {None}
    with _evaluating(model):
        out = model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            use_cache=True,
            pad_token_id=pad,
            eos_token_id=sorted(ends) or None,
            streamer=streamer,
        )
    start = 0 if task.encoder_decoder else ids.shape[1]
    return [text(tokenizer, row[start:].tolist()) for row in out]


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def choose(task: SFT, prompts: Sequence[Sequence[int]], choices: Sequence[Sequence[int]]) -> list[int]:
    """Return for each prompt the index of the choice with the highest log-probability (summed, end of turn included).

    The prompts run once; each choice continues their cached keys and values.

    Args:
        task: the task whose model answers.
        prompts: token ids.
        choices: token ids of the possible answers.
    """
    assert task.model is not None
    model = task.model
    pad = _pad_id(task.tokenizer)
    ids, mask = _padded(readable(task, prompts), pad, task.device)
    scores = torch.empty(len(prompts), len(choices), device=task.device)
    with _evaluating(model):
        if task.encoder_decoder:
            encoded = model.get_encoder()(input_ids=ids, attention_mask=mask)  # type: ignore[operator]
            for i, choice in enumerate(choices):
                labels = torch.tensor([list(choice)] * len(prompts), device=task.device)
                shifted = model.prepare_decoder_input_ids_from_labels(labels=labels)  # type: ignore[operator]
                logits = model(encoder_outputs=encoded, attention_mask=mask, decoder_input_ids=shifted).logits
                scores[:, i] = _log_probability(logits, labels)
            return scores.argmax(1).tolist()
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        last = {"logits_to_keep": 1} if keeps_logits(type(model)) else {}
        first = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, **last)
        cache = first.past_key_values
        for i, choice in enumerate(choices):
            labels = torch.tensor([list(choice)] * len(prompts), device=task.device)
            logits = first.logits[:, -1:]
            if len(choice) > 1:
                more = model(
                    input_ids=labels[:, :-1],
                    attention_mask=F.pad(mask, (0, len(choice) - 1), value=1),
                    position_ids=positions[:, -1:] + torch.arange(1, len(choice), device=task.device),
                    past_key_values=cache,
                    use_cache=True,
                )
                logits = torch.cat([logits, more.logits], 1)
                cache.crop(1 - len(choice))  # take the choice out again
            scores[:, i] = _log_probability(logits, labels)
    return scores.argmax(1).tolist()


def _log_probability(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.float().log_softmax(-1).gather(2, labels[..., None]).squeeze(2).sum(1)


_TAKES: dict[type, bool] = {}


def keeps_logits(kind: type) -> bool:
    """Return whether a model class can compute the logits of chosen positions only."""
    if kind not in _TAKES:
        _TAKES[kind] = "logits_to_keep" in inspect.signature(kind.forward).parameters  # type: ignore[attr-defined]
    return _TAKES[kind]
