"""Where text comes from: the Hub, parquet, JSON lines and text files, as Arrow batches with a
position.

    source = local_source(["corpus/", "more/*.jsonl.gz"])   # or
    hub_source("HuggingFaceFW/fineweb-edu", ...)
    for unit in plan_units(source, unit_bytes=16 << 20):    # in document order, as asked for
        for batch in read_unit(source, unit):       # in any process: source and unit are picklable
            batch.texts, batch.rows                 # pa.Array of strings, row numbers in the unit

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

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pretrain.errors import first_line, reason
from pretrain.files import sha256_once
from pretrain.text import addresses, folders, foreign
from pretrain.text.columns import Chosen, split
from pretrain.text.readers import READABLE, format_of, reader_of
from pretrain.text.source import (
    UNREADABLE_FILE,
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
from pretrain.text.stored import check_unchanged, head, open_file

if TYPE_CHECKING:
    from pretrain.text.readers.parquet import Footer

__all__ = [
    "Batch",
    "File",
    "Patience",
    "Position",
    "Source",
    "SourceError",
    "Unit",
    "changed_files",
    "hub_source",
    "local_source",
    "open_file",
    "plan_units",
    "read_unit",
]

LEAVE_OUT_FILES = "(--on_bad_document skip leaves such files out)"
EDGE = 1 << 16  # bytes at each end of a file that are hashed
HASHED_BYTES = 1 << 30  # of a source: so much is hashed whole, a second's work


# ---- which files


def local_source(
    paths: Sequence[str | os.PathLike],
    *,
    text_column: str = "text",
    on_bad_document: str = "stop",
    columns: Sequence[str | None] | None = None,
    patience: Patience | None = None,
) -> Source:
    """Files, folders and glob patterns (with ** for any depth), in the order given, each file once;
    on this machine, or at addresses of object stores, of servers and of datasets on the Hub.

    A folder stands for all .parquet, .jsonl and .txt files below it (plain .json only where it is
    named: folders have many that are no documents) in the order of their relative paths, links
    followed; names that begin with "." or "_" are left out. Raises SourceError for what does not
    exist or cannot be read; with on_bad_document="skip" an unreadable file or folder among others
    is a file of the source that read_unit leaves out and counts.

    PATH#COLUMN names the text's column in these files alone; `columns`: they are known, one for
    each path (None: text_column), and paths are taken as they are.
    """
    named = [split(path) for path in paths]
    if columns is not None:
        named = [(os.fspath(path), column) for path, column in zip(paths, columns, strict=True)]
    chosen = Chosen()
    edges: dict[str, str | None] = {}
    patience = patience or Patience()
    elsewhere = addresses.find_all([given for given, _ in named], patience)
    for given, column in named:
        if column == text_column:
            column = None
        if given in elsewhere:
            for file in elsewhere[given]:
                chosen.add(str(file.url), file, column)
            continue
        for found in folders.find(given):
            file, edge = _local_file(found)
            if column and file.kind == "txt" and os.path.isfile(given):
                raise SourceError(f"{given}: plain text has no columns; leave out #{column}")
            if file.problem and on_bad_document == "stop":
                raise SourceError(f"{file.path}: {file.problem} {LEAVE_OUT_FILES}")
            real = os.path.normcase(os.path.realpath(file.path))
            if chosen.add(real, file, column):
                edges[file.path] = edge
    files = chosen.files
    if all(file.problem for file in files.values()):
        file = next(iter(files.values()))
        raise SourceError(f"{file.path}: {file.problem}, and nothing else is there to be read")
    described = _described(files.values(), edges)
    kind = "stored" if any(file.url for file in files.values()) else "local"
    description = {"kind": kind, "text_column": text_column, "files": described}
    name = folders.name_of([path for path, _ in named])
    return Source(name, tuple(files.values()), text_column, description, patience, chosen.notes())


def _described(files: Iterable[File], edges: dict[str, str | None]) -> list[dict[str, Any]]:
    """What the manifest records of the files; edges: hashes by path, of those on this machine."""
    described: list[dict[str, Any]] = []
    left = HASHED_BYTES
    for file in files:
        own = {"text_column": file.column} if file.column else {}
        if file.url:
            described.append({"path": file.path, "size": file.size, "tag": file.tag} | own)
            continue
        entry = {"path": file.path, "size": file.size, "edges_sha256": edges[file.path]}
        described.append(entry | {"mtime_ns": file.mtime_ns} | own)
        left -= file.size
        if left >= 0 and not file.problem:
            described[-1]["sha256"] = _sha256(file)
    return described


def _local_file(found: folders.Found) -> tuple[File, str | None]:
    """(the file, hash of its first and last bytes): another one in its place is noticed without
    reading it all."""
    path = found.path.as_posix()
    kind, compression = format_of(path) or ("txt", None)  # of what could not be looked at
    problem = found.problem
    if problem is None:
        try:
            with open(path, "rb", buffering=0) as stored:
                status = os.fstat(stored.fileno())
                digest = hashlib.sha256(stored.read(EDGE))
                stored.seek(max(stored.tell(), status.st_size - EDGE))
                digest.update(stored.read(EDGE))
            file = File(path, status.st_size, kind, compression, mtime_ns=status.st_mtime_ns)
            return file, digest.hexdigest()
        except OSError as error:
            problem = error.strerror or str(error)
    return File(path, 0, kind, compression, problem=problem), None


def _sha256(file: File) -> str:
    """Of all of a local file. Raises SourceError."""
    check_unchanged(file, "since the run began")
    try:
        return sha256_once(file.path)
    except OSError as error:
        raise SourceError(f"{file.path}: {error.strerror or error}") from None


def changed_files(recorded: Sequence[dict], source: Source) -> list[str]:
    """One line for each file that is not the one recorded in another source's description.

    Where local files lie may change, and a new modification time alone is no change: what is in
    the file counts, where its hash was recorded (of a source's first HASHED_BYTES; hashing all of
    a large one would cost as much as reading it), and of others the time. Older records have
    neither time nor hash: there size and edges have to do.
    """
    here = source.description["files"]
    if len(recorded) != len(here):
        return [f"{len(recorded)} files then, {len(here)} now"]
    problems = []
    for file, before, now in zip(source.files, recorded, here, strict=True):
        if file.tag:  # where it lies may change, too
            same = all(before.get(key) == now[key] for key in ("size", "tag"))
        elif file.url:
            same = before == now
        else:
            same = all(before.get(key) == now[key] for key in ("size", "edges_sha256"))
        what = "changed" if not same else None
        if before.get("text_column") != now.get("text_column"):
            was, is_now = (each.get("text_column") or "--text_column" for each in (before, now))
            what = f"is read by {is_now}, was read by {was}"
        touched = same and before.get("mtime_ns") not in (None, now.get("mtime_ns"))
        then, content = before.get("sha256"), now.get("sha256")
        if what is None and touched and then is None:
            what = "was written to since, and is too large for its content to be compared"
            what += f" (touch -d @{before['mtime_ns'] / 1e9:.9f} says that it is the same)"
        elif what is None and then is not None:
            if content is None:
                content = _sha256(file) if touched else then
            if content != then:  # whatever the time says: copies can keep it
                what = "changed in its middle"
        if what:
            problems.append(f"{now['path']} {what}")
    return problems


def _format(path: str) -> tuple[str, str | None]:
    known = format_of(path)
    assert known
    return known


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
    if other := [f.path for f in found.files if format_of(f.path) is None]:
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
    files = tuple(File(f.path, f.size, *_format(f.path), url=f.url) for f in found.files)
    parts = [dataset.rpartition("/")[2], *([found.config] if found.config != "default" else [])]
    return Source("-".join(parts), files, text_column, description, patience)


# ---- units


def plan_units(
    source: Source, *, unit_bytes: int, resume: Position | None = None
) -> Iterator[Unit]:
    """Units of about `unit_bytes` stored bytes of text each, in document order, from `resume` on.

    What a format keeps in a file's footer is read when the file's turn comes. A file of which
    nothing can be read is a unit without bytes: read_unit says what is wrong with it, or leaves it
    out. Raises SourceError for a position that is not in the source.
    """
    at = resume or Position(0, 0)
    if not 0 <= at.file <= len(source.files) or min(at.row, at.token, at.offset or 0) < 0:
        raise SourceError(f"{at} is no place in {source.name}; was its manifest edited?")
    for index in range(at.file, len(source.files)):
        file = source.files[index]
        start = at if index == at.file else Position(index, 0)
        try:
            if file.problem:
                raise UnreadableFile(f"{file.path}: {file.problem}")
            yield from reader_of(file.kind).plan(source, index, unit_bytes, start)
        except UnreadableFile:
            yield Unit(index, 0, 0, 0, 0)


def footer(file: File, text_column: str, patience: Patience) -> "Footer":
    """The footer of a parquet file. Raises UnreadableFile."""
    from pretrain.text.readers import parquet

    if file.problem:
        raise UnreadableFile(f"{file.path}: {file.problem}")
    return parquet.footer(file, text_column, patience)


# ---- documents


def read_unit(
    source: Source, unit: Unit, *, skip_rows: int = 0, on_bad_document: str = "stop"
) -> Iterator[Batch]:
    """The unit's documents in order, without its first `skip_rows` rows.

    Documents with null or empty text are left out and told. One that is broken (wrong type, broken
    JSON, no such key, invalid UTF-8) raises SourceError, or with on_bad_document="skip" is left out
    and counted; so does a file of which nothing can be read, or that is something else than its
    name says. Other damage inside a file, and one that was written to meanwhile, always raises.
    """
    if on_bad_document not in ("stop", "skip"):
        raise ValueError(f"on_bad_document is 'stop' or 'skip', not {on_bad_document!r}")
    file = source.files[unit.file]

    def report(row: int, offset: int | None, what: str) -> None:
        if on_bad_document == "stop":
            where = place(file, unit, row, offset)
            raise SourceError(f"{where}: {what} (--on_bad_document skip leaves such documents out)")

    try:
        if file.problem:
            raise UnreadableFile(f"{file.path}: {file.problem}")
        with open_file(file, source.patience) as stored:
            yield from read_open_file(source, unit, stored, skip_rows=skip_rows, report=report)
        check_unchanged(file, patience=source.patience)
    except UnreadableFile as error:
        if on_bad_document == "stop":
            raise UnreadableFile(f"{error} {LEAVE_OUT_FILES}") from None
        yield _unreadable_file()


def _unreadable_file() -> Batch:
    """What stands for a file that is left out as a whole."""
    import numpy as np

    from pretrain.text import arrow

    return Batch(arrow.strings([]), np.array([], np.int64), 1, {UNREADABLE_FILE: np.array([0])})


def read_open_file(
    source: Source, unit: Unit, stored: Any, *, skip_rows: int, report: Report
) -> Iterator[Batch]:
    """The unit's batches from its open file; bad documents go to `report`."""
    import pyarrow as pa

    file, done = source.files[unit.file], skip_rows
    reader = reader_of(file.kind)
    try:
        for batch in reader.read(source, unit, stored, skip_rows=skip_rows, report=report):
            yield batch
            done += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        where = "" if unit.first_row is None else f", after row {unit.first_row + done}"
        raise SourceError(f"{file.path}{where}: {_damage(error, source, file)}") from None


def _damage(error: Exception, source: Source, file: File) -> str:
    """What an exception in the middle of a file says about it."""
    import pyarrow as pa

    if isinstance(error, OSError) and error.errno:  # the system's word, not the file's fault
        return reason(error)
    said = first_line(error).rstrip(".")
    if "crypt" in said.lower():
        return "is encrypted; write it anew without encryption"
    if isinstance(error, MemoryError):
        return f"more at once than the memory holds ({said})"
    if isinstance(error, pa.ArrowNotImplementedError):
        return f"cannot be read by this pyarrow ({said}); write it anew, or install a newer one"
    if file.compression == "zstd":
        if what := foreign.zstd_problem(head(file, source.patience)):
            return what
        if "too much memory" in said:  # a frame behind the first one
            return foreign.long_window()
    return f"damaged or cut short ({said}); get it again"


def place(file: File, unit: Unit, row: int, offset: int | None) -> str:
    """Where a document is, for people. `row` counts from the unit's first; `offset` as in Batch."""
    return reader_of(file.kind).place(file, unit, row, offset)
