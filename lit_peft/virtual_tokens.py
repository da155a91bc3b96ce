"""HF PEFT's folders of virtual tokens (prefix tuning, prompt tuning, P-tuning), which differ from those of its layers.

The file holds one tensor, `prompt_embeddings`, under no path, and what is trained beside it under one word less. It is
what a network made of them yields: PEFT drops the network, and training cannot go on. Here it is kept in a file beside
PEFT's own, which PEFT does not look at.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_peft.tensor_files import load_tensors, shapes

KINDS = frozenset({"PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"})
TOKENS = "prompt_embeddings"
ENCODER = "prompt_encoder.safetensors"
STORED = "stored_as"  # in a method's part: the type that a folder says where PEFT's own could not hold this one
LONG, SHORT = "base_model.model.", "base_model."


def outward(
    config: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """Return configuration and tensors as PEFT has them, and the network's tensors, which PEFT does not have.

    Args:
        config: for `adapter_config.json`; with `stored_as` it is written under another type, in our own layout.
        tensors: by `base_model.model.` and path.
    """
    config = dict(config)
    config["peft_type"] = config.pop(STORED, config["peft_type"])
    if config["peft_type"] not in KINDS:
        return config, tensors, {}
    config.pop("target_modules", None)  # PEFT's settings of virtual tokens know no targets
    home = next(key for key in tensors if key.endswith(f".{TOKENS}")).removesuffix(TOKENS)
    network = (f"{home}prefix_", f"{home}prompt_encoder")
    encoder = {key.removeprefix(home): tensor for key, tensor in tensors.items() if key.startswith(network)}
    rest = {key: tensor for key, tensor in tensors.items() if not key.startswith(network)}
    main = {TOKENS if key == home + TOKENS else SHORT + key.removeprefix(LONG): t for key, t in rest.items()}
    return config, main, encoder


def lengthened(config: Mapping[str, Any], key: str) -> str:
    """Return the name that a tensor of a folder would have in PEFT's other folders."""
    if config.get("peft_type") not in KINDS:
        return key
    return LONG + (TOKENS if key == TOKENS else key.removeprefix(SHORT))


def encoder_keys(part: Path) -> list[str]:
    """Return the names of the network's tensors in a folder; none where PEFT wrote it."""
    return list(shapes(part / ENCODER)) if (part / ENCODER).is_file() else []


def inward(
    part: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], homes: Mapping[str, Collection[str]]
) -> dict[str, Tensor]:
    """Return a folder's tensors by path, with those of the network where the adapter at that path has one.

    Args:
        part: the folder.
        config: its configuration.
        tensors: those of PEFT's file.
        homes: path of each adapter of the kind, with the names of its tensors.

    Raises:
        ValueError: if the model has more than one place for them.
    """
    if config.get("peft_type") not in KINDS or TOKENS not in tensors or not homes:
        return dict(tensors)
    if len(homes) > 1:
        raise ValueError(
            f"{part} holds HF PEFT's {config['peft_type']}, which acts in the decoder alone, and this model has "
            f"{len(homes)} stacks with virtual tokens of their own. Train it here: such a folder holds them all."
        )
    (home, names), *_ = homes.items()
    found = {f"{home}.{key}" if key == TOKENS else key: tensor for key, tensor in tensors.items()}
    stored = load_tensors(part / ENCODER) if (part / ENCODER).is_file() else {}
    return {**found, **{f"{home}.{key}": tensor for key, tensor in stored.items() if key in names}}
