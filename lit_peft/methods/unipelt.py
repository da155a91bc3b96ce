"""UniPELT (Mao et al. 2022, https://arxiv.org/abs/2110.07577): LoRA, a prefix and an adapter, each behind a gate.

    update * g_L(x),    [g_P K_P ; K], [g_P V_P ; V],    f(h) * g_A(h),    g(h) = sigmoid(w . h + b)

Nothing but a composition of three methods with gates. The gates start near 1/2. On decoders there is one for each
token: the paper's average over the sequence would let a token see those behind it. `train_gate_lora` and so on are
logged. A gate may be a fixed number instead. At 1 its part is the plain method. At 0 its part is gone: the prefix is
left out with its positions, as keys of zero would still take their share of the softmax.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lit_peft.adapter import Adapter
from lit_peft.gates import watched
from lit_peft.low_rank.gated import GatedLoRALinear
from lit_peft.methods.lora import LoRA, LoRAConfig
from lit_peft.methods.pfeiffer import Pfeiffer, PfeifferConfig
from lit_peft.methods.prefix import PrefixTuning
from lit_peft.methods.prefix_config import PrefixConfig
from lit_peft.placing import join
from lit_peft.selection import telling
from lit_peft.sites import linears, match
from lit_peft.sublayers import hosts, is_causal

# what the layers that yield queries and values are called, alone or fused
QUERY_VALUE = {"q_proj", "v_proj", "query", "value", "q", "v", "c_attn", "query_key_value", "qkv_proj", "Wqkv"}


@dataclass(frozen=True, kw_only=True)
class GatedLoRAConfig(LoRAConfig):
    """Settings of UniPELT's LoRA.

    Args:
        r: rank of the update.
        alpha: numerator of the scale s = alpha / r; 1 at the defaults, as in the authors' code.
        dropout: dropout on the adapter's input.
        target_modules: which linear layers; `query-value` for those of attention's queries and values.
        exclude_modules: layers to leave out, written like target_modules; wins over it.
        gate: a learned gate, or a fixed number.
        causal: set by the method: whether a token may not see those behind it.
    """

    alpha: float = 8
    target_modules: list[str] | str = "query-value"
    gate: bool | float = True
    causal: bool = True


@dataclass(frozen=True, kw_only=True)
class GatedPrefixConfig(PrefixConfig):
    """Settings of UniPELT's prefix, as for prefix tuning."""

    num_virtual_tokens: int = 10
    gate: bool | float = True

    default_lr: ClassVar[float] = 2e-4
    peft_type: ClassVar[str] = "LIT_GATED_PREFIX"


@dataclass(frozen=True, kw_only=True)
class GatedPfeifferConfig(PfeifferConfig):
    """Settings of UniPELT's adapter, as for Pfeiffer adapters."""

    gate: bool | float = True

    default_lr: ClassVar[float] = 2e-4


class GatePadding(Adapter):
    """Tells the gates inside an encoder which tokens are padding."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the base, with its attention mask known to all gates inside."""
        mask: Tensor | None = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        with telling(padding=mask if mask is not None and mask.ndim == 2 else None):
            return self.base(*args, **kwargs)


class UniPELT(LoRA, PrefixTuning, Pfeiffer):
    """LoRA on queries and values, a prefix, and an adapter behind each layer, each behind a gate.

    Args:
        lora: LoRA and its gate.
        prefix: the prefix and its gate.
        bottleneck: the adapter and its gate.

    Example:
        >>> from lit_peft import UniPELT, SFT
        >>> class Mine(UniPELT, SFT): ...
    """

    method = "unipelt"
    config_types: ClassVar[dict[str, type[Any]]] = {
        "lora": GatedLoRAConfig,
        "prefix": GatedPrefixConfig,
        "bottleneck": GatedPfeifferConfig,
    }
    lora: GatedLoRAConfig

    def __init__(
        self,
        *args: Any,
        lora: GatedLoRAConfig = GatedLoRAConfig(),
        prefix: GatedPrefixConfig = GatedPrefixConfig(),
        bottleneck: GatedPfeifferConfig = GatedPfeifferConfig(),
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, lora=lora, prefix=prefix, bottleneck=bottleneck, **kwargs)

    def place_adapters(self) -> None:
        """Place prefix and adapter, then the gated LoRA, and around encoders what tells gates about padding."""
        super(LoRA, self).place_adapters()
        model = self.model
        assert model is not None
        targets = self.lora.target_modules
        if targets == "query-value":
            targets = sorted({path.rpartition(".")[2] for path in linears(model)} & QUERY_VALUE)
            if not targets:
                raise ValueError("Found no query and value layers. Name them in lora.target_modules.")
        paths = match(model, targets, exclude_modules=self.lora.exclude_modules)
        where = {path: replace(self.lora, causal=is_causal(model, path)) for path in paths}
        join(model, where, lambda base: GatedLoRALinear, self.placing)
        encoders = [path for path in hosts(model) if not is_causal(model, path)]
        if encoders:
            join(model, dict.fromkeys(encoders, self.lora), lambda base: GatePadding, self.placing)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the task's step and log the mean of each part's gates."""
        with watched() as gates:
            out = super().training_step(*args, **kwargs)
        if self._trainer is not None:
            self.log_dict({f"train_gate_{part}": torch.stack(means).mean() for part, means in gates.items()})
        return out

    def adopt(self, config: Mapping[str, Any]) -> None:
        """Take the settings of the gated LoRA from its part of an adapter folder."""
        super().adopt(config)
        if config.get("peft_type") == GatedLoRALinear.peft_type:
            known = {field.name for field in fields(GatedLoRAConfig)}
            self.lora = self.configured(GatedLoRAConfig, "lora", {k: v for k, v in config.items() if k in known})

    def parts(self) -> list[dict[str, Any]]:
        """Return the settings of each part for its `adapter_config.json`."""
        return [*super(LoRA, self).parts(), {"peft_type": GatedLoRALinear.peft_type, **asdict(self.lora)}]
