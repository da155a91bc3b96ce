"""The names of `--method` and `--task`, where their classes are, and what is worth knowing before choosing one.

Plain data: imports nothing heavy, answers at once. The tests check every line against the classes.
"""

from typing import NamedTuple

METHODS: dict[str, str] = {
    "lora": "methods.lora.LoRA",
    "rslora": "methods.lora.RsLoRA",
    "bitfit": "methods.bitfit.BitFit",
    "houlsby": "methods.houlsby.Houlsby",
    "pfeiffer": "methods.pfeiffer.Pfeiffer",
    "parallel": "methods.parallel.ParallelAdapter",
    "prefix": "methods.prefix.PrefixTuning",
    "p_tuning_v2": "methods.p_tuning_v2.PTuningV2",
    "prompt": "methods.prompt.PromptTuning",
    "loreft": "methods.loreft.LoReFT",
    "direft": "methods.direft.DiReFT",
    "freeze": "methods.freeze.Freeze",
    "full": "methods.full.Full",
}

TASKS: dict[str, str] = {
    "sft": "tasks.sft.SFT",
    "classification": "tasks.classification.Classification",
}


class Facts(NamedTuple):
    """What the table of methods shows.

    Attributes:
        title: what the method does, in a few words.
        keyword: constructor argument and YAML key of its settings; empty where it has none.
        config: class of the settings; empty where it has none.
        adapter: class of the module that it places; empty where it trains weights in place.
        place: what the adapter sits around, or what is trained.
        trained: number of trained weights of each adapted layer, as a formula; or in words.
        merges: whether it can be folded into plain weights (what is trained in place already is).
        peft_type: its name in `adapter_config.json`; without `LIT_`: HF PEFT reads the folder.
        paper: where it comes from.
    """

    title: str
    keyword: str
    config: str
    adapter: str
    place: str
    trained: str
    merges: bool
    peft_type: str
    paper: str


FACTS: dict[str, Facts] = {
    "lora": Facts(
        title="low-rank update beside each linear layer",
        keyword="lora",
        config="methods.lora.LoRAConfig",
        adapter="methods.lora.LoRALinear",
        place="linear",
        trained="r (in + out)",
        merges=True,
        peft_type="LORA",
        paper="https://arxiv.org/abs/2106.09685",
    ),
    "rslora": Facts(
        title="LoRA scaled by alpha / sqrt(r)",
        keyword="lora",
        config="methods.lora.LoRAConfig",
        adapter="methods.lora.LoRALinear",
        place="linear",
        trained="r (in + out)",
        merges=True,
        peft_type="LORA",
        paper="https://arxiv.org/abs/2312.03732",
    ),
    "bitfit": Facts(
        title="a change of each bias, nothing else",
        keyword="bitfit",
        config="methods.bitfit.BitFitConfig",
        adapter="methods.bitfit.BitFitBias",
        place="linear, norm",
        trained="out",
        merges=True,
        peft_type="LIT_BITFIT",
        paper="https://arxiv.org/abs/2106.10199",
    ),
    "houlsby": Facts(
        title="a bottleneck behind attention and behind feed-forward",
        keyword="bottleneck",
        config="methods.houlsby.HoulsbyConfig",
        adapter="methods.bottleneck.Bottleneck",
        place="attention, feed-forward",
        trained="2 d m + m + d",
        merges=False,
        peft_type="LIT_HOULSBY",
        paper="https://arxiv.org/abs/1902.00751",
    ),
    "pfeiffer": Facts(
        title="a bottleneck behind each layer",
        keyword="bottleneck",
        config="methods.pfeiffer.PfeifferConfig",
        adapter="methods.bottleneck.Bottleneck",
        place="layer",
        trained="2 d m + m + d",
        merges=False,
        peft_type="LIT_PFEIFFER",
        paper="https://arxiv.org/abs/2005.00247",
    ),
    "parallel": Facts(
        title="a bottleneck beside feed-forward",
        keyword="bottleneck",
        config="methods.parallel.ParallelConfig",
        adapter="methods.bottleneck.BottleneckBeside",
        place="feed-forward",
        trained="2 d m + m + d",
        merges=False,
        peft_type="LIT_PARALLEL",
        paper="https://arxiv.org/abs/2110.04366",
    ),
    "prefix": Facts(
        title="trained keys and values in every attention",
        keyword="prefix",
        config="methods.prefix.PrefixConfig",
        adapter="methods.prefix.PrefixBackbone",
        place="attention",
        trained="p d + (d + 1) mu + (mu + 1) 2 L d_kv",
        merges=False,
        peft_type="LIT_PREFIX",
        paper="https://arxiv.org/abs/2101.00190",
    ),
    "p_tuning_v2": Facts(
        title="prefix tuning without its network",
        keyword="prefix",
        config="methods.p_tuning_v2.PTuningV2Config",
        adapter="methods.prefix.PrefixBackbone",
        place="attention",
        trained="2 p d_kv",
        merges=False,
        peft_type="LIT_P_TUNING_V2",
        paper="https://arxiv.org/abs/2110.07602",
    ),
    "prompt": Facts(
        title="trained embeddings in front of the text",
        keyword="prompt",
        config="methods.prompt.PromptConfig",
        adapter="methods.prompt.PromptBackbone",
        place="embedding",
        trained="p d",
        merges=False,
        peft_type="LIT_PROMPT",
        paper="https://arxiv.org/abs/2104.08691",
    ),
    "loreft": Facts(
        title="rank-r edits of the stream at prompt positions",
        keyword="reft",
        config="methods.reft.ReFTConfig",
        adapter="methods.reft.LoReFTLayer",
        place="layer",
        trained="2 r d + r",
        merges=False,
        peft_type="LIT_LOREFT",
        paper="https://arxiv.org/abs/2404.03592",
    ),
    "direft": Facts(
        title="LoReFT without orthogonality",
        keyword="reft",
        config="methods.reft.ReFTConfig",
        adapter="methods.reft.DiReFTLayer",
        place="layer",
        trained="2 r d + r",
        merges=False,
        peft_type="LIT_DIREFT",
        paper="https://arxiv.org/abs/2404.03592",
    ),
    "freeze": Facts(
        title="the last layers as they are, the rest frozen",
        keyword="freeze",
        config="methods.freeze.FreezeConfig",
        adapter="",
        place="last layers",
        trained="theirs",
        merges=True,
        peft_type="LIT_FREEZE",
        paper="https://arxiv.org/abs/1911.03090",
    ),
    "full": Facts(
        title="every weight: the baseline",
        keyword="",
        config="",
        adapter="",
        place="whole model",
        trained="all",
        merges=True,
        peft_type="LIT_FULL",
        paper="",
    ),
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
