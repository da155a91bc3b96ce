"""What is worth knowing about a method before choosing it. Plain data, checked against the classes by the tests."""

from typing import NamedTuple


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
        ddp: whether two DDP processes give one process's losses.
        fsdp2: whether two FSDP2 processes do.
        four_bit: whether it works on a base whose linear layers are held in 4 bits.
        rows: whether the rows of one batch can be routed to different named sets.
        sets: whether one base can hold several named sets of it.
        needs: a setting that must be given, where a method builds on what others have trained.
        others: whose folders it reads beside its own and HF PEFT's.
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
    ddp: bool = True
    fsdp2: bool = True
    four_bit: bool = True
    rows: bool = True
    sets: bool = True
    needs: str = ""
    others: tuple[str, ...] = ()

    @property
    def peft(self) -> bool:
        """Whether HF PEFT has the method and reads its folders."""
        return "LIT_" not in self.peft_type

    @property
    def reads(self) -> list[str]:
        """Whose folders it reads beside its own."""
        return [*(["HF PEFT"] if self.peft else []), *self.others]


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
    "dora": Facts(
        title="LoRA on the rows' directions, and their lengths",
        keyword="lora",
        config="methods.lora.LoRAConfig",
        adapter="low_rank.dora.DoRALinear",
        place="linear",
        trained="LoRA's + out",
        merges=True,
        peft_type="LORA",
        paper="https://arxiv.org/abs/2402.09353",
    ),
    "pissa": Facts(
        title="LoRA that starts at W's largest directions",
        keyword="lora",
        config="methods.lora.LoRAConfig",
        adapter="low_rank.residual.ResidualLinear",
        place="linear",
        trained="r (in + out)",
        merges=True,
        peft_type="LORA",
        paper="https://arxiv.org/abs/2404.02948",
    ),
    "olora": Facts(
        title="LoRA that starts at an orthonormal basis of W",
        keyword="lora",
        config="methods.lora.LoRAConfig",
        adapter="low_rank.residual.ResidualLinear",
        place="linear",
        trained="r (in + out)",
        merges=True,
        peft_type="LORA",
        paper="https://arxiv.org/abs/2406.01775",
    ),
    "eva": Facts(
        title="LoRA that starts at its inputs' directions",
        keyword="lora",
        config="methods.lora.LoRAConfig",
        adapter="methods.lora.LoRALinear",
        place="linear",
        trained="r_i (in+out)",
        merges=True,
        peft_type="LORA",
        paper="https://arxiv.org/abs/2410.07170",
    ),
    "loraplus": Facts(
        title="LoRA with a higher learning rate for B",
        keyword="lora",
        config="methods.lora.LoRAConfig",
        adapter="methods.lora.LoRALinear",
        place="linear",
        trained="r (in + out)",
        merges=True,
        peft_type="LORA",
        paper="https://arxiv.org/abs/2402.12354",
    ),
    "relora": Facts(
        title="LoRA, folded in and started anew during training",
        keyword="lora",
        config="methods.lora.LoRAConfig",
        adapter="methods.relora.ReLoRALinear",
        place="linear",
        trained="r (in + out)",
        merges=True,
        peft_type="LIT_RELORA",
        paper="https://arxiv.org/abs/2307.05695",
        four_bit=False,
    ),
    "adalora": Facts(
        title="LoRA with one budget of ranks for all layers",
        keyword="adalora",
        config="methods.adalora.AdaLoRAConfig",
        adapter="methods.adalora.AdaLoRALinear",
        place="linear",
        trained="r (in+out+1)",
        merges=True,
        peft_type="ADALORA",
        paper="https://arxiv.org/abs/2303.10512",
    ),
    "qlora": Facts(
        title="LoRA over a base in four bits (NF4)",
        keyword="lora",
        config="methods.lora.LoRAConfig",
        adapter="methods.lora.LoRALinear",
        place="linear",
        trained="r (in + out)",
        merges=True,
        peft_type="LORA",
        paper="https://arxiv.org/abs/2305.14314",
    ),
    "mora": Facts(
        title="update of high rank from a square matrix of LoRA's size",
        keyword="mora",
        config="methods.mora.MoRAConfig",
        adapter="methods.mora.MoRALinear",
        place="linear",
        trained="~ r (in + out)",
        merges=True,
        peft_type="LIT_MORA",
        paper="https://arxiv.org/abs/2405.12130",
        others=("MoRA's fork of PEFT",),
    ),
    "remora": Facts(
        title="MoRA, folded in and started anew with other types",
        keyword="mora",
        config="methods.mora.MoRAConfig",
        adapter="methods.remora.ReMoRALinear",
        place="linear",
        trained="~ r (in + out)",
        merges=True,
        peft_type="LIT_REMORA",
        paper="https://arxiv.org/abs/2405.12130",
        four_bit=False,
    ),
    "ia3": Facts(
        title="factors on keys, values and the feed-forward's inside",
        keyword="ia3",
        config="methods.ia3.IA3Config",
        adapter="methods.ia3.IA3Linear",
        place="linear",
        trained="out, or in",
        merges=True,
        peft_type="IA3",
        paper="https://arxiv.org/abs/2205.05638",
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
        others=("adapters",),
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
        others=("adapters",),
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
        others=("adapters",),
    ),
    "compacter": Facts(
        title="bottlenecks of Kronecker products with one shared rule",
        keyword="compacter",
        config="methods.compacter.CompacterConfig",
        adapter="methods.compacter.CompacterAdapter",
        place="attention, feed-forward",
        trained="2 (d + h) + h + d, and n^3 once",
        merges=False,
        peft_type="LIT_COMPACTER",
        paper="https://arxiv.org/abs/2106.04647",
        others=("adapters",),
    ),
    "prefix": Facts(
        title="trained keys and values in every attention",
        keyword="prefix",
        config="methods.prefix.PrefixConfig",
        adapter="methods.prefix.PrefixBackbone",
        place="attention",
        trained="p d + (d + 1) mu + (mu + 1) 2 L d_kv",
        merges=False,
        peft_type="PREFIX_TUNING",
        paper="https://arxiv.org/abs/2101.00190",
        others=("adapters",),
    ),
    "p_tuning_v2": Facts(
        title="prefix tuning without its network",
        keyword="prefix",
        config="methods.p_tuning_v2.PTuningV2Config",
        adapter="methods.prefix.PrefixBackbone",
        place="attention",
        trained="2 p d_kv",
        merges=False,
        peft_type="PREFIX_TUNING",
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
        peft_type="PROMPT_TUNING",
        paper="https://arxiv.org/abs/2104.08691",
    ),
    "p_tuning": Facts(
        title="a prompt that comes out of a small network",
        keyword="prompt",
        config="methods.p_tuning.PTuningConfig",
        adapter="methods.p_tuning.PTuningBackbone",
        place="embedding",
        trained="p d + LSTM + 2 (d^2 + d)",
        merges=False,
        peft_type="P_TUNING",
        paper="https://arxiv.org/abs/2103.10385",
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
        others=("adapters", "pyreft"),
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
        others=("adapters", "pyreft"),
    ),
    "mam": Facts(
        title="a prefix and a parallel adapter",
        keyword="prefix",
        config="methods.mam.MAMPrefixConfig",
        adapter="methods.prefix.PrefixBackbone",
        place="attention, feed-forward",
        trained="prefix + parallel",
        merges=False,
        peft_type="PREFIX_TUNING + LIT_PARALLEL",
        paper="https://arxiv.org/abs/2110.04366",
        others=("adapters",),
    ),
    "unipelt": Facts(
        title="LoRA, prefix and adapter, each behind a gate",
        keyword="lora",
        config="methods.unipelt.GatedLoRAConfig",
        adapter="low_rank.gated.GatedLoRALinear",
        place="linear, attention, layer",
        trained="lora + prefix + pfeiffer + gates",
        merges=False,
        peft_type="LIT_GATED_LORA + LIT_GATED_PREFIX + LIT_PFEIFFER",
        paper="https://arxiv.org/abs/2110.07577",
        others=("adapters",),
    ),
    "fusion": Facts(
        title="attention over trained adapters",
        keyword="fusion",
        config="methods.fusion_site.FusionConfig",
        adapter="methods.fusion_site.FusionBottleneck",
        place="bottleneck adapter",
        trained="3 d^2",
        merges=False,
        peft_type="LIT_FUSION",
        paper="https://arxiv.org/abs/2005.00247",
        needs="fusion.adapters",
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
        four_bit=False,
        rows=False,
        sets=False,
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
        four_bit=False,
        rows=False,
        sets=False,
    ),
}
