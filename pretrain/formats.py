"""Parquet, JSON lines and text files as Arrow batches of documents.

Each reader yields the rows of one unit in order, drops what is no document, and names file and row of what is broken.
It reads from an open binary file, local or remote, and keeps about BATCH_BYTES of it in memory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json
import pyarrow.parquet as pq

from pretrain.source import Batch, SourceError

BATCH_BYTES = 8 << 20  # text in one batch, unless a single document is larger
BLOCK = 4 << 20  # bytes read of a text file at a time
TOKEN_COUNT = "token_count"  # FineWeb's column: GPT-2 tokens of the row's text
SEPARATOR_REACH = 20  # bytes that a separator line can span: a byte order mark, <|endoftext|>, CR LF, and one before
SEPARATOR = re.compile(rb"(?m)(?:\A\xef\xbb\xbf|^)<\|endoftext\|>\r?\n")
LAST_SEPARATOR = re.compile(rb"(?m)(?:\A\xef\xbb\xbf|^)<\|endoftext\|>\r?(?:\n|\Z)")
BOM = b"\xef\xbb\xbf"
JSON = json.JSONDecoder(parse_int=len, parse_float=len)  # numbers are never text: no limit on their digits applies

OnBad = Callable[[int, "int | None", str], None]  # (row, byte offset, what is wrong): raises, or counts


# ---- parquet


def open_parquet(file, where: str, column: str, metadata=None) -> pq.ParquetFile:
    """Raises SourceError for a file that is no whole parquet file or has no such text column."""
    try:
        parquet = pq.ParquetFile(file, metadata=metadata, buffer_size=1 << 20)
    except (pa.ArrowException, OSError) as e:
        raise SourceError(f"{where}: not a complete parquet file ({_first_line(e)}); fetch it again") from None
    schema = parquet.schema_arrow
    if column not in schema.names:
        raise SourceError(f"{where}: no column {column!r}; choose --text_column from {', '.join(schema.names)}")
    if not _is_text(schema.field(column).type):
        raise SourceError(f"{where}: column {column!r} holds {schema.field(column).type}, not text")
    return parquet


def _is_text(t: pa.DataType) -> bool:
    if pa.types.is_dictionary(t):
        t = t.value_type
    return any(f(t) for f in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view,
                              pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view))


def chunk_range(metadata, row_group: int, column: str) -> tuple[int, int]:
    """Bytes [start, stop) of a top-level column in a row group."""
    group = metadata.row_group(row_group)
    for i in range(group.num_columns):
        chunk = group.column(i)
        if chunk.path_in_schema == column:
            start = chunk.dictionary_page_offset or chunk.data_page_offset
            start = min(start, chunk.data_page_offset)
            return start, start + chunk.total_compressed_size
    raise KeyError(column)


def read_parquet(file, parquet: pq.ParquetFile, where: str, unit, column: str, skip_rows: int, on_bad) -> Iterator[Batch]:
    metadata = parquet.metadata
    counted = TOKEN_COUNT in parquet.schema_arrow.names
    columns = [column, TOKEN_COUNT] if counted else [column]
    done = 0
    for row_group in range(unit.start, unit.stop):
        rows = metadata.row_group(row_group).num_rows
        if done + rows <= skip_rows:
            done += rows
            continue
        try:
            for record in parquet.iter_batches(rows or 1, row_groups=[row_group], columns=columns, use_threads=False):
                first = done
                done += len(record)
                skip = max(0, skip_rows - first)
                record = record.slice(skip)
                texts = record.column(0)
                counts = record.column(1) if counted else None
                yield make_batch(texts, first + skip, counts=counts)
        except (pa.ArrowException, OSError) as e:
            raise SourceError(f"{where}: row group {row_group}: {_first_line(e)}; fetch it again") from None


def make_batch(texts: pa.Array, first: int, counts=None) -> Batch:
    texts = texts.cast(pa.string()) if not (pa.types.is_string(texts.type) or pa.types.is_large_string(texts.type)) else texts
    keep = pc.fill_null(pc.greater(pc.binary_length(texts), 0), False)
    kept = texts.filter(keep)
    rows = first + np.flatnonzero(keep.to_numpy(zero_copy_only=False))
    total = None
    if counts is not None:
        total = pc.sum(counts.filter(keep)).as_py() or 0
    return Batch(kept, rows, len(texts), {"empty": len(texts) - len(kept), "bad": 0}, total)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


# ---- jsonl


def line_blocks(file, start: int, stop: int | None) -> Iterator[tuple[int, bytes]]:
    """(offset, whole lines) of the lines that begin in bytes [start, stop), about BLOCK bytes at a time."""
    offset = start
    if start > 0:
        file.seek(start - 1)
        while True:
            block = file.read(BLOCK)
            if not block:
                return
            at = block.find(b"\n")
            if at >= 0:
                break
            offset += len(block)
        offset = offset - 1 + at + 1
        pending = [block[at + 1:]]
    else:
        file.seek(0) if stop is not None else None
        pending = [file.read(BLOCK)]
    # `offset` is where pending[0] begins, always the beginning of a line
    while stop is None or offset < stop:
        block = pending[-1]
        before = offset + sum(map(len, pending[:-1]))
        if stop is not None and before + len(block) >= stop:
            at = block.find(b"\n", max(0, stop - 1 - before))
            last = at >= 0
        else:
            at = block.rfind(b"\n")
            last = False
        if at >= 0:
            lines = b"".join([*pending[:-1], block[:at + 1]])
            yield offset, lines
            offset += len(lines)
            pending = [block[at + 1:]]
            if last:
                return
        more = file.read(BLOCK)
        if not more:
            rest = b"".join(pending)
            if rest and (stop is None or offset < stop):
                yield offset, rest
            return
        pending.append(more)


def read_jsonl(file, unit, column: str, skip_rows: int, on_bad: OnBad, splittable: bool) -> Iterator[Batch]:
    row = 0
    for offset, block in line_blocks(file, unit.start, unit.stop if splittable else None):
        lines = block.split(b"\n")
        if not lines[-1]:
            lines.pop()
        texts, rows, offsets, empty, bad = [], [], [], 0, 0
        at, first = offset, row
        for line in lines:
            if row >= skip_rows:
                text = _json_text(line, column, at == 0)
                if isinstance(text, Problem):
                    on_bad(row, at, text.what)
                    bad += 1
                elif text == "":
                    empty += 1
                elif text is not None:
                    texts.append(text)
                    rows.append(row)
                    offsets.append(at)
            at += len(line) + 1
            row += 1
        consumed = row - max(first, min(skip_rows, row))
        if consumed:
            yield Batch(pa.array(texts, pa.large_string()), np.array(rows, np.int64), consumed,
                        {"empty": empty, "bad": bad}, None, np.array(offsets, np.int64) if splittable else None)


class Problem:
    def __init__(self, what):
        self.what = what


def _json_text(line: bytes, column: str, first: bool):
    """The line's text, "" for null or empty, None for a blank line, or a Problem."""
    if first:
        line = line.removeprefix(BOM)
    if not line.strip():
        return None
    try:
        value = JSON.decode(line.decode())
    except UnicodeDecodeError as e:
        return Problem(f"invalid UTF-8 at byte {e.start} of the line")
    except ValueError as e:
        return Problem(f"not JSON: {e}")
    except RecursionError:
        return Problem("JSON nested too deeply")
    if not isinstance(value, dict):
        return Problem(f"a JSON {type(value).__name__}, not an object")
    if column not in value:
        return Problem(f"no key {column!r}; its keys are {', '.join(list(value)[:20])}")
    text = value[column]
    if text is None:
        return ""
    if not isinstance(text, str):
        return Problem(f"{column!r} is a {type(text).__name__}, not a string")
    try:
        text.encode()
    except UnicodeEncodeError:
        return Problem(f"{column!r} has half a surrogate pair, which is no character")
    return text


# ---- txt


def read_txt(file, unit, skip_rows: int, on_bad: OnBad, splittable: bool) -> Iterator[Batch]:
    texts, rows, offsets, size, row, bad, consumed = [], [], [], 0, 0, 0, 0
    for offset, text in _txt_documents(file, unit.start, unit.stop if splittable else None):
        if row >= skip_rows:
            consumed += 1
            if text.strip():
                try:
                    texts.append(text.decode())
                    rows.append(row)
                    offsets.append(offset)
                    size += len(text)
                except UnicodeDecodeError as e:
                    on_bad(row, offset, f"invalid UTF-8 at byte {offset + e.start} of the file")
                    bad += 1
        row += 1
        if size >= BATCH_BYTES:
            yield Batch(pa.array(texts, pa.large_string()), np.array(rows, np.int64), consumed,
                        {"empty": 0, "bad": bad}, None, np.array(offsets, np.int64) if splittable else None)
            texts, rows, offsets, size, bad, consumed = [], [], [], 0, 0, 0
    if consumed:
        yield Batch(pa.array(texts, pa.large_string()), np.array(rows, np.int64), consumed,
                    {"empty": 0, "bad": bad}, None, np.array(offsets, np.int64) if splittable else None)


def _txt_documents(file, start: int, stop: int | None) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes) of the documents that begin in bytes [start, stop)."""
    base = max(0, start - SEPARATOR_REACH)  # of buffer[0] in the file
    if stop is not None:
        file.seek(base)
    buffer, scanned = bytearray(), 0
    begin = 0 if start == 0 else None  # of the document being read
    end_of_file = False
    while not end_of_file:
        block = file.read(BLOCK)
        end_of_file = not block
        buffer += block
        for match in (LAST_SEPARATOR if end_of_file else SEPARATOR).finditer(buffer, scanned):
            if begin is not None:
                yield begin, _document(buffer, begin - base, match.start(), begin)
            end = base + match.end()
            begin = end if end >= start else None
            if stop is not None and end >= stop:
                return
            scanned = match.end()
        scanned = max(scanned, len(buffer) - SEPARATOR_REACH)
        if begin is None and stop is not None and base + scanned >= stop:
            return
        unneeded = (scanned - 1 if begin is None else begin - base) - 1
        if unneeded > 0:
            del buffer[:unneeded]
            base += unneeded
            scanned -= unneeded
    if begin is not None and begin - base < len(buffer):
        yield begin, _document(buffer, begin - base, len(buffer), begin)


def _document(buffer: bytearray, start: int, stop: int, offset: int) -> bytes:
    text = bytes(buffer[start:stop])
    return text.removeprefix(BOM) if offset == 0 else text
