"""DoRA: a weight's magnitude and direction apart (Liu et al. 2024, https://arxiv.org/abs/2402.09353).

    y = b + (m / n) * (W x + s B A x),    n_i = |W_i + s (B A)_i|,    m (out,) starts at n

n is a constant to the backward pass (section 4.3). B A (out, in) is never formed: `lit_peft.ops.row_norms` tells how n
is worked out, `lit_peft.ops.dora` the gradients.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_peft.adapter import Adapter, innermost
from lit_peft.blocks import Entry, names_in
from lit_peft.low_rank.linear import LoRALinear
from lit_peft.ops.dora import dora_linear, dora_update, products, stacks
from lit_peft.ops.lora_linear import joins
from lit_peft.ops.recipes import eager
from lit_peft.ops.row_norms import Norms, across, exact, row_norms
from lit_peft.selection import Rows, acting
from lit_peft.structure import is_linear
from lit_peft.weights import dense, fold

if TYPE_CHECKING:
    from lit_peft.methods.lora import LoRAConfig


def check_layer(path: str, module: nn.Module) -> None:
    """Raise a ValueError unless DoRA can adapt this layer."""
    if not is_linear(module):
        raise ValueError(
            f"DoRA adapts linear layers only, and {path} is a {type(module).__name__}. Leave it out of target_modules."
        )


class DoRALinear(LoRALinear):
    """Turns the rows of W by B A and gives each a trained length m.

    The base runs once. Only with dropout, in training, it runs a second time on the dropped input: the direction's two
    terms must see the same input.

    Example:
        >>> import torch
        >>> from lit_peft import LoRAConfig
        >>> layer = DoRALinear(torch.nn.Linear(8, 4), LoRAConfig(r=2, use_dora=True))
        >>> sum(p.numel() for _, p in layer.own_parameters())
        28
    """

    use_dora: ClassVar[bool] = True
    dora_square: Tensor | None

    def add(self, name: str, config: LoRAConfig) -> None:
        """Make A (r, in), B (out, r) and m (out,) of another named set."""
        super().add(name, config)
        if "lora_magnitude" not in self._modules:
            self.lora_magnitude = nn.ParameterDict()
            # A buffer, so that it moves with the layer; not in checkpoints, because the base tells it.
            self.register_buffer("dora_square", None, persistent=False)
            self.norms = Norms()
        b = self.lora_b[name]
        if b.device.type == "meta":
            self.lora_magnitude[name] = nn.Parameter(torch.empty(b.shape[0], device="meta"))
        else:
            self.lora_magnitude[name] = nn.Parameter(self.norm(name).to(b.dtype, copy=True))

    def remove(self, name: str) -> None:
        """Delete one named set."""
        super().remove(name)
        self.norms.drop(name)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move or cast the layer; what is kept of W in less than float32, or of no W, is worked out again."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.norms.forget()
        kept = self.dora_square
        if kept is not None and (kept.dtype.itemsize < 4 or kept.is_meta):
            self.dora_square = None
        return self

    def norm(self, name: str) -> Tensor:
        """Return the row norms n (out,) of W + s B A, detached; worked out when A, B or W have changed since."""
        found = self._known(name)
        return self._worked_out(name) if found is None else found

    def _known(self, name: str) -> Tensor | None:
        if torch.compiler.is_compiling():  # a graph cannot look at storages
            return None
        held = [part for key, part in innermost(self.base)._parameters.items() if part is not None and key != "bias"]
        if not self.norms.check(held):
            self.dora_square = None
        return self.norms.get(name, self.lora_a[name], self.lora_b[name], self.configs[name].scale)

    def _worked_out(self, name: str, product: Tensor | None = None) -> Tensor:
        """Return n, and keep it; A W^T (r, out) may be there already."""
        base, compiling = innermost(self.base), torch.compiler.is_compiling()
        a, b, scale = self.lora_a[name], self.lora_b[name], self.configs[name].scale
        # not as tensors of inference mode, which a later training step could not keep
        with nullcontext() if compiling else torch.inference_mode(False), torch.no_grad():
            product = across(dense(base), a) if product is None else product
            found = row_norms(self._square(base), product, a, b, scale)
        if not compiling:
            self.norms.put(name, a, b, scale, found)
        return found

    def _square(self, base: nn.Module) -> Tensor:
        """Return |W_i|^2 (out,)."""
        if self.dora_square is None:
            self.dora_square = torch.linalg.vector_norm(exact(dense(base)), dim=1).square()
        return self.dora_square

    def _check_alone(self) -> None:
        choice = acting(self.scope)
        inner: list[str] = []  # names at this layer, from here to the base
        module: nn.Module = self
        while isinstance(module, Adapter):
            inner += list(module.configs)
            module = module.base
        if isinstance(choice, Rows):
            rows = [row for entry in choice.entries for row in choice.rows(entry) * _most(inner, entry)]
            alone = len(rows) == len(set(rows))
        else:
            alone = sum(_most(inner, entry) for entry in choice) <= 1
        if not alone:
            raise TypeError(
                "DoRA cannot act together with another adapter below it or another set of DoRA on the same layer. "
                "Choose one set at a time; in a stack name dora last (--method bitfit+dora)."
            )

    def change(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """Return b + (m / n) (W x + s B A x): (..., in), (..., out) -> (..., out).

        Raises:
            TypeError: if another set acts on the same rows of this layer: lengths do not add up.
        """
        self._check_alone()
        config: LoRAConfig = self.configs[name]
        a, b, m, n = self.lora_a[name], self.lora_b[name], self.lora_magnitude[name], self.norm(name)
        bias: Tensor | None = innermost(self.base).bias  # type: ignore[assignment]
        dropped = config.dropout > 0 and self.training
        if eager() and not dropped:
            return dora_update(y, x, bias, a, b, m, n, config.scale)
        ratio = m / n
        turned = y  # W x: what the ratio scales
        if dropped:
            x = F.dropout(x, config.dropout)
            turned = self.base(x)
        if bias is not None:
            turned = turned - bias.to(y.dtype)
        # ratio - 1 keeps its digits in half precision, where the ratio itself would be rounded to 1
        y = torch.addcmul(y, turned, (ratio - 1).to(y.dtype))
        h = F.linear(x, a.to(x.dtype))
        b = (ratio * config.scale)[:, None] * b
        rows, h = y.reshape(-1, y.shape[-1]), h.reshape(-1, h.shape[-1]).to(y.dtype)
        return torch.addmm(rows, h, b.t().to(y.dtype)).view(y.shape)

    def joined(self, name: str, x: Tensor) -> Tensor | None:
        """Return the same from x alone, where the base is a plain linear layer and nothing is dropped."""
        config: LoRAConfig = self.configs[name]
        if not joins(self.base, x) or (config.dropout and self.training) or type(self).change is not DoRALinear.change:
            return None
        a, b, m = self.lora_a[name], self.lora_b[name], self.lora_magnitude[name]
        n, product = self._known(name), None
        if n is None and stacks(x, self.base):
            product, side = products(x, self.base.weight, a)
            n = self._worked_out(name, side)
        return dora_linear(
            x, self.base, a, b, m, self._worked_out(name) if n is None else n, config.scale, product=product
        )

    def delta(self, name: str) -> Tensor:
        """Return (m / n) (W + s B A) - W, (out, in), in float32 or better."""
        weight = exact(dense(innermost(self.base)))
        turned = weight + super().delta(name).to(weight.device, weight.dtype)
        n = torch.linalg.vector_norm(turned, dim=1).clamp_min(torch.finfo(turned.dtype).tiny)
        delta: Tensor = (self.lora_magnitude[name] / n)[:, None] * turned - weight
        return delta

    def merge(self, names: tuple[str, ...] | None = None) -> nn.Module:
        """Fold direction and length into W.

        Raises:
            TypeError: if several sets are asked for: their order would count.
        """
        chosen = [name for name in (self.active() if names is None else names) if name in self.configs]
        if len(chosen) > 1:
            raise TypeError(f"Sets of DoRA do not add up: {chosen} cannot be merged together. Name one of them.")
        with torch.no_grad():
            for name in chosen:
                fold(self.base, self.delta(name))
                self.dora_square = None  # W is another one now
                self.norms.forget()
        return self.base

    def tensors(self, name: str = "default") -> dict[str, Tensor]:
        """Return A, B and m under HF PEFT's names."""
        return {**super().tensors(name), "lora_magnitude_vector": self.lora_magnitude[name].detach()}


def _most(inner: list[str], entry: Entry) -> int:
    """Return how many sets act one after the other: in an average, the only block here, each starts from the base."""
    return max(inner.count(name) for name in names_in((entry,)))
