"""What tasks share: loading the backbone, the optimizer, and gradients that are exact under accumulation."""

from __future__ import annotations

import math
from inspect import signature
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedTokenizerBase, get_scheduler

from lit_peft import backbone as backbones
from lit_peft.module import AdaptableModule


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite; raised before the optimizer could spoil the weights."""


def checkpoint_layers(model: Any) -> None:
    """Recompute the activations of a transformers model's layers in the backward pass, which goes no deeper for it.

    transformers makes the embeddings' output require gradients, as only PyTorch's older, reentrant kind needs it. With
    it the backward pass would go, and recompute, down to the embeddings even where the first layers have no adapters.
    """
    model.activation_checkpointing_enable({"use_reentrant": False})
    # models from the hub with a format of their own take no such argument, and are left as transformers has them
    if "value" not in signature(model._set_gradient_checkpointing).parameters:
        model.disable_input_require_grads()


class Task(AdaptableModule):
    """A LightningModule that loads a pretrained backbone and owns the loss; the base class of all tasks.

    Args:
        backbone: model name on the hub, a local folder, or `package:NAME` for a model inside a pip package.
        revision: branch, tag or commit of the backbone.
        dtype: `float32`, `bfloat16`, `float16` or `auto` (as stored); None lets the method choose.
        attn_implementation: `sdpa`, `eager`, `flash_attention_2`, ...; None lets transformers choose.
        trust_remote_code: run model code from the hub. Off unless you ask for it.
        quantize: `nf4` stores the frozen linear layers in four bits (QLoRA), under any method that leaves them frozen;
            `none` as they are; None lets the method choose.
        double_quant: under `nf4`, store the scales of the blocks in eight bits too: 4.127 bits a weight, else 4.5.
        lr: learning rate of everything that is trained; None: each method's own.
        weight_decay: applied to matrices, never to vectors (biases, norms, gates).
        optim: `adamw`; on CUDA also `adamw8bit`, `paged_adamw8bit` and `paged_adamw_32bit` (bitsandbytes); None lets
            the method choose.
        scheduler: learning rate over the run.
        warmup: share of the run with a rising learning rate.
        max_grad_norm: gradients are clipped to this norm, unless the Trainer's gradient_clip_val says otherwise.
        gradient_checkpointing: recompute activations in the backward pass to save memory.
    """

    peft_task_type: ClassVar[str | None] = None

    def __init__(
        self,
        backbone: str,
        *,
        revision: str | None = None,
        dtype: str | None = None,
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        quantize: Literal["nf4", "none"] | None = None,
        double_quant: bool = True,
        lr: float | None = None,
        weight_decay: float = 0.0,
        optim: Literal["adamw", "adamw8bit", "paged_adamw8bit", "paged_adamw_32bit"] | None = None,
        scheduler: Literal["cosine", "linear", "constant"] = "cosine",
        warmup: float = 0.05,
        max_grad_norm: float = 1.0,
        gradient_checkpointing: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if lr is not None and not 0 < lr <= 10:
            raise ValueError(f"lr is {lr}; it must be above 0 and at most 10.")
        for name, value in (("weight_decay", weight_decay), ("max_grad_norm", max_grad_norm)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} is {value}; it must be 0 or more.")
        if not 0 <= warmup < 1:
            raise ValueError(f"warmup is {warmup}; it is a share of the run, at least 0 and below 1.")
        if quantize not in (None, "nf4", "none"):
            raise ValueError(f"quantize is {quantize!r}; it must be 'nf4' or 'none'.")
        self.backbone = backbone
        self.revision = revision
        self.dtype_name = dtype
        self.attn_implementation = attn_implementation
        self.trust_remote_code = trust_remote_code
        self.quantize = quantize
        self.double_quant = double_quant
        self.lr = lr
        self.weight_decay = weight_decay
        self.optim = optim
        self.scheduler = scheduler
        self.warmup = warmup
        self.max_grad_norm = max_grad_norm
        self.gradient_checkpointing = gradient_checkpointing
        self.backbone_identity: dict[str, Any] = {}
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._config: Any = None
        self._window: Tensor | None = None
        self._settings: list[tuple[float, float]] = []
        self.save_hyperparameters(
            {
                "backbone": backbone,
                "revision": revision,
                "dtype": dtype,
                "attn_implementation": attn_implementation,
                "trust_remote_code": trust_remote_code,
                "quantize": quantize,
                "double_quant": double_quant,
                "lr": lr,
                "weight_decay": weight_decay,
                "optim": optim,
                "scheduler": scheduler,
                "warmup": warmup,
                "max_grad_norm": max_grad_norm,
                "gradient_checkpointing": gradient_checkpointing,
            }
        )

    # The model -------------------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The backbone's tokenizer, loaded on first use."""
        if self._tokenizer is None:
            self._tokenizer = backbones.load_tokenizer(
                self.backbone, revision=self.revision, trust_remote_code=self.trust_remote_code
            )
        return self._tokenizer

    @property
    def config(self) -> Any:
        """The backbone's configuration, loaded on first use."""
        if self._config is None:
            self._config = backbones.load_config(
                self.backbone, revision=self.revision, trust_remote_code=self.trust_remote_code
            )
        return self._config

    @property
    def encoder_decoder(self) -> bool:
        """Whether the backbone has an encoder and a decoder (T5)."""
        return bool(getattr(self.config, "is_encoder_decoder", False))

    def auto_class(self) -> type:
        """Return the transformers Auto class that loads the backbone for this task."""
        return backbones.auto_class(self.config, "lm")  # type: ignore[no-any-return]

    def build_model(self, **kwargs: Any) -> nn.Module:
        """Load the backbone; tasks may pass more arguments to `from_pretrained`."""
        quantize = self.quantize or self.preferred_quantization()
        model: nn.Module = backbones.load_model(
            self.backbone,
            auto=self.auto_class(),
            revision=self.revision,
            dtype=self.dtype_name or self.preferred_dtype(),
            attn_implementation=self.attn_implementation,
            trust_remote_code=self.trust_remote_code,
            quantize=None if quantize == "none" else quantize,
            double_quant=self.double_quant,
            **kwargs,
        )
        return model

    def configure_model(self) -> None:
        """Load the backbone, once."""
        super().configure_model()
        if self.model is not None:
            return
        self.model = self.build_model()
        self.backbone_identity = backbones.identity(self.backbone, self.revision)
        self.model.train()
        if self.gradient_checkpointing:
            checkpoint_layers(self.model)

    # The optimizer ---------------------------------------------------------------------------------------------------

    def parameter_groups(self, lr: float | None = None, weight_decay: float | None = None) -> list[dict[str, Any]]:
        """Group what is trained by learning rate and weight decay; `lr` and `weight_decay` are this task's own."""
        decay = self.weight_decay if weight_decay is None else weight_decay
        return super().parameter_groups(self.lr if lr is None else lr, decay)

    def _fuses(self) -> bool:
        """Return whether all weights can step in one call: Lightning clips no gradients for that in mixed precision."""
        given = self.trainer.gradient_clip_val
        clips = bool(self.max_grad_norm if given is None else given)
        mixed = isinstance(self.trainer.precision_plugin, MixedPrecision)
        return self.device.type in ("cuda", "cpu") and not (clips and mixed)

    def configure_optimizers(self) -> Any:
        """Build the optimizer over `parameter_groups`, with warm-up and schedule per optimizer step."""
        groups = self.parameter_groups()
        optimizer: Optimizer
        sharded = any(hasattr(parameter, "full_tensor") for group in groups for parameter in group["params"])
        optim = self.optim
        if optim is None:  # bitsandbytes' optimizers need a GPU and whole parameters; no complaint where none was asked
            optim = self.preferred_optim() if self.device.type == "cuda" and not sharded else "adamw"  # type: ignore[assignment]
        if optim == "adamw":
            optimizer = torch.optim.AdamW(groups, fused=not sharded and self._fuses())
        else:
            if self.device.type != "cuda":
                raise ValueError(f"optim {optim!r} needs a CUDA device; this is {self.device.type}. Use optim=adamw.")
            import bitsandbytes as bnb

            kinds = {
                "adamw8bit": bnb.optim.AdamW8bit,
                "paged_adamw8bit": bnb.optim.PagedAdamW8bit,
                "paged_adamw_32bit": bnb.optim.PagedAdamW32bit,
            }
            optimizer = kinds[str(optim)](groups)
        self._settings = [(group["lr"], group["weight_decay"]) for group in groups]
        total = self.trainer.estimated_stepping_batches
        if math.isinf(total):  # an endless run has no end to anneal towards
            return optimizer
        name = "constant_with_warmup" if self.scheduler == "constant" else self.scheduler
        schedule = get_scheduler(
            name, optimizer, num_warmup_steps=round(self.warmup * total), num_training_steps=int(total)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        """Let this run's learning rate and weight decay win over those a checkpoint brought back."""
        super().on_train_start()
        for optimizer in self.trainer.optimizers:
            if len(optimizer.param_groups) != len(self._settings):
                continue
            for group, (lr, decay) in zip(optimizer.param_groups, self._settings, strict=True):
                group["weight_decay"] = decay
                if group.get("fused") != optimizer.defaults.get("fused"):  # one of the runs clips in mixed precision
                    group["fused"] = False
                    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
                before = group.get("initial_lr", group["lr"])
                if before != lr:
                    group["lr"] *= lr / before
                    group["initial_lr"] = lr
        for config in self.trainer.lr_scheduler_configs:
            if len(config.scheduler.base_lrs) == len(self._settings):
                config.scheduler.base_lrs = [lr for lr, _ in self._settings]

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip by the Trainer's setting, or to `max_grad_norm` where it has none."""
        value = self.max_grad_norm if gradient_clip_val is None else gradient_clip_val
        self.clip_gradients(
            optimizer, gradient_clip_val=value, gradient_clip_algorithm=gradient_clip_algorithm or "norm"
        )

    # Exact accumulation ----------------------------------------------------------------------------------------------

    def summed(self, loss: Tensor, count: Tensor) -> Tensor:
        """Note a micro-batch's summed loss and how much it counts, and return the sum for the backward pass.

        Averages of averages are wrong when micro-batches or processes hold different numbers of trained tokens (up to
        98 % off was measured). So gradients are sums until `on_before_optimizer_step` divides once by the count of the
        whole accumulated, all-process batch.
        """
        part = torch.stack([loss.detach().double(), count.to(loss.device).double()])
        self._window = part if self._window is None else self._window + part
        self.counted = part[1]
        return loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Turn summed gradients into those of the mean over the whole batch, and stop at a loss that is not finite.

        Raises:
            NonFiniteLossError: with the step and what to try.
        """
        super().on_before_optimizer_step(optimizer)
        if self._window is None:  # a user's own training_step that returns a mean is left alone
            return
        totals, self._window = self._window, None
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(totals)
        total, count = totals.tolist()
        if not math.isfinite(total):
            raise NonFiniteLossError(
                f"The loss is {total} at step {self.trainer.global_step}; nothing was updated. Lower lr, raise warmup, "
                "or use precision bf16 instead of 16."
            )
        # Lightning divided by accumulate_grad_batches, DDP and FSDP2 by the number of processes.
        factor = self.trainer.accumulate_grad_batches * self.trainer.world_size / max(count, 1.0)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)
        self.log("train_loss", total / max(count, 1.0), prog_bar=True)
