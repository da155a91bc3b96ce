"""Every parameter-efficient fine-tuning method as a Lightning mixin.

Nothing heavy is imported here: `import lit_peft` is instant, and each public name pulls in its module on first use.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# public name -> module that defines it
_HOME = {
    "Adapter": "adapter",
    "activate": "named",
    "adapters": "named",
    "add_adapter": "named",
    "combine_adapters": "named",
    "train_adapters": "named",
    "disabled": "named",
    "place": "placing",
    "delete_adapter": "named",
    "routed": "named",
    "Stack": "blocks",
    "Average": "blocks",
    "Fuse": "blocks",
    "LoRA": "methods.lora",
    "LoRAConfig": "methods.lora",
    "RsLoRA": "methods.lora",
    "ReLoRA": "methods.relora",
    "MoRA": "methods.mora",
    "MoRAConfig": "methods.mora",
    "ReMoRA": "methods.remora",
    "DoRA": "methods.dora",
    "PiSSA": "methods.pissa",
    "OLoRA": "methods.olora",
    "EVA": "methods.eva",
    "LoRAPlus": "methods.loraplus",
    "QLoRA": "methods.qlora",
    "AdaLoRA": "methods.adalora",
    "AdaLoRAConfig": "methods.adalora",
    "BitFit": "methods.bitfit",
    "BitFitConfig": "methods.bitfit",
    "IA3": "methods.ia3",
    "IA3Config": "methods.ia3",
    "Freeze": "methods.freeze",
    "FreezeConfig": "methods.freeze",
    "Full": "methods.full",
    "Houlsby": "methods.houlsby",
    "HoulsbyConfig": "methods.houlsby",
    "Pfeiffer": "methods.pfeiffer",
    "PfeifferConfig": "methods.pfeiffer",
    "ParallelAdapter": "methods.parallel",
    "ParallelConfig": "methods.parallel",
    "PrefixTuning": "methods.prefix",
    "PrefixConfig": "methods.prefix",
    "PTuningV2": "methods.p_tuning_v2",
    "PTuningV2Config": "methods.p_tuning_v2",
    "PromptTuning": "methods.prompt",
    "PromptConfig": "methods.prompt",
    "PTuning": "methods.p_tuning",
    "PTuningConfig": "methods.p_tuning",
    "Compacter": "methods.compacter",
    "CompacterConfig": "methods.compacter",
    "MAM": "methods.mam",
    "MAMPrefixConfig": "methods.mam",
    "UniPELT": "methods.unipelt",
    "AdapterFusion": "methods.fusion",
    "FusionConfig": "methods.fusion_site",
    "LoReFT": "methods.loreft",
    "DiReFT": "methods.direft",
    "ReFTConfig": "methods.reft",
    "make_lean": "ops.lean",
    "make_plain": "ops.lean",
    "SFT": "tasks.sft",
    "Classification": "tasks.classification",
    "Instructions": "data.instructions",
    "Labelled": "data.labelled",
    "load": "restore",
}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lit_peft' has no attribute {name!r}")
    return getattr(import_module(f"lit_peft.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
