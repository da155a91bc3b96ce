"""What a method says of itself to adapter folders, and writing one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from lit_peft import hub
from lit_peft.adapter import adapter_names, named_adapters
from lit_peft.catalogue import FACTS
from lit_peft.module import AdaptableModule

FIRST = "default"


class AdapterFolders(AdaptableModule):
    """What every method knows of adapter folders: its kind, its settings, its weights."""

    method: ClassVar[str] = ""

    # What a method says -----------------------------------------------------------------------------------------------

    def adopt(self, config: Mapping[str, Any]) -> None:
        """Take over the configuration read from an adapter folder; each method takes the part that is its own."""

    def parts(self) -> list[dict[str, Any]]:
        """Return the `adapter_config.json` contents of each stacked method, outermost last."""
        return []

    def gathered(self, layers: Mapping[str, Any]) -> Any:
        """Return this method's configuration that places what a combination holds: `{module path: its settings}`.

        Raises:
            TypeError: if the method has no combinations.
        """
        raise TypeError(f"{type(self).__name__} has no combined adapters. Let the adapters act together instead.")

    def declared(self) -> dict[str, Tensor]:
        """Return the existing weights that are trained in place, by path in the model."""
        assert self.model is not None
        adapted = {id(p) for _, adapter in named_adapters(self.model) for _, p in adapter.own_parameters()}
        return {
            name: parameter.detach()
            for name, parameter in self.model.named_parameters()
            if id(parameter) not in adapted and self.is_trainable(name, parameter)
        }

    def base_identity(self) -> dict[str, Any]:
        """Return name, revision and hash of the base model, as far as the task knows them."""
        return dict(getattr(self, "backbone_identity", {}))

    def kinds(self) -> list[str]:
        """Return the kinds of folder that hold this method: one, or one for each part of a composed method."""
        return self.kind().split(" + ")

    def kind(self) -> str:
        """Return the `peft_type` of a single method."""
        facts = FACTS.get(self.method)
        return facts.peft_type if facts else str(self.parts()[-1]["peft_type"])

    # What is written --------------------------------------------------------------------------------------------------

    def parts_of(self, name: str) -> list[dict[str, Any]]:
        """Return the `adapter_config.json` contents of each method of one named set, outermost last."""
        return self.parts()

    def save_adapter(self, folder: str | Path, name: str = FIRST) -> Path:
        """Write one named adapter as a folder that HF PEFT loads (where PEFT has the method).

        Args:
            folder: where to write; must not hold another adapter's files.
            name: which named set.

        Returns:
            The folder.

        Raises:
            ValueError: if there is no such set, or more was trained than an adapter folder holds.
        """
        assert self.model is not None, "call configure_model() first"
        known = adapter_names(self.model)
        if name not in known and (known or name != FIRST):
            raise ValueError(f"No adapter is named {name!r}. This model has {known}.")
        declared = self.declared()
        own = {id(p) for _, adapter in named_adapters(self.model) for _, p in adapter.own_parameters()}
        trained = {n for n, p in self.model.named_parameters() if p.requires_grad and id(p) not in own}
        thawed = sorted(trained - declared.keys())
        if thawed:
            raise ValueError(
                f"{len(thawed)} thawed weights of the base were trained too, such as {thawed[0]!r}, and an adapter "
                "folder has no place for them. Keep the checkpoint, or merge."
            )
        labels = getattr(self, "labels", None)
        return hub.write(
            folder,
            self.model,
            self.parts_of(name),
            declared=declared,
            base=self.base_identity(),
            task_type=getattr(self, "peft_task_type", None),
            name=name,
            notes={"labels": list(labels)} if labels else None,
        )
