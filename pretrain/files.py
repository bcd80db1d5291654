"""Files that are whole or not there, and locks that end with their process.

    with atomic_write(path) as file:        # binary; under its name only once it is on the disk
        file.write(data)
    with lock(folder / ".lock", "another process is writing here"):
        ...

Nothing else in the project renames into place, syncs or locks.
"""

import contextlib
import ctypes
import errno
import functools
import hashlib
import json
import os
import shutil
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
def atomic_write(path: str | Path, *, durable: bool = True) -> Iterator[IO[bytes]]:
    """A binary file to write. When the block ends it is on the disk under its name; when the block
    raises, what was under the name before is still there and nothing else is left. Raises
    OSError.

    durable False: it is whole for every process, and may be damaged or gone after a power cut. For
    what has a checksum and is soon removed, and so perhaps never written to the disk.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        problem = "not a regular file, and nothing else is replaced by one"
        raise FileExistsError(errno.EEXIST, problem, str(path))
    temporary = temporary_name(path)
    try:
        with open(temporary, "wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        if durable:
            publish(temporary, path)
        else:
            os.replace(temporary, path)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):
            error.filename, error.filename2 = str(path), None  # as its user calls it
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


def sync_tree(folder: str | Path) -> None:
    """Have all files below a folder, and their names, on the disk, whoever wrote them."""
    for parent, _, names in os.walk(folder):
        for name in names:
            with open(Path(parent, name), "rb+") as file:  # to write: Windows syncs no other
                os.fsync(file.fileno())
        fsync_folder(Path(parent))


def replace_folder(new: Path, name: Path) -> None:
    """Give a complete folder the name of one that is there, which goes away as a whole.

    On Linux the two change places in one step; elsewhere there is a moment in which nothing has the
    name, and the old folder is `.name.old` beside it. Raises OSError.
    """
    sync_tree(new)
    if not name.exists():
        publish(new, name)
        return
    old = name.with_name(f".{name.name}.old")
    if _exchange(new, name):
        old = new
    else:
        shutil.rmtree(old, ignore_errors=True)
        os.rename(name, old)
        os.rename(new, name)
    fsync_folder(name.parent)
    shutil.rmtree(old)


def _exchange(one: Path, other: Path) -> bool:
    """Let two names change places, which Linux can and Python does not offer; False where the
    system or the file system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def is_utf8(name: str) -> bool:
    """Whether a name is text: Python has other bytes of a file's name as halves of surrogate
    pairs."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def write_text(path: str | Path, text: str, *, durable: bool = True) -> None:
    r"""A UTF-8 file, atomically; half a surrogate pair, as Python has it for a byte of a file's
    name that is no UTF-8, becomes \udcff, which JSON reads as what it was. Raises OSError."""
    with atomic_write(path, durable=durable) as file:
        file.write(text.encode("utf-8", "backslashreplace"))


def write_json(path: str | Path, value: Any, *, durable: bool = True) -> None:
    """A JSON file, indented, atomically. Raises OSError."""
    text = json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n"
    write_text(path, text, durable=durable)


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


def is_locked(path: str | Path) -> bool | None:
    """Whether a process holds the lock of a file; None where there is none, or where the system
    cannot tell. It is in nobody's way: its own lock is shared, and let go of at once."""
    try:
        import fcntl

        if not Path(path).is_file():  # opening a pipe of that name could wait for ever
            return None
        with open(path, "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            return False
    except (ImportError, OSError):
        return None


def sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes. Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_once(path: str | Path) -> str:
    """The same, computed once by a process as long as the file stays as it is. The time at which a
    file was put in its place counts too: that of its last change can be set back. Raises
    OSError."""
    status = os.stat(path)
    state = status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
    return _sha256_of(path, state)


@functools.lru_cache(maxsize=4096)
def _sha256_of(path: str | Path, state: tuple[int, ...]) -> str:
    return sha256(path)
