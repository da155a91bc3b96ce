"""ReLoRA: LoRA, folded in and started anew again and again (Lialin et al. 2023, https://arxiv.org/abs/2307.05695).

    W_n = W_(n-1) + s B_n A_n,    then A fresh and B zero

Each cycle adds an update of rank r; their sum has a rank of up to n r. The restarts are the callback `AdapterRestart`.

A saved folder holds the rewritten weights whole, beside A and B: exact in every dtype and of one size however many
restarts there were. (The sum as one LoRA of rank n r would grow with each, and in bfloat16 it would not be exact,
because every restart rounds the base weight.) To hand the result to others, merge it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback
from torch import Tensor, nn

from lit_peft import hub
from lit_peft.adapter import Adapter, named_adapters
from lit_peft.callbacks.adapter_restart import AdapterRestart
from lit_peft.low_rank.linear import LoRALinear
from lit_peft.methods.lora import LoRA, LoRAConfig
from lit_peft.mixin import PEFT
from lit_peft.rewriting import fold_in, note, rewritten
from lit_peft.targets import bare
from lit_peft.weights import put

VERSION = 1  # of the layout of LIT_RELORA folders
OWN = ("version", "restarts")  # what such a folder's configuration has beside LoRA's


class ReLoRALinear(LoRALinear):
    """LoRA around a linear layer that can be folded into it and started anew.

    Example:
        >>> import torch
        >>> from lit_peft import LoRAConfig
        >>> layer, x = ReLoRALinear(torch.nn.Linear(8, 4), LoRAConfig(r=2)), torch.ones(1, 8)
        >>> _ = torch.nn.init.normal_(layer.lora_b["default"])
        >>> before = layer(x)
        >>> layer.restart("default", seed=1)
        >>> bool(torch.allclose(layer(x), before, atol=1e-5)), layer.lora_b["default"].abs().sum().item()
        (True, 0.0)
    """

    peft_type: ClassVar[str] = "LIT_RELORA"

    def restart(self, name: str, seed: int) -> None:
        """Fold s B A into W, then draw A anew and set B to zero."""
        with torch.no_grad():
            fold_in(self, self.delta(name))
            a, b = (torch.zeros(p[name].shape, dtype=p[name].dtype) for p in (self.lora_a, self.lora_b))
            with torch.random.fork_rng(devices=[]):  # the run's own random numbers go on as without a restart
                torch.manual_seed(seed)
                self.start(a, b, self.configs[name])
            put(self.lora_a[name], a)
            put(self.lora_b[name], b)
        self.restarts += 1

    def tensors(self, name: str = "default") -> dict[str, Tensor]:
        """Return A and B, and W once it was rewritten."""
        return {**super().tensors(name), **rewritten_weight(self)}


def rewritten_weight(adapter: Adapter) -> dict[str, Tensor]:
    """Return the base weight below an adapter as `{"weight": ...}` if a restart has rewritten it."""
    return {"weight": adapter.base.get_parameter("weight").detach()} if adapter.restarts else {}


class Restarting(PEFT):
    """What methods with restarts share: the callback, and base weights in saved folders.

    Args:
        restart_every: optimizer steps between two restarts; None: a quarter of the run, at least 20.
        restart_warmup: steps in which the learning rate rises again after one; None: a tenth of that, at most 100.
    """

    def __init__(
        self, *args: Any, restart_every: int | None = None, restart_warmup: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        AdapterRestart(restart_every, restart_warmup)  # raises what is wrong with them now
        self.restart_every, self.restart_warmup = restart_every, restart_warmup
        self.save_hyperparameters({"restart_every": restart_every, "restart_warmup": restart_warmup})

    def place_adapters(self) -> None:
        """Place the adapters, on a base that restarts can fold into.

        Raises:
            TypeError: if the base is quantised.
        """
        assert self.model is not None
        packed = [path for path, module in self.model.named_modules() if hasattr(type(module), "dequantised")]
        if packed:
            raise TypeError(f"A restart cannot fold into {packed[0]}, which is quantised. Load the base unquantised.")
        super().place_adapters()

    def configure_callbacks(self) -> list[Callback]:
        """Bring `AdapterRestart`, unless the Trainer has one."""
        callbacks = super().configure_callbacks()
        if not any(isinstance(callback, AdapterRestart) for callback in self.trainer.callbacks):  # type: ignore[attr-defined]
            callbacks.append(AdapterRestart(self.restart_every, self.restart_warmup))
        return callbacks

    def restarts(self) -> dict[str, int]:
        """Return how often each adapter was restarted, by the path of its layer, for `adapter_config.json`."""
        assert self.model is not None
        return {bare(path): count for path, count in rewritten(self.model).items()}

    def load_adapter(self, folder: str | Path, name: str = "default") -> None:
        """Copy a saved adapter's weights into one named set, and the rewritten base weights that came with it.

        Raises:
            ValueError: if keys, shapes or the base model do not fit; nothing is changed then.
        """
        assert self.model is not None, "call configure_model() first"
        before, adapters = rewritten(self.model), dict(named_adapters(self.model))
        stored: dict[str, int] = {}
        for config in hub.read_configs(folder):
            stored |= config.get("restarts") or {}
        counts = {path: stored.get(bare(path), 0) for path in adapters}
        lost = {
            path: adapters[path].base.get_parameter("weight").detach().clone() for path in before if not counts[path]
        }
        note(self.model, counts)
        try:
            super().load_adapter(folder, name)
        except Exception:
            note(self.model, before)
            for path, weight in lost.items():
                put(adapters[path].base.get_parameter("weight"), weight)
            raise


class ReLoRA(Restarting, LoRA):
    """ReLoRA on the task's model: LoRA with restarts, whose updates add up to one of higher rank.

    Args:
        lora: rank, scale, dropout and targets.

    Raises:
        ValueError: for a variant of LoRA whose update is no plain product, which cannot be folded in on the way.

    Example:
        >>> from lit_peft import ReLoRA, SFT
        >>> class Mine(ReLoRA, SFT): ...
    """

    method = "relora"

    def __init__(self, *args: Any, lora: LoRAConfig = LoRAConfig(), **kwargs: Any) -> None:
        super().__init__(*args, lora=lora, **kwargs)
        drawn = self.lora.init_lora_weights in ("default", "gaussian", "orthogonal", "loaded")
        if self.lora.use_dora or not drawn or self.lora.enable_lora:
            raise ValueError(
                "ReLoRA restarts plain LoRA only. Leave out lora.use_dora, lora.enable_lora, and init_lora_weights "
                "other than default, gaussian or orthogonal."
            )

    def adapter_class(self, base: nn.Module) -> type[Adapter]:
        """Return the class of adapter for one module.

        Raises:
            TypeError: if it is no linear layer.
        """
        if super().adapter_class(base) is not LoRALinear:
            raise TypeError(
                f"ReLoRA restarts linear layers only, not {type(base).__name__}. Change lora.target_modules."
            )
        return ReLoRALinear

    def adopt(self, config: Mapping[str, Any]) -> None:
        """Take rank, scale and targets from an adapter folder.

        Raises:
            ValueError: if it has a newer version, or its layers do not fit this model.
        """
        if config.get("peft_type") != "LIT_RELORA":
            super().adopt(config)
            return
        if config.get("version") != VERSION:
            raise ValueError(
                f"This adapter has version {config.get('version')} of LIT_RELORA, and {VERSION} is known here. Update "
                "lit_peft."
            )
        plain = {key: value for key, value in config.items() if key not in OWN}
        super().adopt({**plain, "peft_type": "LORA"})

    def parts(self) -> list[dict[str, Any]]:
        """Return the settings for `adapter_config.json`."""
        *others, mine = super().parts()
        return [*others, {**mine, "peft_type": "LIT_RELORA", "version": VERSION, "restarts": self.restarts()}]
