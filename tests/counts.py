"""The closed formulas for how many weights each method trains, over the base model without adapters."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from lit_peft.sites import attention, geometry, layers, linears, stacks, widths
from lit_peft.sublayers import hosts

HEADS = ("score.", "classifier.", "classification_head.")
Count = Callable[[nn.Module], int]  # closed formula over the *base* model


def lora_count(r: int) -> Count:
    return lambda model: sum(r * sum(widths(linear)) for linear in linears(model).values())


def ranks_by_layer(model: nn.Module) -> int:
    return sum((2 if ".0." in path else 4) * sum(widths(linear)) for path, linear in linears(model).items())


def mora_count(r: int, mora_type: int) -> Count:
    def size(linear: nn.Module) -> int:
        found = int((sum(widths(linear)) * r) ** 0.5 + 0.5)
        return found - found % 2 if mora_type == 6 else found

    return lambda model: sum(size(linear) ** 2 for linear in linears(model).values())


def svd_count(r: int) -> Count:
    return lambda model: sum(r * (sum(widths(linear)) + 1) for linear in linears(model).values())


def biases(model: nn.Module) -> int:
    """BitFit: every bias outside the new head; where there is none, one for every linear layer."""
    found = sum(p.numel() for n, p in model.named_parameters() if n.endswith("bias") and not n.startswith(HEADS))
    return found or sum(widths(linear)[1] for linear in linears(model).values())


def ia3_count(model: nn.Module) -> int:
    """2 d_kv for every attention block, and f for every feed-forward block."""
    shape = geometry(model)
    blocks = shape.layers + (
        len(stacks(model)[1]) if len(stacks(model)) > 1 else 0
    )  # a decoder has cross-attention too
    return blocks * 2 * shape.kv_heads * shape.head_dim + shape.layers * shape.feed_forward


def last_layer(model: nn.Module) -> int:
    return sum(p.numel() for stack in stacks(model) for p in model.get_submodule(stack[-1]).parameters())


def nothing(model: nn.Module) -> int:
    return 0


def bottlenecks(per_layer: int, m: int, more: Count = nothing) -> Count:
    def count(model: nn.Module) -> int:
        d = geometry(model).hidden
        blocks = len(feed_forward_outputs(model)) + (len(attention(model)) if per_layer == 2 else 0)
        return blocks * (2 * d * m + m + d) + more(model)

    return count


def norms(model: nn.Module) -> int:
    """All weights of what normalises: d for RMSNorm, 2 d for LayerNorm."""
    found = [module for module in model.modules() if "norm" in type(module).__name__.lower()]
    return sum(p.numel() for module in found for p in module.parameters(recurse=False))


def feed_forward_outputs(model: nn.Module) -> list[str]:
    """One a layer; BERT's has two halves."""
    return layers(model)


def prefixes(p: int, mu: int | None) -> Count:
    """p d + (d + 1) mu + (mu + 1) 2 n d_kv for each stack with n attention modules; direct: 2 n p d_kv."""

    def count(model: nn.Module) -> int:
        total = 0
        for host in hosts(model):
            part = model.get_submodule(host)
            size, n = geometry(part), len(attention(part))
            wide = 2 * n * size.kv_heads * size.head_dim
            total += p * wide if mu is None else p * size.hidden + (size.hidden + 1) * mu + (mu + 1) * wide
        return total

    return count


def p_tuning(p: int, d: int) -> int:
    """E, two layers of a bidirectional LSTM of width d / 2 (two biases each, as torch has them), and the MLP."""
    h = d // 2
    return p * d + 2 * 2 * 4 * h * (d + h + 2) + 2 * (d * d + d)


def compacter(n: int, reduction: int, more: Count = nothing) -> Count:
    def count(model: nn.Module) -> int:
        d = geometry(model).hidden
        m = d // reduction
        return (len(attention(model)) + len(layers(model))) * (2 * (d + m) + m + d) + n**3 + more(model)

    return count


def unipelt(model: nn.Module) -> int:
    """The three parts, and a gate of d + 1 for each LoRA layer, each attention and each bottleneck."""
    d = geometry(model).hidden
    names = ("q_proj", "v_proj", "query", "value", "q", "v", "c_attn")
    targets = [linear for path, linear in linears(model).items() if path.rpartition(".")[2] in names]
    gates = sum(widths(linear)[0] + 1 for linear in targets) + (len(attention(model)) + len(layers(model))) * (d + 1)
    lora = sum(2 * sum(widths(linear)) for linear in targets)
    return lora + prefixes(3, 8)(model) + bottlenecks(1, 4)(model) + gates


def edits(r: int) -> Count:
    return lambda model: len(stacks(model)[0]) * (2 * r * geometry(model).hidden + r)
