"""SIGKILL at any moment, through the real command line: the resumed run equals the uninterrupted one, bit for bit."""

from __future__ import annotations

import random

import pytest

from tests.distributed.killed_runs import EPOCHS, EVERY, LAUNCHERS, Runs, compare, resume

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("killed"))


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_killed_at_a_random_step(launcher: str, runs: Runs) -> None:
    whole, run = runs.whole(launcher), runs.home / f"{launcher}-random"
    step = random.SystemRandom().randint(EVERY + 1, EPOCHS * LAUNCHERS[launcher][2] - 2)
    print(f"{launcher}: killed at step {runs.killed(launcher, runs.flags(launcher, run), step=step)}, drawn {step}")
    resume(runs, launcher, run)
    compare(run, whole)


@pytest.mark.parametrize(
    ("launcher", "hook"),
    [
        ("one", "on_train_epoch_start"),  # the epoch's end has just been saved
        ("one", "on_train_epoch_end"),  # it has not
        ("one", "on_validation_end"),  # validated, not saved
        ("ddp", "on_train_epoch_start"),
        ("fsdp2", "on_train_epoch_start"),
    ],
)
def test_killed_at_a_boundary(launcher: str, hook: str, runs: Runs) -> None:
    whole, run = runs.whole(launcher), runs.home / f"{launcher}-{hook}"
    epoch = LAUNCHERS[launcher][2]
    place = f"{hook}:{epoch - 1 if hook == 'on_validation_end' else epoch}"
    print(f"{launcher}: killed in {place}", runs.killed(launcher, runs.flags(launcher, run), hold=place))
    resume(runs, launcher, run)
    compare(run, whole)


def test_killed_twice(runs: Runs) -> None:
    whole, run = runs.whole("one"), runs.home / "one-twice"
    first, second = sorted(random.SystemRandom().sample(range(EVERY + 1, 3 * LAUNCHERS["one"][2] - 2), 2))
    runs.killed("one", runs.flags("one", run), hold=f"on_train_batch_start:{first}")
    last = run / "checkpoints/last.ckpt"
    runs.killed("one", [f"--ckpt_path={last}"], hold=f"on_train_batch_start:{second}")
    print(f"killed at steps {first} and {second}")
    resume(runs, "one", run, number=2)
    compare(run, whole)


STEPS = ("--trainer.max_epochs=-1", "--trainer.max_steps=27", "--trainer.val_check_interval=1.0")


@pytest.mark.parametrize("hook", ["on_train_epoch_start", "on_train_batch_start"])
@pytest.mark.parametrize("validate", [True, False])
def test_killed_after_an_epoch_of_a_run_counted_in_steps(hook: str, validate: bool, runs: Runs) -> None:
    """Lightning counts epochs differently when max_steps is set, and may skip one on resuming from an epoch's end."""
    more = (*STEPS, *(() if validate else ("--trainer.limit_val_batches=0",)))
    name = f"steps-{'val' if validate else 'noval'}"
    whole, run = runs.whole("one", name, *more), runs.home / f"one-{name}-{hook}"
    place = f"{hook}:{LAUNCHERS['one'][2]}"
    print(f"killed in {place}", runs.killed("one", runs.flags("one", run, *more), hold=place))
    resume(runs, "one", run)
    compare(run, whole, ("best", "last") if validate else ("last",))
