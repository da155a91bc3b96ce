"""LoRA around a fused query-key-value layer: an update of its own for each of the three.

One pair B A around the whole layer would make queries, keys and values share A. Here each chosen slice has its own
pair, as loralib's `MergedLinear` has. Written out they are one pair of rank k r, with B block-diagonal: that is how
they are computed, folded, and saved for HF PEFT.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lit_peft.adapter import innermost
from lit_peft.low_rank.linear import LoRALinear
from lit_peft.structure import geometry, widths

if TYPE_CHECKING:
    from lit_peft.methods.lora import LoRAConfig

# model_type -> the fused layer's name, and whether the three take turns head by head
FUSED = {
    "gpt2": ("c_attn", False),
    "phi3": ("qkv_proj", False),
    "mpt": ("Wqkv", False),
    "gpt_neox": ("query_key_value", True),
    "bloom": ("query_key_value", True),
}


@dataclass(frozen=True)
class Slices:
    """How the rows of a fused layer are shared: `sizes` rows each for queries, keys, values, in `turns` turns."""

    sizes: tuple[int, ...]
    turns: int = 1


class LoRAFused(LoRALinear):
    """Adds s B_i A_i dropout(x) to the chosen slices i of a fused linear layer's output.

    Parameters are A (k r, in), the chosen slices' one below the other, and B (rows of the chosen slices, r).

    Example:
        >>> import torch
        >>> from lit_peft import LoRAConfig
        >>> linear = torch.nn.Linear(4, 8)
        >>> linear.__dict__["qkv_slices"] = Slices((4, 2, 2))
        >>> layer = LoRAFused(linear, LoRAConfig(r=1, enable_lora=[True, False, True]))
        >>> layer.delta("default").shape, sum(p.numel() for _, p in layer.own_parameters())
        (torch.Size([8, 4]), 14)
    """

    @property
    def slices(self) -> Slices:
        """How the rows of the layer are shared."""
        found: Slices = innermost(self.base).__dict__["qkv_slices"]
        return found

    def pair_shapes(self, config: LoRAConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return (k r, in) and (rows of the k chosen slices, r)."""
        chosen = self._chosen(config)
        rows = sum(size for size, on in zip(self.slices.sizes, chosen, strict=True) if on)
        return (sum(chosen) * config.r, widths(innermost(self.base))[0]), (rows, config.r)

    def pair(self, name: str) -> tuple[Tensor, Tensor]:
        """Return A (k r, in) and the block-diagonal B (out, k r), with zero rows for slices that are left out."""
        return self.lora_a[name], self._spread(self.lora_b[name], self.configs[name])

    def tensors(self, name: str = "default") -> dict[str, Tensor]:
        """Return one exact pair of rank k r under HF PEFT's names."""
        a, b = self.lora_a[name].detach(), self.lora_b[name].detach()
        b = b if not hasattr(b, "full_tensor") else b.full_tensor()
        return {"lora_A.weight": a, "lora_B.weight": self._spread(b, self.configs[name])}

    def check_tensors(self, tensors: Mapping[str, Tensor], name: str = "default") -> None:
        """See that B is block-diagonal.

        Raises:
            ValueError: if not.
        """
        b = tensors["lora_B.weight"]
        if not torch.equal(self._spread(self._gathered(b, self.configs[name]), self.configs[name]), b):
            raise ValueError(
                f"The adapter changes more than the slices that enable_lora names, {self.configs[name].enable_lora}. "
                "Load it without enable_lora, as one update of the whole layer."
            )

    def load_tensors(self, tensors: Mapping[str, Tensor], name: str = "default") -> None:
        """Copy A and the blocks of B; the inverse of `tensors`."""
        self.lora_a[name].copy_(tensors["lora_A.weight"])
        self.lora_b[name].copy_(self._gathered(tensors["lora_B.weight"], self.configs[name]))

    def stored_rank(self, name: str) -> int:
        """Return k r."""
        config: LoRAConfig = self.configs[name]
        return sum(self._chosen(config)) * config.r

    def _chosen(self, config: LoRAConfig) -> list[bool]:
        return list(config.enable_lora or [True] * len(self.slices.sizes))

    def _spread(self, b: Tensor, config: LoRAConfig) -> Tensor:
        """Return the chosen slices' B, one below the other, as one block-diagonal B for the whole layer."""
        slices, chosen = self.slices, self._chosen(config)
        parts = iter(torch.split(b, [size for size, on in zip(slices.sizes, chosen, strict=True) if on]))
        blocks = [next(parts) if on else b.new_empty(size, 0) for size, on in zip(slices.sizes, chosen, strict=True)]
        whole: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
        if slices.turns == 1:
            return whole
        turned = [part.view(slices.turns, -1, whole.shape[1]) for part in torch.split(whole, list(slices.sizes))]
        return torch.cat(turned, 1).reshape(whole.shape)

    def _gathered(self, b: Tensor, config: LoRAConfig) -> Tensor:
        """Return the blocks of a block-diagonal B, one below the other."""
        slices, chosen = self.slices, self._chosen(config)
        turned = torch.split(b.view(slices.turns, -1, b.shape[1]), [size // slices.turns for size in slices.sizes], 1)
        columns = iter(range(0, b.shape[1], config.r))
        found = []
        for part, on in zip(turned, chosen, strict=True):
            if on:
                at = next(columns)
                found.append(part.reshape(-1, b.shape[1])[:, at : at + config.r])
        return torch.cat(found)


def note_slices(model: nn.Module, paths: Iterable[str]) -> None:
    """Note on each fused layer among some paths which rows are queries, keys and values.

    Raises:
        ValueError: if there is none, or the model's fused layers are not known.
    """
    paths = list(paths)
    kind = str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))
    leaf, by_head = FUSED.get(kind, ("", False))
    found = {path: innermost(model.get_submodule(path)) for path in paths if path.rpartition(".")[2] == leaf}
    if not found:
        known = ", ".join(f"{name} of {model_type}" for model_type, (name, _) in FUSED.items())
        raise ValueError(
            f"lora.enable_lora is for fused query-key-value layers, and none of the {len(paths)} adapted layers of "
            f"this {kind} model is one. Known are {known}. Leave enable_lora out."
        )
    sizes = geometry(model)
    shares = (sizes.heads * sizes.head_dim, *(sizes.kv_heads * sizes.head_dim,) * 2)
    for path, layer in found.items():
        if widths(layer)[1] != sum(shares):
            raise ValueError(
                f"{path} has {widths(layer)[1]} outputs, but queries, keys and values are {sum(shares)} together, so "
                "lora.enable_lora does not fit it. Leave the layer out with exclude_modules."
            )
    for layer in found.values():
        # in __dict__: a note about the layer, no part of it; deepcopy keeps it
        layer.__dict__["qkv_slices"] = Slices(shares, sizes.heads if by_head else 1)


def is_fused(module: nn.Module) -> bool:
    """Whether `note_slices` has found this layer to be a fused one."""
    return "qkv_slices" in module.__dict__
