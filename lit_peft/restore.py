"""`lit_peft.load`: a ready module from whatever was saved: checkpoint, run folder, adapter folder, merged model."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoTokenizer

from lit_peft import backbone as backbones
from lit_peft import hub
from lit_peft.adapter import remember
from lit_peft.catalogue import TASKS
from lit_peft.forks import kind_of
from lit_peft.module import AdaptableModule
from lit_peft.saved import locate, methods_of, read_checkpoint
from lit_peft.zoo import check, compose, task_class

# PEFT's name of a task, or the ending of a model class -> ours
TASK_OF = {
    "CAUSAL_LM": "sft",
    "SEQ_2_SEQ_LM": "sft",
    "SEQ_CLS": "classification",
    "ForCausalLM": "sft",
    "LMHeadModel": "sft",
    "ForConditionalGeneration": "sft",
    "ForSequenceClassification": "classification",
}
# the last layer of transformers' classification heads
HEADS = ("classifier", "score", "classifier.out_proj", "classification_head.out_proj")


def load(
    path: str | Path,
    *,
    backbone: str | None = None,
    device: str | torch.device | None = None,
    dtype: str | None = None,
    quantize: Literal["nf4", "none"] | None = None,
    task: str | None = None,
    check_base: bool = True,
) -> Any:
    """Give back what was saved, ready to use: base model, adapter and tokenizer, in eval mode.

    Args:
        path: a checkpoint (`.ckpt`), a run folder (its best checkpoint, else its last), an adapter folder written by
            lit_peft or HF PEFT, or a merged model's folder.
        backbone: base model to use instead of the one that was noted, such as a local copy of it.
        device: where to put the model; default: the GPU if there is one.
        dtype: `float32`, `bfloat16`, `float16` or `auto`; default: as in training.
        quantize: `nf4` for a base in four bits, `none` for one as it is stored, whatever the adapter was trained on;
            default: as in training, which adapter folders do not say.
        task: name as for `--task`, for adapters that do not say.
        check_base: refuse a base model other than the adapter's.

    Returns:
        The LightningModule: `.model` with the adapter in place, `.tokenizer`, and for language models
        `.reply([{"role": "user", "content": "..."}])`.

    Raises:
        FileNotFoundError: if there is nothing to load at the path.
        ValueError: if files are damaged, or adapter and base do not fit.

    Example:
        >>> from lit_peft import load
        >>> # assistant = load("runs/2026-11-21-lora-sft")
        >>> # assistant.reply([{"role": "user", "content": "What is LoRA?"}])
    """
    kind, found = locate(path)
    options: dict[str, Any] = {key: value for key, value in (("dtype", dtype), ("quantize", quantize)) if value}
    if kind == "model" and backbone is not None:
        raise ValueError(f"{found} is a whole model, so there is no base to choose. Leave backbone out.")
    with _silence():
        if kind == "checkpoint":
            module = _from_checkpoint(found, backbone, options, check_base)
        elif kind == "adapter":
            module = _from_adapter(found, backbone, task, options, check_base)
        else:
            module = _from_model(found, task, options)
    _use_tokenizer(module, Path(path), found)
    module.eval()
    return module.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


@contextmanager
def _silence() -> Iterator[None]:
    """Leave out what is said to someone who trains: how much is trained, what was created for it."""
    log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(level)


def _from_checkpoint(path: Path, backbone: str | None, options: dict[str, Any], check_base: bool) -> AdaptableModule:
    checkpoint = read_checkpoint(path)
    meta = checkpoint["lit_peft"]
    # "_class_path" and "_instantiator" are LightningCLI's own notes
    settings = {k: v for k, v in checkpoint.get("hyper_parameters", {}).items() if not k.startswith("_")}
    if backbone is not None:
        settings |= {"backbone": backbone, "revision": None}
    if "adapter" in settings:  # where training started from: its weights are in the checkpoint, the folder may be gone
        settings["adapter"] = None
    module: Any = _class(meta["class_path"], path)(**{**settings, **options})
    module.check_base = check_base
    module.configure_model()
    module.on_load_checkpoint(checkpoint)
    state, mine = checkpoint["state_dict"], dict(module.named_parameters(remove_duplicate=False))
    with_grad = module.trained_keys()
    thawed = [(key.removeprefix("model."), mine[key]) for key in state if key in mine and key not in with_grad]
    remember(module.model, thawed)  # so that `disabled` still gives the base, and an export sees that they were trained
    for _, parameter in thawed:
        parameter.requires_grad_(True)
    module.load_state_dict(state, strict=False)
    return module  # type: ignore[no-any-return]


def _class(class_path: str, path: Path) -> type[AdaptableModule]:
    module, _, name = class_path.rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path} needs the class {class_path}, which cannot be imported here. Put its file on PYTHONPATH."
        ) from error
    if not (isinstance(found, type) and issubclass(found, AdaptableModule)):
        raise ValueError(f"{path} names {class_path}, which is no module of lit_peft.")
    return found


def _from_adapter(
    folder: Path, backbone: str | None, task: str | None, options: dict[str, Any], check_base: bool
) -> AdaptableModule:
    configs, meta = hub.read_configs(folder), hub.read_meta(folder)
    methods = methods_of([kind_of(config) for config in configs], folder)
    first = configs[0]
    name = backbone or meta.get("base", {}).get("name") or first.get("base_model_name_or_path")
    if not name:
        raise ValueError(f"{folder} does not say which base model it belongs to. Pass backbone=NAME.")
    mapped = (first.get("auto_mapping") or {}).get("base_model_class") or ""
    task = _task(task, first.get("task_type") or mapped, folder)
    settings = {"backbone": name, "revision": None if backbone else first.get("revision"), **options}
    if task == "classification":
        settings["labels"] = meta.get("labels") or _labels(configs, folder, str(name), settings["revision"])
    made = compose("+".join(methods), task)
    module: Any = made(**settings, adapter=str(folder), check_base=check_base)
    module.configure_model()
    return module  # type: ignore[no-any-return]


def _task(task: str | None, kind: str, folder: Path) -> str:
    if task is not None:
        check(task, TASKS, "task")
        return task
    for ending, ours in TASK_OF.items():
        if kind.endswith(ending):
            return ours
    if not kind:
        raise ValueError(f"{folder} does not say which task it is for. Pass task=, one of {', '.join(TASKS)}.")
    raise ValueError(f"{folder} is made for {kind}, which no task here covers. Tasks: {', '.join(TASKS)}.")


def _labels(configs: list[dict[str, Any]], folder: Path, backbone: str, revision: str | None) -> list[str]:
    """Return the names of the classes: the base's own where it has as many as the saved head."""
    stored = {key: tensor.shape for _, tensors in hub.contents(folder) for key, tensor in tensors.items()}
    config = backbones.load_config(backbone, revision=revision)
    names = [str(config.id2label[i]) for i in sorted(config.id2label)]
    number = next((stored[f"{head}.weight"][0] for head in HEADS if f"{head}.weight" in stored), len(names))
    return names if len(names) == number else [f"LABEL_{i}" for i in range(number)]


def _from_model(folder: Path, task: str | None, options: dict[str, Any]) -> AdaptableModule:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    task = _task(task, (config.get("architectures") or [""])[0], folder)
    settings: dict[str, Any] = {"backbone": str(folder), **options}
    if task == "classification":
        names = config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
        settings["labels"] = [names[key] for key in sorted(names, key=int)]
    module: Any = task_class(task)(**settings)
    module.configure_model()
    return module  # type: ignore[no-any-return]


def _use_tokenizer(module: Any, *places: Path) -> None:
    """Take the tokenizer saved beside the adapter, if there is one: it carries the template of the training."""
    folders = [place if place.is_dir() else place.parent for place in places]
    folder = next((folder for folder in folders if (folder / "tokenizer_config.json").is_file()), None)
    if folder is not None and hasattr(type(module), "tokenizer"):
        module._tokenizer = AutoTokenizer.from_pretrained(folder)
