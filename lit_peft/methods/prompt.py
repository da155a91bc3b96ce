"""Prompt tuning (Lester et al. 2021, https://arxiv.org/abs/2104.08691).

    X -> [P ; emb(x)],    P (p, d)

Only P is trained. It enters in front of the text, behind its first token (`after_bos`), or at the pseudo tokens of a
`template`. In front, it leaves again with the last layer: labels, logits and tokens of the text keep their places.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, Literal

import torch

from lit_peft import hub
from lit_peft.adapter import named_adapters
from lit_peft.methods.prompt_adapters import PromptBackbone, PromptReader
from lit_peft.mixin import PEFT
from lit_peft.placing import join
from lit_peft.sites import classification_head, geometry, stacks
from lit_peft.sublayers import hosts, is_causal
from lit_peft.targets import OWN
from lit_peft.template import resolved
from lit_peft.virtual_tokens import STORED

COMMONEST = 5000


@dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """Settings of prompt tuning.

    Args:
        num_virtual_tokens: length p of the prompt.
        init: start from `random` numbers between -0.5 and 0.5, from embeddings sampled from the `vocabulary`, or from
            those of a `text`.
        init_text: the text; repeated or cut to p tokens.
        after_bos: put the prompt behind the first token. None: for encoders such as BERT, whose first token is the
            one that a classifier reads.
        template: put it inside of the text instead, at pseudo tokens: `[P][P]{text} It was [P]`. `{prompt:3}` is
            three of them, `{prompt}` all that are left. In a conversation the first question is the text.

    Raises:
        ValueError: if a value is out of range, or the template has another number of pseudo tokens.
    """

    num_virtual_tokens: int = 20
    init: Literal["random", "vocabulary", "text"] = "vocabulary"
    init_text: str = ""
    after_bos: bool | None = None
    template: str = ""

    default_lr: ClassVar[float] = 1e-2

    def __post_init__(self) -> None:
        if self.num_virtual_tokens < 1:
            raise ValueError(f"prompt.num_virtual_tokens is {self.num_virtual_tokens}; it must be 1 or more.")
        if (self.init == "text") != bool(self.init_text):
            raise ValueError(f"prompt.init is {self.init!r} and init_text {self.init_text!r}; a text needs both.")
        if self.template and self.after_bos is not None:
            raise ValueError("prompt.template says where the prompt goes, and so does prompt.after_bos. Leave one out.")
        resolved(self.template, self.num_virtual_tokens)

    def to_peft(self) -> dict[str, Any]:
        """Return the settings as in `adapter_config.json` of HF PEFT."""
        return {"prompt_tuning_init": "RANDOM"}  # PEFT's other words need its tokenizer again when a folder is read


class PromptTuning(PEFT):
    """Prompt tuning on the task's model.

    Args:
        prompt: length, start and place of the prompt.

    Example:
        >>> from lit_peft import PromptTuning, SFT
        >>> class Mine(PromptTuning, SFT): ...
    """

    method = "prompt"
    conflicts = ("prefix", "p_tuning_v2", "mam", "unipelt", "loreft", "direft")
    backbone_class: ClassVar[type[PromptBackbone]] = PromptBackbone
    beyond: ClassVar[str] = "LIT_PROMPT"  # the type of a folder that holds what HF PEFT has no word for

    def __init__(self, *args: Any, prompt: PromptConfig = PromptConfig(), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.prompt: PromptConfig = self.configured(PromptConfig, "prompt", prompt)

    @property
    def text_template(self) -> str:
        """What texts are put into before they are read; empty where no pseudo tokens are, or none act."""
        config = self.prompt
        if self._placed and self.model is not None:
            found = [a for _, a in named_adapters(self.model) if isinstance(a, PromptBackbone)]
            acting = [a.configs[name] for a in found for name in a.chosen() if a.configs[name].template]
            if not acting:
                return ""
            config = acting[0]
        elif self.adapter is not None:  # data are read before the model is there
            for saved in hub.read_configs(self.adapter):
                config = self._adopted(saved) or config
        return resolved(config.template, config.num_virtual_tokens)

    def place_adapters(self) -> None:
        """Put a `PromptBackbone` around what reads the prompt, and a `PromptReader` around a decoder behind it."""
        super().place_adapters()
        assert self.model is not None
        paths = hosts(self.model)
        config: Any = getattr(self.model, "config", None)
        seq2seq = getattr(config, "is_encoder_decoder", False)
        encoder_only = not seq2seq and not is_causal(self.model, stacks(self.model)[0][0])
        if self.prompt.after_bos is None and not self.prompt.template:
            self.prompt = replace(self.prompt, after_bos=encoder_only)
        join(self.model, {paths[0]: self.prompt}, lambda base: self.backbone_class, self.placing)
        if len(paths) > 1:
            join(self.model, dict.fromkeys(paths[1:], self.prompt), lambda base: PromptReader, self.placing)
        for _, adapter in named_adapters(self.model):
            if isinstance(adapter, PromptBackbone):
                adapter.reads_first = encoder_only and classification_head(self.model) is not None
        self.start_prompt()

    def start_prompt(self) -> None:
        """Fill the prompt with embeddings of words, unless it starts at random."""
        assert self.model is not None
        for _, adapter in named_adapters(self.model):
            if isinstance(adapter, PromptBackbone) and self.placing in adapter.configs and self.prompt.init != "random":
                table: Any = adapter.embedding()
                rows = adapter.prompt_embedding[self.placing]
                if rows.device.type == "meta":
                    continue
                if self.prompt.init == "text":
                    tokenizer: Any = getattr(self.beside or self, "tokenizer", None)
                    if tokenizer is None:
                        kind = type(self.beside or self).__name__
                        raise TypeError(
                            f"prompt.init_text needs a tokenizer, and {kind} has no attribute `tokenizer`. Give it one."
                        )
                    ids = list(tokenizer(self.prompt.init_text, add_special_tokens=False)["input_ids"])
                    if not ids:
                        raise ValueError(f"prompt.init_text {self.prompt.init_text!r} has no tokens.")
                    chosen = torch.tensor([ids[i % len(ids)] for i in range(len(rows))])
                else:  # the commonest words have the lowest numbers in most tokenizers
                    chosen = torch.randint(0, min(COMMONEST, table.num_embeddings), (len(rows),))
                with torch.no_grad():
                    rows.copy_(table(chosen.to(table.weight.device)))

    def on_fit_start(self) -> None:
        """See that no text is longer than the positions that the prompt leaves.

        Raises:
            ValueError: if one is.
        """
        super().on_fit_start()
        assert self.model is not None
        data: Any = getattr(self.trainer, "datamodule", None)
        found = [a for _, a in named_adapters(self.model) if isinstance(a, PromptBackbone) and a.room is not None]
        acting = [adapter.configs[name] for adapter in found for name in adapter.chosen()]
        taken = sum(config.num_virtual_tokens for config in acting if not config.template)
        most = min((adapter.room or 0 for adapter in found), default=0) - taken
        if not acting or getattr(data, "max_length", most + 1) <= most:
            return
        tables = (getattr(data, "tables", None) or {}).values()
        longest = max((len(ids) for table in tables for ids in table["input_ids"]), default=0)
        if longest > most:
            beside = f"; beside a prompt of {taken}" if taken else " with its prompt;"
            raise ValueError(
                f"The longest text has {longest} tokens{beside} this model has positions for {most}. Set "
                f"data.max_length to {most} or less."
            )

    # Folders ---------------------------------------------------------------------------------------------------------

    def adopt(self, config: Mapping[str, Any]) -> None:
        """Take the settings from an adapter folder."""
        super().adopt(config)
        found = self._adopted(config)
        if found is not None:
            self.prompt = self.configured(type(self.prompt), "prompt", found)

    def _adopted(self, config: Mapping[str, Any]) -> PromptConfig | None:
        """Return the settings that a folder's configuration means; None if it is another method's."""
        if config.get("peft_type") not in (self.backbone_class.peft_type, self.beyond):
            return None
        kind = type(self.prompt)
        known = {field.name for field in fields(kind)}
        theirs = {"init": "random", "after_bos": False}
        return kind(**{k: v for k, v in {**theirs, **config, **(config.get(OWN) or {})}.items() if k in known})

    def parts(self) -> list[dict[str, Any]]:
        """Return the settings for `adapter_config.json`: HF PEFT's, or ours where PEFT has no word for one."""
        assert self.model is not None
        config, size = self.prompt, geometry(self.model)
        beyond = bool(config.after_bos or config.template or getattr(config, "tune_base", False))
        kind = self.backbone_class.peft_type
        if beyond:
            return [*super().parts(), {**asdict(config), "peft_type": kind, STORED: self.beyond}]
        part = {
            "peft_type": kind,
            "num_virtual_tokens": config.num_virtual_tokens,
            "token_dim": size.hidden,
            "num_layers": size.layers,
            "num_attention_heads": size.heads,
            "num_transformer_submodules": 1,
            **config.to_peft(),
            OWN: {key: value for key, value in asdict(config).items() if key != "num_virtual_tokens"},
        }
        return [*super().parts(), part]
