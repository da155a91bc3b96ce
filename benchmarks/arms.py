"""The arms of a comparison: a method of ours, HF PEFT's same method, a frozen base; all step alike, with no Trainer."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor, nn

from benchmarks.bytes_held import bytes_of
from lit_peft import backbone as backbones
from lit_peft.adapter import named_adapters
from lit_peft.catalogue import FACTS, METHODS
from lit_peft.tasks.task import Task

LORA = {"r": 8, "alpha": 16, "dropout": 0.0}
RATE = 1e-4
# Our method -> HF PEFT's, with the settings that make it the same. LoRA+, EVA and ReLoRA step as LoRA does: they differ
# in the optimizer, at the start, and between long runs of steps.
PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoRA", {}),
    "rslora": ("rsLoRA", {"use_rslora": True}),
    "dora": ("DoRA", {"use_dora": True}),
    "pissa": ("PiSSA", {"init_lora_weights": "pissa_niter_4"}),  # the fast way to the same factors
    "olora": ("OLoRA", {"init_lora_weights": "olora"}),
    "eva": ("LoRA", {}),
    "loraplus": ("LoRA", {}),
    "relora": ("LoRA", {}),
    "qlora": ("LoRA on bitsandbytes", {}),
    "adalora": ("AdaLoRA", {}),
    "ia3": ("IA3", {}),
    "prefix": ("prefix tuning", {"prefix_projection": True}),
    "p_tuning_v2": ("prefix tuning, rows", {"prefix_projection": False}),
    "prompt": ("prompt tuning", {}),
    "p_tuning": ("P-tuning", {"encoder_reparameterization_type": "LSTM"}),
}
FLOOR = "frozen base"


def own_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the loss that a transformers model computes by itself."""
    loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


class Plain(Task):
    """The task of all our arms: the model's own loss. What a method adds to a training step, it adds to this one."""

    def training_step(self, ids: Tensor, batch_idx: int) -> Tensor:
        assert self.model is not None
        return own_loss(self.model, ids)

    def log(self, *args: Any, **kwargs: Any) -> None:
        """Keep silent: there is no Trainer."""


@dataclass
class Arm:
    """A model under training.

    Attributes:
        model: what is called.
        base: bytes of the base's weights as they are stored.
        parameters: what is trained.
        loss: the loss of token ids (rows, length), all of which are learned.
        after: called with the number of the step when the optimizer has stepped.
    """

    model: nn.Module
    base: int
    parameters: list[nn.Parameter]
    loss: Callable[[Tensor], Tensor]
    after: Callable[[int], None] = lambda step: None
    steps: int = 0
    optimizer: torch.optim.Optimizer | None = field(init=False)

    def __post_init__(self) -> None:
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.parameters, lr=RATE, fused=True) if self.parameters else None

    def step(self, ids: Tensor) -> None:
        """Train on one batch."""
        self.loss(ids).backward()
        if self.optimizer is not None:
            self.optimizer.step()
        self.steps += 1
        self.after(self.steps)
        if self.optimizer is not None:
            self.optimizer.zero_grad()

    def held(self) -> int:
        """Return the bytes that stay from step to step beyond the base's weights: adapters and optimizer state."""
        return bytes_of(self._tensors()) - self.base

    def _tensors(self) -> Iterator[Tensor]:
        yield from self.model.parameters()
        yield from self.model.buffers()
        for state in self.optimizer.state.values() if self.optimizer is not None else ():
            yield from (value for value in state.values() if isinstance(value, Tensor))


@dataclass(frozen=True)
class Setting:
    """What all arms of a run have in common: the base, its dtype, where it is, and how many steps are to come."""

    backbone: str
    dtype: str
    device: torch.device
    total: int

    def load(self, **options: Any) -> nn.Module:
        """Return a fresh copy of the base."""
        return backbones.load_model(self.backbone, dtype=self.dtype, **options).to(self.device)


def ours(method: str, setting: Setting) -> Arm:
    """Return the arm of our method, in its own settings or those of `LORA`."""
    lora = {"lora": LORA} if any(FACTS[part].keyword == "lora" for part in method.split("+")) else {}
    parts = tuple(imported(METHODS[part]) for part in method.split("+"))
    module: Any = type("Measured", (*parts, Plain), {})(setting.backbone, dtype=setting.dtype, **lora)
    module.configure_model()
    model = module.model.to(setting.device)
    added = [p for _, adapter in named_adapters(model) for _, p in adapter.own_parameters()]
    base = bytes_of([*model.parameters(), *model.buffers()]) - bytes_of(added)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    arm = Arm(model, base, parameters, lambda ids: module.training_step(ids, 0))  # type: ignore[no-any-return]
    arm.after = _callbacks(module, arm, setting)
    return arm


def _callbacks(module: Any, arm: Arm, setting: Setting) -> Callable[[int], None]:
    """What the method's own callbacks do after a step (AdaLoRA shares ranks out), with a stand-in for the Trainer."""
    trainer: Any = SimpleNamespace(
        global_step=0,
        current_epoch=0,
        callbacks=[],
        optimizers=[arm.optimizer],
        lr_scheduler_configs=[],
        strategy=None,
        precision_plugin=SimpleNamespace(scaler=None),
        estimated_stepping_batches=setting.total,
        accumulate_grad_batches=1,
        world_size=1,
        is_global_zero=True,
        fast_dev_run=True,
        sanity_checking=False,
        default_root_dir=tempfile.gettempdir(),
    )
    module.__dict__["_trainer"] = trainer
    acting = [c for c in module.configure_callbacks() if type(c).on_train_batch_end is not Callback.on_train_batch_end]
    for callback in acting:
        callback.on_fit_start(trainer, module)
        callback.on_train_start(trainer, module)

    def after(step: int) -> None:
        trainer.global_step = step
        for callback in acting:
            callback.on_train_batch_end(trainer, module, None, None, step - 1)

    return after


def theirs(method: str, setting: Setting) -> tuple[str, Arm]:
    """Return HF PEFT's same method and its name, or the frozen base where PEFT has none."""
    name, settings = PEERS.get(method, (FLOOR, {}))
    if name == FLOOR:
        return name, floor(setting)
    import peft

    options: dict[str, Any] = {}
    if method == "qlora":
        from transformers import BitsAndBytesConfig

        compute = getattr(torch, setting.dtype)
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
        )
    model = setting.load(**options).requires_grad_(False)
    base = bytes_of([*model.parameters(), *model.buffers()])
    config = _config(method, setting, settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped: Any = peft.get_peft_model(model, config)  # type: ignore[arg-type]
    after: Callable[[int], None] = lambda step: None  # noqa: E731
    if method == "adalora":  # its loss brings the orthogonality by itself
        after = wrapped.base_model.update_and_allocate
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    return name, Arm(wrapped, base, trained, partial(own_loss, wrapped), after)


def _config(method: str, setting: Setting, settings: dict[str, Any]) -> Any:
    import peft

    known: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    if method == "ia3":
        return peft.IA3Config(**known)
    if FACTS[method].keyword == "prefix":  # under GQA its network reads rows as wide as a key, ours as the model
        mine = imported(FACTS[method].config)()
        sizes = {"num_virtual_tokens": mine.num_virtual_tokens, "encoder_hidden_size": mine.encoder_hidden_size}
        return peft.PrefixTuningConfig(**known, **sizes, **settings)
    if FACTS[method].keyword == "prompt":
        known["num_virtual_tokens"] = imported(FACTS[method].config)().num_virtual_tokens
        if method == "prompt":
            return peft.PromptTuningConfig(**known)
        width = backbones.load_config(setting.backbone).hidden_size  # half of it in each direction, as in the paper
        return peft.PromptEncoderConfig(encoder_hidden_size=width // 2, **known, **settings)
    known["target_modules"] = "all-linear"
    if method == "adalora":
        mine = asdict(imported(FACTS[method].config)())
        for key in ("init_r", "target_r", "deltaT", "beta1", "beta2"):
            if mine.get(key) is not None:
                known[key] = mine[key]
        known["orth_reg_weight"] = mine["orth_reg_weight"]
        tenths = {"tinit": setting.total // 10, "tfinal": int(setting.total * 0.4), "total_step": setting.total}
        return peft.AdaLoraConfig(lora_alpha=mine["alpha"], lora_dropout=0.0, **known, **tenths)
    return peft.LoraConfig(r=LORA["r"], lora_alpha=LORA["alpha"], lora_dropout=0.0, **known, **settings)


def imported(path: str) -> Any:
    """Return a class of the package by its path in the catalogue."""
    module, _, name = path.rpartition(".")
    return getattr(import_module(f"lit_peft.{module}"), name)


def floor(setting: Setting) -> Arm:
    """Return the arm that trains nothing: forward, and backward down to the output of the embeddings."""
    return floor_of(setting.load())


def floor_of(model: Any) -> Arm:
    """Return the arm of a model whose weights are all frozen."""
    model.requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_())
    return Arm(model, bytes_of([*model.parameters(), *model.buffers()]), [], partial(own_loss, model))
