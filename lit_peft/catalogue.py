"""The names of `--method` and `--task`, where their classes are, and what is worth knowing before choosing one.

Plain data: imports nothing heavy, answers at once. The tests check every line against the classes.
"""

from typing import NamedTuple

METHODS: dict[str, str] = {
    "lora": "methods.lora.LoRA",
    "rslora": "methods.lora.RsLoRA",
    "bitfit": "methods.bitfit.BitFit",
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
        ddp: whether two DDP processes give one process's losses.
        fsdp2: whether two FSDP2 processes do.
        four_bit: whether it works on a base whose linear layers are held in 4 bits.
        rows: whether the rows of one batch can be routed to different named sets.
        sets: whether one base can hold several named sets of it.
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

    @property
    def peft(self) -> bool:
        """Whether HF PEFT has the method and reads its folders."""
        return not self.peft_type.startswith("LIT_")


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
