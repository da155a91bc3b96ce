"""Two-layer, width-32 models with random weights, and a tokenizer of 128 tokens: nothing is downloaded.

All dropouts are 0, so train and eval mode compute the same, and the weights are drawn wider than usual (small widths
would otherwise give almost flat outputs, on which any comparison passes).
"""

from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

Task = Literal["lm", "classification", "base"]

VOCAB = 128
PAD, UNK, BOS, IM_START, IM_END = range(5)

_TOKENS = {"vocab_size": VOCAB, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": IM_END}
_ROPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "attention_dropout": 0.0,
}
_ENCODER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}

# kind -> (transformers' model_type, what its configuration needs to be small)
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**_ROPE, "tie_word_embeddings": False}),
    "qwen2": ("qwen2", {**_ROPE, "tie_word_embeddings": True}),
    "gemma": (
        "gemma3_text",
        {**_ROPE, "head_dim": 8, "query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "gpt2": (
        "gpt2",
        {
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 256,
            "initializer_range": 0.2,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
    ),
    "gpt_neox": (
        "gpt_neox",
        {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
            "initializer_range": 0.2,
        },
    ),
    "bert": ("bert", _ENCODER),
    "roberta": ("roberta", {**_ENCODER, "type_vocab_size": 1}),
    "t5": (
        "t5",
        {
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 64,
            "num_layers": 2,
            "num_decoder_layers": 2,
            "num_heads": 4,
            "dropout_rate": 0.0,
            "decoder_start_token_id": PAD,
        },
    ),
}
KINDS = tuple(CONFIGS)

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _auto(kind: str, task: Task) -> Any:
    if task == "classification":
        return AutoModelForSequenceClassification
    if task == "base":
        return AutoModel
    return {"t5": AutoModelForSeq2SeqLM, "bert": AutoModelForMaskedLM, "roberta": AutoModelForMaskedLM}.get(
        kind, AutoModelForCausalLM
    )


def tiny(kind: str, task: Task = "lm", *, num_labels: int = 3, seed: int = 0, **config: Any) -> nn.Module:
    """A small random model in eval mode and fp32; two calls give equal weights and leave the global seed alone.

    Args:
        kind: A key of `CONFIGS`.
        task: "lm" (causal, masked for BERT and RoBERTa, seq2seq for T5), "classification" or "base" (no head).
        num_labels: Classes of the classification head.
        seed: Another seed gives another base.
        config: Overrides of the configuration, by transformers' names.
    """
    model_type, settings = CONFIGS[kind]
    extra = {"num_labels": num_labels} if task == "classification" else {}
    # AutoConfig instead of the classes by name: one table row is then enough for a new architecture
    cfg = AutoConfig.for_model(model_type, **{**_TOKENS, **settings, **extra, **config})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = _auto(kind, task).from_config(cfg, dtype=torch.float32)
        # biases and norms start at 0 and 1, on which a forgotten bias or a swapped norm would not be noticed
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval()


def tiny_tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE of exactly 128 tokens: all of ASCII, a few merges, a ChatML template unless `chat` is false.

    Ends of turn are `<|im_end|>`, which is also eos; padding has its own token. Anything beyond ASCII becomes unk.
    """
    # as ByteLevel writes them: space is Ġ, newline Ċ, tab ĉ
    letters = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ", "ĉ"]
    joined = "thheineranreonatenndtiesorteofedisitalarsttontngseha"
    pairs = [joined[i : i + 2] for i in range(0, len(joined), 2)]
    tokens = ["<pad>", "<unk>", "<bos>", "<|im_start|>", "<|im_end|>", *letters, *pairs]
    assert len(tokens) == VOCAB, len(tokens)
    bpe = models.BPE(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[(pair[0], pair[1]) for pair in pairs],
        unk_token="<unk>",
    )
    backend = Tokenizer(bpe)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )
    if chat:
        tokenizer.chat_template = CHATML
    return tokenizer


def save_tiny(kind: str, folder: str | Path, task: Task = "lm", *, chat: bool = True, **options: Any) -> Path:
    """Write `tiny(kind, task, **options)` and its tokenizer as a Hugging Face folder; returns the folder."""
    folder = Path(folder)
    tiny(kind, task, **options).save_pretrained(folder)  # type: ignore[operator]
    tiny_tokenizer(chat).save_pretrained(folder)
    return folder
