"""The stored bytes of a source's files: opened, watched for changes, decompressed.

    with open_file(file, patience) as stored:
        stream = decompressed(stored, file)     # read(n) gives n bytes, fewer only at the end
    check_unchanged(file)

What the system refuses is said in its own words; what changed while it was read ends the reading.
"""

import functools
import os
import stat
import zlib
from typing import Any

from pretrain.text.source import DRIVERS, File, Patience, SourceError

CHUNK = 1 << 16  # stored bytes of a .gz file that are decompressed at a time
LARGEST_FREELY = 1 << 24  # bytes that a file may inflate to, however small it is
LARGEST_RATIO = 200  # bytes from each stored one beyond that
HEAD = 1 << 10  # bytes from which foreign files are recognized


def open_file(file: File, patience: Patience) -> Any:
    """The stored bytes, for reading and seeking, by this code and by pyarrow. Raises
    SourceError."""
    check_unchanged(file, "since the run began", patience)
    if file.url:
        return _open_elsewhere(file, file.url, patience)
    try:
        return open(file.path, "rb", buffering=0)
    except OSError as error:
        raise SourceError(f"{file.path}: {error.strerror or error}") from None


def _open_elsewhere(file: File, url: str, patience: Patience) -> Any:
    from pretrain.text import remote, stores

    if is_stored(url):
        return stores.StoreFile(url, file.size, patience)
    if file.path.startswith("http"):  # a server's answers have the tag, the Hub's a commit
        return remote.RemoteFile(url, file.size, patience, file.tag, remote.is_hub(url))
    return remote.RemoteFile(url, file.size, patience)


def is_stored(url: str | None) -> bool:
    """Whether an address is of an object store."""
    return (url or "").partition("://")[0] in DRIVERS


def check_unchanged(
    file: File, when: str = "while it was read", patience: Patience | None = None
) -> None:
    """Raise SourceError if a file on this machine or in a store is not as it was when the source
    was made: documents of two versions would mix."""
    if file.url:
        if is_stored(file.url):
            _check_object(file, when, patience)
        return
    try:
        now = os.stat(file.path)
    except OSError as error:
        raise SourceError(f"{file.path}: {error.strerror or error}") from None
    if not stat.S_ISREG(now.st_mode):  # opening a FIFO would wait for ever
        raise SourceError(f"{file.path}: is no longer a file")
    if now.st_size != file.size:
        what = f"has {now.st_size} bytes, and had {file.size} when the run began"
        raise SourceError(f"{file.path}: changed its size {when} ({what}); start again")
    if file.mtime_ns is not None and now.st_mtime_ns != file.mtime_ns:
        raise SourceError(f"{file.path}: was written to {when}; start again")


def _check_object(file: File, when: str, patience: Patience | None) -> None:
    from pretrain.text.stores import look

    now = look(file.path, patience)
    if (now.size, now.tag or "") != (file.size, file.tag):
        raise SourceError(f"{file.path}: was written to {when}; start again")


@functools.lru_cache(maxsize=64)
def head(file: File, patience: Patience) -> bytes:
    """The first bytes of a file as stored."""
    with open_file(file, patience) as stored:
        return stored.read(min(HEAD, file.size))


def decompressed(stored: Any, file: File) -> Any:
    """What a compressed file holds. Damage in it raises OSError when it is met, and a size that
    text does not inflate to SourceError."""
    import pyarrow as pa

    if file.size == 0:
        raise OSError("no bytes in it")
    stream = (
        GzipStream(stored)
        if file.compression == "gzip"
        else pa.CompressedInputStream(stored, file.compression)
    )
    return Inflated(stream, stored, file)


class Inflated:
    """A decompressed stream that ends where a small file becomes a large one: gzip can make a
    thousand bytes of one, zstd ten thousand, and text, even repetitive, some tens."""

    def __init__(self, stream: Any, stored: Any, file: File):
        self._stream, self._stored, self._file = stream, stored, file
        self._size = 0

    def read(self, n: int) -> bytes:
        """n bytes, fewer only at the end. Raises OSError, SourceError."""
        data = self._stream.read(n)
        self._size += len(data)
        if self._size > LARGEST_FREELY and self._size > LARGEST_RATIO * self._stored.tell():
            unpack = "gzip -d" if self._file.compression == "gzip" else "zstd -d"
            raise SourceError(
                f"{self._file.path}: inflates to more than {LARGEST_RATIO} times its size, as no"
                f" text does; if it is meant so, decompress it first ({unpack})"
            )
        return data


class GzipStream:
    """The members of a gzip file one after the other, as gzip reads them: zeros behind a member
    are padding (of tapes, of block devices), which Arrow's decoder takes for damage."""

    def __init__(self, stored: Any):
        self._stored = stored
        self._input = b""
        self._member: Any = zlib.decompressobj(wbits=31)  # None between members

    def read(self, n: int) -> bytes:
        """n bytes, fewer only at the end. Raises OSError for damage and for a member cut short."""
        pieces, wanted = [], n
        while wanted and (piece := self._piece(wanted)):
            pieces.append(piece)
            wanted -= len(piece)
        return b"".join(pieces)

    def _piece(self, limit: int) -> bytes:
        """1 to `limit` bytes, none at the end."""
        while True:
            self._input = self._input or self._stored.read(CHUNK)
            at_end = not self._input
            if self._member is None:
                if at_end:
                    return b""
                self._input = self._input.lstrip(b"\0")
                if not self._input:
                    continue
                self._member = zlib.decompressobj(wbits=31)
            try:
                piece = self._member.decompress(self._input, limit)
            except zlib.error as error:
                raise OSError(str(error)) from None
            if self._member.eof:
                self._input, self._member = self._member.unused_data, None
            else:
                self._input = self._member.unconsumed_tail
                if at_end and not piece:
                    raise OSError("it ends in the middle of its compressed data")
            if piece:
                return piece
