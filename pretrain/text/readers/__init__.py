"""The registry of document formats.

Another format is a module here with the functions of `Reader`, and its line in FORMATS:

    "csv": Format((".csv",), compressible=True),        # read by pretrain/text/readers/csv.py
"""

import importlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    from pretrain.text.source import Batch, File, Position, Report, Source, Unit


@dataclass(frozen=True)
class Format:
    endings: tuple[str, ...]  # of file names, in lower case; the first one is for messages
    compressible: bool  # whether it can also be .gz and .zst


FORMATS = {
    "parquet": Format((".parquet",), compressible=False),
    "jsonl": Format((".jsonl", ".ndjson", ".json"), compressible=True),
    "txt": Format((".txt",), compressible=True),
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
NAMED_ONLY = ".json"  # not looked for in folders: those have many that are no documents
READABLE = ".parquet, .jsonl or .txt (the latter two also as .gz or .zst)"


class Reader(Protocol):
    """What a module of a format provides."""

    def plan(
        self, source: "Source", index: int, unit_bytes: int, start: "Position"
    ) -> "Iterator[Unit]":
        """Units of file `index` from `start` on. Raises UnreadableFile where there can be none."""
        ...

    def read(
        self, source: "Source", unit: "Unit", stored: Any, *, skip_rows: int, report: "Report"
    ) -> "Iterator[Batch]":
        """The unit's documents without its first `skip_rows` rows, from the open file `stored`.

        Raises UnreadableFile for a file without any, pyarrow's errors and OSError for damage.
        """
        ...

    def place(self, file: "File", unit: "Unit", row: int, offset: int | None) -> str:
        """Where a document is, for people: "a.jsonl, line 17". Row and offset as in Batch."""
        ...


def reader_of(kind: str) -> Reader:
    """The module that reads a format; imported when it is needed, as pyarrow takes its time."""
    return cast(Reader, importlib.import_module(f"{__name__}.{kind}"))


def format_of(path: str) -> tuple[str, str | None] | None:
    """(format, compression) by the name of a file: ("jsonl", "gzip") for x.jsonl.gz, None for what
    is not read."""
    stem, ending = os.path.splitext(path.lower())
    compression = COMPRESSIONS.get(ending)
    if compression:
        ending = os.path.splitext(stem)[1]
    for kind, known in FORMATS.items():
        if ending in known.endings and (known.compressible or not compression):
            return kind, compression
    return None
