"""Text files as Arrow batches of documents.

The documents are the bytes between separator lines, which are exactly `<|endoftext|>` with LF or
CR LF: all those bytes, line breaks included, and the whole file where there is no such line. What
has only white space in it is no document, and what has more than LARGEST_TEXT bytes is refused. A
byte order mark that begins a file is not part of its text.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from pretrain.text import arrow
from pretrain.text.readers.blocks import BOM, place_of, plan_bytes, unit_blocks
from pretrain.text.source import Batch, File, Report, Source, Unit

BATCH_BYTES = 8 << 20  # text in a batch, unless a single document has more
LARGEST_TEXT = 1 << 30  # bytes of a document
SEPARATOR = b"<|endoftext|>"
REACH = len(BOM + SEPARATOR) + 2  # bytes of the longest separator line, one that begins the file

plan = plan_bytes


def place(file: File, unit: Unit, row: int, offset: int | None) -> str:
    return place_of(file, unit, row, offset, "document")


def read(
    source: Source, unit: Unit, stored: Any, *, skip_rows: int, report: Report
) -> Iterator[Batch]:
    """The documents that begin in the unit, without the first `skip_rows` of them."""
    stop = None if source.files[unit.file].compression else unit.stop
    blocks = unit_blocks(source, unit, stored, before=REACH)
    pending: list[Part] = []
    size = 0
    for row, (offset, text) in enumerate(_parts(blocks, unit.start, stop)):
        if row < skip_rows:
            continue
        pending.append((row, offset, text))
        size += len(text or b"")
        if size >= BATCH_BYTES:
            yield _batch(pending, stop is not None, report)
            pending, size = [], 0
    if pending:
        yield _batch(pending, stop is not None, report)


Part = tuple[int, int, bytes | None]  # (row, offset, text), None for one that is too long


def _batch(parts: list[Part], seekable: bool, report: Report) -> Batch:
    good = [(row, at, text) for row, at, text in parts if text and not text.isspace()]
    bad: list[Part] = [part for part in parts if part[2] is None]
    try:
        texts = arrow.strings([text for *_, text in good])
    except pa.ArrowInvalid:
        bad += [part for part in good if arrow.utf8_problem(part[2])]
        good = [part for part in good if not arrow.utf8_problem(part[2])]
        texts = arrow.strings([text for *_, text in good])
    bad.sort(key=lambda part: part[0])
    for row, offset, text in bad:
        report(row, offset if seekable else None, _problem(text))
    rows = np.array([row for row, *_ in good], np.int64)
    offsets = np.array([at for _, at, _ in good], np.int64) if seekable else None
    left_out = np.array([row for row, *_ in bad], np.int64)
    skipped = {"empty": np.array([], np.int64), "bad": left_out}
    return Batch(texts, rows, len(parts), skipped, None, offsets)


def _problem(text: bytes | None) -> str:
    if text is None:
        way_out = f"separate its documents by lines {SEPARATOR.decode()}"
        return f"a document of more than {LARGEST_TEXT:,} bytes; {way_out}"
    return arrow.utf8_problem(text) or ""


def _parts(
    blocks: Iterator[bytes], start: int, stop: int | None
) -> Iterator[tuple[int, bytes | None]]:
    """(offset, bytes) of the parts between separator lines that begin in bytes [start, stop); None
    for one above LARGEST_TEXT. blocks: from REACH bytes before `start` on."""
    base = max(0, start - REACH)  # where buffer[0] lies in the file
    buffer, scanned = bytearray(), 0
    begin = 0 if start == 0 else None  # of the part that is being read, None: not found yet
    for block in _then_empty(blocks):
        buffer += block
        while found := _find_separator(buffer, scanned, base, end_of_file=not block):
            if begin is not None:
                yield begin, _part(buffer, base, begin, base + found[0])
            scanned = found[1]
            begin = base + scanned if base + scanned >= start else None
            if stop is not None and base + scanned >= stop:
                return
        scanned = max(scanned, len(buffer) - REACH)
        if begin is not None and base + scanned - begin > LARGEST_TEXT:
            yield begin, None
            begin = None
        if begin is None and stop is not None and base + scanned >= stop:
            return
        needed = max(0, (scanned if begin is None else min(begin - base, scanned)) - 1)
        del buffer[:needed]
        base, scanned = base + needed, scanned - needed
    if begin is not None and begin < base + len(buffer):
        yield begin, _part(buffer, base, begin, base + len(buffer))


def _then_empty(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """The blocks, and an empty one for the end of the file."""
    yield from blocks
    yield b""


def _find_separator(
    buffer: bytearray, scan: int, base: int, *, end_of_file: bool
) -> tuple[int, int] | None:
    """Where in the buffer the next separator line begins and ends, None if there is no complete
    one."""
    while (at := buffer.find(SEPARATOR, scan)) >= 0:
        scan = at + 1
        stop = at + len(SEPARATOR)
        after = buffer[stop : stop + 2]
        if after[:1] == b"\n" or after == b"\r\n":
            stop = buffer.index(b"\n", stop) + 1
        elif end_of_file and after in (b"", b"\r"):
            stop = len(buffer)
        else:
            continue
        if at > 0 and buffer[at - 1] == 0x0A:
            return at, stop
        if base == 0 and buffer[:at] in (b"", BOM):
            return 0, stop
    return None


def _part(buffer: bytearray, base: int, begin: int, end: int) -> bytes | None:
    if end - begin > LARGEST_TEXT:
        return None
    with memoryview(buffer) as view:
        text = view[begin - base : end - base].tobytes()
    return text.removeprefix(BOM) if begin == 0 else text
