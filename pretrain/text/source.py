"""What documents are read from: files, units of work, positions, batches.

Plain data that is pickled to worker processes and written into manifests; nothing here touches a
file or the network. `pretrain.text.documents` makes sources and reads them.
"""

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Self

from pretrain.errors import UserError, without_credentials

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

# What a reader calls for a document that is left out: (row in the unit, byte where it begins or
# None, what is wrong with it). It raises SourceError where such a document is to end the run.
Report = Callable[[int, int | None, str], None]


# Schemes of object stores, and the package that reads each, which fsspec imports.
DRIVERS = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
}
UNREADABLE_FILE = "unreadable file"  # the reason in Batch.skipped for a file left out as a whole


class SourceError(UserError):
    """A source cannot be read. One line for the user: which file and row, what is wrong, what to
    do. Here every message loses line breaks (of a key of the document's) and its addresses their
    passwords and signatures."""

    def __init__(self, message: str):
        super().__init__(re.sub(r"[\x00-\x1f\x7f]+", " ", without_credentials(message)))


class UnreadableFile(SourceError):
    """No document of this file can be had: it is not whole, or has no column with text."""


@dataclass(frozen=True)
class Patience:
    """How long the network is waited for.

    A stall is noticed after `read_seconds`. A server that delivers nothing for `give_up_seconds`
    ends the run; only one that asks for a longer pause itself (Retry-After) gets it, up to
    `rate_limit_seconds` without a byte.
    """

    connect_seconds: float = 5.0
    read_seconds: float = 20.0
    give_up_seconds: float = 75.0
    rate_limit_seconds: float = 330.0  # the Hub counts requests in windows of five minutes
    first_wait_seconds: float = 0.5
    longest_wait_seconds: float = 15.0


@dataclass(frozen=True)
class File:
    """One file of a source: on this machine, or elsewhere, then `url` is set. `path` is within the
    repository of a dataset, else the address without secrets. With `problem` it is a place where
    documents were looked for in vain (a folder that cannot be opened, a link to nothing): reading
    it raises UnreadableFile."""

    path: str
    size: int  # bytes, as stored
    kind: str  # "parquet", "jsonl" or "txt"
    compression: str | None = None  # None, "gzip" or "zstd"
    url: str | None = field(default=None, repr=False)  # an address can hold a password
    mtime_ns: int | None = None  # modification time of a local file when the source was made
    problem: str | None = None  # why nothing of it can be read
    # what changes when the content at an address does, "" where that is not told
    tag: str | None = None
    column: str | None = None  # with its text, where that is not the source's


@dataclass(frozen=True)
class Source:
    """Files in document order. Picklable, and without secrets: a worker finds the Hub's token by
    itself."""

    name: str  # how its shards are called unless told otherwise, e.g. "fineweb-edu-sample-10BT"
    files: tuple[File, ...]
    text_column: str
    description: dict  # JSON, for the manifest: equal descriptions mean equal documents
    patience: Patience = field(default_factory=Patience)
    notes: tuple[str, ...] = ()  # for people, of what was given

    def column_of(self, file: File) -> str:
        """The column or key that holds the file's text."""
        return file.column or self.text_column


@dataclass(frozen=True)
class Unit:
    """A part of one file, for one worker. The documents of all units in order are those of the
    source.

    parquet: row groups [start, stop). Plain jsonl and txt: the rows that begin in bytes [start,
    stop). Compressed jsonl and txt: the whole file, [0, size).
    """

    file: int  # index in source.files
    start: int
    stop: int
    # the file's row number of the unit's first row; None where nobody counted so far
    first_row: int | None
    num_bytes: int  # stored bytes that hold the unit's text: what progress is measured in


@dataclass(frozen=True)
class Position:
    """Where the next token comes from: token `token` of the document in row `row` of file `file`.

    Rows count from 0: rows of a parquet file, lines of a jsonl file (blank ones too), parts between
    the separator lines of a txt file. `offset` is the byte where the row begins in a plain jsonl or
    txt file, None elsewhere. `token` counts the document's end-of-text as token 0 and may equal the
    number of its tokens: then nothing of the document is left.
    """

    file: int
    row: int
    token: int = 0
    offset: int | None = None

    def to_json(self) -> dict:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict) -> Self:
        return cls(**value)


@dataclass
class Batch:
    """Consecutive rows of a unit: `kept` of its `num_rows` rows are documents."""

    texts: "pa.Array"  # (kept,) string or large_string: valid UTF-8, no null, no empty text
    rows: "np.ndarray"  # (kept,) int64, counted from the unit's first row
    num_rows: int  # rows that this batch consumed, with those that are left out
    # int64 rows left out: "empty" texts and, with on_bad_document="skip", "bad" ones; a whole
    # "unreadable file" counts as one row
    skipped: "dict[str, np.ndarray]"
    # (kept,) int64, the file's token_count column, where it has one
    token_counts: "np.ndarray | None" = None
    # (kept,) int64, byte where each row begins; plain jsonl and txt only
    offsets: "np.ndarray | None" = None
