"""One training step under LoRA, QLoRA and DoRA on the shapes of Llama 3.2 1B and 3.1 8B, with random weights.

All arms share the base's weights and take the same loss, the cross entropy of `lit_peft` on the last hidden states, so
that what differs is the layers. The floor is the frozen base: forward, and backward down to the embeddings' output.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.arms import FLOOR
from benchmarks.bytes_held import peak_of
from benchmarks.on_gpu.timing import Clock, kernels, ratio
from lit_peft import LoRAConfig, place
from lit_peft.low_rank.dora import DoRALinear
from lit_peft.low_rank.linear import LoRALinear
from lit_peft.ops.cross_entropy import linear_cross_entropy
from lit_peft.ops.lean import make_lean

R, ALPHA = 16, 32
WORDS = 128_256
SHAPES = {"1B": (2048, 8192, 32, 8, 16), "8B": (4096, 14336, 32, 8, 32)}  # width, inner, heads, shared heads, layers
SMALL = {"tiny": (32, 64, 4, 2, 2)}
KERNELS, MEASURED, ADDMM = "lit_peft, all kernels", "lit_peft", "addmm_ (the usual fused form, lean=False)"


def base_of(size: tuple[int, ...], words: int, device: torch.device, layers: int | None = None) -> LlamaForCausalLM:
    """Return a frozen Llama in bfloat16 with random weights, never zeros: those need less power."""
    width, inner, heads, shared, depth = size
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=shared,
        num_hidden_layers=layers or depth,
        vocab_size=words,
        tie_word_embeddings=True,
        use_cache=False,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.requires_grad_(False)


def shared(model: nn.Module) -> Any:
    """Return a copy of a model's modules whose frozen weights are the same memory."""
    memo = {id(p): nn.Parameter(p.data, requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, memo)  # type: ignore[arg-type]


def adapted(model: nn.Module, kind: type[LoRALinear] = LoRALinear, lean: bool = True) -> nn.Module:
    """Place LoRA, or a subclass of its layer, on all linear layers of the blocks."""
    place(
        model,
        lambda path, _: path.endswith("_proj"),
        lambda base: kind(base, LoRAConfig(r=R, alpha=ALPHA, use_dora=kind is DoRALinear)),
    )
    if lean:
        make_lean(model)
    return model


def _peft(model: nn.Module, upcast: bool, **settings: Any) -> nn.Module:
    import peft

    config = peft.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=r".*_proj", **settings)
    wrapped = peft.get_peft_model(model, config, autocast_adapter_dtype=upcast)  # type: ignore[arg-type]
    return wrapped.get_base_model()  # type: ignore[return-value]


def _compiled(model: Any) -> nn.Module:
    for layer in model.model.layers:  # one by one: the code of the first serves them all
        layer.compile()
    return model  # type: ignore[no-any-return]


def _liger(model: nn.Module) -> nn.Module:
    from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(model=model)
    return _peft(model, upcast=False)


def _quantised(model: nn.Module) -> nn.Module:
    from lit_peft.quantised.linear import NF4Linear

    for path, module in list(model.named_modules()):
        if path.endswith("_proj"):
            model.set_submodule(path, NF4Linear(module.weight.data, module.bias))  # type: ignore[union-attr, arg-type]
    return model


def _bitsandbytes(model: nn.Module) -> nn.Module:
    import bitsandbytes

    for path, module in list(model.named_modules()):
        if path.endswith("_proj"):
            layer: Any = bitsandbytes.nn.Linear4bit(
                module.in_features, module.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
            )
            layer.weight = bitsandbytes.nn.Params4bit(module.weight.data.clone(), quant_type="nf4", requires_grad=False)
            model.set_submodule(path, layer.to(module.weight.device))
    return _peft(model, upcast=False)


Made = Callable[[nn.Module], nn.Module]
LORA: dict[str, tuple[Made, str | None]] = {
    FLOOR: (lambda model: model, "0"),
    "HF PEFT": (lambda model: _peft(model, True), None),
    "HF PEFT, bf16 adapters": (lambda model: _peft(model, False), None),
    "HF PEFT, bf16, compiled": (lambda model: _compiled(_peft(model, False)), None),
    "HF PEFT, bf16, Liger": (_liger, None),
    ADDMM: (lambda model: adapted(model, lean=False), None),
    MEASURED: (adapted, None),
    KERNELS: (adapted, "1"),
}
QLORA: dict[str, tuple[Made, str | None]] = {
    FLOOR: (lambda model: model, "0"),
    "HF PEFT on bitsandbytes": (_bitsandbytes, None),
    MEASURED: (lambda model: adapted(_quantised(model)), None),
    KERNELS: (lambda model: adapted(_quantised(model)), "1"),
}
DORA: dict[str, tuple[Made, str | None]] = {
    "LoRA, lit_peft": (adapted, None),
    "HF PEFT": (lambda model: _peft(model, False, use_dora=True), None),
    MEASURED: (lambda model: adapted(model, DoRALinear), None),
    KERNELS: (lambda model: adapted(model, DoRALinear), "1"),
}


class Step:
    """One arm: forward, loss, backward.

    Args:
        model: the model.
        way: what LIT_PEFT_KERNELS is while it runs.
        ids: token ids (rows, length).
    """

    def __init__(self, model: Any, way: str | None, ids: Tensor) -> None:
        self.model, self.way, self.ids = model.train(), way, ids
        self.head = model.lm_head.weight
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def __call__(self) -> None:
        """Make one step, and forget its gradients."""
        with self._environment():
            x = self.model.model.embed_tokens(self.ids).detach().requires_grad_()
            hidden = self.model.model(inputs_embeds=x, use_cache=False).last_hidden_state
            loss = linear_cross_entropy(hidden[:, :-1].flatten(0, 1), self.head, self.ids[:, 1:].flatten())
            loss.backward()
        for parameter in self.trained:
            parameter.grad = None

    def _environment(self) -> AbstractContextManager[None]:
        return kernels(self.way)


def built(base: nn.Module, arms: dict[str, tuple[Made, str | None]], ids: Tensor) -> Iterator[tuple[str, Step | str]]:
    """Yield every arm's step, or why there is none."""
    for name, (make, way) in arms.items():
        try:
            with kernels(way):
                step = Step(make(shared(base)), way, ids)
                step()
            yield name, step
        except Exception as error:
            yield name, f"{type(error).__name__}: {error}".splitlines()[0]


def measured(clock: Clock, small: bool) -> list[dict[str, Any]]:
    """Return seconds, ratios, peaks and launches of all arms at all sizes."""
    found = []
    for size, shape in (SMALL if small else SHAPES).items():
        plans = [
            ("LoRA", LORA, (1,), (None,)),
            ("QLoRA", QLORA, (1,), (1,)),
            ("DoRA", DORA, (1,), (1,)),
        ]
        for method, arms, rows, depths in plans:
            for depth in depths:
                for tokens in (32,) if small else ((2048, 8192) if method == "LoRA" else (8192,)):
                    if clock.left < (0 if small else 20):
                        found.append({"method": method, "size": size, "tokens": tokens, "skipped": "the time was over"})
                        continue
                    base = base_of(shape, 96 if small else WORDS, clock.device, depth)
                    words = base.config.vocab_size
                    ids = torch.randint(words, (rows[0], tokens), device=clock.device)
                    layers = base.config.num_hidden_layers
                    about = {"method": method, "size": size, "layers": layers, "tokens": tokens}
                    found.append({**about, **_one(clock, base, arms, ids)})
                    del base
                    gc.collect()
                    if clock.device.type == "cuda":
                        torch.cuda.empty_cache()
    return found


def _one(clock: Clock, base: nn.Module, arms: dict[str, tuple[Made, str | None]], ids: Tensor) -> dict[str, Any]:
    steps, errors = {}, {}
    for name, step in built(base, arms, ids):
        if isinstance(step, str):
            errors[name] = step
        else:
            steps[name] = step
    peaks = {name: peak_of(step, clock.device) for name, step in steps.items()}
    seconds = clock.interleaved(steps, rounds=8, budget=40)
    first = next(iter(arms))
    launches = {name: clock.on_device(step)[1] for name, step in steps.items()}
    return {
        "errors": errors,
        "seconds": {name: sorted(values)[len(values) // 2] for name, values in seconds.items()},
        "over_first": {name: ratio(seconds, name, first) for name in steps if name != first and first in steps},
        "peak": peaks,
        "launches": launches,
    }


def markdown(rows: list[dict[str, Any]]) -> list[str]:
    """Return a table for each size."""
    lines: list[str] = []
    for row in rows:
        title = f"{row['method']}, {row['size']} shapes, {row['tokens']} tokens"
        if "skipped" in row:
            lines += ["", f"### {title}", "", f"Not run: {row['skipped']}."]
            continue
        first = next(iter(row["seconds"]), "-")
        lines += ["", f"### {title}, {row['layers']} layers", ""]
        lines += [f"| arm | step | over {first} | quartiles | peak | kernels |", "|---|---|---|---|---|---|"]
        for name, seconds in row["seconds"].items():
            over = row["over_first"].get(name)
            cells = [name, f"{seconds * 1e3:.2f} ms", f"{over['median']:.3f}" if over else "1"]
            cells += [
                "{:.3f}-{:.3f}".format(*over["quartiles"]) if over else "",
                f"{row['peak'][name] / 2**20:.0f} MiB",
            ]
            lines.append(f"| {' | '.join([*cells, str(row['launches'][name])])} |")
        lines += [f"| {name} | {error} | | | | |" for name, error in row["errors"].items()]
    return lines
