"""Folders of pyreft: LoReFT, DiReFT and their relatives without orthogonality, edits behind layers.

`config.json` names the classes of the edits as text, which is parsed and never imported; each edit is a file of tensors
`intkey_layer_3_comp_block_output_unit_pos_nunit_1#0.bin`, with #1 for the last tokens where these have an edit of their
own. Which tokens are edited is not stored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_peft.foreign.rotations import rotation, without_subtraction
from lit_peft.foreign.told import Part, Told, unpickled

CLASS = re.compile(r"<class '(?:[\w]+\.)*(\w+)'>")
# a layer by its number, or by a path such as `model.layers[3].output`, whose dots are written as _
FILE = re.compile(r"(?:layer_(\d+)_comp_block_output|comp_\w*\[(\d+)\]_output)_unit_pos_nunit_\d+#(\d+)")
KINDS = {
    "LoreftIntervention": "LIT_LOREFT",
    "DireftIntervention": "LIT_DIREFT",
    "NoreftIntervention": "LIT_DIREFT",  # W - P in the place of W
    "NodireftIntervention": "LIT_DIREFT",
}


def recognised(config: Mapping[str, Any]) -> bool:
    """Whether a folder with this `config.json` was written by pyreft (pyvene)."""
    return "intervention_types" in config and "representations" in config


def read(folder: Path, note: Mapping[str, Any]) -> Told:
    """Read a folder.

    Args:
        folder: where it is.
        note: its `config.json`.

    Raises:
        FileNotFoundError: if an edit's file is missing.
        ValueError: if edits have no equal here, are not behind layers, or a file is damaged.
    """
    classes = {_class(folder, text) for text in note["intervention_types"]}
    unknown = sorted(classes - KINDS.keys())
    if unknown or len(classes) != 1:
        what = unknown[0] if unknown else " and ".join(sorted(classes)) + " in one folder"
        raise ValueError(f"{folder} holds {what}; of pyreft's edits {', '.join(KINDS)} are read, one kind a folder.")
    (kind,) = classes
    names = note.get("sorted_keys") or [
        file.stem.removeprefix("intkey_") for file in sorted(folder.glob("intkey_*.bin"))
    ]
    if len(names) != len(note["representations"]):
        raise ValueError(f"{folder} lists {len(note['representations'])} edits and {len(names)} files. Copy it again.")
    edits: dict[int, dict[int, tuple[Tensor, Tensor, Tensor]]] = {}
    for name in names:
        match = FILE.fullmatch(str(name))
        if match is None:
            raise ValueError(
                f"{folder} has an edit at {name}; those behind whole layers (block_output) are read. Run it in pyreft."
            )
        place = edits.setdefault(int(match[1] or match[2]), {})
        place[int(match[3])] = _edit(folder, kind, unpickled(folder / f"intkey_{name}.bin"))
    places = {tuple(sorted(place)) for place in edits.values()}
    if places not in ({(0,)}, {(0, 1)}):
        raise ValueError(f"{folder} has layers with {sorted(places)} edits; one each, or two each, are read.")
    found: dict[str, Tensor] = {}
    for layer, place in edits.items():
        columns = zip(*(place[number] for number in sorted(place)), strict=True)
        for leaf, tensors in zip(("reft_rotation", "reft_source", "reft_bias"), columns, strict=True):
            found[f"layer.{layer}.{leaf}"] = torch.stack(tensors)
    ranks = sorted({tensor.shape[-1] for key, tensor in found.items() if key.endswith("reft_bias")})
    if len(ranks) > 1:
        raise ValueError(f"{folder} has edits of ranks {ranks}, and here all have one. Run it in pyreft.")
    if (folder / "pytorch_model.bin").is_file():  # weights of the model that were trained beside, such as a head
        found |= unpickled(folder / "pytorch_model.bin")
    config = {
        "peft_type": KINDS[kind],
        "r": ranks[0],
        "tied": places == {(0,)},
        "layers_to_transform": sorted(edits),
        "auto_mapping": {"base_model_class": _class(folder, note["model_type"]) if note.get("model_type") else ""},
    }
    return Told(folder / "config.json", [Part(config, found)])


def _class(folder: Path, text: Any) -> str:
    """Return the name of a class from its text, `<class 'pyreft.interventions.LoreftIntervention'>`."""
    match = CLASS.fullmatch(str(text))
    if match is None:
        raise ValueError(f"{folder} names a class as {text!r}, and <class '...'> is expected. Restore its config.json.")
    return match[1]


def _edit(folder: Path, kind: str, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return R (d, r), W (r, d) and b (r) of one edit."""
    learned = "" if kind == "LoreftIntervention" else "learned_source."
    source, bias = (tensors.get(f"{learned}{leaf}") for leaf in ("weight", "bias"))
    if source is None or bias is None:
        raise ValueError(f"{folder} lacks {learned}weight or bias of an edit; it has {sorted(tensors)}. Copy it again.")
    if kind in ("LoreftIntervention", "DireftIntervention"):
        r = rotation(folder, tensors, "rotate_layer").float()
    else:
        projection, offset = rotation(folder, tensors, "proj_layer"), tensors.get("proj_layer.bias")
        r = projection.t().float()
        if kind == "NoreftIntervention":
            source, bias = without_subtraction(source, bias, projection)
            bias = bias if offset is None else bias - offset.float()
    return r, source.float(), bias.float()
