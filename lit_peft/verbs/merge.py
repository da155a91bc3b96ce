"""`lit-peft merge`: fold an adapter into its base and write a Hugging Face folder, measured before it is written."""

from __future__ import annotations

from typing import Literal

from rich.console import Console
from rich.markup import escape

from lit_peft.merging import check_folder, write_merged
from lit_peft.mixin import PEFT
from lit_peft.restore import load
from lit_peft.runs import quiet
from lit_peft.saved import merge_summary


def run(
    path: str,
    out: str,
    atol: float = 1e-4,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    backbone: str | None = None,
) -> None:
    """Fold an adapter into its base and write a folder that plain transformers loads, tokenizer included.

    Args:
        path: a checkpoint, a run folder, or an adapter folder.
        out: a new or empty folder.
        atol: largest accepted difference of the logits in float32, merged against adapted.
        dtype: precision to write; default: that of the base.
        backbone: base model to use instead of the one that was noted.

    Raises:
        ValueError: if there is nothing to merge, the method cannot be folded, or the logits differ too much.
        FileExistsError: if the folder holds something else.
    """
    if not atol > 0:
        raise ValueError(f"atol is {atol}; it must be above 0.")
    check_folder(out)  # before the model is loaded, which can take minutes
    quiet()
    module = load(path, backbone=backbone, device="cpu")
    if not isinstance(module, PEFT):
        raise ValueError(
            f"{path} is a whole model already, which transformers loads as it is. There is nothing to merge."
        )
    try:
        report = write_merged(module, out, atol=atol, dtype=dtype)
    except TypeError as reason:
        raise ValueError(f"Cannot merge {path}: {reason}") from reason
    Console(highlight=False).print(f"Wrote {escape(out)}: {escape(merge_summary(report))}", soft_wrap=True)
