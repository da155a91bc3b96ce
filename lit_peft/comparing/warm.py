"""Calls in processes of their own that need not import everything again.

One process imports the libraries and forks for each call. What a call breaks, leaks or allocates ends with it, and its
peak memory is its own. Where forking is not safe (a GPU driver, other systems than Linux), each call starts afresh.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType
from typing import IO, Any

PATIENCE = 20.0  # seconds that a call gets to save what it has
FORKS = sys.platform == "linux" and not Path("/dev/nvidiactl").exists()


class Warm:
    """Calls functions by name, one at a time, each in a process of its own.

    Args:
        modules: what to import beforehand.

    Example:
        >>> with Warm(["json"]) as warm:  # doctest: +SKIP
        ...     code = warm("lit_peft.__main__:main", ["methods"], log=Path("log.txt"))
    """

    def __init__(self, modules: Sequence[str]) -> None:
        self.modules = modules
        self._complaints: IO[bytes] = TemporaryFile()  # noqa: SIM115 (open as long as the process)
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self, function: str, *arguments: Any, log: Path) -> int:
        """Call `module:function` with arguments that JSON can hold, and wait.

        Args:
            function: where it is.
            *arguments: what it gets.
            log: file to which everything it prints is appended.

        Returns:
            What it returned, as an exit code; minus the number of the signal that ended it.

        Raises:
            RuntimeError: if no process could be started.
        """
        process = self._process = self._process or self._begin()
        assert process.stdin is not None
        assert process.stdout is not None
        order = {"function": function, "arguments": arguments, "log": str(log.resolve())}
        try:
            process.stdin.write(json.dumps(order).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            pass  # its end shows below
        answer = process.stdout.readline()
        if not answer:
            self._complaints.seek(0)
            said = self._complaints.read().decode(errors="replace").strip().splitlines()
            raise RuntimeError(f"The process that starts the runs ended: {said[-1] if said else 'it said nothing'}.")
        return int(answer)

    def _begin(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "lit_peft.comparing.warm", *self.modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            start_new_session=True,  # Ctrl-C comes to the caller, who decides
        )

    def close(self) -> None:
        """End the call that is going on, letting it save, and the process."""
        process, self._process = self._process, None
        if process is not None:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.close()
            try:
                process.wait(PATIENCE + 5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()
        self._complaints.close()

    def __enter__(self) -> Warm:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()


# In the process itself ------------------------------------------------------------------------------------------------


def serve(modules: Sequence[str]) -> None:
    """Do what comes in, line by line, until the caller is gone."""
    if FORKS:
        for module in modules:
            import_module(module)
    orders = open(0, "rb", buffering=0, closefd=False)  # noqa: SIM115 (unbuffered, so that `select` sees what is there)
    while line := orders.readline():
        code = _watch(_start(line))
        if code is None:
            return
        sys.stdout.write(f"{code}\n")
        sys.stdout.flush()


def _start(line: bytes) -> int | subprocess.Popen[bytes]:
    if FORKS:
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            perform(line.decode())
        return pid
    return subprocess.Popen(
        [sys.executable, "-m", "lit_peft.comparing.warm", "--call", line.decode()], stdin=subprocess.DEVNULL
    )


def _watch(call: int | subprocess.Popen[bytes]) -> int | None:
    """Wait for the end of a call and return its code; None if the caller was gone first, and the call was ended."""
    while (code := _poll(call)) is None:
        if sys.platform == "win32":
            time.sleep(0.1)
        elif select.select([0], [], [], 0.05)[0]:  # nothing is sent while a call runs: this is the end of the file
            _end(call)
            return None
    return code


def _poll(call: int | subprocess.Popen[bytes]) -> int | None:
    if not isinstance(call, int):
        return call.poll()
    pid, status = os.waitpid(call, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if pid else None


def _end(call: int | subprocess.Popen[bytes]) -> None:
    pid = call if isinstance(call, int) else call.pid
    os.kill(pid, signal.SIGTERM)
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        if _poll(call) is not None:
            return
        time.sleep(0.05)
    os.killpg(pid, signal.SIGKILL)


def perform(order: str) -> None:
    """Make one call, and leave the process with its code."""
    code = 1
    try:
        wanted = json.loads(order)
        if hasattr(os, "setsid"):
            os.setsid()
        log = os.open(wanted["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        module, _, name = wanted["function"].partition(":")
        found = import_module(module)
        # Lightning starts further processes with the command line of the main module
        sys.modules["__main__"] = found
        words = wanted["arguments"][0] if wanted["arguments"] else []
        sys.argv = ["lit-peft", *(words if isinstance(words, list) else [])]
        code = int(getattr(found, name)(*wanted["arguments"]) or 0)
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 0 if leaving.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # nothing of the parent's is cleaned up here


if __name__ == "__main__":
    if sys.argv[1:2] == ["--call"]:
        perform(sys.argv[2])
    else:
        serve(sys.argv[1:])
