"""`lit-peft fit|validate|test|predict|preview`: LightningCLI with one flag for the method and one for the task."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import Any

import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from lit_peft import catalogue, strategies  # noqa: F401 (strategies registers `fsdp2`)
from lit_peft.callbacks import (
    AdapterCheckpoint,
    AnswerWriter,
    GracefulStop,
    RunProgress,
    RunReport,
    Throughput,
)
from lit_peft.cli import ending, runs
from lit_peft.cli.complaints import OneLine, innermost
from lit_peft.cli.request import Request, read
from lit_peft.cli.shown import Shown
from lit_peft.data.rows import Rows
from lit_peft.faults import RunFailed, stopping
from lit_peft.module import AdaptableModule
from lit_peft.quiet import quiet
from lit_peft.verbs.preview import preview
from lit_peft.zoo import check, compose

DATA = {
    "sft": "lit_peft.data.instructions.Instructions",
    "classification": "lit_peft.data.labelled.Labelled",
}
# What a checkpoint's own configuration decides; the Trainer's part in full only when training goes on.
KEPT = ("method", "task", "seed_everything", "model", "data")
OF_FIT = ("trainer", "evaluate", "evaluate_base", "save_every")
AS_TRAINED = ("precision", "limit_val_batches")  # so that measuring gives the numbers of the training again


class PEFTTrainer(Trainer):
    """Lightning's Trainer with one more verb."""

    def preview(self, model: LightningModule, datamodule: LightningDataModule | None = None, rows: int = 3) -> int:
        """Show rows with what the loss sees in colour.

        Args:
            model: the module; only its tokenizer and its template are used.
            datamodule: the data.
            rows: how many rows to show.
        """
        if not isinstance(datamodule, Rows):
            raise ValueError("preview needs data: pass --data.path.")
        template = getattr(model, "text_template", "")
        datamodule.attach(model.tokenizer, model.encoder_decoder, template)  # type: ignore[union-attr, arg-type]
        datamodule.prepare_data()
        datamodule.setup("fit")
        trained = preview(datamodule, rows)
        if trained == 0:
            raise ValueError(
                "The loss sees nothing in these rows: every label is masked. Check the roles and the format."
            )
        return trained


class Parser(Shown, OneLine, LightningArgumentParser):
    """Lightning's parser with readable complaints, and a `--print_config` that shows what will be used."""


class SaveRunConfig(SaveConfigCallback):
    """Writes the resolved configuration into the run folder and into every checkpoint."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write nothing yet: a mistake that shows before the first step must not leave what looks like a run."""
        runs.agree(self.plain(), KEPT)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write `config.yaml` once, on every machine: one without the checkpoint resumes by it."""
        folder = trainer.strategy.broadcast(str(trainer.default_root_dir))
        if trainer.local_rank == 0 and not self.already_saved:
            runs.write_config(folder, self.plain())
            self.already_saved = True

    def plain(self) -> dict[str, Any]:
        """Return the configuration as plain values, without what belongs to this one call."""
        dumped = yaml.safe_load(self.parser.dump(self.config, skip_none=True))
        return {key: value for key, value in dumped.items() if key in (*KEPT, *OF_FIT)}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the configuration into the checkpoint, so that it alone restores everything."""
        checkpoint.setdefault("lit_peft", {})["config"] = self.plain()


class LitPEFTCLI(LightningCLI):
    """The command line around one `Request`.

    Args:
        request: what the user asked for.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.saved: dict[str, Any] = {}
        if request.ckpt_path:
            self._restore(request)
        if request.model is None or request.flags & {"method", "task"}:
            self.default_model = _path(compose(request.method, request.task))
        else:
            self.default_model = _importable(request.model)
        super().__init__(
            AdaptableModule,
            LightningDataModule,
            save_config_callback=SaveRunConfig,
            trainer_class=PEFTTrainer,
            trainer_defaults={"max_epochs": 1, "log_every_n_steps": 10},
            seed_everything_default=42,
            parser_class=Parser,
            subclass_mode_model=True,
            subclass_mode_data=True,
            args=[request.verb, *self._arguments()],  # sys.argv stays as typed: DDP starts its other processes with it
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    @classmethod
    def start(cls, verb: str, arguments: list[str]) -> LitPEFTCLI:
        """Run one verb from the command line."""
        quiet()
        return cls(read(verb, arguments))

    # Before parsing --------------------------------------------------------------------------------------------------

    def _restore(self, request: Request) -> None:
        """Let a checkpoint's own configuration come before the user's files and flags."""
        asked, resume = request.ckpt_path or "", request.verb == "fit"
        try:
            found = runs.find_checkpoint(asked, request.method, request.task, resume=resume)
            self.saved = runs.saved_config(found)
        except FileNotFoundError:
            if not runs.further_machine():
                raise
            found, self.saved = runs.config_without_checkpoint(asked, bool(request.configs), resume=resume)
        request.ckpt_path = str(found)
        for key in ("method", "task"):
            if key not in request.flags and isinstance(self.saved.get(key), str):
                setattr(request, key, self.saved[key])
        if request.model is None:
            request.model = self.saved.get("model", {}).get("class_path")

    def _arguments(self) -> list[str]:
        request = self.request
        arguments: list[str] = []
        if self.saved:
            fitting = request.verb == "fit"
            kept = {key: self.saved[key] for key in (*KEPT, *(OF_FIT if fitting else ())) if key in self.saved}
            if not fitting:
                kept["trainer"] = {k: v for k, v in self.saved.get("trainer", {}).items() if k in AS_TRAINED}
            arguments += ["--config", yaml.safe_dump(kept)]
        skip = False
        for i, argument in enumerate(request.arguments):
            name = argument.partition("=")[0]
            if skip:
                skip = False
                continue
            if name == "--ckpt_path" and request.ckpt_path:
                arguments += ["--ckpt_path", request.ckpt_path]
                skip = "=" not in argument
            elif name in ("--model.help", "--data.help") and "=" not in argument:
                following = request.arguments[i + 1 : i + 2]
                named = bool(following) and not following[0].startswith("-")
                default = self.default_model if name == "--model.help" else DATA[request.task]
                arguments += [argument] if named else [argument, default]
            else:
                arguments.append(argument)
        if "model" not in request.flags and request.model is not None and self.default_model != request.model:
            # --method or --task as a flag beats a class that a file names; what fits in the rest of the file stays.
            arguments += ["--model", self.default_model]
        return arguments

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Build a parser for the verb that was asked for, and no other: it takes a second each."""
        known = {**LightningCLI.subcommands(), "preview": {"model", "datamodule"}}
        return {self.request.verb: known[self.request.verb]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what is not Lightning's."""
        parser.add_argument(
            "--method", type=str, default=self.request.method, help="see `lit-peft methods`; a+b stacks"
        )
        parser.add_argument("--task", type=str, default=self.request.task, help=", ".join(catalogue.TASKS))
        parser.add_argument(
            "--run_dir", type=str | None, default=None, help="folder of this run; runs/DATE-METHOD-TASK"
        )
        if self.request.verb == "fit":
            text = "after training, measure base and tuned model on this many test rows"
            parser.add_argument("--evaluate", type=int, default=0, help=text)
            text = "measure the base as well; false saves that time where its numbers are known"
            parser.add_argument("--evaluate_base", type=bool, default=True, help=text)
            text = "write last.ckpt also after so many optimizer steps, not only after validations and epochs"
            parser.add_argument("--save_every", type=int | None, default=None, help=text)
        check(self.request.task, catalogue.TASKS, "task")
        parser.set_defaults(
            {"model": {"class_path": self.default_model}, "data": {"class_path": DATA[self.request.task]}}
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the arguments as rewritten here, not sys.argv."""
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Do nothing: `_restore` has put the checkpoint's configuration *before* the flags, so that flags win."""

    # After parsing ---------------------------------------------------------------------------------------------------

    def before_instantiate_classes(self) -> None:
        """Settle the run folder and the precision, and say which flags overrule a checkpoint."""
        config = self.config[self.request.verb]
        if self.saved:
            keys = (*KEPT, "trainer") if self.request.verb == "fit" else KEPT
            for line in runs.overruled(self.saved, config.as_dict(), keys):
                rank_zero_info(line)
        for name, value, least in (
            ("evaluate", config.get("evaluate", 0), 0),
            ("trainer.accumulate_grad_batches", config.trainer.get("accumulate_grad_batches", 1), 1),
        ):
            if value < least:
                raise ValueError(f"{name} is {value}; it must be {least} or more.")
        self.run_dir = runs.choose(self.request, config.run_dir)
        self.new_folder = not self.run_dir.exists()
        config.trainer.default_root_dir = str(self.run_dir)
        if config.trainer.precision is None:
            config.trainer.precision, why = runs.precision()
            rank_zero_info(f"precision {config.trainer.precision}: {why}")

    def instantiate_classes(self) -> None:
        """Build everything; what a class says about its settings is passed on without the parser's layers."""
        try:
            super().instantiate_classes()
        except MisconfigurationException as error:
            raise ValueError(str(error)) from error
        except Exception as error:
            raise innermost(error) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add the callbacks and loggers of a run, where the user has not given their own."""
        config = self._get(self.config_init, "trainer")
        given: list[Callback] = list(config.get("callbacks") or [])
        verb = self.request.verb
        extra: list[Callback] = []
        if verb == "fit":
            for callback in given:
                if isinstance(callback, AdapterCheckpoint) and callback.dirpath is None:
                    callback.dirpath = str((self.run_dir / runs.CHECKPOINTS).resolve())
            if config.get("enable_checkpointing") is not False and not _has(given, ModelCheckpoint):
                extra.append(AdapterCheckpoint(self.run_dir / runs.CHECKPOINTS, every_n_steps=self._save_every()))
            extra += [make() for kind, make in self._fit_callbacks().items() if not _has(given, kind)]
        if verb == "predict" and not _has(given, AnswerWriter):
            extra.append(AnswerWriter(self.run_dir / "predictions.jsonl"))
        if config.get("logger") is None:
            session = runs.session(self.run_dir)
            kwargs["logger"] = verb == "fit" and [
                # Every row is written at once: a run that is killed keeps them.
                CSVLogger(self.run_dir, name="logs", version=session, flush_logs_every_n_steps=1),
                TensorBoardLogger(self.run_dir, name="tensorboard", version=session, default_hp_metric=False),
            ]
        if verb != "preview" and config.get("enable_progress_bar") is not False and not _has(given, ProgressBar):
            extra.append(RunProgress())
        kwargs["callbacks"] = [*given, *extra]
        kwargs["enable_model_summary"] = bool(config.get("enable_model_summary"))  # one line of ours says more
        return super().instantiate_trainer(**kwargs)

    def _save_every(self) -> int | None:
        every: int | None = self._get(self.config, "save_every")
        if every is not None and every < 1:
            raise ValueError(f"save_every is {every}; it must be 1 or more, or left out.")
        return every

    def _fit_callbacks(self) -> dict[type[Callback], Callable[[], Callback]]:
        resume = f"lit-peft fit --ckpt_path {shlex.quote(str(self.run_dir / 'checkpoints' / 'last.ckpt'))}"
        return {
            Throughput: Throughput,
            RunReport: RunReport,
            GracefulStop: lambda: GracefulStop(resume),
        }

    def _run_subcommand(self, subcommand: str) -> None:
        """Run the verb; what fails after training began is no mistake in the command."""
        try:
            with stopping(self._stopped):
                super()._run_subcommand(subcommand)
        except BaseException as error:
            self._discard()
            if not isinstance(error, Exception):
                raise
            if subcommand == "fit" and self.trainer.global_step > runs.resumed_step(self.trainer):
                raise RunFailed(self._resume()) from error
            if isinstance(error, MisconfigurationException):
                raise ValueError(str(error)) from error
            raise

    def _discard(self) -> None:
        """Leave no folder behind that holds no run: training had not begun."""
        begun = (self.run_dir / runs.CONFIG).exists()
        if self.request.verb == "fit" and self.new_folder and not begun and self.trainer.is_global_zero:
            shutil.rmtree(self.run_dir, ignore_errors=True)
            with suppress(OSError):  # it holds other runs
                self.run_dir.parent.rmdir()

    def _stopped(self) -> str:
        if self.request.verb != "fit":
            return "stopped."
        if not (self.run_dir / runs.CONFIG).exists():
            return "stopped before training began; nothing was written."
        return f"stopped at once. {self._resume() or 'Nothing was saved.'}"

    def _resume(self) -> str:
        last = self.run_dir / "checkpoints" / "last.ckpt"
        return f"Resume: lit-peft fit --ckpt_path {shlex.quote(str(last))}" if last.is_file() else ""

    def after_fit(self) -> None:
        """Compare with the base if asked, show the results, and say how to go on."""
        ending.finish(self)

    def after_validate(self) -> None:
        """Say where the numbers come from."""
        self._say_source()

    after_test = after_validate

    def after_predict(self) -> None:
        """Say where the answers are."""
        self._say(f"answers written to {self.run_dir / 'predictions.jsonl'}")

    def _say_source(self) -> None:
        limit = self.trainer.limit_val_batches if self.request.verb == "validate" else 1.0
        part = "" if limit == 1.0 else f" with --trainer.limit_val_batches {limit}, so not on all rows"
        self._say(f"measured {self.request.ckpt_path or 'without a checkpoint'}{part}")

    @rank_zero_only
    def _say(self, line: str) -> None:
        print(line)


def _has(callbacks: list[Callback], kind: type[Callback]) -> bool:
    return any(isinstance(callback, kind) for callback in callbacks)


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _importable(path: str) -> str:
    """Return the path of a user's own module class.

    Raises:
        ValueError: if it cannot be imported.
    """
    module, _, name = path.rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except TypeError:
        raise  # methods and task in the wrong order
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"--model {path} cannot be imported ({reason}). Write it as package.module.Class, with its folder on "
            "PYTHONPATH."
        ) from error
    if not (isinstance(found, type) and issubclass(found, AdaptableModule)):
        raise ValueError(f"--model {path} adapts nothing. Make it of methods and a task: class {name}(LoRA, SFT).")
    return path
