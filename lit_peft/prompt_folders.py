"""How HF PEFT stores prompts: one tensor without a path, and no network that it came out of.

PEFT puts a prompt in front of the text. What it has no word for (a place inside of the text, a base that is trained
too) is written under a `peft_type` of our own, so that PEFT refuses it instead of computing something else.
"""

from __future__ import annotations

EMBEDDINGS = "prompt_embeddings"
ENCODER = "adapter_encoder.safetensors"  # beside PEFT's file: the network, so that training can go on
ENCODER_KEYS = "encoder_keys"  # added to what is read from a configuration file: the names of its tensors
BEYOND = {"PROMPT_TUNING": "LIT_PROMPT", "P_TUNING": "LIT_P_TUNING"}
_MEANT = {own: kind for kind, own in BEYOND.items()}
# around a model that only gets a prompt PEFT has one wrapper, around one with changed layers two
_ROOTS = dict.fromkeys((*BEYOND, "PREFIX_TUNING"), "base_model.")


def meant(peft_type: str) -> str:
    """Return PEFT's name for a kind of folder that is one of its methods with more than it knows.

    Example:
        >>> meant("LIT_PROMPT"), meant("LORA")
        ('PROMPT_TUNING', 'LORA')
    """
    return _MEANT.get(peft_type, peft_type)


def root(peft_type: str) -> str:
    """Return what the names of the base's own weights begin with in a folder of this kind."""
    return _ROOTS.get(meant(peft_type), "base_model.model.")


def stored_key(start: str, path: str, leaf: str) -> str:
    """Return the name of an adapter's tensor in a file: a prompt has no path."""
    return leaf if leaf == EMBEDDINGS else f"{start}{path}.{leaf}"
