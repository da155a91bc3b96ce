"""From exception to one readable line and an exit code."""

from __future__ import annotations

import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

USER_MISTAKE, FAILED = 2, 1


class Interrupted(BaseException):
    """A signal ended the run after everything was saved.

    Args:
        number: the signal.
        advice: how to go on, one line.
    """

    def __init__(self, number: int, advice: str) -> None:
        super().__init__(advice)
        self.number = number


class RunFailed(Exception):
    """Training had begun when this happened: whatever the cause, it is no mistake in the command."""


@dataclass
class Outcome:
    """The exit code of a guarded block."""

    code: int = 0


@contextmanager
def guarded() -> Iterator[Outcome]:
    """Turn exceptions into one line on stderr and an exit code.

    Set LIT_PEFT_DEBUG=1 to see tracebacks as well. What is not foreseen shows its traceback anyway: that is a bug.
    """
    outcome = Outcome()
    try:
        yield outcome
    except Interrupted as stop:
        outcome.code = 128 + stop.number
        say(str(stop))
    except KeyboardInterrupt:
        outcome.code = 128 + signal.SIGINT
        say("interrupted; nothing was written.")
    except SystemExit as stop:
        outcome.code = stop.code if isinstance(stop.code, int) else (0 if stop.code is None else 1)
    except BrokenPipeError:
        outcome.code = 0
    except TypeError as error:
        if re.search(r"\(\) (missing|got |takes )", str(error)):  # a call that does not fit its function: our own bug
            traceback.print_exc()
        outcome.code = _report(error, USER_MISTAKE)
    except RunFailed as failure:
        cause = failure.__cause__ or failure
        outcome.code = _report(cause, FAILED, str(failure))
    except (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError) as mistake:
        outcome.code = _report(mistake, USER_MISTAKE)
    except (OSError, RuntimeError) as failure:
        outcome.code = _report(failure, FAILED)
    except Exception:
        traceback.print_exc()
        say("This was not foreseen; please report it with the lines above.")
        outcome.code = FAILED


@contextmanager
def stopping(advice: Callable[[], str]) -> Iterator[None]:
    """Let SIGINT and SIGTERM raise `Interrupted` inside the block.

    Python's own KeyboardInterrupt would not do: Lightning's Trainer turns it into exit code 1.

    Args:
        advice: what to tell, asked at the signal.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number, advice())

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _report(error: BaseException, code: int, advice: str = "") -> int:
    if os.environ.get("LIT_PEFT_DEBUG") == "1":
        traceback.print_exception(error)
    text = " ".join(str(error).split()) or type(error).__name__
    say(f"error: {text}" + (f" {advice}" if advice else ""))
    return code


def say(line: str) -> None:
    """Print one line on stderr under the program's name, once on every machine."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"lit-peft: {line}", file=sys.stderr, flush=True)
