"""LoRA+: which weight learns how fast, beside HF PEFT's optimizer, under schedules and after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from peft.optimizers import create_loraplus_optimizer

from lit_peft import LoRAConfig, LoRAPlus
from lit_peft.zoo import compose
from tests.models import save_tiny, tiny
from tests.test_methods import batch, loader, quick_trainer


def built(folder: Path, method: str = "loraplus", task: str = "sft", **options: Any) -> Any:
    extra = {"labels": ["a", "b", "c"]} if task == "classification" else {}
    module: Any = compose(method, task)(str(folder), **extra, **options)
    module.configure_model()
    return module


def rates(module: Any, **options: Any) -> dict[str, tuple[float, float]]:
    """{parameter: (learning rate, weight decay)}"""
    names = {id(p): n.removeprefix("model.") for n, p in module.named_parameters()}
    groups = module.parameter_groups(**options)
    return {names[id(p)]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}


def plain(name: str) -> str:
    """A parameter's name without what either library adds."""
    for piece in ("base_model.model.", ".modules_to_save", ".default", ".weight", ".base"):
        name = name.replace(piece, "")
    return name.lower().replace("_layer", "").replace("lora_magnitude_vector", "lora_magnitude")


@pytest.mark.parametrize(("kind", "dora"), [("bert", False), ("bert", True), ("llama", False)])
def test_groups_are_those_of_peft(kind: str, dora: bool, tmp_path: Path) -> None:
    folder = save_tiny(kind, tmp_path / "base", task="classification")
    targets = ["query", "dense"] if kind == "bert" else ["q_proj", "down_proj"]
    exclude = [] if kind == "llama" else ["pooler.dense"]
    config = LoRAConfig(r=2, target_modules=targets, exclude_modules=exclude or None, loraplus_lr_ratio=8)
    method = "dora+loraplus" if dora else "loraplus"
    module = built(folder, method, "classification", lora=config, lr=1e-3, weight_decay=0.1)
    theirs = peft.get_peft_model(
        tiny(kind, "classification"),
        peft.LoraConfig(r=2, target_modules=targets, exclude_modules=exclude, use_dora=dora, task_type="SEQ_CLS"),
    )
    optimizer: Any = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8, loraplus_weight_decay=0.1
    )
    names = {id(p): plain(n) for n, p in theirs.named_parameters()}
    expected = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    found = {plain(name): value for name, value in rates(module).items()}
    vectors = {n for n, p in theirs.named_parameters() if p.requires_grad and p.ndim == 1 and "bias" not in n}
    for name in vectors:  # PEFT decays DoRA's magnitudes; here no vector is
        expected[plain(name)] = (expected[plain(name)][0], 0.0)
    assert found == expected
    assert {lr for lr, _ in found.values()} == {1e-3, 8e-3}
    if kind == "bert":
        assert found["classifier.bias"] == (8e-3, 0.0)
    assert bool(vectors) == dora


def test_own_rate_and_ratio(tmp_path: Path) -> None:
    module = built(save_tiny("llama", tmp_path / "base"))
    assert {(n.rpartition(".lora_")[2][0], lr) for n, (lr, _) in rates(module).items()} == {("a", 1e-4), ("b", 1.6e-3)}


def test_another_methods_vectors_keep_their_own_rate(tmp_path: Path) -> None:
    folder = save_tiny("gpt2", tmp_path / "base")
    own = rates(built(folder, "bitfit"))
    both = rates(built(folder, "loraplus+bitfit"))
    biases = {n: value for n, value in both.items() if ".lora_" not in n}
    assert len(biases) == len(own)
    assert set(biases.values()) == set(own.values())


def test_embeddings_learn_at_a_rate_of_their_own(tmp_path: Path) -> None:
    from torch import nn

    from lit_peft import Adapter

    class Stub(Adapter):
        def add(self, name: str, config: Any) -> None:
            super().add(name, config)
            self.lora_embedding_a = nn.ParameterDict({name: nn.Parameter(torch.zeros(2, 2))})

    module = built(save_tiny("llama", tmp_path / "base"), lr=1e-3)
    module.model.model.embed_tokens = Stub(module.model.model.embed_tokens, module.lora)
    found = rates(module)
    assert found["model.embed_tokens.lora_embedding_a.default"][0] == 1e-6


class Seen(Callback):
    """The learning rates of A and B at each step."""

    def __init__(self) -> None:
        self.pairs: list[tuple[float, ...]] = []

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self.pairs.append(tuple(group["lr"] for group in trainer.optimizers[0].param_groups))


@pytest.mark.parametrize("scheduler", ["cosine", "linear", "constant"])
def test_ratio_survives_schedule_and_resume(scheduler: str, tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "base")
    options: dict[str, Any] = {"lora": LoRAConfig(r=2, loraplus_lr_ratio=5), "scheduler": scheduler, "warmup": 0.3}
    straight, resumed = Seen(), Seen()
    quick_trainer(tmp_path, max_epochs=2, callbacks=[straight]).fit(built(folder, **options), loader("sft", 5))
    files = tmp_path / "half.ckpt"

    class Half(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(files)

    quick_trainer(tmp_path, max_epochs=2, callbacks=[Half()]).fit(built(folder, **options), loader("sft", 5))
    trainer = quick_trainer(tmp_path, max_epochs=2, callbacks=[resumed])
    trainer.fit(built(folder, **options), loader("sft", 5), ckpt_path=files, weights_only=True)
    assert len(straight.pairs) == 10
    assert resumed.pairs == straight.pairs[5:]
    for a, b in straight.pairs:
        assert b == pytest.approx(5 * a)
    assert len({a for a, _ in straight.pairs}) > (5 if scheduler != "constant" else 2)


class Theirs(LightningModule):
    """Somebody's own module."""

    def __init__(self) -> None:
        super().__init__()
        self.model: Any = None

    def configure_model(self) -> None:
        if self.model is None:
            self.model = tiny("llama")

    def training_step(self, rows: dict[str, Any], batch_idx: int) -> Any:
        return self.model(**rows).loss


class Mine(LoRAPlus, Theirs):
    """LoRA+ around it, with its optimizer."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameter_groups(lr=1e-3, weight_decay=0.1))


def test_module_of_ones_own_asks_for_the_groups(tmp_path: Path) -> None:
    module = Mine(lora=LoRAConfig(r=2))
    seen = Seen()
    quick_trainer(tmp_path, max_steps=2, callbacks=[seen]).fit(module, loader("sft", 2))
    assert seen.pairs == [(1e-3, 1.6e-2)] * 2
    assert all(decay == 0.1 for _, decay in rates(module, lr=1e-3, weight_decay=0.1).values())
    assert module.model(**batch("sft")).loss.isfinite()


def test_ratio_must_be_positive() -> None:
    with pytest.raises(ValueError, match=r"loraplus_lr_ratio is 0; it must be above 0"):
        LoRAConfig(loraplus_lr_ratio=0)
