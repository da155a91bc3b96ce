"""The shapes in which people keep instructions, and how each becomes messages.

One internal form: a list of messages `{"role", "content"}`, or a plain string that is learned whole. A schema is one
entry of `SCHEMAS`; it is recognised by the columns present.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Message = dict[str, str]
Example = list[Message] | str
Row = Mapping[str, Any]
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}


def _word(row: Row, name: str) -> str:
    value = row.get(name)
    if value is None or value != value:  # pandas leaves a NaN where a line stops short
        raise ValueError(f"{name!r} is missing")
    return str(value)


def _turns(row: Row, name: str, role: str, content: str) -> list[Message]:
    turns = row.get(name)
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise ValueError(f"{name!r} is not a list of turns")
    messages = []
    for turn in turns:
        if not isinstance(turn, Mapping) or turn.get(role) is None or turn.get(content) is None:
            raise ValueError(f"a turn of {name!r} lacks {role!r} or {content!r}")
        if not isinstance(turn[content], str):
            raise ValueError(f"a turn of {name!r} has {content!r} of type {type(turn[content]).__name__}, not text")
        messages.append({"role": _ROLES.get(turn[role], turn[role]), "content": turn[content]})
    return messages


def _with_system(row: Row, messages: list[Message]) -> list[Message]:
    system = row.get("system")
    if system and messages[0]["role"] != "system":
        return [{"role": "system", "content": str(system)}, *messages]
    return messages


def _messages(row: Row) -> Example:
    return _with_system(row, _turns(row, "messages", "role", "content"))


def _sharegpt(row: Row) -> Example:
    turns = row.get("conversations") or [{}]
    if "role" in turns[0] and turns[0]["role"] is not None:
        return _with_system(row, _turns(row, "conversations", "role", "content"))
    return _with_system(row, _turns(row, "conversations", "from", "value"))


def _alpaca(row: Row) -> Example:
    extra = row.get("input")
    prompt = _word(row, "instruction") + (f"\n\n{extra}" if extra and extra == extra else "")
    past = [
        {"role": role, "content": str(text)}
        for pair in row.get("history") or []
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    answer = {"role": "assistant", "content": _word(row, "output")}
    return _with_system(row, [*past, {"role": "user", "content": prompt}, answer])


def _prompt_completion(row: Row) -> Example:
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        return _turns(row, "prompt", "role", "content") + _turns(row, "completion", "role", "content")
    messages = [
        {"role": "user", "content": _word(row, "prompt")},
        {"role": "assistant", "content": _word(row, "completion")},
    ]
    return _with_system(row, messages)


def _text(row: Row) -> Example:
    return _word(row, "text")


@dataclass(frozen=True)
class Schema:
    """How rows of one shape become messages.

    Args:
        fields: Sets of columns that are enough, in order of preference, each a mapping from the schema's field to the
            column's name.
        convert: Turns a row (columns renamed to fields) into messages or a text.
    """

    fields: tuple[dict[str, str], ...]
    convert: Callable[[Row], Example]


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


SCHEMAS: dict[str, Schema] = {
    "messages": Schema((_same("messages"),), _messages),
    "sharegpt": Schema((_same("conversations"), {"conversations": "conversation"}), _sharegpt),
    "alpaca": Schema(
        (
            _same("instruction", "output"),
            {"instruction": "instruction", "output": "response"},
        ),
        _alpaca,
    ),
    "prompt_completion": Schema(
        (
            _same("prompt", "completion"),
            {"prompt": "prompt", "completion": "response"},
            {"prompt": "question", "completion": "answer"},
            {"prompt": "input", "completion": "target"},
            {"prompt": "input", "completion": "output"},
        ),
        _prompt_completion,
    ),
    "text": Schema((_same("text"), {"text": "content"}), _text),
}


@dataclass(frozen=True)
class Reading:
    """The schema chosen for a table, the columns it uses, and one sentence saying why."""

    schema: str
    names: dict[str, str]
    why: str

    def __call__(self, row: Row) -> Example:
        """Convert one row.

        Raises:
            ValueError: If the row does not have the schema's shape.
        """
        return SCHEMAS[self.schema].convert({**row, **{field: row.get(name) for field, name in self.names.items()}})


def recognise(
    columns: Sequence[str], format: str | None = None, renamed: Mapping[str, str] | None = None, where: str = "data"
) -> Reading:
    """Choose the schema of a table from its column names.

    Args:
        columns: Columns of the table.
        format: Take this schema, whatever else would fit.
        renamed: The user's own mapping from a schema's field to the column that holds it.
        where: What to call the table in messages.

    Raises:
        ValueError: If no schema fits; the message lists the columns found and the schemas known.

    Example:
        >>> recognise(["instruction", "input", "output"]).schema
        'alpaca'
    """
    known = "; ".join(f"{name} ({' + '.join(schema.fields[0])})" for name, schema in SCHEMAS.items())
    if format is not None and format not in SCHEMAS:
        raise ValueError(f"Unknown data format {format!r}. Known: {known}.")
    if renamed and (lost := [name for name in renamed.values() if name not in columns]):
        raise ValueError(f"{where} has no column {lost[0]!r}; its columns are {list(columns)}.")
    for name in [format] if format else SCHEMAS:
        for fields in SCHEMAS[name].fields:
            names = {field: (renamed or {}).get(field, column) for field, column in fields.items()}
            if all(column in columns for column in names.values()):
                names |= {field: column for field, column in (renamed or {}).items() if field not in names}
                reason = "as asked" if format else "because it has " + " and ".join(map(repr, names.values()))
                return Reading(name, names, f"{where} is read as {name}, {reason}.")
    asked = f"does not fit the format {format!r}" if format else "fits no known schema"
    raise ValueError(
        f"{where} {asked}: its columns are {list(columns)}. Known: {known}. "
        f"Name your own columns with --data.columns '{{prompt: ..., completion: ...}}'."
    )
