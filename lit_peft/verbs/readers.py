"""Who can load an exported adapter folder, how, and why others cannot: read off its configuration.

What servers take was read in their own loaders: vLLM (`lora/peft_helper.py`, `config/lora.py`), SGLang
(`srt/lora/lora.py`) and llama.cpp (`convert_lora_to_gguf.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from lit_peft.targets import KEYS

AUTO = {"CAUSAL_LM": "CausalLM", "SEQ_2_SEQ_LM": "Seq2SeqLM", "SEQ_CLS": "SequenceClassification"}
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # values of --max-lora-rank; 16 unless told otherwise


class Exported(NamedTuple):
    """What is known of an exported folder.

    Attributes:
        config: from `adapter_config.json`, with the names of the tensors.
        folder: where it is.
        base: the base model, as other libraries name it.
        labels: number of classes of a classifier.
    """

    config: Mapping[str, Any]
    folder: str
    base: str
    labels: int = 0


class Reader(NamedTuple):
    """A library or server.

    Attributes:
        title: its name.
        obstacle: why it cannot load an adapter; empty where it can.
        how: what to run.
    """

    title: str
    obstacle: Callable[[Exported], str]
    how: Callable[[Exported], str]


def _peft(adapter: Exported) -> str:
    return "" if adapter.config.get("task_type") in AUTO else "the adapter does not say which task it is for"


def _in_python(adapter: Exported) -> str:
    kind = adapter.config["task_type"]
    head = f", num_labels={adapter.labels}" if kind == "SEQ_CLS" else ""
    model = f"AutoModelFor{AUTO[kind]}.from_pretrained({adapter.base!r}{head})"
    return f"PeftModel.from_pretrained({model}, {adapter.folder!r})"


def _extras(adapter: Exported) -> str:
    """Say what there is beside the A and B of causal language models, or an empty string."""
    config = adapter.config
    if config["peft_type"] != "LORA":
        return f"it reads LoRA only, and this is {config['peft_type']}"
    if config.get("task_type") != "CAUSAL_LM":
        return f"it adapts causal language models, and this is for {config.get('task_type')}"
    if config.get("modules_to_save"):
        return f"it does not read modules_to_save ({', '.join(config['modules_to_save'])})"
    if config.get("use_dora"):
        return "it has no DoRA"
    if config.get("bias", "none") != "none" or any(key.endswith(".bias") for key in config[KEYS]):
        return "it does not read trained biases"
    if any(".lora_embedding_" in key for key in config[KEYS]):
        return "not every version reads an adapted embedding"
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        return "it takes one scale for all layers, and rank_pattern or alpha_pattern give several"
    return ""


def _vllm(adapter: Exported) -> str:
    rank = adapter.config.get("r", 8)
    return _extras(adapter) or (
        f"its largest rank is {VLLM_RANKS[-1]}, and this has {rank}" if rank > VLLM_RANKS[-1] else ""
    )


def _serve_vllm(adapter: Exported) -> str:
    rank = next(rank for rank in VLLM_RANKS if rank >= max(16, adapter.config.get("r", 8)))
    return f"--enable-lora{f' --max-lora-rank {rank}' if rank > 16 else ''} --lora-modules NAME={adapter.folder}"


def _plain(adapter: Exported) -> str:
    rslora = "it scales by alpha / r, and rsLoRA's alpha / sqrt(r) would be taken for that"
    return _extras(adapter) or (rslora if adapter.config.get("use_rslora") else "")


READERS: dict[str, Reader] = {
    "peft": Reader("transformers + peft", _peft, _in_python),
    "vllm": Reader("vLLM, for architectures that it adapts", _vllm, _serve_vllm),
    "sglang": Reader("SGLang", _plain, lambda adapter: f"--enable-lora --lora-paths NAME={adapter.folder}"),
    "llama.cpp": Reader(
        "llama.cpp", _plain, lambda adapter: f"convert_lora_to_gguf.py {adapter.folder} --base FOLDER_OF_THE_BASE"
    ),
}
