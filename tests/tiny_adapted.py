"""A tiny task without data, methods on it, and the same through the real HF PEFT: for the tests of adapter folders."""

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

from lit_peft.methods.bitfit import BitFit
from lit_peft.methods.freeze import Freeze
from lit_peft.methods.full import Full
from lit_peft.methods.lora import LoRA, RsLoRA
from lit_peft.module import AdaptableModule
from tests.models import tiny

KINDS = {"llama": "lm", "gpt2": "lm", "bert": "classification", "t5": "lm"}
TASK_TYPES = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}
HEADS = ("classifier", "score")


class Tiny(AdaptableModule):
    """A task without a loss: a tiny model, its head trained where it has one."""

    def __init__(self, kind: str, seed: int = 0, base: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.kind = kind
        self.seed = seed
        self.backbone_identity = {"name": f"tiny/{kind}", "revision": None, "sha": None, **(base or {})}
        self.peft_task_type = TASK_TYPES[kind]

    def configure_model(self) -> None:
        super().configure_model()
        if self.model is None:
            self.model = tiny(self.kind, KINDS[self.kind], seed=self.seed)

    def is_trainable(self, name: str, parameter: nn.Parameter) -> bool:
        return name.split(".")[0] in HEADS or super().is_trainable(name, parameter)


class LoRATiny(LoRA, Tiny): ...


class RsLoRATiny(RsLoRA, Tiny): ...


class BitFitTiny(BitFit, Tiny): ...


class FreezeTiny(Freeze, Tiny): ...


class FullTiny(Full, Tiny): ...


class LoRABitFitTiny(LoRA, BitFit, Tiny): ...


class LoRAFreezeTiny(LoRA, Freeze, Tiny): ...


def placed(cls: type[Any], kind: str, **kwargs: Any) -> Any:
    module = cls(kind, **kwargs)
    module.configure_model()
    return module.eval()


def shake(module: nn.Module, seed: int = 1, size: float = 0.1) -> None:
    """Give everything that is trained other values, so that a tensor that was lost on the way is noticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=size)


@torch.no_grad()
def logits(model: nn.Module, kind: str) -> Tensor:
    ids = torch.arange(5, 29).view(2, 12)
    inputs: dict[str, Tensor] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if kind == "t5":
        inputs["decoder_input_ids"] = ids[:, :4]
    return model(**inputs).logits  # type: ignore[no-any-return]


@torch.no_grad()
def check_equal(one: nn.Module, other: nn.Module, kind: str) -> None:
    """Logits agree to 1e-6 of the largest in fp32, which leaves room for the order of sums, and exactly in fp64."""
    a, b = logits(one, kind), logits(other, kind)
    assert (a - b).abs().max() <= 1e-6 * a.abs().max().clamp(min=1)
    a, b = logits(copy.deepcopy(one).double(), kind), logits(copy.deepcopy(other).double(), kind)
    assert (a - b).abs().max() <= 1e-12


def base_model(kind: str) -> Any:
    return tiny(kind, KINDS[kind])


def in_peft(folder: Path, kind: str) -> nn.Module:
    """Load a folder with the real PEFT, which must have nothing to complain about."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # what it says about configurations and keys
        warnings.filterwarnings("ignore", ".*ensure_weight_tying.*")  # said of every adapted table that is tied
        return peft.PeftModel.from_pretrained(base_model(kind), folder).eval()  # type: ignore[no-any-return]


def by_peft(folder: Path, kind: str, **settings: Any) -> nn.Module:
    """Write a folder with the real PEFT, random B, and return its model."""
    defaults = {"r": 4, "lora_alpha": 12, "task_type": TASK_TYPES[kind]}
    model = peft.get_peft_model(base_model(kind), peft.LoraConfig(**{**defaults, **settings})).eval()
    shake(model, 2)
    model.save_pretrained(folder)
    return model  # type: ignore[no-any-return]
