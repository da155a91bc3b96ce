"""Parallel adapters that read the residual stream before it is normalised: x + F(LN(x)) -> x + F(LN(x)) + f(x).

So adapter-hub's library has them on models that normalise first (Llama, GPT-2); its folders need it.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

from lit_peft.adapter import Adapter
from lit_peft.methods.bottleneck import Bottleneck, first, with_first
from lit_peft.structure import walk
from lit_peft.sublayers import beside, is_norm

_STREAM: ContextVar[Tensor | None] = ContextVar("lit_peft_stream", default=None)


class StreamReader(Adapter):
    """Notes what the norm in front of a feed-forward reads, for the adapter around the feed-forward; has no weights."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Call the base."""
        if self.chosen():
            # For the call that comes next in the same layer, which takes it away: in a replay both run again.
            _STREAM.set(x)
        return self.base(x, *args, **kwargs)


class BottleneckOnStream(Bottleneck):
    """A bottleneck beside a feed-forward that reads what the norm in front of it does: y -> y + f(x)."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the base and add f of the stream to its (first) output."""
        out = self.base(*args, **kwargs)
        if not self.chosen():
            return out
        x = _STREAM.get()
        if x is None:
            raise TypeError("A parallel adapter was called outside of its layer, whose stream it reads.")
        _STREAM.set(None)
        return with_first(out, self.plus(first(out), x))


def norms_before(model: nn.Module) -> dict[str, str]:
    """Return the norm in front of each feed-forward block, `{the block's path: the norm's}`.

    Raises:
        ValueError: if a layer does not have just two norms, of which the second is the feed-forward's.
    """
    sites = list(walk(model))
    names = {site.path: site.name for site in sites}
    found = {}
    for path in beside(model):
        layer = names[path].rpartition(".")[0]
        norms = [site.path for site in sites if site.name.rpartition(".")[0] == layer and is_norm(site.base)]
        if len(norms) != 2:
            raise ValueError(
                f"bottleneck.reads_stream needs layers with two norms, and {layer} of {type(model).__name__} has "
                f"{len(norms)}. Set it to false."
            )
        found[path] = norms[1]
    return found
