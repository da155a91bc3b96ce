"""Which library wrote a folder, seen from its files; and the folder in our words."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from lit_peft.foreign import adapters_hub, pyreft
from lit_peft.foreign.told import Told


def foreign(folder: str | Path) -> Callable[[], Told] | None:
    """Return what reads a folder of another library than HF PEFT; None if it is none.

    Example:
        >>> foreign("/nowhere") is None
        True
    """
    folder = Path(folder)
    for name, reader in (("adapter_config.json", adapters_hub), ("config.json", pyreft)):
        config = _json(folder / name)
        if isinstance(config, dict) and reader.recognised(config):
            return partial(reader.read, folder, config)
    return None


def _json(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # whoever else reads it will say so
        return None
