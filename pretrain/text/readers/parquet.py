"""The text column of a parquet file as Arrow batches of documents.

Only the column chunks of the text, and of FineWeb's `token_count` where it exists, are read. A
remote file is told which bytes will be wanted, so that a batch costs one request and not one per
page.
"""

import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pretrain.errors import first_line
from pretrain.text import arrow
from pretrain.text.foreign import foreign
from pretrain.text.source import (
    Batch,
    File,
    Patience,
    Position,
    Report,
    Source,
    SourceError,
    Unit,
    UnreadableFile,
)
from pretrain.text.stored import head, open_file

BATCH_BYTES = 8 << 20  # text in a batch, unless a single document has more
LOAD_BYTES = 32 << 20  # stored bytes of a remote batch that are fetched into memory in one go
READ_BYTES = 1 << 20  # bytes that pyarrow asks a file for
LARGEST_PIECE = 1 << 29  # bytes that a piece of a column can be decoded to, whatever it repeats
FOOTER_BYTES = 1 << 16  # bytes at a file's end that pyarrow reads first
SIGNATURE_BYTES = 28  # of a footer: nonce and tag of AES-GCM
WITHOUT_ENCRYPTION = "write it anew without encryption"
TOKEN_COUNT = "token_count"  # FineWeb's column: GPT-2 tokens of the row's text, without end-of-text


@dataclass(frozen=True)
class Footer:
    """What a parquet file says about itself."""

    metadata: pq.FileMetaData
    columns: tuple[str, ...]  # to be read: the text, then token_count where there is one
    leaves: tuple[int, ...]  # their indices in a row group

    def ranges(self, row_group: int) -> list[tuple[int, int]]:
        """Bytes [start, stop) of each column in a row group."""
        ranges = []
        for leaf in self.leaves:
            chunk = self.metadata.row_group(row_group).column(leaf)
            start = min(
                filter(None, (chunk.dictionary_page_offset, chunk.data_page_offset)), default=0
            )
            ranges.append((start, start + chunk.total_compressed_size))
        return ranges

    def num_rows(self, row_group: int) -> int:
        return self.metadata.row_group(row_group).num_rows

    def has_dictionary(self, row_group: int) -> bool:
        return self.metadata.row_group(row_group).column(self.leaves[0]).has_dictionary_page

    def text_bytes(self, row_group: int) -> int:
        """Of the text column, uncompressed."""
        return self.metadata.row_group(row_group).column(self.leaves[0]).total_uncompressed_size


def plan(source: Source, index: int, unit_bytes: int, start: Position) -> Iterator[Unit]:
    """Row groups of file `index` from the one that has row `start.row` on."""
    file = source.files[index]
    if not file.url:
        os.stat(file.path)  # a footer that was kept may be of a file that has gone since
    known = footer(file, source.column_of(file), source.patience)
    groups = known.metadata.num_row_groups
    group, first_row = 0, 0
    while group < groups and first_row + known.num_rows(group) <= start.row:
        first_row, group = first_row + known.num_rows(group), group + 1
    size, rows, begin = 0, 0, group
    for group in range(begin, groups):
        chunk_start, chunk_stop = known.ranges(group)[0]
        size, rows = size + chunk_stop - chunk_start, rows + known.num_rows(group)
        if size >= unit_bytes or group + 1 == groups:
            yield Unit(index, begin, group + 1, first_row, size)
            begin, first_row, size, rows = group + 1, first_row + rows, 0, 0


def read(
    source: Source, unit: Unit, stored: Any, *, skip_rows: int, report: Report
) -> Iterator[Batch]:
    """The unit's row groups without their first `skip_rows` rows."""
    file = source.files[unit.file]
    known = footer(file, source.column_of(file), source.patience)
    yield from read_row_groups(
        stored, known, unit.start, unit.stop, skip_rows=skip_rows, report=report
    )


def place(file: File, unit: Unit, row: int, offset: int | None) -> str:
    return f"{file.path}, row {(unit.first_row or 0) + row}"


@functools.lru_cache(maxsize=4)
def footer(file: File, text_column: str, patience: Patience) -> Footer:
    """The footer of a parquet file; the latest are kept for the units that follow. Raises
    UnreadableFile for a file that is not whole, is no parquet or has no such text."""
    with open_file(file, patience) as stored:
        try:
            return read_footer(stored, text_column)
        except ValueError as error:
            if not isinstance(error, pa.ArrowException):
                raise UnreadableFile(f"{file.path}: {error}") from None
            failure: Exception = error
        except (pa.ArrowException, OSError) as error:
            failure = error
    if isinstance(failure, OSError) and failure.errno:  # the system's word, not the file's fault
        raise SourceError(f"{file.path}: {failure.strerror}")
    if what := foreign(head(file, patience), "parquet", None) or encryption(failure):
        raise UnreadableFile(f"{file.path}: {what}")
    raise UnreadableFile(
        f"{file.path}: not a whole parquet file ({first_line(failure)}); get it again"
    )


def encryption(failure: Exception) -> str | None:
    """What to do where pyarrow fails because the file, its footer or a column is encrypted."""
    if "crypt" in str(failure).lower():
        return f"is encrypted; {WITHOUT_ENCRYPTION}"
    return None


def read_footer(file: Any, column: str) -> Footer:
    """Raises ValueError where `column` is missing, there twice or no text; pyarrow's errors for
    what is no parquet."""
    size = file.seek(0, os.SEEK_END)
    if hasattr(file, "load"):  # one request for what pyarrow and this code read of it
        file.load([(max(0, size - FOOTER_BYTES), size)])
    parquet = pq.ParquetFile(file)
    if _is_signed(file, parquet.metadata.serialized_size):
        raise ValueError(f"is encrypted; {WITHOUT_ENCRYPTION}")
    schema = parquet.schema_arrow
    count = schema.names.count(column)
    if count != 1:
        there = f"{count} columns {column!r}" if count else f"no column {column!r}"
        others = ", ".join(dict.fromkeys(name for name in schema.names if name != column))
        raise ValueError(f"{there}; choose --text_column from {others or 'another file'}")
    if not _holds_text(schema.field(column).type):
        raise ValueError(f"column {column!r} holds {schema.field(column).type}, not text")
    columns = [column]
    if (
        column != TOKEN_COUNT
        and schema.names.count(TOKEN_COUNT) == 1
        and pa.types.is_integer(schema.field(TOKEN_COUNT).type)
    ):
        columns.append(TOKEN_COUNT)
    paths = [parquet.schema.column(i).path for i in range(len(parquet.schema))]
    known = Footer(parquet.metadata, tuple(columns), tuple(paths.index(c) for c in columns))
    _check_sizes(known, size)
    return known


def _is_signed(file: Any, metadata_bytes: int) -> bool:
    """Whether columns are encrypted behind a footer that is not: it carries a signature then.
    pyarrow ends the process where such a column's metadata is asked for."""
    file.seek(-8, os.SEEK_END)
    return int.from_bytes(file.read(4), "little") - metadata_bytes == SIGNATURE_BYTES


def _check_sizes(footer: Footer, file_size: int) -> None:
    """Raise ValueError where a footer names bytes or rows that cannot be."""
    groups = range(footer.metadata.num_row_groups)
    rows = [footer.num_rows(group) for group in groups]
    inside = all(
        0 <= start <= stop <= file_size for group in groups for start, stop in footer.ranges(group)
    )
    sizes = [footer.text_bytes(group) for group in groups]
    if not inside or min(rows + sizes, default=0) < 0 or sum(rows) != footer.metadata.num_rows:
        raise ValueError("damaged: its footer contradicts itself; get it again")


def _holds_text(t: pa.DataType) -> bool:
    """Strings and bytes (which must be UTF-8) in any of Arrow's layouts, and nothing but nulls: a
    part of a dataset can have no text at all."""
    t = t.value_type if pa.types.is_dictionary(t) else t
    return str(t).removeprefix("large_").removesuffix("_view") in (
        "string",
        "binary",
        "null",
    )


def read_row_groups(
    file, footer: Footer, start: int, stop: int, *, skip_rows: int, report: Report
) -> Iterator[Batch]:
    """Row groups [start, stop) without their first `skip_rows` rows.

    Raises pyarrow's errors (ArrowException, OSError) where the file is damaged.
    """
    # pre-buffering would hold all of a column chunk, and one can be gigabytes
    parquet = pq.ParquetFile(
        file, metadata=footer.metadata, pre_buffer=False, buffer_size=READ_BYTES
    )
    first = 0  # the row that comes next, counted from the unit's first
    while start < stop and first + footer.num_rows(start) <= skip_rows:
        first, start = first + footer.num_rows(start), start + 1
    if remote := hasattr(file, "expect"):
        file.expect([r for group in range(start, stop) for r in footer.ranges(group)])
    for groups in _groups_of_a_batch(footer, start, stop):
        if remote:
            _fetch(file, footer, groups)
        rows, text_bytes = sum(map(footer.num_rows, groups)), sum(map(footer.text_bytes, groups))
        # a row group far larger than a batch is decoded piece by piece
        at_once = rows if text_bytes <= 2 * BATCH_BYTES else rows * BATCH_BYTES // text_bytes
        # a value that a dictionary has once can stand in every row: a megabyte becomes terabytes
        if any(map(footer.has_dictionary, groups)):
            at_once = min(at_once, max(64, LARGEST_PIECE // max(1, text_bytes)))
        records = parquet.iter_batches(
            max(1, at_once), groups, list(footer.columns), use_threads=False
        )
        for columns in _joined(records):
            begin, first = first, first + len(columns[0])
            if first > skip_rows:
                skip = max(0, skip_rows - begin)
                counts = columns[1].slice(skip) if len(columns) > 1 else None
                yield _batch(columns[0].slice(skip), counts, begin + skip, report)


def _joined(records: Iterator[pa.RecordBatch]) -> Iterator[list[pa.Array]]:
    """The columns of consecutive pieces, as many pieces at a time as BATCH_BYTES hold."""
    pending: list[pa.RecordBatch] = []
    size = 0
    for record in records:
        if pending and size + record.nbytes > BATCH_BYTES:
            yield _columns(pending)
            pending, size = [], 0
        pending.append(record)
        size += record.nbytes
        if pa.types.is_dictionary(record.schema.types[0]):  # its size is not that of its texts
            size = BATCH_BYTES
    if pending:
        yield _columns(pending)


def _columns(records: list[pa.RecordBatch]) -> list[pa.Array]:
    if len(records) == 1:
        return records[0].columns
    names = range(records[0].num_columns)
    return [pa.concat_arrays([record.column(i) for record in records]) for i in names]


def _groups_of_a_batch(footer: Footer, start: int, stop: int) -> Iterator[list[int]]:
    """Consecutive row groups with about BATCH_BYTES of text: small ones are read like large
    ones."""
    groups: list[int] = []
    size = 0
    for group in range(start, stop):
        groups, size = [*groups, group], size + footer.text_bytes(group)
        if size >= BATCH_BYTES:
            yield groups
            groups, size = [], 0
    if groups:
        yield groups


def _fetch(file, footer: Footer, groups: list[int]) -> None:
    """Bring column chunks of a remote file into memory; text that is too large for it will be
    streamed."""
    ranges = [footer.ranges(group) for group in groups]
    if sum(stop - start for columns in ranges for start, stop in columns) > LOAD_BYTES:
        ranges = [columns[1:] for columns in ranges]
    file.load([r for columns in ranges for r in columns])


def _batch(texts: pa.Array, counts: pa.Array | None, first: int, report: Report) -> Batch:
    """A batch of the rows from `first` on. texts: any type that _holds_text accepts, nulls
    included."""
    if pa.types.is_null(texts.type):
        texts = pa.nulls(len(texts), pa.string())
    if pa.types.is_dictionary(texts.type):
        texts = texts.dictionary_decode()
    if str(texts.type).endswith("_view"):
        texts = texts.cast(pa.large_binary())
    texts = texts.view(pa.large_string() if str(texts.type).startswith("large_") else pa.string())
    keep = arrow.lengths(texts) > 0
    empty = first + np.flatnonzero(~keep)
    bad = []
    for i, what in _invalid_utf8(texts):
        report(first + i, None, what)
        keep[i] = False
        bad.append(first + i)
    if not keep.all():
        texts = arrow.select(texts, keep)
    if counts is not None:
        counts = arrow.integers(counts)[keep]
    skipped = {"empty": empty, "bad": np.array(bad, np.int64)}
    return Batch(texts, first + np.flatnonzero(keep), len(keep), skipped, counts)


def _invalid_utf8(texts: pa.Array) -> list[tuple[int, str]]:
    """(index, what is wrong) of strings that are not UTF-8: pyarrow does not check when it
    reads."""
    try:
        texts.validate(full=True)
        return []
    except pa.ArrowInvalid:
        values = texts.view(
            pa.large_binary() if pa.types.is_large_string(texts.type) else pa.binary()
        )
        problems = [arrow.utf8_problem(value or b"") for value in values.to_pylist()]
        return [(i, what) for i, what in enumerate(problems) if what]
