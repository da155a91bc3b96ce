"""Blocks: named adapters put together, in the place of a name.

    with adapters(model, Stack("language", Average("news", "law", weights=[3, 1]))):

A block is plain data and names adapters; it holds no weights. What it means at one layer is up to the adapters there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True, init=False, repr=False)
class Block:
    """Several named adapters as one: the base class of `Stack`, `Average` and `Fuse`.

    Args:
        *parts: names of adapters, or blocks of them.

    Raises:
        ValueError: if there are fewer than two.
        TypeError: if a part is neither a name nor a block.
    """

    parts: tuple[Entry, ...]
    word: ClassVar[str] = ""  # how it is called in YAML

    def __init__(self, *parts: Entry) -> None:
        kind = type(self).__name__
        for part in parts:
            if not isinstance(part, str | Block):
                raise TypeError(
                    f"{kind} takes names of adapters and blocks of them, not {part!r}. Write {kind}('a', 'b')."
                )
        if len(parts) < 2:
            alone = f"the adapter {parts[0]!r} alone" if parts else "none"
            raise ValueError(f"{kind} puts adapters together and was given {alone}. Name two or more.")
        object.__setattr__(self, "parts", parts)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all adapters in it, each once."""
        return names_in(self.parts)

    def inside(self) -> Iterator[Block]:
        """Yield this block and all blocks in it."""
        yield self
        for part in self.parts:
            if isinstance(part, Block):
                yield from part.inside()

    def plain(self) -> dict[str, Any]:
        """Return it as it is written in YAML: `{"stack": ["a", "b"]}`."""
        return {self.word: [plain(part) for part in self.parts]}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self.parts))})"


Entry = str | Block


class Stack(Block):
    """Adapters one behind the other: the second acts on what the first has made, and so on.

    Example:
        >>> Stack("language", "task").names
        ('language', 'task')
    """

    word: ClassVar[str] = "stack"


@dataclass(frozen=True, init=False, repr=False)
class Average(Block):
    """The weighted mean of what adapters change: y + sum_i w_i (change of adapter i), with weights that sum to one.

    Args:
        *parts: names of adapters, or blocks of them.
        weights: one for each, none negative; they are divided by their sum. None: all the same.

    Raises:
        ValueError: if the weights do not fit.

    Example:
        >>> Average("a", "b", weights=[3, 1]).weights
        (0.75, 0.25)
    """

    weights: tuple[float, ...]
    word: ClassVar[str] = "average"

    def __init__(self, *parts: Entry, weights: Sequence[float] | None = None) -> None:
        super().__init__(*parts)
        given = [1.0] * len(parts) if weights is None else [float(weight) for weight in weights]
        if len(given) != len(parts):
            raise ValueError(f"Average has {len(parts)} parts and {len(given)} weights. Give one weight for each part.")
        wrong = [weight for weight in given if not 0 <= weight < math.inf]
        if wrong or not sum(given):
            what = f"the weight {wrong[0]:g}" if wrong else "weights that are all 0"
            raise ValueError(
                f"Average was given {what}; a mean needs numbers of 0 or more. To subtract use combine_adapters."
            )
        total = sum(given)
        object.__setattr__(self, "weights", tuple(weight / total for weight in given))

    def plain(self) -> dict[str, Any]:
        """Return it as it is written in YAML: `{"average": ["a", "b"], "weights": [0.75, 0.25]}`."""
        return {**super().plain(), "weights": list(self.weights)}

    def __repr__(self) -> str:
        shown = ", ".join(f"{weight:g}" for weight in self.weights)
        return f"Average({', '.join(map(repr, self.parts))}, weights=[{shown}])"


class Fuse(Block):
    """AdapterFusion: attention over what adapters change, with weights that were trained for just these adapters.

    Raises:
        ValueError: if a name comes twice.
        TypeError: if a part is no name.

    Example:
        >>> Fuse("news", "law")
        Fuse('news', 'law')
    """

    word: ClassVar[str] = "fuse"

    def __init__(self, *parts: Entry) -> None:
        super().__init__(*parts)
        for part in parts:
            if isinstance(part, Block):
                raise TypeError(
                    f"Fuse was trained over adapters, not over {part!r}. Name adapters; {part!r} may hold it."
                )
            if parts.count(part) > 1:
                raise ValueError(f"Fuse names the adapter {part!r} twice. Name each once.")


def names_in(entries: Iterable[Entry]) -> tuple[str, ...]:
    """Return the names of all adapters in names and blocks, each once, in order."""
    found: dict[str, None] = {}
    for entry in entries:
        found.update(dict.fromkeys((entry,) if isinstance(entry, str) else entry.names))
    return tuple(found)


def plain(entry: Entry) -> str | dict[str, Any]:
    """Return a name or a block as plain data, as it is written in YAML and kept in checkpoints."""
    return entry if isinstance(entry, str) else entry.plain()


def read(entry: Any) -> Entry:
    """Return a name or a block from plain data; the inverse of `plain`.

    Raises:
        ValueError: if it is neither.

    Example:
        >>> read({"stack": ["language", {"fuse": ["news", "law"]}]})
        Stack('language', Fuse('news', 'law'))
    """
    if isinstance(entry, str | Block):
        return entry
    if isinstance(entry, Mapping):
        kinds = [kind for kind in (Stack, Average, Fuse) if kind.word in entry]
        options = {key: value for key, value in entry.items() if not kinds or key != kinds[0].word}
        if len(kinds) == 1 and isinstance(entry[kinds[0].word], Sequence) and options.keys() <= _options(kinds[0]):
            return kinds[0](*[read(part) for part in entry[kinds[0].word]], **options)
    raise ValueError(
        f"{entry!r} is neither the name of an adapter nor a block of several. Write a name, stack: [a, b], "
        "average: [a, b] (with weights: [0.7, 0.3]) or fuse: [a, b]."
    )


def _options(kind: type[Block]) -> set[str]:
    return {"weights"} if kind is Average else set()
