"""One file from the network: whole and right, or not there at all.

    fetch(url, Path("data/hellaswag/hellaswag_val.jsonl"), size=12_246_618, sha256="0aa3b88843...")

Faults of the network are retried as pretrain/text/ranges.py has it; a body that was cut is asked
for anew.
"""

import contextlib
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from pretrain import files
from pretrain.errors import UserError, without_credentials
from pretrain.text.ranges import BLOCK, Fault, Waiting, cause
from pretrain.text.remote import attempt
from pretrain.text.source import Patience, SourceError

PATIENCE = Patience(give_up_seconds=30, rate_limit_seconds=120)


class DownloadError(UserError):
    """The file could not be had. One line for the user: which address, what is wrong."""

    def __init__(self, message: str):
        super().__init__(without_credentials(message))


def fetch(
    url: str,
    path: Path,
    *,
    size: int | None = None,
    sha256: str | None = None,
    check: Callable[[Path], str | None] = lambda path: None,
    patience: Patience | None = None,
    progress: bool = False,
) -> None:
    """Make sure that `path` is the file at `url`: of `size` bytes, with this SHA-256, and with
    nothing wrong that `check` finds (it returns what is wrong, or None).

    A good file is left alone, another one replaced. Several processes may call this at once: one
    downloads, the others wait for a lock on a file beside `path`, and fail as it fails. Raises
    DownloadError, and OSError for a folder that cannot be written to.
    """

    def problem(file: Path) -> str | None:
        if size is not None and file.stat().st_size != size:
            return f"{file.stat().st_size:,} bytes instead of {size:,}"
        if sha256 is not None and files.sha256(file) != sha256:
            return "its SHA-256 is not the expected one"
        return check(file)

    if path.is_file() and problem(path) is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    note = path.with_name(f".{path.name}.failed")
    last_failure = _read(note)
    with files.lock(path.with_name(f".{path.name}.lock"), f"{path}: is locked", wait_seconds=-1):
        if path.is_file() and problem(path) is None:  # downloaded while this process waited
            return
        failure = _read(note)
        if failure not in ("", last_failure):  # tried in vain while this process waited
            raise DownloadError(failure.partition("\n")[2])
        try:
            with files.atomic_write(path) as part:
                _download(url, part, size, patience or PATIENCE, progress)
                if wrong := problem(files.temporary_name(path)):
                    what = f"what came is not the file ({wrong}): a proxy's or a login page?"
                    raise DownloadError(f"{url}: {what}")
        except DownloadError as error:
            files.write_text(note, f"{uuid.uuid4()}\n{error}")
            raise
        note.unlink(missing_ok=True)


def _read(note: Path) -> str:
    with contextlib.suppress(OSError):
        return note.read_text(encoding="utf-8")
    return ""


def _download(
    url: str, part: IO[bytes], size: int | None, patience: Patience, progress: bool
) -> None:
    """The body at `url` into a file, begun anew after a fault until patience is at its end."""
    from tqdm import tqdm

    waiting = Waiting(url, patience)
    while True:
        part.seek(0)
        part.truncate()
        try:
            hidden = None if progress else True  # None: where there is no terminal
            bar = tqdm(total=size, unit="B", unit_scale=True, desc="downloading", disable=hidden)
            with bar:
                for block in _body(url, waiting):
                    part.write(block)
                    bar.update(len(block))
            part.flush()
            return
        except Fault as fault:
            try:
                waiting.after(fault)
            except SourceError as error:
                raise DownloadError(str(error)) from None
        except SourceError as error:
            raise DownloadError(str(error)) from None


def _body(url: str, waiting: Waiting) -> Iterator[bytes]:
    """What the address holds, in blocks. Raises Fault for what may pass, a cut body too, else
    SourceError."""
    from urllib3.exceptions import HTTPError

    response, _ = attempt(url, home=url, token=None, timeouts=waiting.timeouts())
    with contextlib.closing(response):
        expected, received = int(response.headers.get("Content-Length", -1)), 0
        while True:
            try:
                block = response.raw.read(BLOCK, decode_content=False)
            except (HTTPError, OSError) as error:
                raise Fault(cause(error)) from None
            if not block:
                break
            received += len(block)
            yield block
        if received < expected:
            raise Fault(f"the connection was closed after {received:,} of {expected:,} bytes")
