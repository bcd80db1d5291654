"""The text column of a parquet file as Arrow batches of documents.

Only the column chunks of the text, and of FineWeb's `token_count` where it exists, are read. A
remote file is told which bytes will be wanted, so that a batch costs one request and not one per
page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pretrain.text import arrow
from pretrain.text.source import Batch

BATCH_BYTES = 8 << 20  # text in a batch, unless a single document has more
LOAD_BYTES = 32 << 20  # stored bytes of a remote batch that are fetched into memory in one go
READ_BYTES = 1 << 20  # bytes that pyarrow asks a file for
UNREADABLE_FILE = "unreadable file"  # the reason in Batch.skipped
TOKEN_COUNT = "token_count"  # FineWeb's column: GPT-2 tokens of the row's text, without end-of-text

Report = Callable[
    [int, "int | None", str], None
]  # (row in the unit, byte offset or None, what is wrong)


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
            start = min(filter(None, (chunk.dictionary_page_offset, chunk.data_page_offset)))
            ranges.append((start, start + chunk.total_compressed_size))
        return ranges

    def num_rows(self, row_group: int) -> int:
        return self.metadata.row_group(row_group).num_rows

    def text_bytes(self, row_group: int) -> int:
        """Of the text column, uncompressed."""
        return self.metadata.row_group(row_group).column(self.leaves[0]).total_uncompressed_size


def read_footer(file, column: str) -> Footer:
    """Raises ValueError where `column` is missing or no text, pyarrow's errors for what is no
    parquet."""
    parquet = pq.ParquetFile(file)
    schema = parquet.schema_arrow
    if column not in schema.names:
        raise ValueError(
            f"no column {column!r}; choose --text_column from {', '.join(schema.names)}"
        )
    if not _holds_text(schema.field(column).type):
        raise ValueError(f"column {column!r} holds {schema.field(column).type}, not text")
    columns = [column]
    if column != TOKEN_COUNT in schema.names and pa.types.is_integer(
        schema.field(TOKEN_COUNT).type
    ):
        columns.append(TOKEN_COUNT)
    paths = [parquet.schema.column(i).path for i in range(len(parquet.schema))]
    return Footer(parquet.metadata, tuple(columns), tuple(paths.index(c) for c in columns))


def _holds_text(t: pa.DataType) -> bool:
    """Strings and bytes (which must be UTF-8) in any of Arrow's layouts."""
    t = t.value_type if pa.types.is_dictionary(t) else t
    return str(t).removeprefix("large_").removesuffix("_view") in ("string", "binary")


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
        at_once = max(
            1, rows if text_bytes <= 2 * BATCH_BYTES else rows * BATCH_BYTES // text_bytes
        )
        for record in parquet.iter_batches(
            at_once, groups, list(footer.columns), use_threads=False
        ):
            begin, first = first, first + len(record)
            if first > skip_rows:
                skip = max(0, skip_rows - begin)
                counts = record.column(1).slice(skip) if len(footer.columns) > 1 else None
                yield _batch(record.column(0).slice(skip), counts, begin + skip, report)


def _groups_of_a_batch(footer: Footer, start: int, stop: int) -> Iterator[list[int]]:
    """Consecutive row groups with about BATCH_BYTES of text: small ones are read like large
    ones."""
    groups, size = [], 0
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


def unreadable_file() -> Batch:
    """What stands for a file that is left out as a whole."""
    return Batch(arrow.strings([]), np.array([], np.int64), 1, {UNREADABLE_FILE: np.array([0])})


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
        problems = [utf8_problem(value or b"") for value in values.to_pylist()]
        return [(i, what) for i, what in enumerate(problems) if what]


def utf8_problem(data: bytes) -> str | None:
    """Why these bytes are not UTF-8, None if they are."""
    try:
        data.decode()
    except UnicodeDecodeError as e:
        return f"invalid UTF-8 at byte {e.start} of the text (0x{data[e.start]:02x})"
    return None
