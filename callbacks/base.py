"""What callbacks know of adapters: one hook between `configure_model` and the optimizer."""

from __future__ import annotations

from lightning.pytorch import Callback, Trainer

from lit_peft.module import AdaptableModule


class AdapterCallback(Callback):
    """A callback that is told when the adapters are in place.

    Lightning calls callbacks' `setup` before the model exists and `on_fit_start` after the optimizer does. What must
    happen between the two (freezing, inspecting targets, calibrating) goes into `on_adapters_placed`.
    """

    def on_adapters_placed(self, trainer: Trainer | None, module: AdaptableModule) -> None:
        """Called once, when adapters are in `module.model` and no optimizer exists yet.

        Args:
            trainer: the Trainer, or None when the module is used without one.
            module: the module whose model was just adapted.
        """
