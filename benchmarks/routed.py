"""Training steps on batches of rows under several LoRA adapters, beside HF PEFT's mixed batches and beside one adapter.

    python -m benchmarks.routed [--tokens 128] [--rows 4] [--adapters 2 4] [--rounds 8] [--bf16]

A Llama of SmolLM2-135M's widths with random weights, LoRA of rank 8 on all linear layers, forward and backward. HF
PEFT's side is a pass with `adapter_names=`, one name a row, in eval mode: it refuses in training mode. Both have equal
weights, and their outputs are compared first. All arms take turns in one process; the numbers are medians of the ratios
within a round to a step with one adapter for all rows.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lit_peft import LoRAConfig, adapters, place, routed
from lit_peft.low_rank.linear import LoRALinear
from lit_peft.ops.lean import make_lean

SHAPE = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
R = 8


def base(layers: int, dtype: torch.dtype) -> Any:
    """Return the same frozen model each time."""
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, num_hidden_layers=layers, vocab_size=512)  # type: ignore[arg-type]
    return LlamaForCausalLM(config).to(dtype).requires_grad_(False)


def ours(layers: int, dtype: torch.dtype, names: list[str]) -> Any:
    """Return our model under LoRA sets of these names."""
    model = base(layers, dtype)

    def adapter(inner: Any) -> LoRALinear:
        layer = LoRALinear(inner, LoRAConfig(r=R, alpha=R), names[0])
        for name in names[1:]:
            layer.add(name, LoRAConfig(r=R, alpha=R))
        return layer

    place(model, lambda path, _: path.endswith("_proj"), adapter)
    make_lean(model)
    return model.train()


def theirs(layers: int, dtype: torch.dtype, names: list[str]) -> Any:
    """Return HF PEFT's model under LoRA sets of these names."""
    config = peft.LoraConfig(r=R, lora_alpha=R, target_modules="all-linear", lora_dropout=0.0)
    model = peft.get_peft_model(base(layers, dtype), config, names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in key)
    return model.eval()  # without dropout that is the same arithmetic


def share(mine: Any, other: Any) -> None:
    """Give both sides the same weights."""
    for path, layer in mine.named_modules():
        if isinstance(layer, LoRALinear):
            there = other.base_model.model.get_submodule(path)
            for name in layer.configs:
                torch.nn.init.normal_(layer.lora_b[name], std=0.02)
                there.lora_A[name].weight.data.copy_(layer.lora_a[name].data)
                there.lora_B[name].weight.data.copy_(layer.lora_b[name].data)


def measured(number: int, args: argparse.Namespace) -> dict[str, float]:
    """Return the ratio of each arm's step to that with one adapter for all rows."""
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    names = [f"a{i}" for i in range(number)]
    ids = torch.randint(512, (args.rows, args.tokens))
    mixed = [names[row % number] for row in range(args.rows)]
    mine, other = ours(args.layers, dtype, names), theirs(args.layers, dtype, names)

    share(mine, other)
    with torch.no_grad(), routed(mine, mixed):
        here, there = mine(input_ids=ids).logits, other(input_ids=ids, adapter_names=mixed).logits
        assert (here - there).norm() <= (0.05 if args.bf16 else 1e-4) * there.norm(), "both sides compute the same"

    def step(model: Any, **settings: Any) -> None:
        model(input_ids=ids, use_cache=False, **settings).logits.float().logsumexp(-1).sum().backward()
        model.zero_grad()

    def alone() -> None:
        with adapters(mine, names[0]):
            step(mine)

    def shuffled() -> None:
        with routed(mine, mixed):
            step(mine)

    def ordered() -> None:
        with routed(mine, sorted(mixed)):
            step(mine)

    def one_by_one() -> None:
        with mock.patch.object(LoRALinear, "change_rows", return_value=None), routed(mine, mixed):
            step(mine)

    arms: dict[str, Callable[[], None]] = {
        "one adapter": alone,
        "routed": shuffled,
        "routed, sorted": ordered,
        "sets one after the other": one_by_one,
        "HF PEFT, mixed": lambda: step(other, adapter_names=mixed),
    }
    rounds: list[dict[str, float]] = []
    for _ in range(args.rounds + 1):
        taken = {}
        for name in random.sample(list(arms), len(arms)):
            start = time.perf_counter()
            arms[name]()
            taken[name] = time.perf_counter() - start
        rounds.append(taken)
    return {name: statistics.median(taken[name] / taken["one adapter"] for taken in rounds[1:]) for name in arms}


def main() -> None:
    """Measure, and print one line for each number of adapters."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.routed", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--adapters", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for number in args.adapters:
        found = measured(number, args)
        print(f"{number} adapters: " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in found.items()), flush=True)


if __name__ == "__main__":
    main()
