"""JSON lines as Arrow batches of documents.

A line means what `json.loads(line)[column]` gives, whatever stands beside it: the last of equal
keys counts, NaN and Infinity are numbers. Lines longer than LARGEST_LINE bytes and values nested
deeper than DEEPEST are refused: without such limits a small compressed file takes all memory, and
how deep json goes would depend on who calls it. A byte order mark that begins a file is not part of
its text.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.json

from pretrain.text import arrow
from pretrain.text.readers.blocks import BOM, place_of, plan_bytes, unit_blocks
from pretrain.text.source import Batch, File, Report, Source, Unit

LARGEST_LINE = 1 << 27  # bytes; parsing takes up to twelve times as much memory
DEEPEST = 500  # lists and objects in each other; json itself ends at 1000 less its callers

plan = plan_bytes


def place(file: File, unit: Unit, row: int, offset: int | None) -> str:
    return place_of(file, unit, row, offset, "line")


def read(
    source: Source, unit: Unit, stored: Any, *, skip_rows: int, report: Report
) -> Iterator[Batch]:
    """The lines that begin in the unit, without the first `skip_rows` of them."""
    file = source.files[unit.file]
    stop = None if file.compression else unit.stop
    blocks = unit_blocks(source, unit, stored, before=1)
    row = 0
    for begin, block in line_blocks(blocks, unit.start, stop):
        starts, stops = _lines(block)
        skip = max(0, skip_rows - row)
        rows, row = row + np.arange(len(starts)), row + len(starts)
        count = len(starts) - skip
        if count <= 0:
            continue
        kept = np.flatnonzero(_is_filled(block, starts, stops)[skip:]) + skip
        mark = len(BOM) if begin == 0 and block.startswith(BOM) else 0
        lines = [block[max(mark, i) : j] for i, j in zip(starts[kept], stops[kept], strict=True)]
        known = begin + starts[kept] if stop is not None else None
        block = block[mark:] if len(kept) == len(starts) else b"\n".join(lines)
        column = source.column_of(file)
        yield _batch(block, lines, rows[kept], known, count=count, column=column, report=report)


def _lines(block: bytes) -> tuple[np.ndarray, np.ndarray]:
    """(where each line begins, where it ends) in a block, line feeds left out; int64. Millions of
    lines with nothing in them cost as little as others of their size."""
    stops = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n"))
    if not block.endswith(b"\n"):
        stops = np.append(stops, len(block))
    return np.concatenate([[0], stops[:-1] + 1]).astype(np.int64), stops


# What bytes.strip() takes for blank, by value; the line feed that ends a line among them.
FILLED = np.ones(256, bool)
FILLED[list(b" \t\n\r\v\f")] = False
SHORT_LINE = 16  # bytes: no documents are so short on average


def _is_filled(block: bytes, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """For each line, bool, whether anything may be in it. Blank lines, by the million in a file
    that is made of them, are told without looking at each; a few among documents are found
    later."""
    if len(block) > SHORT_LINE * len(starts):
        return starts < stops
    return np.logical_or.reduceat(FILLED[np.frombuffer(block, np.uint8)], starts)


def line_blocks(
    blocks: Iterator[bytes], start: int, stop: int | None
) -> Iterator[tuple[int, bytes]]:
    """(offset, whole lines) of the lines that begin in bytes [start, stop), about a block at a
    time. Of a line above LARGEST_LINE there is as much as shows that it is one.

    blocks: from one byte before `start` on: if that is a line feed, a line begins at `start`.
    """
    at = max(0, start - 1)
    begin = 0 if start == 0 else None  # where the pending lines begin, None: not found yet
    pending: list[bytes] = []  # pieces of one line
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
        feed = block.find(b"\n", max(0, stop - 1 - (at - len(block)))) if last and stop else -1
        complete = feed >= 0
        feed = feed if complete else block.rfind(b"\n")
        pending.append(block[: feed + 1] if feed >= 0 else block)
        if feed >= 0:
            lines = b"".join(pending)
            pending = []
            yield begin, lines
            if complete:
                return
            begin += len(lines)
            pending = [block[feed + 1 :]]
        elif sum(map(len, pending)) > LARGEST_LINE:
            yield begin, b"".join(pending)[: LARGEST_LINE + len(BOM) + 1]
            begin, pending = None, []
    if rest := b"".join(pending):
        assert begin is not None
        yield begin, rest


def _batch(
    block: bytes,
    lines: list[bytes],
    rows: np.ndarray,
    offsets: np.ndarray | None,
    *,
    count: int,
    column: str,
    report: Report,
) -> Batch:
    """The documents of these lines, out of `count` that the block has."""
    texts = parse_lines_fast(block, lines, column)
    bad: list[int] = []
    if texts is not None:
        keep = np.flatnonzero(arrow.lengths(texts) > 0)
        empty = np.setdiff1d(np.arange(len(lines)), keep)
        if len(empty):
            texts = arrow.select(texts, arrow.lengths(texts) > 0)
    else:
        found: dict[int, bytes] = {}  # by line, blank lines left out
        for i, line in enumerate(lines):
            try:
                text = parse_line(line, column)
            except ValueError as error:
                report(int(rows[i]), None if offsets is None else int(offsets[i]), str(error))
                bad.append(i)
                continue
            if text is not None:
                found[i] = text.encode()
        keep = np.array([i for i, text in found.items() if text], np.int64)
        empty = np.array([i for i, text in found.items() if not text], np.int64)
        texts = arrow.strings([text for text in found.values() if text])
    skipped = {"empty": rows[empty], "bad": rows[np.array(bad, np.int64)]}
    begins = None if offsets is None else offsets[keep]
    return Batch(texts, rows[keep], count, skipped, None, begins)


# What pyarrow takes for a number and json does not (-NaN, Inf) ends like this; so does some prose.
NOT_FINITE = re.compile(rb"Inf(?:inity)?[ \t\r]*[,\]}]|NaN[ \t\r]*[,\]}]")


def parse_lines_fast(block: bytes, lines: list[bytes], column: str) -> pa.Array | None:
    """The texts of a block's lines by pyarrow, or None where it might see something else than
    parse_line.

    pyarrow reads values and does not care for lines; but lines that each begin with a brace and end
    with one are one value each if there are as many lines as values: no value can go on behind a
    line that ends with a brace when the next one begins with a brace. Its grammar is json's but for
    numbers that are not finite; it has no limit of depth, refuses lone surrogates and equal keys,
    does not check the UTF-8 of columns that it leaves out, and does not tell null from a key that
    is missing.
    """
    one_each = all(line[:1] == b"{" and line.rstrip(b" \t\r")[-1:] == b"}" for line in lines)
    if not one_each or len(block) > 1 << 24 or NOT_FINITE.search(block):
        return None
    if any(len(line) > LARGEST_LINE or is_too_deep(line) for line in lines):
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


BRACKETS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[{]|[\]}]', re.DOTALL)


def is_too_deep(line: bytes) -> bool:
    """Whether lists and objects are in each other more than DEEPEST times."""
    if line.count(b"[") + line.count(b"{") <= DEEPEST:
        return False
    depth = 0
    for match in BRACKETS.finditer(line):  # strings are passed over
        first = line[match.start()]
        depth += (first in b"[{") - (first in b"]}")
        if depth > DEEPEST:
            return True
    return False


# Numbers are never text: that they are not converted also avoids int()'s limit on digits.
_DECODER = json.JSONDecoder(parse_int=len, parse_float=len, parse_constant=len)


def parse_line(line: bytes, column: str) -> str | None:
    """The text of a line of JSON, "" for null, None for a blank line. Raises ValueError for a bad
    one."""
    if len(line) > LARGEST_LINE:
        raise ValueError(f"a line of more than {LARGEST_LINE:,} bytes, which is too long")
    if not line.strip():
        return None
    if is_too_deep(line):
        raise ValueError(f"JSON that is nested more than {DEEPEST} deep")
    value = _decode(line)
    if not isinstance(value, dict):
        raise ValueError(f"not a JSON object{_array_hint(line)}")
    if column not in value:
        keys = ", ".join(key[:80] for key in list(value)[:20]) or "none"
        raise ValueError(f"no key {column!r}; choose --text_column from {keys}")
    text = value[column]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise ValueError(f"{column!r} is not a string")
    try:
        text.encode()
    except UnicodeEncodeError:
        what = "half of a surrogate pair in it, which is no character"
        raise ValueError(f"{column!r} has {what}") from None
    return text


def _decode(line: bytes) -> Any:
    try:
        return _DECODER.decode(line.decode())
    except UnicodeDecodeError as error:
        byte = f"byte {error.start} of the line (0x{line[error.start]:02x})"
        raise ValueError(f"invalid UTF-8 at {byte}") from None
    except json.JSONDecodeError as error:
        what = f"{error.msg}: character {error.pos + 1} of the line"
        raise ValueError(f"not JSON ({what}){_array_hint(line)}") from None


def _array_hint(line: bytes) -> str:
    return (
        "; an array has to be rewritten as one object a line" if line.lstrip()[:1] == b"[" else ""
    )
