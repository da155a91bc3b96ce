"""Classification of whole texts with a head on the backbone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score, MulticlassMatthewsCorrCoef
from transformers import AutoModelForSequenceClassification

from lit_peft.sites import classification_head
from lit_peft.tasks.task import Task

IGNORED = -100


class Classification(Task):
    """Train a classifier of texts: cross entropy over the labels, the head trained beside the method's adapters.

    Batches: `input_ids`, `attention_mask` (batch, length) and `labels` (batch,), -100 for rows that do not count.

    Args:
        backbone: model name on the hub, a local folder, or `package:NAME` for a model inside a pip package.
        labels: names of the classes; None: those of the data.
        head_lr: learning rate of the head when `lr` is None.
        **kwargs: see `Task`.

    Example:
        >>> from lit_peft import Classification, LoRA
        >>> class Mine(LoRA, Classification): ...
    """

    peft_task_type = "SEQ_CLS"

    def __init__(self, backbone: str, *, labels: list[str] | None = None, head_lr: float = 1e-3, **kwargs: Any) -> None:
        super().__init__(backbone, **kwargs)
        self.labels = labels
        self.head_lr = head_lr
        self._head: tuple[str, ...] = ()
        self._new: frozenset[str] = frozenset()
        self.save_hyperparameters({"labels": labels, "head_lr": head_lr})

    def auto_class(self) -> type:
        """Return the Auto class with a classification head."""
        return AutoModelForSequenceClassification  # type: ignore[no-any-return]

    def build_model(self, **kwargs: Any) -> nn.Module:
        """Load the backbone with a head of the right size.

        Raises:
            ValueError: if the labels are not known.
        """
        if self.labels is None:
            data = getattr(self._trainer, "datamodule", None)
            self.labels = getattr(data, "labels", None)
        if not self.labels:
            raise ValueError("The classes are not known. Pass labels=[...], or data with a column of labels.")
        self.save_hyperparameters({"labels": list(self.labels)})
        names = dict(enumerate(self.labels))
        ids = {name: i for i, name in names.items()}
        model = super().build_model(num_labels=len(self.labels), id2label=names, label2id=ids, **kwargs)
        config: Any = model.config
        if config.pad_token_id is None:  # causal models need it to find each row's last token
            tokenizer = self.tokenizer
            pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
            config.pad_token_id = pad
        return model

    def configure_model(self) -> None:
        """Load the backbone and its metrics, once."""
        super().configure_model()
        if self._head or self.model is None:
            return
        head = classification_head(self.model)
        if head is None:
            raise ValueError(f"{type(self.model).__name__} has no classification head that is known here.")
        self._head = (f"{head}.",)
        self._new = self.model.__dict__.get("new_weights", frozenset())
        number = len(self.labels or [])
        scores = MetricCollection(
            {
                "accuracy": MulticlassAccuracy(number, average="micro", ignore_index=IGNORED),
                "f1": MulticlassF1Score(number, average="macro", ignore_index=IGNORED),
                "mcc": MulticlassMatthewsCorrCoef(number, ignore_index=IGNORED),
            }
        )
        self.val_scores, self.test_scores = scores.clone(prefix="val_"), scores.clone(prefix="test_")
        self.val_nll, self.test_nll = MeanMetric(), MeanMetric()

    def is_trainable(self, name: str, parameter: nn.Parameter) -> bool:
        """The head is, and whatever else the backbone's files do not hold (a pooler): it starts from nothing."""
        return self._is_new(name) or super().is_trainable(name, parameter)

    def learning_rate(self, name: str, parameter: nn.Parameter) -> float | None:
        """Return the head's own rate."""
        if self._is_new(name):
            return self.head_lr
        return super().learning_rate(name, parameter)

    def _is_new(self, name: str) -> bool:
        # an adapter around a new layer moves its weights one step down
        return (bool(self._head) and name.startswith(self._head)) or name.replace(".base.", ".") in self._new

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        """Return (batch, classes)."""
        assert self.model is not None
        inputs = {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask", "token_type_ids")}
        return self.model(**inputs).logits.float()  # type: ignore[no-any-return]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the summed loss; `Task` divides the gradients once, over the whole batch."""
        loss = F.cross_entropy(self.logits(batch), batch["labels"], ignore_index=IGNORED, reduction="sum")
        return self.summed(loss, (batch["labels"] != IGNORED).sum())

    def _measure(self, batch: dict[str, Tensor], nll: MeanMetric, scores: MetricCollection) -> None:
        kept = batch["labels"] != IGNORED
        logits, labels = self.logits(batch)[kept], batch["labels"][kept]
        if labels.numel():
            nll.update(F.cross_entropy(logits, labels, reduction="none"))
            scores.update(logits, labels)

    def _report(self, stage: str, nll: MeanMetric, scores: MetricCollection) -> None:
        self.log(f"{stage}_loss", nll.compute(), prog_bar=True)
        self.log_dict(scores.compute(), prog_bar=True)
        nll.reset()
        scores.reset()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Measure loss, accuracy, F1 and MCC."""
        self._measure(batch, self.val_nll, self.val_scores)

    def on_validation_epoch_end(self) -> None:
        """Log `val_loss`, `val_accuracy`, `val_f1` (macro), `val_mcc` over all rows of all processes."""
        self._report("val", self.val_nll, self.val_scores)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Measure loss, accuracy, F1 and MCC."""
        self._measure(batch, self.test_nll, self.test_scores)

    def on_test_epoch_end(self) -> None:
        """Log `test_loss`, `test_accuracy`, `test_f1` (macro), `test_mcc` over all rows of all processes."""
        self._report("test", self.test_nll, self.test_scores)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> list[dict[str, Any]]:
        """Return one record a row: `text`, `label` (of the data, if any), `predicted`, `probability`."""
        assert self.labels is not None
        with torch.no_grad():
            probabilities = self.logits(batch).softmax(-1)
        records = []
        for i, row in enumerate(probabilities):
            best = int(row.argmax())
            true = int(batch["labels"][i]) if "labels" in batch else IGNORED
            ids = batch["input_ids"][i][batch["attention_mask"][i].bool()]
            records.append(
                {
                    "text": self.tokenizer.decode(ids, skip_special_tokens=True),
                    "label": self.labels[true] if true != IGNORED else None,
                    "predicted": self.labels[best],
                    "probability": float(row[best]),
                }
            )
        return records
