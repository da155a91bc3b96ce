"""Checkpoint files: written whole or not at all, read as plain values only, brought to processes that lack them."""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.types import _PATH

CHUNK = 1 << 26


class AtomicCheckpointIO(TorchCheckpointIO):
    """Reads and writes checkpoint files such that a crash or a full disk never costs the file that was there.

    A file is written under a temporary name in the same folder, flushed to the disk, and then renamed. Reading uses
    `weights_only=True` always: a checkpoint cannot run code.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lit_peft.callbacks.checkpoint_io import AtomicCheckpointIO
        >>> trainer = Trainer(plugins=[AtomicCheckpointIO()], logger=False, accelerator="cpu")
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        """Write a checkpoint.

        Raises:
            OSError: if it cannot be written; the file that was there is left as it was.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        write_atomically(Path(path), lambda file: torch.save(checkpoint, file))

    def load_checkpoint(
        self, path: _PATH, map_location: Any = lambda storage, _: storage, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Read a checkpoint of plain tensors and values, whatever `weights_only` says.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it is damaged, or holds objects that could run code.
        """
        check(path)
        try:
            return super().load_checkpoint(path, map_location, weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
            raise unreadable(path, error) from error


class BroadcastCheckpointIO(AtomicCheckpointIO):
    """Also reads a checkpoint that only the first process can see: machines need no shared disk to resume.

    The file's bytes are shipped from the first process to each that lacks the file or has another one (left over from
    an earlier resume), under the same path, before all of them read it. Shipping the file, rather than what it holds,
    serves every strategy: FSDP2 reads the path itself and would never ask this class (see `AdapterCheckpoint`).
    """

    def load_checkpoint(
        self, path: _PATH, map_location: Any = lambda storage, _: storage, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Read a checkpoint on all processes together."""
        ship(path)
        return super().load_checkpoint(path, map_location, weights_only)


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let `write` fill a temporary file in the same folder, flush it to the disk, and give it its name.

    Raises:
        OSError: naming the file, the cause and the way out; the file that was there is whole, the temporary gone.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    sink: _Sink | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            sink = _Sink(file)
            write(sink)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        cause = (sink.error if sink else None) or error
        if not isinstance(cause, OSError):
            raise
        kept = f"The {path.name} that was there is untouched. " if path.exists() else ""
        way = "Free some space" if cause.errno in (errno.ENOSPC, errno.EDQUOT) else "Make the folder writable"
        why = cause.strerror or cause
        problem = OSError(f"Could not write {path}: {why}. {kept}{way}, or choose another folder, and start again.")
        problem.errno = cause.errno
        raise problem from error
    finally:
        temporary.unlink(missing_ok=True)


class _Sink:
    """A file that remembers why a write failed: torch turns it into a RuntimeError without the cause."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _sync_folder(folder: Path) -> None:
    """Make the new name survive a power cut; not every system can open a folder."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def check(path: _PATH) -> None:
    """See that a checkpoint file is there and has its end; folders and remote paths are left alone.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is cut off.
    """
    local = Path(path)
    if "://" in str(path) or local.is_dir():
        return
    if not local.is_file():
        raise FileNotFoundError(f"There is no checkpoint {path}.{_other(local)}")
    if not zipfile.is_zipfile(local):  # torch's format: the directory stands at the end
        raise ValueError(f"{path} is damaged or half-written.{_other(local)}")


def unreadable(path: _PATH, error: Exception) -> ValueError:
    """Return what to tell about a checkpoint that torch could not read."""
    if isinstance(error, pickle.UnpicklingError):
        return ValueError(
            f"{path} holds objects that are no plain tensors or values and could run code, so it is not read. "
            "Save hyper-parameters and callback states as plain numbers, strings, lists and dicts."
        )
    return ValueError(f"{path} is damaged or half-written.{_other(Path(path))}")


def _other(path: Path) -> str:
    others = sorted(path.parent.glob("*.ckpt"), key=lambda p: p.stat().st_mtime) if path.parent.is_dir() else []
    others = [other for other in others if other.name != path.name]
    return f" Use the other checkpoint, {others[-1]}." if others else " There is no other checkpoint in its folder."


def ship(path: _PATH) -> None:
    """Bring the first process's file to every process whose path holds nothing or something else.

    All processes call this together. Folders (distributed checkpoints) and remote paths are left alone.

    Raises:
        FileNotFoundError: on all processes, if the first one has no such file.
        ValueError: on all processes, if they were given different paths.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    local = Path(path)
    mine = (str(path), _digest(local), local.is_dir() or "://" in str(path))
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    if any(skip for _, _, skip in everyone):
        return
    if len({name for name, _, _ in everyone}) > 1:
        raise ValueError(
            f"Processes resume from different checkpoints, such as {everyone[0][0]} and {everyone[-1][0]}."
        )
    digest = everyone[0][1]
    if digest is None:
        raise FileNotFoundError(f"There is no checkpoint {path} on the first machine.")
    if all(other == digest for _, other, _ in everyone):
        return
    if mine[1] == digest:
        _send_or_receive(local, None)
    else:
        write_atomically(local, lambda file: _send_or_receive(local, file))


def _digest(path: Path) -> str | None:
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _send_or_receive(path: Path, into: IO[bytes] | None) -> None:
    first = dist.get_rank() == 0
    with open(path if first else os.devnull, "rb") as source:
        while True:
            box = [source.read(CHUNK) if first else None]
            dist.broadcast_object_list(box, src=0)
            if not box[0]:
                return
            if into is not None:
                into.write(box[0])
