"""What a user can mend, said in one line, by every program in the same way.

    class ShardError(UserError): ...
    raise ShardError(f"{path}: cut short; rebuild it with fineweb.py")

    def main(argv=None) -> int:
        with program("fineweb.py") as outcome:
            outcome.status = run(argv)
        return outcome.status       # 1 after "fineweb.py: error: ..." on stderr

An exception that is no UserError, no OSError and no lack of memory is a fault of ours, and keeps
its traceback.
"""

import contextlib
import errno
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

# Packages that `pip install .` leaves out, by the extra that brings them; see pyproject.toml.
EXTRAS = {
    "datasets": "hub",
    "huggingface_hub": "hub",
    "requests": "hub",
    "matplotlib": "plots",
    "gigatoken": "fast",
    "awkward": "fast",
}


class UserError(Exception):
    """What its user can mend: the message is one line that says what, where and the way out."""

    on_all_ranks = False  # whether every rank of a torchrun raises the same: then one says it


class CheckpointError(UserError):
    """A checkpoint, folder or name from which no model can be made or no run continued."""


def not_installed(package: str) -> str:
    """What to do about a package of EXTRAS that is missing."""
    return (
        f"{package} is not installed: `pip install {package}`, or install this project with its"
        f" extra {EXTRAS[package]}"
    )


@dataclass
class Outcome:
    """How a program ends."""

    status: int = 0


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type where the message is empty.

    >>> first_line(ValueError("bad header\\nat byte 7"))
    'bad header'
    """
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


def reason(error: BaseException) -> str:
    """What is wrong, for a message that names the file itself.

    >>> reason(FileNotFoundError(2, "No such file or directory", "a.txt"))
    'No such file or directory'
    """
    return getattr(error, "strerror", None) or first_line(error)


def without_credentials(text: str) -> str:
    """The text with user names, passwords and signatures taken out of the addresses in it.

    >>> without_credentials("https://me:secret@hub.test/x?X-Amz-Signature=abc: HTTP 500")
    'https://hub.test/x?...: HTTP 500'
    """
    text = re.sub(r"(\w+://)[^/\s@]*@", r"\1", text)
    return re.sub(r"(\w+://[^\s?]*)\?[^\s:]*", r"\1?...", text)


def say(name: str, message: str, kind: str = "error") -> None:
    """One line on stderr, whatever the message holds; a stderr that is gone is no reason to
    stop."""
    line = without_credentials(" ".join(message.split()))
    with contextlib.suppress(OSError, ValueError):
        print(f"{name}: {kind}: {line}", file=sys.stderr, flush=True)


def prepare_streams() -> None:
    """Let stdout and stderr take any text: what their encoding lacks is written as \\x.. or ?, so
    that a sample or a file name never ends a program (a redirected Windows console writes
    cp1252)."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell: `command >&-`
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (as long as the process)
    for stream, errors in ((sys.stdout, "replace"), (sys.stderr, "backslashreplace")):
        with contextlib.suppress(AttributeError, ValueError, OSError):
            stream.reconfigure(errors=errors)  # type: ignore[union-attr]


class _Lasting:
    """A stream whose reader may go away: what is written then is lost, and nobody fails."""

    def __init__(self, stream: Any, other: Any = None):
        """other: where a full disk is said, once."""
        self._stream, self._other = stream, other

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._lost_where_gone():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._lost_where_gone():
            self._stream.flush()

    @contextlib.contextmanager
    def _lost_where_gone(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) and self._other:
                other, self._other = self._other, None
                with contextlib.suppress(OSError, ValueError):
                    print(f"warning: standard output: {error.strerror}", file=other, flush=True)
        except (ValueError, AttributeError):
            pass

    def isatty(self) -> bool:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            return self._stream.isatty()
        return False


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """For work that must not end because nobody looks on any more: `| head`, a terminal that is
    closed, `>&-`. Its log and its files tell what is no longer shown."""
    before = sys.stdout, sys.stderr
    sys.stderr = _Lasting(sys.stderr)  # type: ignore[assignment]
    sys.stdout = _Lasting(sys.stdout, sys.stderr)  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        try:
            if sys.stdout:
                sys.stdout.flush()
        except (OSError, ValueError):
            release_stdout()


def open_standard_files() -> None:
    """Have the file descriptors 0, 1 and 2 lead somewhere: started with one of them closed (`>&-`),
    a program's next file would get its number, and whatever is printed."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free


def release_stdout() -> None:
    """Point stdout at nothing, for the flush at exit, after its reader has gone away."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _flush_stdout() -> None:
    """Have on its way what was printed. Raises OSError."""
    try:
        if sys.stdout:
            sys.stdout.flush()
    except OSError as error:
        release_stdout()  # else the interpreter's own flush ends in another status
        error.filename = "standard output"
        raise


@contextlib.contextmanager
def program(
    name: str, is_speaker: Callable[[], bool] = lambda: True, *, less_memory: str = "smaller sizes"
) -> Iterator[Outcome]:
    """The net around a program: the one place where errors become a line and an exit status.

    UserError, OSError, a missing package of EXTRAS and running out of memory: one line, status 1.
    Ctrl-C: status 130. A reader of stdout that goes away (`| head`): status 0. Everything else is a
    fault of ours and keeps its traceback. is_speaker: whether this rank says an error that all
    ranks have. less_memory: what of this program's to give when memory runs out.
    """
    outcome = Outcome()
    open_standard_files()
    prepare_streams()
    try:
        yield outcome
        _flush_stdout()
    except UserError as error:
        outcome.status = 1
        if is_speaker() or not error.on_all_ranks:
            say(name, str(error))
    except ModuleNotFoundError as error:
        if (package := (error.name or "").split(".")[0]) not in EXTRAS:
            raise
        outcome.status = 1
        say(name, not_installed(package))
    except BrokenPipeError:
        release_stdout()
    except OSError as error:
        outcome.status = 1
        say(name, first_line(error))
        with contextlib.suppress(OSError, ValueError):
            _flush_stdout()
    except MemoryError:
        outcome.status = 1
        say(name, f"out of memory; give {less_memory}")
    except KeyboardInterrupt:
        outcome.status = 130
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported here
            raise
        outcome.status = 1
        say(name, f"{str(error).split('. ')[0]}; give {less_memory}")
