"""The names of `--method` and `--task`, where their classes are, and what is worth knowing before choosing one.

Plain data: imports nothing heavy, answers at once. The tests check every line against the classes.
"""

from lit_peft.facts import FACTS as FACTS
from lit_peft.facts import Facts as Facts

METHODS: dict[str, str] = {
    "lora": "methods.lora.LoRA",
    "rslora": "methods.lora.RsLoRA",
    "dora": "methods.dora.DoRA",
    "pissa": "methods.pissa.PiSSA",
    "olora": "methods.olora.OLoRA",
    "eva": "methods.eva.EVA",
    "loraplus": "methods.loraplus.LoRAPlus",
    "relora": "methods.relora.ReLoRA",
    "adalora": "methods.adalora.AdaLoRA",
    "qlora": "methods.qlora.QLoRA",
    "mora": "methods.mora.MoRA",
    "remora": "methods.remora.ReMoRA",
    "ia3": "methods.ia3.IA3",
    "bitfit": "methods.bitfit.BitFit",
    "houlsby": "methods.houlsby.Houlsby",
    "pfeiffer": "methods.pfeiffer.Pfeiffer",
    "parallel": "methods.parallel.ParallelAdapter",
    "compacter": "methods.compacter.Compacter",
    "prefix": "methods.prefix.PrefixTuning",
    "p_tuning_v2": "methods.p_tuning_v2.PTuningV2",
    "prompt": "methods.prompt.PromptTuning",
    "p_tuning": "methods.p_tuning.PTuning",
    "loreft": "methods.loreft.LoReFT",
    "direft": "methods.direft.DiReFT",
    "mam": "methods.mam.MAM",
    "unipelt": "methods.unipelt.UniPELT",
    "fusion": "methods.fusion.AdapterFusion",
    "freeze": "methods.freeze.Freeze",
    "full": "methods.full.Full",
}

TASKS: dict[str, str] = {
    "sft": "tasks.sft.SFT",
    "classification": "tasks.classification.Classification",
}

# What makes a method larger, for comparisons at equal numbers of trained weights: keyword of its settings -> the fields
# that grow together, in order of preference, each with the settings that must be on for them to count. Alpha grows with
# the rank, so that the scale alpha / r, and with it the default learning rate, stays.
SIZES: dict[str, dict[tuple[str, ...], tuple[str, ...]]] = {
    "lora": {("r", "alpha"): ()},
    "adalora": {("init_r", "target_r", "alpha"): ()},
    "mora": {("r",): ()},
    "bottleneck": {("bottleneck_size",): ()},
    "prefix": {("encoder_hidden_size",): ("prefix_projection",), ("num_virtual_tokens",): ()},
    "prompt": {("num_virtual_tokens",): ()},
    "reft": {("r",): ()},
    "freeze": {("last_layers",): ()},
}
# Beyond these, the papers found nothing more to gain, while every step costs more.
LARGEST = {"num_virtual_tokens": 100}
