"""Object stores through fsspec and its drivers: s3://bucket/key, gs://bucket/key, az://container/key.

    for entry in listing("s3://bucket/folder"): ...     # Entry(address, size, tag), all below it
    with StoreFile("s3://bucket/a.parquet", size, patience) as file: file.read(100)
    upload(Path("shard.npy"), "s3://bucket/shard.npy")  # whole, or not there
    tag = replace("s3://bucket/manifest.json", data, tag)   # or Replaced: somebody else did

A driver does one attempt; how often, and for how long, is decided here as for the Hub. Credentials
are found by the driver, in the store's own usual places. Only `_once` and below know fsspec.
"""

import functools
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from dataclasses import replace as changed
from pathlib import Path
from typing import Any, TypeVar

from pretrain.errors import first_line
from pretrain.files import atomic_write
from pretrain.text.ranges import Body, Fault, RangeFile, Waiting, cause
from pretrain.text.source import DRIVERS, Patience, SourceError

INSTALL = "pip install -r requirements-stores.txt"
WHERE = {
    "s3fs": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, `aws configure`, or FSSPEC_S3_ANON=true "
    "for a public bucket",
    "gcsfs": "`gcloud auth application-default login`, or FSSPEC_GS_TOKEN=anon for a public bucket",
    "adlfs": "AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE_ACCOUNT_NAME with a key",
}
COPIED = 1 << 20  # bytes at a time
PIECE = 8 << 20  # bytes of a request: what a cut body can cost
ONE_REQUEST = 256 << 20  # objects up to twice as large go in one request, others in parts
SLOWEST = 1_000_000  # bytes a second of an upload that is waited for
PASSING = (408, 425, 429)  # and all from 500 on: statuses that another attempt may not get
# S3's codes of status 400 that speak of one attempt
PASSING_CODES = ("RequestTimeout", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch")

T = TypeVar("T")


class Missing(SourceError):
    """There is no such object, or no such bucket."""


class Damaged(SourceError):
    """An object is not what it should be."""


class Replaced(SourceError):
    """An object is not the one that was to be replaced."""


@dataclass(frozen=True)
class Entry:
    """An object. `tag` is another one when its content is: the store's ETag or generation, else its
    time."""

    address: str
    size: int
    tag: str | None


def require_driver(address: str) -> None:
    """Raise SourceError where the driver of a store is not installed or finds itself misled."""
    _system(address.partition("://")[0], os.getpid())


def look(address: str, patience: Patience | None = None) -> Entry:
    """What is at an address. Raises Missing, also for what is a folder; SourceError."""
    found = _retried(address, patience, lambda seconds: _once(address, seconds, "info"))
    if found.get("type") != "file":
        raise Missing(f"{address}: no such object")
    return _entry(address, found)


def listing(
    address: str, patience: Patience | None = None, depth: int | None = None
) -> list[Entry]:
    """The objects below a folder, by name; down to so many levels. Raises Missing where there is no
    such bucket, SourceError."""
    found = _retried(
        address,
        patience,
        lambda seconds: _once(address, seconds, "find", detail=True, maxdepth=depth),
    )
    scheme = address.partition("://")[0]
    entries = (
        _entry(name if "://" in name else f"{scheme}://{name}", info)
        for name, info in found.items()
        if info.get("type") == "file" and not name.endswith("/")
    )
    return sorted(entries, key=lambda entry: entry.address)


def read(address: str, patience: Patience | None = None) -> tuple[bytes, Entry]:
    """All of a small object. Raises Missing, SourceError."""
    entry = look(address, patience)
    with StoreFile(address, entry.size, patience or Patience()) as file:
        return file.read(), entry


def download(
    address: str, path: Path, patience: Patience | None = None, *, sha256: str | None = None
) -> None:
    """An object as a file, whole or not there. Raises Missing, Damaged where it has another hash,
    SourceError, OSError."""
    size, digest = look(address, patience).size, hashlib.sha256()
    with StoreFile(address, size, patience or Patience()) as file, atomic_write(path) as written:
        file.expect([(0, size)])
        while block := file.read(COPIED):
            digest.update(block)
            written.write(block)
        if sha256 and digest.hexdigest() != sha256:
            raise Damaged(f"{address}: its SHA-256 is not the expected one")


def upload(path: Path, address: str, patience: Patience | None = None) -> None:
    """A file as an object. Until all of it has arrived the store has what it had before: of an
    upload that is killed only parts remain that nobody sees. Raises SourceError, OSError."""
    size, patience = path.stat().st_size, patience or Patience()
    seconds = patience.give_up_seconds + size / SLOWEST
    patience = changed(patience, give_up_seconds=seconds)
    options: dict[str, Any] = {}
    if _driver(address) == "s3fs":  # which holds in memory what it sends at a time
        options = {"chunksize": ONE_REQUEST, "max_concurrency": 2}

    def send(_: float) -> None:
        _once(address, seconds, "put_file", before=(str(path),), **options)

    _retried(address, patience, send)
    arrived = look(address, patience).size
    if arrived != size:
        raise SourceError(f"{address}: has {arrived} bytes after {size} were sent; run it again")


def replace(
    address: str, data: bytes, tag: str | None, patience: Patience | None = None
) -> str | None:
    """Put a small object where the one with this tag is, None: where none is. Returns its tag.

    Raises Replaced where there is another one. S3 itself decides that, in the same request; other
    stores are asked just before. Raises SourceError.
    """
    on_s3 = _driver(address) == "s3fs"

    def put(seconds: float) -> None:
        condition: dict[str, Any] = {}
        if on_s3:
            condition = {"IfMatch": tag} if tag else {"IfNoneMatch": "*"}
        elif _tag_at(address, patience) != tag:
            raise Replaced(f"{address}: was replaced")
        _once(address, seconds, "pipe_file", data, **condition)

    try:
        _retried(address, patience, put)
    except Replaced:
        # An attempt whose answer was lost has put it there itself.
        try:
            there, entry = read(address, patience)
        except Missing:
            there = b""
        if there != data:
            raise
        return entry.tag
    return look(address, patience).tag


def _tag_at(address: str, patience: Patience | None) -> str | None:
    try:
        return look(address, patience).tag
    except Missing:
        return None


class StoreFile(RangeFile):
    """An object for reading by ranges."""

    def _open(self, start: int, stop: int) -> Body:
        return _Pieces(self.url, start, stop, self._waiting)


class _Pieces:
    """Bytes [at, stop) of an object, PIECE by PIECE."""

    def __init__(self, address: str, at: int, stop: int, waiting: Waiting):
        self._address, self._at, self._stop, self._waiting = address, at, stop, waiting
        self._piece = memoryview(b"")

    def read(self, n: int) -> bytes:
        if not self._piece:
            stop = min(self._stop, self._at + PIECE)
            seconds = self._waiting.patience.give_up_seconds / 2
            piece = _once(self._address, seconds, "cat_file", start=self._at, end=stop)
            if len(piece) != stop - self._at:
                raise Fault("the connection was closed early")
            self._at, self._piece = stop, memoryview(piece)
        block, self._piece = self._piece[:n], self._piece[n:]
        return bytes(block)

    def release(self) -> None:
        self.close()

    def close(self) -> None:
        self._piece = memoryview(b"")


# ---- one attempt


def _retried(address: str, patience: Patience | None, attempt: Callable[[float], T]) -> T:
    """What `attempt(seconds)` returns, after as many as patience allows."""
    waiting = Waiting(address, patience or Patience())
    while True:
        try:
            return attempt(waiting.patience.give_up_seconds / 2)
        except Fault as fault:
            waiting.after(fault)


def _once(
    address: str, seconds: float, method: str, *args: Any, before: tuple = (), **options: Any
) -> Any:
    """Have the driver do something at an address, once. Raises Fault for what may pass, SourceError
    for what will not."""
    from fsspec.asyn import sync

    system = _system(address.partition("://")[0], os.getpid())
    path = system._strip_protocol(address)
    function = getattr(system, f"_{method}")
    try:
        return sync(system.loop, function, *before, path, *args, timeout=seconds, **options)
    except Exception as error:
        if type(error).__module__ == "builtins" and not isinstance(error, OSError):
            raise  # a fault of ours
        raise _fault(address, error) from None


@functools.lru_cache(maxsize=8)
def _system(scheme: str, pid: int) -> Any:
    """fsspec's view of a store: of this process, as a forked child has not its parent's threads."""
    import fsspec

    driver, patience = DRIVERS.get(scheme, "aiohttp"), Patience()
    options: dict[str, Any] = {}
    if driver == "s3fs":
        options["config_kwargs"] = {
            "connect_timeout": patience.connect_seconds,
            "read_timeout": patience.read_seconds,
            "retries": {"max_attempts": 0},  # attempts are counted here
        }
    try:
        system = fsspec.filesystem(
            scheme, use_listings_cache=False, skip_instance_cache=True, **options
        )
    except ImportError:
        raise SourceError(
            f"{scheme}://: its driver is not installed; {INSTALL}, or pip install {driver}"
        ) from None
    except Exception as error:
        where = WHERE.get(driver, "its credentials")
        raise SourceError(f"{scheme}://: {first_line(error)}; set {where}") from None
    if driver == "s3fs":
        system.retries = 1
    return system


def _driver(address: str) -> str:
    return DRIVERS[address.partition("://")[0]]


def _entry(address: str, info: dict) -> Entry:
    names = ("ETag", "etag", "generation", "LastModified", "last_modified", "updated", "mtime")
    tag = next((str(info[name]) for name in names if info.get(name)), None)
    return Entry(address, int(info.get("size") or 0), tag)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what caused it: drivers translate those of their clients."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException, on_s3: bool) -> tuple[int | None, str]:
    """(HTTP status, the store's own code of the error) as far as a driver tells."""
    for each in _chain(error):
        response = getattr(each, "response", None)
        if isinstance(response, dict):  # botocore's
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            code = str(response.get("Error", {}).get("Code", ""))
            return status or (int(code) if code.isdigit() else None), code
        # gcsfs', azure's; beneath s3fs it is what aiohttp thinks of an answer that it cannot read
        for name in () if on_s3 else ("status", "status_code", "code"):
            if str(value := getattr(each, name, None)).isdigit():
                return int(str(value)), ""
    return None, ""


def _fault(address: str, error: Exception) -> Exception:
    """What an exception of a driver means: Fault or SourceError."""
    driver = DRIVERS.get(address.partition("://")[0], "")
    status, code = _status(error, driver == "s3fs")
    names = " ".join(type(each).__name__ for each in _chain(error))
    said = re.sub(r"^\[Errno \d+\] ", "", " ".join(str(error).split()))[:200].rstrip(".")
    if status == 412 or isinstance(error, FileExistsError):
        return Replaced(f"{address}: was replaced")
    if isinstance(error, FileNotFoundError):
        return Missing(f"{address}: no such object, or no such bucket")
    if isinstance(error, PermissionError) or status in (401, 403) or "Credential" in names:
        where = f"; its credentials come from {WHERE[driver]}" if driver else ""
        return SourceError(f"{address}: not permitted ({said}){where}")
    if status == 416:
        return SourceError(f"{address}: is shorter than when the run began; start again")
    if "Timeout" in names:
        return Fault("no answer in time")
    if any(word in names for word in ("ConnectionClosed", "Payload", "IncompleteRead")):
        return Fault("the connection was closed early")
    if status is None and not ("Validation" in names or "ProfileNotFound" in names):
        return Fault(cause(error))
    if status is not None and (status in PASSING or status >= 500 or code in PASSING_CODES):
        return Fault(f"HTTP {status} {code if not code.isdigit() else ''}".rstrip())
    return SourceError(f"{address}: {said}")
