"""What the formats of text have in common: units of bytes, read in blocks, and lines for people.

A unit is a byte range of a plain file: the documents that begin in it, wherever they end. A
compressed file can only be read from its beginning, so it is one unit. Files that are whole but
something else (an archive, UTF-16) are recognized by their first bytes.
"""

from collections.abc import Iterator
from typing import Any

from pretrain.text import stored as stores
from pretrain.text.foreign import foreign
from pretrain.text.source import File, Position, Source, Unit, UnreadableFile

BLOCK = 4 << 20  # bytes read at a time
# the same beyond the end of a unit, where only the rest of its last document is wanted
OVERRUN = 1 << 16
BOM = b"\xef\xbb\xbf"


def plan_bytes(source: Source, index: int, unit_bytes: int, start: Position) -> Iterator[Unit]:
    """Units of a file of text from `start` on. Raises UnreadableFile for a foreign file."""
    file = source.files[index]
    refuse_foreign(source, file)
    if file.compression:
        yield Unit(index, 0, file.size, 0, file.size)
        return
    at = start.offset or 0
    first_row: int | None = start.row
    while at < file.size:
        stop = min(file.size, at + unit_bytes)
        yield Unit(index, at, stop, first_row, stop - at)
        at, first_row = stop, None


def refuse_foreign(source: Source, file: File) -> None:
    """Raise UnreadableFile for a file that is not what its name says."""
    if what := foreign(stores.head(file, source.patience), file.kind, file.compression):
        raise UnreadableFile(f"{file.path}: {what}")


def unit_blocks(source: Source, unit: Unit, stored: Any, before: int) -> Iterator[bytes]:
    """The bytes of a plain file from `before` bytes before the unit on, to the end of the file if
    need be; all that a compressed file holds. Raises UnreadableFile for a foreign file."""
    file = source.files[unit.file]
    refuse_foreign(source, file)
    if not file.compression:
        yield from read_blocks(stored, max(0, unit.start - before), unit.stop)
        return
    blocks = read_blocks(stores.decompressed(stored, file), 0, None)
    first = next(blocks, b"")
    if what := foreign(first[: stores.HEAD], file.kind, None):
        raise UnreadableFile(f"{file.path}: what is compressed in it {what}")
    if first:
        yield first
        yield from blocks


def read_blocks(stream: Any, start: int, stop: int | None) -> Iterator[bytes]:
    """The bytes from `start` to the end of the stream, in small pieces beyond `stop`."""
    if stop is None:
        while block := stream.read(BLOCK):
            yield block
        return
    if hasattr(stream, "expect"):
        stream.expect([(start, stop)])
    stream.seek(start)
    while block := stream.read(min(BLOCK, stop - start) if start < stop else OVERRUN):
        start += len(block)
        yield block


def place_of(file: File, unit: Unit, row: int, offset: int | None, noun: str) -> str:
    """Where a document is, for people: "a.jsonl, line 17". Lines count from 1."""
    if offset is not None and not file.url:
        with open(file.path, "rb") as stored:
            feeds = sum(
                stored.read(min(1 << 20, offset - at)).count(b"\n")
                for at in range(0, offset, 1 << 20)
            )
        return f"{file.path}, line {feeds + 1}"
    if unit.first_row is not None:
        return f"{file.path}, {noun} {unit.first_row + row + 1}"
    return f"{file.path}, byte {offset}"
