"""The attention of AdapterFusion at one layer (Pfeiffer et al. 2021, https://arxiv.org/abs/2005.00247, section 3.2).

    s_n = softmax_n((Q h) . (K f_n(h))),    f(h) = V sum_n s_n f_n(h)

h is what the adapters read, f_n(h) what adapter n adds; Q, K and V are (d, d), for each token, over the adapters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_peft.adapter import Adapter, innermost
from lit_peft.blocks import Block, Fuse, names_in
from lit_peft.selection import Rows, acting


@dataclass(frozen=True, kw_only=True)
class FusionConfig:
    """Settings of AdapterFusion.

    Args:
        adapters: the trained bottleneck adapters to fuse: `{name: folder}`, or a list of folders, or of the names of
            adapters that the model has.
        penalty: weight of the penalty ||V - I||^2, summed over the layers.
        hidden_size: set by the method: width d of the residual stream.

    Raises:
        ValueError: if a value is out of range.
    """

    adapters: dict[str, str] | list[str] | None = None
    penalty: float = 0.01
    hidden_size: int | None = None

    default_lr: ClassVar[float] = 5e-5

    def __post_init__(self) -> None:
        if not 0 <= self.penalty < float("inf"):
            raise ValueError(f"fusion.penalty is {self.penalty}; it must be 0 or more.")

    @property
    def names(self) -> list[str]:
        """The names of the adapters that are fused; known once the method has placed them."""
        return list(self.adapters or ())


@dataclass
class Attention:
    """Collects how much attention each adapter gets: sums over tokens, by layer and named set.

    Attributes:
        mask: (batch, length), true where tokens count; a column (batch, 1) speaks of whole rows; None: all do.
        found: `{(id of the layer's adapter, name of the set): (sum of weights (n,), number of tokens)}`.
    """

    mask: Tensor | None = None
    found: dict[tuple[int, str], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def add(self, key: tuple[int, str], weights: Tensor, rows: Tensor | None) -> None:
        """Add the weights (batch, ..., n) of one call, which are those of some rows of the batch."""
        mask = self.mask if self.mask is None or rows is None else self.mask[rows]
        weights = weights.detach().float()
        if mask is None or len(mask) != len(weights):  # such as tokens that a mixture has sorted
            mask = weights.new_ones(weights.shape[:-1])
        elif mask.shape != weights.shape[:-1]:
            mask = mask.any(-1, keepdim=True).expand(weights.shape[:-1])
        mask = mask.float()
        total, count = self.found.get(key, (0.0, 0.0))
        self.found[key] = total + (weights * mask[..., None]).flatten(0, -2).sum(0), count + mask.sum()


_SEEN: ContextVar[Attention | None] = ContextVar("lit_peft_fusion", default=None)


@contextmanager
def watched(mask: Tensor | None) -> Iterator[Attention]:
    """Collect the attention weights of all calls inside the `with` block."""
    found = Attention(mask)
    token = _SEEN.set(found)
    try:
        yield found
    finally:
        _SEEN.reset(token)


class FusionBottleneck(Adapter):
    """Holds Q, K and V of one layer, inside the bottleneck adapter whose sets it weighs.

    V starts as the identity; its difference from it is what is stored, so that no change is all zeros.

    Example:
        >>> import torch
        >>> site = FusionBottleneck(torch.nn.Linear(8, 8), FusionConfig(adapters=["a", "b"], hidden_size=8))
        >>> h, a = torch.randn(1, 3, 8), torch.randn(1, 3, 8)
        >>> bool(torch.allclose(site.attend("default", h, [a, a]), a, atol=1e-6))
        True
    """

    peft_type: ClassVar[str] = "LIT_FUSION"

    def add(self, name: str, config: FusionConfig) -> None:
        """Make Q, K and V - I, all (d, d), of another named set."""
        super().add(name, config)
        if "fusion_query" not in self._modules:
            self.fusion_query, self.fusion_key = nn.ParameterDict(), nn.ParameterDict()
            self.fusion_value = nn.ParameterDict()
            self.settled: dict[str, frozenset[str]] = {}  # sets whose adapters no folder of a fusion may change
        d = config.hidden_size
        assert d is not None, "fill in the model's hidden size first"
        device = next(innermost(self.base).parameters()).device
        query, key = torch.empty(d, d, device=device), torch.empty(d, d, device=device)
        if device.type != "meta":
            nn.init.normal_(query, std=0.02)
            nn.init.normal_(key, std=0.02)
        self.fusion_query[name], self.fusion_key[name] = nn.Parameter(query), nn.Parameter(key)
        self.fusion_value[name] = nn.Parameter(torch.zeros(d, d, device=device))

    def attend(self, name: str, h: Tensor, outputs: Sequence[Tensor], rows: Tensor | None = None) -> Tensor:
        """Return V sum_n s_n f_n, (batch, ..., d).

        Args:
            name: the named set.
            h: what the adapters read, (batch, ..., d).
            outputs: f_n(h) of each adapter.
            rows: which rows of the batch h is of; None: all.
        """
        dtype = h.dtype
        f = torch.stack([out.to(dtype) for out in outputs], -2)  # (..., n, d)
        # (Q h) . (K f_n) is (K^T Q h) . f_n: two products with (d, d) for each token, however many adapters
        query = F.linear(h, self.fusion_query[name].to(dtype)) @ self.fusion_key[name].to(dtype)
        scores = (f @ query[..., None])[..., 0]
        weights = scores.softmax(-1, dtype=torch.promote_types(dtype, torch.float32))
        seen = None if torch.compiler.is_compiling() else _SEEN.get()
        if seen is not None:
            seen.add((id(self), name), weights, rows)
        mixed = (weights.to(dtype)[..., None, :] @ f)[..., 0, :]
        out: Tensor = mixed + F.linear(mixed, self.fusion_value[name].to(dtype))
        return out

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the base; the adapter around it asks for the attention."""
        return self.base(*args, **kwargs)

    def acting_fusions(self) -> list[str]:
        """Return the fusions that act in this very call, by name or as a `Fuse`."""
        choice = acting(self.scope)
        entries = choice.entries if isinstance(choice, Rows) else choice
        fuses = [b for e in entries if isinstance(e, Block) for b in e.inside() if isinstance(b, Fuse)]
        meant = [set(block.names) for block in fuses]
        named = names_in(entries)
        return [name for name, config in self.configs.items() if name in named or set(config.names) in meant]

    def refusal(self, block: Block) -> str:
        """Return nothing: the adapter around this one says what it can apply."""
        return ""

    def needing(self, name: str) -> list[str]:
        """Return the fusions of an adapter."""
        return [fusion for fusion, config in self.configs.items() if name in config.names]

    # A folder holds the fused adapters too: without them the fusion would be nothing ---------------------------------

    def tensors(self, name: str = "default") -> dict[str, Tensor]:
        """Return Q, K, V - I and, after their names, the weights of the fused adapters."""
        found = super().tensors(name)
        for other in self.configs[name].names:
            found |= {f"{other}.{leaf}": tensor for leaf, tensor in self.fused.tensors(other).items()}
        return found

    @property
    def fused(self) -> Adapter:
        """The bottleneck adapter around this one."""
        around: Adapter = self.__dict__["around"]
        return around

    def check_tensors(self, tensors: Mapping[str, Tensor], name: str = "default") -> None:
        """See that a folder brings no other weights for adapters that were here before.

        Raises:
            ValueError: if it does.
        """
        for other in self.settled.get(name, ()):
            for leaf, mine in self.fused.tensors(other).items():
                theirs = tensors.get(f"{other}.{leaf}")
                if theirs is not None and not torch.equal(mine.cpu(), theirs.cpu().to(mine.dtype)):
                    raise ValueError(
                        f"The folder has another adapter {other!r} than this model. Delete or rename the one here."
                    )
