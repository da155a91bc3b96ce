"""Merged models: adapters folded into a copy of the base, written as a Hugging Face folder with a measured certificate.

A merge can change the answers without a word: rounding in bf16, a tied weight, a bias that the architecture drops when
the folder is loaded. So nothing is written before it was measured: the merged copy against the adapted model, and the
folder as transformers loads it against the merged copy.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lit_peft import __version__
from lit_peft.adapter import Adapter, merge, named_adapters
from lit_peft.quantised.model import dequantise, requantisation_error
from lit_peft.rewriting import note, rewritten
from lit_peft.weights import dense

REPORT = "merge_report.json"
PROBES = (
    "The capital of France is",
    "Question: What is 12 times 11? Answer:",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n    ",
)
PROBE_LENGTH = 64
SMALL = 10**9  # parameters; below, the second precision is measured although nobody asked for it


def write_merged(
    module: LightningModule,
    folder: str | Path,
    *,
    prompts: Sequence[str] = PROBES,
    dtype: str | None = None,
    atol: float = 1e-4,
) -> dict[str, Any]:
    """Fold a module's adapters into a copy of its model and write that as a folder for `from_pretrained`.

    The module itself stays as it is. A base in four bits is dequantised in the copy, which takes its full memory. Under
    FSDP2 all processes call this together and the first one writes.

    Args:
        module: a configured module with `model`, and `tokenizer` where it has one.
        folder: where to write; must not hold anything else. An earlier merge is replaced.
        prompts: texts on which merged and adapted model are compared.
        dtype: `float32` or `bfloat16`; None: that of the base.
        atol: largest accepted logit difference in float32, relative to the largest logit where that is above 1.

    Returns:
        The report, as in `merge_report.json`: `differences` (largest |logit difference| of the merged copy to the
        adapted model, per dtype), `reloaded` (of the folder to the merged copy), `largest_logit`, `dtype`, ...; after a
        4-bit base also `requantised`: the relative error (Frobenius; mean and max over the layers) that the merged
        weights would have if they were stored in four bits again.

    Raises:
        FileExistsError: if the folder holds something that is no earlier merge.
        TypeError: if a method cannot be folded, or the architecture has no place for what was trained.
        ValueError: if the merged model differs too much.

    Example:
        >>> from lit_peft.merging import write_merged
        >>> # write_merged(module, "merged")["differences"]
    """
    folder = Path(folder)
    check_folder(folder)
    check_mergeable(module)
    model = _plain_copy(module)
    if model is None:  # a process that only helped to gather
        return {}
    wanted = _dtype(dtype) if dtype else _base_dtype(model)
    dequantised = dequantise(model, torch.float32)
    tokenizer = getattr(module, "tokenizer", None)
    probes = _probes(model, tokenizer, prompts)
    kinds = sorted({type(adapter).__name__ for _, adapter in named_adapters(model)})
    differences: dict[str, float] = {}
    half = None
    if torch.bfloat16 in (wanted, _base_dtype(model)) or sum(p.numel() for p in model.parameters()) < SMALL:
        half = _answers(_cast_base(copy.deepcopy(model), torch.bfloat16), probes)
    _cast_base(model, torch.float32)  # folding in bf16 would lose most of a small change
    before = _answers(model, probes)
    with torch.no_grad():
        merge(model)
    differences["float32"] = _distance(_answers(model, probes), before)
    requantised = [requantisation_error(dense(layer)) for layer in dequantised]
    scale = max(float(logits.abs().max()) for logits in before)
    if not differences["float32"] <= atol * max(1.0, scale):
        raise ValueError(
            f"The merged model differs from the adapted one by {differences['float32']:.2g} in float32 (largest logit "
            f"{scale:.3g}, atol {atol:g}); nothing was written. Export the adapter instead, or raise atol."
        )
    created, untied = fit_biases(model), fit_ties(model)
    if half is not None:
        in_half = model if wanted == torch.bfloat16 else copy.deepcopy(model)
        differences["bfloat16"] = _distance(_answers(_cast_base(in_half, torch.bfloat16), probes), half)
        del in_half
    _cast_base(model, wanted)
    report = {
        "differences": differences,
        "largest_logit": scale,
        "dtype": str(wanted).removeprefix("torch."),
        "probes": len(probes),
        "atol": atol,
        "merged": kinds,
        "zero_biases_added": created,
        "untied": untied,
        "base": getattr(module, "base_identity", dict)(),
        "lit_peft_version": __version__,
    }
    if requantised:
        report["requantised"] = {"mean": sum(requantised) / len(requantised), "max": max(requantised)}
    return _write(model, tokenizer, folder, probes, report)


def check_folder(folder: str | Path) -> None:
    """See that a merge may be written here.

    Raises:
        FileExistsError: if there is something that is no earlier merge.
    """
    folder = Path(folder)
    if folder.is_dir():
        if not any(folder.iterdir()) or (folder / REPORT).is_file():
            return
        stranger = sorted(entry.name for entry in folder.iterdir())[0]
        raise FileExistsError(f"{folder} already holds {stranger!r} and no earlier merge. Choose a new folder.")
    if folder.exists():
        raise FileExistsError(f"{folder} is a file. Choose a new folder.")


def check_mergeable(module: LightningModule) -> None:
    """See that every adapter of a module can be folded into its base.

    Raises:
        TypeError: naming the kind of adapter that cannot, or the model that cannot be saved.
    """
    model = module.model
    if not isinstance(model, nn.Module):
        raise TypeError(f"{type(module).__name__} has no model yet. Call configure_model() first.")
    if not hasattr(model, "save_pretrained"):
        raise TypeError(f"{type(model).__name__} is no transformers model: it has no folder format to be written in.")
    for _, adapter in named_adapters(model):
        if type(adapter).merge is Adapter.merge:
            raise TypeError(
                f"{type(adapter).__name__} cannot be merged into its base. Save the adapter instead of merging."
            )


def is_mergeable(module: LightningModule) -> bool:
    """Whether `write_merged` has a way for every adapter of a module."""
    try:
        check_mergeable(module)
    except TypeError:
        return False
    return True


def _plain_copy(module: LightningModule) -> nn.Module | None:
    """Return the adapted model on the CPU, unsharded and in eval mode; None on all but the first process."""
    model = module.model
    assert isinstance(model, nn.Module)
    if any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        # Sharded models cannot be copied. The base is on disk, so only what was trained has to be gathered.
        state = {key: _whole(value) for key, value in module.state_dict().items()}
        if module.global_rank != 0:
            return None
        fresh: Any = type(module)(**module.hparams)
        fresh.configure_model()
        note(fresh.model, rewritten(model))  # ReMoRA's type goes by it
        fresh.load_state_dict(state, strict=False)
        rebuilt: nn.Module = fresh.model
        return rebuilt.cpu().eval()
    if module.global_rank != 0:
        return None
    # Tensors that the copy finds in the memo are taken from there: nothing is doubled on the device.
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("cpu", copy=True), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach().to("cpu", copy=True)
    return copy.deepcopy(model, memo).eval()


def _whole(value: Any) -> Any:
    gather = getattr(value, "full_tensor", None)
    return value if gather is None else gather().cpu()


def _dtype(name: str) -> torch.dtype:
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise ValueError(f"dtype {name!r} is not one of {list(known)}.")
    return known[name]


def _own(model: nn.Module) -> set[int]:
    return {id(parameter) for _, adapter in named_adapters(model) for _, parameter in adapter.own_parameters()}


def _base_dtype(model: nn.Module) -> torch.dtype:
    own = _own(model)
    return next(p.dtype for p in model.parameters() if id(p) not in own and p.is_floating_point())


def _cast_base(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast all parameters but the adapters' own, which are trained in float32.

    Not the buffers: rotary frequencies rounded to bf16 moved the logits of a small model by more than 1.
    """
    own = _own(model)
    for parameter in model.parameters():
        if id(parameter) not in own and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return model


def _probes(model: nn.Module, tokenizer: Any, prompts: Sequence[str]) -> list[Tensor]:
    """Return one row of token ids (1, length) for each prompt."""
    config: Any = model.config
    if tokenizer is None:
        generator = torch.Generator().manual_seed(0)
        return [torch.randint(int(config.vocab_size), (1, 16), generator=generator) for _ in range(4)]
    rows = [list(tokenizer(prompt)["input_ids"])[:PROBE_LENGTH] for prompt in prompts]
    return [torch.tensor([row]) for row in rows if row]


@torch.no_grad()
def _answers(model: nn.Module, probes: Sequence[Tensor]) -> list[Tensor]:
    """Return the logits, or the last hidden state of a model without a head, for each probe."""
    config: Any = model.config
    found = []
    for ids in probes:
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if getattr(config, "is_encoder_decoder", False):
            start = torch.full((1, 1), int(config.decoder_start_token_id or 0))
            inputs["decoder_input_ids"] = torch.cat([start, ids[:, :15]], 1)
        out = model(**inputs)
        logits = out.logits if getattr(out, "logits", None) is not None else out.last_hidden_state
        found.append(logits.float())
    return found


def _distance(ones: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    return max(float((one - other).abs().max()) for one, other in zip(ones, others, strict=True))


def fit_biases(model: nn.Module) -> int:
    """Make the configuration announce biases that a merge created, so that loading does not drop them.

    Where the architecture can only have biases on a whole kind of layer, the others get zeros.

    Args:
        model: a merged transformers model.

    Returns:
        How many zero biases were added.

    Raises:
        TypeError: if the architecture has no such bias.
    """
    config: Any = model.config
    present = set(dict(model.named_parameters(remove_duplicate=False)))
    extra = present - _announced(type(model), config)
    if not extra:
        return 0
    for flag, value in sorted(config.to_dict().items()):
        if value is False and "bias" in flag and extra:
            changed = copy.deepcopy(config)
            setattr(changed, flag, True)
            left = present - _announced(type(model), changed)
            if left < extra:
                setattr(config, flag, True)
                extra = left
    if extra:
        raise TypeError(
            f"{type(model).__name__} has no place for {sorted(extra)[0]!r}, which was trained; loading the merged "
            "folder would drop it. Export the adapter instead of merging."
        )
    missing = sorted(_announced(type(model), config) - present)
    for name in missing:
        path, _, leaf = name.rpartition(".")
        layer = model.get_submodule(path)
        weight: Any = layer.weight
        setattr(layer, leaf, nn.Parameter(torch.zeros(weight.shape[0], dtype=weight.dtype), requires_grad=False))
    return len(missing)


def fit_ties(model: nn.Module) -> bool:
    """Make the configuration say that weights are not tied, where a merge changed one of them and not the other.

    Loading the folder would tie them again. A configuration ties all or none, so those still tied get copies.

    Args:
        model: a merged transformers model.

    Returns:
        Whether the weights had to be untied.
    """
    held = dict(model.named_parameters(remove_duplicate=False))
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    pairs = [(target, source) for target, source in tied.items() if target in held and source in held]
    if all(held[target] is held[source] for target, source in pairs):
        return False
    for target, source in pairs:
        if held[target] is held[source]:
            path, _, leaf = target.rpartition(".")
            setattr(model.get_submodule(path), leaf, nn.Parameter(held[target].detach().clone(), requires_grad=False))
    whole: Any = model
    whole.config.tie_word_embeddings = False
    whole.all_tied_weights_keys = {}
    return True


def _announced(kind: type[nn.Module], config: Any) -> set[str]:
    """Return the parameters that the architecture has under this configuration, without making them."""
    with torch.device("meta"):
        skeleton = kind(config)
    return set(dict(skeleton.named_parameters(remove_duplicate=False)))


def _write(
    model: Any, tokenizer: Any, folder: Path, probes: Sequence[Tensor], report: dict[str, Any]
) -> dict[str, Any]:
    """Write into a temporary folder, load that as a user would, compare, and only then give it its name."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        model.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        expected = _answers(model, probes)
        loaded = type(model).from_pretrained(temporary, dtype=_dtype(report["dtype"])).eval()
        report["reloaded"] = _distance(_answers(loaded, probes), expected)
        if not report["reloaded"] <= report["atol"] * max(1.0, report["largest_logit"]):
            raise ValueError(
                "The merged folder, loaded by transformers, differs from the merged model by "
                f"{report['reloaded']:.2g}; nothing was written. Export the adapter instead."
            )
        (temporary / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        temporary.chmod(0o755)
        _rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return report


def _rename(temporary: Path, folder: Path) -> None:
    if not folder.exists() or not any(folder.iterdir()):
        os.replace(temporary, folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
    os.replace(folder, old)
    os.replace(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)
