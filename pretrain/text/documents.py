"""Where text comes from: the Hub, parquet, JSON lines and text files, as Arrow batches with a
position.

    source = local_source(["corpus/", "more/*.jsonl.gz"])   # or
    hub_source("HuggingFaceFW/fineweb-edu", ...) for unit in plan_units(source, unit_bytes=16 <<
    20):    # in document order, made as they are asked for
        for batch in read_unit(source, unit):               # in any process: source and unit are
        picklable
            batch.texts, batch.rows                         # pa.Array of strings, row numbers in
            the unit

The documents of all units, in order, are the documents of the source: they do not depend on
`unit_bytes`. A unit is some row groups of a parquet file, or a byte range of a plain jsonl or txt
file. A compressed file can only be read from its beginning, so it is one unit however large, as is
a huge row group: use batches as they come.

To resume, record where the next token comes from: `Position(file, row, token, offset)`, where row
is the file's row number (the unit's first row plus `batch.rows[i]`) and offset is
`batch.offsets[i]` where a batch has offsets. A plan made with `resume=position` begins with the
unit that has this row: read that one with `skip_rows=position.row - unit.first_row` and drop the
first `position.token` tokens. Nothing that came before is read again, except within one row group,
and within a compressed file.

Files on the Hub are read by range requests in the process that calls read_unit, and never stored.
What a user can do something about is raised as SourceError: one line with the file, the row and the
way out. Rows of parquet files are counted from 0 as pyarrow and pandas do, lines of text files from
1 as editors do.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.text.source import (
    Batch,
    File,
    Patience,
    Position,
    Source,
    SourceError,
    Unit,
    UnreadableFile,
)

if TYPE_CHECKING:
    from pretrain.text.readers.parquet import Footer, Report

__all__ = [
    "Batch",
    "File",
    "Patience",
    "Position",
    "Source",
    "SourceError",
    "Unit",
    "hub_source",
    "local_source",
    "plan_units",
    "read_unit",
]

KINDS = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".txt": "txt",
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
LEAVE_OUT_FILES = "(--on_bad_document skip leaves such files out)"
READABLE = ".parquet, .jsonl or .txt (the latter two also as .gz or .zst)"


def kind_of(path: str) -> tuple[str, str | None] | None:
    """("jsonl", "gzip") for x.jsonl.gz, None for what cannot be read."""
    stem, ending = os.path.splitext(path.lower())
    compression = COMPRESSIONS.get(ending)
    kind = KINDS.get(os.path.splitext(stem)[1] if compression else ending)
    return None if kind is None or (kind == "parquet" and compression) else (kind, compression)


# ---- which files


def local_source(paths: Sequence[str | os.PathLike], *, text_column: str = "text") -> Source:
    """Files, folders and glob patterns (with ** for any depth), in the order given, each file once.

    A folder stands for all .parquet, .jsonl and .txt files below it (plain .json only where it is
    named: folders have many that are no documents) in the order of their relative paths; names that
    begin with "." or "_" are left out. Raises SourceError for what does not exist or cannot be
    read.
    """
    files: dict[str, File] = {}  # by real path
    for given in map(os.fspath, paths):
        for path in _expand(given):
            file = File(path.as_posix(), path.stat().st_size, *kind_of(path.name))
            files.setdefault(os.path.normcase(os.path.realpath(path)), file)
    description = {
        "kind": "local",
        "text_column": text_column,
        "files": [
            {"path": f.path, "size": f.size, "edges_sha256": _edges_sha256(f)}
            for f in files.values()
        ],
    }
    return Source(_name_of(paths), tuple(files.values()), text_column, description)


def _expand(given: str) -> list[Path]:
    path = Path(given)
    if path.is_file():
        if kind_of(path.name) is None:
            raise SourceError(f"{given}: cannot be read; a source is {READABLE}")
        return [path]
    if path.is_dir():
        found = [p for p in path.rglob("*") if not p.name.lower().endswith(".json")]
        found = [p for p in found if not any(x[0] in "._" for x in p.relative_to(path).parts)]
    elif os.path.lexists(path):
        raise SourceError(f"{given}: neither a file nor a folder")
    else:
        found = [Path(p) for p in glob.glob(given, recursive=True)]
        if not found:
            raise SourceError(
                f"{given}: no such file or folder, and no file matches it as a pattern"
            )
    found = [p for p in found if kind_of(p.name) and p.is_file()]
    if not found:
        raise SourceError(f"{given}: no file in it can be read; a source is {READABLE}")
    return sorted(found, key=Path.as_posix)


def _edges_sha256(file: File) -> str:
    """Hash of the first and last 64 KiB: another file in its place is noticed without reading it
    all."""
    try:
        with open(file.path, "rb") as f:
            digest = hashlib.sha256(f.read(1 << 16))
            f.seek(max(f.tell(), file.size - (1 << 16)))
            digest.update(f.read(1 << 16))
    except OSError as e:
        raise SourceError(f"{file.path}: {e.strerror or e}") from None
    return digest.hexdigest()


def _name_of(paths: Sequence[str | os.PathLike]) -> str:
    """The one file's or folder's name, the folder's of a pattern; of several, the first."""
    path = Path(os.fspath(paths[0]))
    while glob.has_magic(path.name):
        path = path.parent
    name = path.name.split(".")[0] if path.is_file() else path.resolve().name
    return re.sub(r"[^\w.-]+", "-", name).strip("-._") or "documents"


def hub_source(
    dataset: str,
    *,
    name: str | None = None,
    split: str = "train",
    revision: str = "main",
    text_column: str = "text",
    patience: Patience | None = None,
) -> Source:
    """The files that `datasets.load_dataset(dataset, name, split=split, revision=revision)` would
    read.

    `revision` is resolved to a commit now and recorded in the description; a rerun that must read
    the same documents passes that commit. Raises SourceError for a dataset, configuration or split
    that does not exist or may not be read, for files of other kinds, and when the Hub stays away
    for longer than `patience`.
    """
    from pretrain.text import hub

    patience = patience or Patience()
    found = hub.resolve(dataset, name=name, split=split, revision=revision, patience=patience)
    if other := [f.path for f in found.files if kind_of(f.path) is None]:
        raise SourceError(
            f"dataset {dataset}: {other[0]} cannot be read; its files have to be {READABLE}"
        )
    description = {
        "kind": "hub",
        "dataset": dataset,
        "config": found.config,
        "split": split,
        "commit": found.commit,
        "text_column": text_column,
        "files": [{"path": f.path, "size": f.size, "sha256": f.sha256} for f in found.files],
    }
    files = tuple(File(f.path, f.size, *kind_of(f.path), url=f.url) for f in found.files)
    parts = [dataset.rpartition("/")[2], *([found.config] if found.config != "default" else [])]
    return Source("-".join(parts), files, text_column, description, patience)


# ---- units


def plan_units(
    source: Source, *, unit_bytes: int, resume: Position | None = None
) -> Iterator[Unit]:
    """Units of about `unit_bytes` stored bytes of text each, in document order, from `resume` on.

    Footers of parquet files are read when their turn comes. A file without a readable one is a unit
    of no row groups: read_unit says what is wrong with it, or leaves it out.
    """
    at = resume or Position(0, 0)
    for index in range(at.file, len(source.files)):
        file = source.files[index]
        here = at if index == at.file else Position(index, 0)
        if file.kind == "parquet":
            yield from _parquet_units(source, index, unit_bytes, here.row)
        elif file.compression:
            yield Unit(index, 0, file.size, 0, file.size)
        else:
            start, first_row = here.offset or 0, here.row
            while start < file.size:
                stop = min(file.size, start + unit_bytes)
                yield Unit(index, start, stop, first_row, stop - start)
                start, first_row = stop, None


def _parquet_units(source: Source, index: int, unit_bytes: int, row: int) -> Iterator[Unit]:
    try:
        known = footer(source.files[index], source.text_column, source.patience)
    except UnreadableFile:
        yield Unit(index, 0, 0, 0, 0)
        return
    groups = known.metadata.num_row_groups
    start, first_row = 0, 0
    while start < groups and first_row + known.num_rows(start) <= row:  # before the position
        first_row, start = first_row + known.num_rows(start), start + 1
    size = rows = 0
    for group in range(start, groups):
        begin, end = known.ranges(group)[0]
        size, rows = size + end - begin, rows + known.num_rows(group)
        if size >= unit_bytes or group + 1 == groups:
            yield Unit(index, start, group + 1, first_row, size)
            start, first_row, size, rows = group + 1, first_row + rows, 0, 0


def footer(file: File, text_column: str, patience: Patience) -> Footer:
    """The footer of a parquet file; the latest are kept for the units that follow. Raises
    UnreadableFile."""
    return _footer(file, text_column, patience, 0 if file.url else os.stat(file.path).st_mtime_ns)


@functools.lru_cache(maxsize=4)
def _footer(file: File, text_column: str, patience: Patience, modified_ns: int) -> Footer:
    import pyarrow as pa

    from pretrain.text.readers.parquet import read_footer

    with open_file(file, patience) as stored:
        try:
            return read_footer(stored, text_column)
        except (pa.ArrowException, OSError) as e:
            what = f"not a whole parquet file ({_first_line(e)}); get it again"
            raise UnreadableFile(f"{file.path}: {what}") from None
        except ValueError as e:
            raise UnreadableFile(f"{file.path}: {e}") from None


# ---- documents


def read_unit(
    source: Source, unit: Unit, *, skip_rows: int = 0, on_bad_document: str = "stop"
) -> Iterator[Batch]:
    """The unit's documents in order, without its first `skip_rows` rows.

    Documents with null or empty text are left out and told. One that is broken (wrong type, broken
    JSON, no such key, invalid UTF-8) raises SourceError, or with on_bad_document="skip" is left out
    and counted; so does a parquet file that is truncated or lacks the column. Other damage inside a
    file, and one that changed its size, always raises.
    """
    if on_bad_document not in ("stop", "skip"):
        raise ValueError(f"on_bad_document is 'stop' or 'skip', not {on_bad_document!r}")
    file = source.files[unit.file]

    def report(row: int, offset: int | None, what: str) -> None:
        if on_bad_document == "stop":
            where = place(file, unit, row, offset)
            raise SourceError(f"{where}: {what} (--on_bad_document skip leaves such documents out)")

    with open_file(file, source.patience) as stored:
        try:
            yield from read_open_file(source, unit, stored, skip_rows=skip_rows, report=report)
        except UnreadableFile as e:
            if on_bad_document == "stop":
                raise UnreadableFile(f"{e} {LEAVE_OUT_FILES}") from None
            from pretrain.text.readers import parquet

            yield parquet.unreadable_file()
    if not file.url and os.path.getsize(file.path) != file.size:
        raise SourceError(f"{file.path}: changed its size while it was read; start again")


def read_open_file(
    source: Source, unit: Unit, stored, *, skip_rows: int, report: Report
) -> Iterator[Batch]:
    """The unit's batches from its open file; bad documents go to `report`."""
    import pyarrow as pa

    from pretrain.text.readers import parquet, textfile

    file, done = source.files[unit.file], skip_rows
    try:
        if file.kind == "parquet":
            known = footer(file, source.text_column, source.patience)
            batches = parquet.read_row_groups(
                stored, known, unit.start, unit.stop, skip_rows=skip_rows, report=report
            )
        else:
            stream, stop = stored, unit.stop
            if file.compression:
                if file.size == 0:
                    raise OSError("no bytes in it")
                stream, stop = pa.CompressedInputStream(stored, file.compression), None
            options = {"skip_rows": skip_rows, "report": report}
            if file.kind == "jsonl":
                batches = textfile.read_jsonl(
                    stream, unit.start, stop, column=source.text_column, **options
                )
            else:
                batches = textfile.read_txt(stream, unit.start, stop, **options)
        for batch in batches:
            yield batch
            done += batch.num_rows
    except (pa.ArrowException, OSError) as e:
        place = "" if unit.first_row is None else f", after row {unit.first_row + done}"
        what = f"damaged or cut short ({_first_line(e)}); get it again"
        raise SourceError(f"{file.path}{place}: {what}") from None


def open_file(file: File, patience: Patience):
    """The stored bytes, for reading and seeking, by this code and by pyarrow."""
    if file.url:
        from pretrain.text.remote import RemoteFile

        return RemoteFile(file.url, file.size, patience)
    try:
        stored = open(file.path, "rb", buffering=0)  # noqa: SIM115  the caller closes it
    except OSError as e:
        raise SourceError(f"{file.path}: {e.strerror or e}") from None
    if (size := os.fstat(stored.fileno()).st_size) != file.size:
        stored.close()
        raise SourceError(f"{file.path}: has {size} bytes, and had {file.size} when the run began")
    return stored


def place(file: File, unit: Unit, row: int, offset: int | None) -> str:
    """Where a document is, for people. `row` counts from the unit's first; `offset` as in Batch."""
    if file.kind == "parquet":
        return f"{file.path}, row {unit.first_row + row}"
    if offset is not None and not file.url:
        with open(file.path, "rb") as f:
            feeds = sum(
                f.read(min(1 << 20, offset - at)).count(b"\n") for at in range(0, offset, 1 << 20)
            )
        return f"{file.path}, line {feeds + 1}"
    if unit.first_row is not None:
        what = "line" if file.kind == "jsonl" else "document"
        return f"{file.path}, {what} {unit.first_row + row + 1}"
    return f"{file.path}, byte {offset}"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
