"""Which row goes to which process and when, and how to go on from the middle of an epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import distributed
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

FILLER = -1


class ShardedSampler(DistributedSampler[Any]):
    """Deal rows out to processes: process r of w takes every w-th row of one order, starting at r.

    The rows of a global batch are therefore the same for every number of processes. Where rows do not divide, the
    last ones get the index -1, a row that counts for nothing, instead of a row that another process already has.

    Args:
        dataset: Anything with a length.
        shuffle: Draw a new order in every epoch.
        seed: Seed of the order.
        replicas: Number of processes; None asks `torch.distributed`.
        rank: This process; None asks `torch.distributed`.
        groups: For each row, which weighted source it is from.
        weights: How often each source is drawn; an epoch keeps its length.

    Example:
        >>> [list(ShardedSampler(range(5), replicas=2, rank=r)) for r in range(2)]
        [[0, 2, 4], [1, 3, -1]]
    """

    def __init__(
        self,
        dataset: Any,
        *,
        shuffle: bool = False,
        seed: int = 0,
        replicas: int | None = None,
        rank: int | None = None,
        groups: Sequence[int] | None = None,
        weights: Sequence[float] | None = None,
    ) -> None:
        running = distributed.is_available() and distributed.is_initialized()
        replicas = replicas if replicas is not None else distributed.get_world_size() if running else 1
        rank = rank if rank is not None else distributed.get_rank() if running else 0
        super().__init__(dataset, num_replicas=replicas, rank=rank, shuffle=shuffle, seed=seed)
        self.rows = len(dataset)
        self.num_samples = -(-self.rows // replicas)
        self.total_size = self.num_samples * replicas
        self.groups, self.weights = groups, weights
        self.skip = 0

    def order(self) -> list[int]:
        """Return the order of this epoch's rows over all processes, without fillers."""
        if not self.shuffle:
            return list(range(self.rows))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        if self.weights is None or self.groups is None:
            return cast("list[int]", torch.randperm(self.rows, generator=generator).tolist())
        chosen = torch.multinomial(torch.tensor(self.weights), self.rows, replacement=True, generator=generator)
        order = torch.empty(self.rows, dtype=torch.long)
        groups = torch.tensor(self.groups)
        for source in range(len(self.weights)):
            # Go round each source in shuffled order, so that a row comes twice only when all have come once.
            rows, places = (groups == source).nonzero().flatten(), (chosen == source).nonzero().flatten()
            rounds = -(-len(places) // len(rows))
            drawn = [rows[torch.randperm(len(rows), generator=generator)] for _ in range(rounds)]
            if drawn:
                order[places] = torch.cat(drawn)[: len(places)]
        return cast("list[int]", order.tolist())

    def __iter__(self) -> Iterator[Any]:
        skip, self.skip = self.skip, 0
        order = self.order()
        order += [FILLER] * (self.total_size - self.rows)
        return iter(order[self.rank : self.total_size : self.num_replicas][skip:])

    def __len__(self) -> int:
        return self.num_samples


class ResumableLoader(DataLoader[Any]):
    """A DataLoader that can say how far it is, and go on from there.

    Lightning saves and loads `state_dict` of a training loader. Batches are counted as they are handed out, not as
    worker processes read ahead, and skipped ones are never read.
    """

    _rows = 0  # handed out in this epoch by all processes together: also right for another number of them
    _resume: dict[str, int] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator: which epoch it is, is asked at the first batch. Lightning makes the iterator before it has told
        # the sampler the epoch.
        state, self._resume = self._resume, None
        self._rows = state["rows"] if state and state["epoch"] == self._epoch() else 0
        share = 1
        if isinstance(self.sampler, ShardedSampler):
            share = self.sampler.num_replicas
            self.sampler.skip = self._rows // share
        for batch in super().__iter__():
            self._rows += share * (self.batch_size or 1)
            yield batch

    def _epoch(self) -> int:
        return int(getattr(self.sampler, "epoch", 0))

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and the number of rows handed out in it, by all processes together."""
        return {"epoch": self._epoch(), "rows": self._rows}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after the rows of `state` when the loader is next iterated in that epoch."""
        self._resume = dict(state)
        self._rows = state["rows"]


class EncodedRows(Dataset[Any]):
    """Encoded rows by index, single or in bins; the index -1 is a row that counts for nothing.

    Args:
        table: Rows as a sequence of mappings.
        bins: For packing, the rows of each bin.
    """

    def __init__(self, table: Any, bins: list[list[int]] | None = None) -> None:
        self.table, self.bins = table, bins

    def __len__(self) -> int:
        return len(self.table if self.bins is None else self.bins)

    def __getitem__(self, index: int) -> Any:
        if index == FILLER:
            row = dict(self.table[0])
            blank = {"labels": [-100] * len(row["labels"])} if "labels" in row else {"label": -100}
            row |= {"id": FILLER, **blank}
            return row if self.bins is None else [row]
        if self.bins is None:
            return self.table[index]
        return [self.table[i] for i in self.bins[index]]
