"""Files that are whole or not there, and locks that end with their process.

with atomic_write(path) as file:        # binary; under its name only once it is on the disk
    file.write(data)
with lock(folder / ".lock", "another process is writing here"):
    ...
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from pretrain.errors import UserError


class Locked(UserError):
    """Another process holds a lock."""


def temporary_name(path: Path) -> Path:
    """Where a file is written before it takes its name: `.name.tmp` beside it."""
    return path.with_name(f".{path.name}.tmp")


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[IO[bytes]]:
    """A binary file to write. When the block ends it is on the disk under its name; when the block
    raises, what was under the name before is still there and nothing else is left. Raises
    OSError."""
    path = Path(path)
    temporary = temporary_name(path)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        publish(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def publish(temporary: Path, path: Path) -> None:
    """Give a complete, fsynced file or folder its name, so that the name outlasts a power cut."""
    os.replace(temporary, path)
    fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk; where a system cannot (Windows), they are when it
    says so."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):  # some network file systems refuse it
            os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: str | Path, text: str) -> None:
    """A UTF-8 file, atomically. Raises OSError."""
    with atomic_write(path) as file:
        file.write(text.encode("utf-8"))


def write_json(path: str | Path, value: Any) -> None:
    """A JSON file, indented, atomically. Raises OSError."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


@contextlib.contextmanager
def lock(path: str | Path, problem: str, *, wait_seconds: float = 0) -> Iterator[None]:
    """Hold the lock of a file, which the system takes back from a process that dies.

    Raises Locked with `problem` when another process still holds it after wait_seconds (-1: wait
    for ever), and OSError for a folder that cannot be written.
    """
    from filelock import FileLock, Timeout

    held = FileLock(path, timeout=wait_seconds)
    try:
        held.acquire()
    except Timeout:
        raise Locked(problem) from None
    try:
        yield
    finally:
        held.release()


def sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes. Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
