"""Supervised fine-tuning on answers: causal and sequence-to-sequence language models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MeanMetric

from lit_peft.ops.cross_entropy import linear_cross_entropy, token_scores
from lit_peft.ops.lean import LeanHead, scored
from lit_peft.tasks import answers
from lit_peft.tasks.task import Task

IGNORED = -100


class SFT(Task):
    """Train a language model on answers: loss = -sum over trained tokens of log p, divided by their number.

    Only tokens whose label is not -100 are learned (answers, with their end of turn). The number is that of the whole
    accumulated, all-process batch. Logits are computed only where a label is kept.

    Batches: `input_ids`, `labels` (batch, length) and `attention_mask`, or `position_ids` for packed rows.

    Args:
        backbone: model name on the hub, a local folder, or `package:NAME` for a model inside a pip package.
        max_new_tokens: longest generated answer in tests, predictions and chat.
        **kwargs: see `Task`.

    Example:
        >>> from lit_peft import LoRA, SFT
        >>> class Mine(LoRA, SFT): ...
        >>> # Trainer(max_epochs=1).fit(Mine(backbone="Qwen/Qwen3-0.6B"), Instructions("chats.jsonl"))
    """

    def __init__(self, backbone: str, *, max_new_tokens: int = 128, **kwargs: Any) -> None:
        super().__init__(backbone, **kwargs)
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be 1 or more.")
        self.max_new_tokens = max_new_tokens
        self.save_hyperparameters({"max_new_tokens": max_new_tokens})
        self.val_nll, self.val_hits = MeanMetric(), MeanMetric()
        self.test_nll, self.test_hits = MeanMetric(), MeanMetric()
        self.test_exact, self.test_choice = MeanMetric(), MeanMetric()

    @property
    def peft_task_type(self) -> str:  # type: ignore[override]
        """HF PEFT's name for this task."""
        return "SEQ_2_SEQ_LM" if self.encoder_decoder else "CAUSAL_LM"

    def scored(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, LeanHead | None]:
        """Return what stands for the n trained tokens of a batch, and their targets (n,).

        That is logits (n, vocabulary) and None, or hidden states (n, width) and the output layer they belong to. A
        batch without a trained token gives one that is ignored, so that every process has gradients. A subclass with
        `trained_logits` of its own is asked for those.
        """
        if type(self).trained_logits is not SFT.trained_logits:
            return (*self.trained_logits(batch), None)
        return self._scored(batch)

    def _scored(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, LeanHead | None]:
        assert self.model is not None
        model, labels = self.model, batch["labels"]
        inputs: dict[str, Any] = {k: batch[k] for k in ("input_ids", "attention_mask", "position_ids") if k in batch}
        inputs["use_cache"] = False
        if self.encoder_decoder:
            shifted = model.prepare_decoder_input_ids_from_labels(labels=labels)  # type: ignore[operator]
            out, head = scored(model, {**inputs, "decoder_input_ids": shifted})
            targets = labels
        else:
            targets = labels[:, 1:]
            columns = (targets != IGNORED).any(0).nonzero().squeeze(1)
            if columns.numel() == 0:
                columns = columns.new_zeros(1)
            if answers.keeps_logits(type(model)):
                out, head = scored(model, {**inputs, "logits_to_keep": columns})
            else:
                out, head = scored(model, inputs)
                out = out[:, columns]
            targets = targets[:, columns]
        kept = targets != IGNORED
        if not kept.any():
            return out[:1, 0], targets[:1, 0], head
        return out[kept], targets[kept], head

    def trained_logits(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return logits (n, vocabulary) and targets (n,) of the n trained tokens of a batch."""
        out, targets, head = self._scored(batch)
        return out if head is None else head(out), targets

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """See in the first batch that the end of turn is learned.

        Raises:
            ValueError: if every answer is followed by an end of turn that is masked. That happens where padding is the
                same token and was masked by its id; such a model never stops writing.
        """
        super().on_train_batch_start(batch, batch_idx)
        end = self.tokenizer.eos_token_id
        if batch_idx or self.encoder_decoder or end != self.tokenizer.pad_token_id or "attention_mask" not in batch:
            return
        learned = batch["labels"] != IGNORED
        after = learned[:, :-1] & ~learned[:, 1:] & batch["attention_mask"][:, 1:].bool()
        eaten = after & (batch["input_ids"][:, 1:] == end)
        if bool(eaten.any()) and not bool((batch["labels"] == end).any()):
            raise ValueError(
                f"The end of turn ({self.tokenizer.eos_token!r}) is masked after every answer, so the model would "
                "never stop. It is the padding token too: mask padding by its place (attention_mask), not by its id."
            )

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the summed loss; `Task` divides the gradients once, over the whole batch."""
        out, targets, head = self.scored(batch)
        count = (targets != IGNORED).sum()
        if not count:
            loss = out.float().sum() * 0.0
        elif head is None:
            loss = F.cross_entropy(out.float(), targets, reduction="sum")
        else:
            loss = linear_cross_entropy(out, head.weight, targets, head.bias, ignore_index=None)
        return self.summed(loss, count)

    def _measure(self, batch: dict[str, Tensor], nll: MeanMetric, hits: MeanMetric) -> None:
        out, targets, head = self.scored(batch)
        if (targets == IGNORED).any():
            return
        if head is None:
            nll.update(F.cross_entropy(out.float(), targets, reduction="none"))
            hits.update((out.argmax(-1) == targets).float())
        else:
            losses, right = token_scores(out, head.weight, targets, head.bias)
            nll.update(losses)
            hits.update(right)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Measure loss and accuracy of the trained tokens."""
        self._measure(batch, self.val_nll, self.val_hits)

    def on_validation_epoch_end(self) -> None:
        """Log `val_loss`, `val_perplexity`, `val_accuracy` over all tokens of all processes."""
        loss = self.val_nll.compute()
        self.log("val_loss", loss, prog_bar=True)
        self.log("val_perplexity", loss.exp())
        self.log("val_accuracy", self.val_hits.compute(), prog_bar=True)
        self.val_nll.reset()
        self.val_hits.reset()

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Measure what validation does, and the answers: generated exactly, chosen rightly among the known labels."""
        self._measure(batch, self.test_nll, self.test_hits)
        rows = answers.split(batch, self.encoder_decoder)
        if not rows:
            return
        prompts, wanted = [row.prompt for row in rows], [row.answer for row in rows]
        texts = answers.generate(self, prompts, self.max_new_tokens)
        truth = [answers.text(self.tokenizer, ids) for ids in wanted]
        self.test_exact.update(torch.tensor([float(a == b) for a, b in zip(texts, truth, strict=True)]))
        choices = self._choices()
        if choices:
            chosen = answers.choose(self, prompts, list(choices.values()))
            names = list(choices)
            self.test_choice.update(torch.tensor([float(names[i] == t) for i, t in zip(chosen, truth, strict=True)]))

    def on_test_epoch_end(self) -> None:
        """Log perplexity, token accuracy, exact match, and accuracy among the choices where the data has some."""
        loss = self.test_nll.compute()
        self.log("test_loss", loss)
        self.log("test_perplexity", loss.exp())
        self.log("test_accuracy", self.test_hits.compute())
        self.log("test_exact_match", self.test_exact.compute())
        if self._choices():
            self.log("test_choice_accuracy", self.test_choice.compute())
        for metric in (self.test_nll, self.test_hits, self.test_exact, self.test_choice):
            metric.reset()

    def _choices(self) -> dict[str, list[int]]:
        """Return the closed set of answers, if the data has one, as token ids."""
        data: Any = getattr(self.trainer, "datamodule", None)
        return data.choice_ids() if getattr(data, "choices", None) else {}

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> list[dict[str, Any]]:
        """Return one record a row: `prompt`, `answer` (of the data), `generated`."""
        rows = answers.split(batch, self.encoder_decoder)
        texts = answers.generate(self, [row.prompt for row in rows], self.max_new_tokens)
        return [
            {
                "prompt": self.tokenizer.decode(row.prompt),
                "answer": answers.text(self.tokenizer, row.answer),
                "generated": generated,
            }
            for row, generated in zip(rows, texts, strict=True)
        ]

    def reply(self, messages: list[dict[str, str]], max_new_tokens: int | None = None, streamer: Any = None) -> str:
        """Answer a conversation, greedily.

        Args:
            messages: `[{"role": "user", "content": "..."}, ...]`, ending with the user's turn.
            max_new_tokens: longest answer; default: the task's own.
            streamer: a transformers streamer, to see the answer while it is made.

        Returns:
            The answer's text.
        """
        prompt = answers.render(self, messages)
        return answers.generate(self, [prompt], max_new_tokens or self.max_new_tokens, streamer)[0]
