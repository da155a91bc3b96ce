"""Bottleneck adapters put together: stacks, averages and fusions of the branches that several sets add."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from lit_peft.adapter import Adapter
from lit_peft.blocks import Average, Block, Entry, Fuse, Stack, names_in
from lit_peft.methods.fusion_site import FusionBottleneck
from lit_peft.selection import Rows, acting, told


class ComposedBranches(Adapter):
    """An adapter whose sets each add a branch f(h) to the residual stream, alone or in blocks."""

    stacks: ClassVar[bool] = True  # whether what it reads changes with what it adds

    def branch(self, name: str, h: Tensor, rows: Tensor | None = None) -> Tensor:
        """Return f(h) of one named set; rows are the rows of the batch that h is of."""
        raise TypeError(f"{type(self).__name__} does not say what its sets add.")

    def reread(self, total: Tensor) -> Tensor:
        """Return what a set reads when the sum that it adds to is `total`."""
        return total

    @property
    def fusions(self) -> dict[str, Any]:
        """The fusions of this layer's sets, by name."""
        return self.base.configs if isinstance(self.base, FusionBottleneck) else {}

    def is_composed(self) -> bool:
        """Whether more than single sets acts in this call: a block, or a fusion."""
        choice, fusions = acting(self.scope), self.fusions
        if isinstance(choice, Rows):  # in training with several processes fusions take part even if no row asks
            return bool(fusions) or any(isinstance(entry, Block) for entry in choice.entries)
        return any(isinstance(entry, Block) or entry in fusions for entry in choice)

    def plus_composed(self, y: Tensor, h: Tensor) -> Tensor:
        """Return y plus what every set, block and fusion that acts adds, each on its rows."""
        total, together = y, self.training and dist.is_available() and dist.is_initialized()
        for entry, rows in self._turns(h, together):
            if next(iter(self.configs.values())).layer < (told("adapter_drop") or 0):
                if not together or told("adapter_drop_covered"):
                    continue
                rows = torch.empty(0, dtype=torch.long, device=h.device)  # DDP waits for a gradient from everything
            if rows is None:
                total = total + self.branches(entry, y, h)
            else:
                total = total.index_add(0, rows, self.branches(entry, y[rows], h[rows], rows).to(y.dtype))
        return total

    def _turns(self, h: Tensor, together: bool) -> list[tuple[Entry, Tensor | None]]:
        """Return what acts here, each with the rows of h that it acts on; None for all rows."""
        choice = acting(self.scope)
        if not isinstance(choice, Rows):
            return [(entry, None) for entry in choice if self.holds(entry)]
        entries = [entry for entry in choice.entries if self.holds(entry)]
        if together:
            entries += [name for name in (*self.configs, *self.fusions) if name not in choice.names]
        return [(entry, choice.of(entry, h)) for entry in entries]

    def holds(self, entry: Entry) -> bool:
        """Whether a name, or one of those in a block, is that of a set or a fusion here."""
        return any(name in self.configs or name in self.fusions for name in names_in((entry,)))

    def meets(self, block: Block) -> bool:
        """Whether several parts of a block have weights in this adapter."""
        return sum(self.holds(part) for part in block.parts) > 1

    def branches(self, entry: Entry, y: Tensor, h: Tensor, rows: Tensor | None = None) -> Tensor:
        """Return what a set, a fusion or a block adds to y when it reads h: (..., d) -> (..., d)."""
        if isinstance(entry, str):
            found = [self.branch(entry, h, rows)] if entry in self.configs else []
            if entry in self.fusions:
                found.append(self.fused(entry, h, rows))
            return found[0] if len(found) == 1 else found[0] + found[1]
        if isinstance(entry, Fuse):
            return self.fused(self.fusion_of(entry)[0], h, rows)
        if isinstance(entry, Average):
            pairs = zip(entry.weights, entry.parts, strict=True)
            parts = [weight * self.branches(part, y, h, rows) for weight, part in pairs if self.holds(part)]
            return torch.stack(parts).sum(0)
        added: Tensor | None = None
        for part in entry.parts:
            if self.holds(part):
                total = y if added is None else y + added
                more = self.branches(part, total, h if added is None else self.reread(total), rows)
                added = more if added is None else added + more
        assert added is not None, "the caller has seen that something here belongs to the block"
        return added

    def fused(self, name: str, h: Tensor, rows: Tensor | None = None) -> Tensor:
        """Return the attention over what the adapters of one fusion add."""
        assert isinstance(self.base, FusionBottleneck)
        outputs = [self.branch(other, h, rows) for other in self.fusions[name].names]
        return self.base.attend(name, h, outputs, rows)

    def fusion_of(self, block: Fuse) -> list[str]:
        """Return the names of the fusions over just the adapters that a block names, in any order."""
        return [name for name, config in self.fusions.items() if set(config.names) == set(block.names)]

    def refusal(self, block: Block) -> str:
        """Return why this adapter cannot apply a block; an empty string if it can, or has none of its sets."""
        for inner in block.inside():
            if isinstance(inner, Stack) and not self.stacks and self.meets(inner):
                together = ", ".join(map(repr, inner.names))
                return (
                    f"{type(self).__name__} cannot apply {inner}: it stands beside its layer and reads the layer's "
                    f"input. Let them act together: adapters(model, {together})."
                )
            if isinstance(inner, Fuse) and self.holds(inner):
                found = self.fusion_of(inner)
                if not found:
                    known = ", ".join(map(repr, self.fusions)) or "none"
                    return (
                        f"No fusion of {' and '.join(map(repr, inner.names))} was trained (fusions here: {known}). "
                        "Train one with --method fusion, or average: Average(...)."
                    )
                if len(found) > 1:
                    return f"{inner} could be any of {found}. Choose by name: adapters(model, {found[0]!r})."
        return ""
