"""JSON lines and text files as Arrow batches of documents.

A unit is a byte range of a plain file: the documents that begin in it, wherever they end.
Compressed streams are read from their beginning (`stop` is None). A few BATCH_BYTES are kept in
memory unless one document is larger.

A JSON line means what `json.loads(line)[column]` gives. A text file's documents are the bytes
between its separator lines, which are exactly `<|endoftext|>` with LF or CR LF: all those bytes,
line breaks included, and the whole file where there is no such line. What has only white space in
it is no document. A byte order mark at the beginning of a file is not part of its text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.json

from pretrain.text import arrow
from pretrain.text.readers.parquet import BATCH_BYTES, Report, utf8_problem
from pretrain.text.source import Batch

BLOCK = 4 << 20  # bytes read at a time
OVERRUN = (
    1 << 16
)  # the same beyond the end of a unit, where only the rest of its last document is wanted
BOM = b"\xef\xbb\xbf"
SEPARATOR = b"<|endoftext|>"
REACH = len(BOM + SEPARATOR) + 2  # bytes of the longest separator line, one that begins the file


def _blocks(file, start: int, stop: int | None) -> Iterator[bytes]:
    """The bytes from `start` to the end of the file, in small pieces beyond `stop`."""
    if stop is None:
        while block := file.read(BLOCK):
            yield block
        return
    if hasattr(file, "expect"):
        file.expect([(start, stop)])
    file.seek(start)
    while block := file.read(min(BLOCK, stop - start) if start < stop else OVERRUN):
        start += len(block)
        yield block


# ---- JSON lines


def read_jsonl(
    file, start: int, stop: int | None, *, column: str, skip_rows: int, report: Report
) -> Iterator[Batch]:
    """The lines that begin in bytes [start, stop), without the first `skip_rows` of them."""
    row = 0
    for begin, block in _line_blocks(file, start, stop):
        lines = block.split(b"\n")
        if not lines[-1]:
            lines.pop()
        offsets = begin + np.cumsum([0, *(len(line) + 1 for line in lines[:-1])])
        skip = max(0, skip_rows - row)
        rows = np.arange(row, row + len(lines))
        row += len(lines)
        if begin == 0:
            lines[0], block = lines[0].removeprefix(BOM), block.removeprefix(BOM)
        if skip:
            lines, rows, offsets = lines[skip:], rows[skip:], offsets[skip:]
            block = b"\n".join(lines)
        if lines:
            known = offsets if stop is not None else None
            yield _jsonl_batch(block, lines, rows, known, column=column, report=report)


def _line_blocks(file, start: int, stop: int | None) -> Iterator[tuple[int, bytes]]:
    """(offset, whole lines) of the lines that begin in bytes [start, stop), about BLOCK bytes at a
    time."""
    at = max(0, start - 1)  # one byte before: if it is a line feed, a line begins at `start`
    blocks = _blocks(file, at, stop)
    begin = 0 if start == 0 else None  # where the pending lines begin, None: not found yet
    pending: list[bytes] = []
    for block in blocks:
        at += len(block)
        if begin is None:
            feed = block.find(b"\n")
            if feed < 0:
                if stop is not None and at >= stop:
                    return
                continue
            begin, block = at - len(block) + feed + 1, block[feed + 1 :]
        if stop is not None and begin >= stop:
            return
        # the unit's last line is the one whose line feed is the first from byte stop - 1 on
        last = stop is not None and at >= stop
        feed = (
            block.find(b"\n", max(0, stop - 1 - (at - len(block)))) if last else block.rfind(b"\n")
        )
        if feed < 0:
            pending.append(block)
            continue
        lines = b"".join([*pending, block[: feed + 1]])
        yield begin, lines
        if last:
            return
        begin, pending = begin + len(lines), [block[feed + 1 :]]
    if rest := b"".join(pending):
        yield begin, rest


def _jsonl_batch(
    block: bytes,
    lines: list[bytes],
    rows: np.ndarray,
    offsets: np.ndarray | None,
    *,
    column: str,
    report: Report,
) -> Batch:
    texts = parse_lines_fast(block, lines, column)
    if texts is not None:
        keep = arrow.lengths(texts) > 0
        empty, bad = np.flatnonzero(~keep), []
        if len(empty):
            texts = arrow.select(texts, keep)
    else:
        kept, empty, bad, texts = [], [], [], []
        for i, line in enumerate(lines):
            try:
                text = parse_line(line, column)
            except ValueError as e:
                report(int(rows[i]), None if offsets is None else int(offsets[i]), str(e))
                bad.append(i)
                continue
            if text:
                kept.append(i)
                texts.append(text.encode())
            elif text is not None:
                empty.append(i)
        keep, texts = np.array(kept, np.int64), arrow.strings(texts)
    skipped = {"empty": rows[np.array(empty, np.int64)], "bad": rows[np.array(bad, np.int64)]}
    return Batch(
        texts, rows[keep], len(lines), skipped, None, None if offsets is None else offsets[keep]
    )


def parse_lines_fast(block: bytes, lines: list[bytes], column: str) -> pa.Array | None:
    """The texts of a block's lines by pyarrow, or None where it might see something else than
    json.loads.

    pyarrow reads values and does not care for lines; but lines that each begin with a brace and end
    with one are one value each if there are as many lines as values. It does not check the UTF-8 of
    columns that it leaves out, and does not tell null from a key that is missing.
    """
    one_each = all(line[:1] == b"{" and line.rstrip(b" \t\r")[-1:] == b"}" for line in lines)
    if not one_each or len(block) > 1 << 30:
        return None
    schema = pa.schema([(column, pa.string())])
    parse = pa.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    read = pa.json.ReadOptions(use_threads=False, block_size=len(block) + 1)
    try:
        arrow.strings([block])
        texts = pa.json.read_json(pa.BufferReader(block), read, parse).column(0).combine_chunks()
        texts.validate(full=True)
    except (pa.ArrowException, UnicodeError):
        return None
    return texts if len(texts) == len(lines) and texts.null_count == 0 else None


# Numbers are never text: that they are not converted also avoids int()'s limit on digits.
_DECODER = json.JSONDecoder(parse_int=len, parse_float=len, parse_constant=len)


def parse_line(line: bytes, column: str) -> str | None:
    """The text of a line of JSON, "" for null, None for a blank line. Raises ValueError for a bad
    one."""
    if not line.strip():
        return None
    try:
        value = _DECODER.decode(line.decode())
    except UnicodeDecodeError as e:
        raise ValueError(
            f"invalid UTF-8 at byte {e.start} of the line (0x{line[e.start]:02x})"
        ) from None
    except json.JSONDecodeError as e:
        what = f"{e.msg}: character {e.pos + 1} of the line"
        raise ValueError(f"not JSON ({what}){_array_hint(line)}") from None
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"not a JSON object{_array_hint(line)}")
    if column not in value:
        keys = ", ".join(list(value)[:20]) or "none"
        raise ValueError(f"no key {column!r}; choose --text_column from {keys}")
    text = value[column]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise ValueError(f"{column!r} is not a string")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{column!r} has half of a surrogate pair in it, which is no character"
        ) from None
    return text


def _array_hint(line: bytes) -> str:
    return (
        "; an array has to be rewritten as one object a line" if line.lstrip()[:1] == b"[" else ""
    )


# ---- text


def read_txt(
    file, start: int, stop: int | None, *, skip_rows: int, report: Report
) -> Iterator[Batch]:
    """The documents that begin in bytes [start, stop), without the first `skip_rows` of them."""
    pending: list[tuple[int, int, bytes]] = []  # (row, offset, text)
    size = 0
    for row, (offset, text) in enumerate(_parts(file, start, stop)):
        if row < skip_rows:
            continue
        pending.append((row, offset, text))
        size += len(text)
        if size >= BATCH_BYTES:
            yield _txt_batch(pending, stop is not None, report)
            pending, size = [], 0
    if pending:
        yield _txt_batch(pending, stop is not None, report)


def _txt_batch(parts: list[tuple[int, int, bytes]], seekable: bool, report: Report) -> Batch:
    num_rows, bad = len(parts), []
    parts = [part for part in parts if part[2] and not part[2].isspace()]
    try:
        texts = _strings(parts)
    except pa.ArrowInvalid:
        good = []
        for row, offset, text in parts:
            if what := utf8_problem(text):
                report(row, offset if seekable else None, what)
                bad.append(row)
            else:
                good.append((row, offset, text))
        parts, texts = good, _strings(good)
    rows = np.array([row for row, *_ in parts], np.int64)
    offsets = np.array([offset for _, offset, _ in parts], np.int64) if seekable else None
    skipped = {"empty": np.array([], np.int64), "bad": np.array(bad, np.int64)}
    return Batch(texts, rows, num_rows, skipped, None, offsets)


def _strings(parts: list[tuple[int, int, bytes]]) -> pa.Array:
    """Raises ArrowInvalid where one is not UTF-8."""
    return arrow.strings([text for *_, text in parts])


def _parts(file, start: int, stop: int | None) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes) of the parts between separator lines that begin in bytes [start, stop)."""
    base = max(0, start - REACH)  # where buffer[0] lies in the file
    buffer, scanned = bytearray(), 0
    begin = 0 if start == 0 else None  # of the part that is being read, None: not found yet
    for block in _then_empty(_blocks(file, base, stop)):
        buffer += block
        while found := _find_separator(buffer, scanned, base, end_of_file=not block):
            if begin is not None:
                yield begin, _part(buffer, base, begin, base + found[0])
            scanned = found[1]
            begin = base + scanned if base + scanned >= start else None
            if stop is not None and base + scanned >= stop:
                return
        scanned = max(scanned, len(buffer) - REACH)
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


def _part(buffer: bytearray, base: int, begin: int, end: int) -> bytes:
    with memoryview(buffer) as view:
        text = view[begin - base : end - base].tobytes()
    return text.removeprefix(BOM) if begin == 0 else text
