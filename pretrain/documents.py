"""Where text comes from: the Hub, parquet, JSON lines, text files, as Arrow batches with a position.

    source = local_source(["corpus/", "more/*.jsonl.gz"])            # or hub_source("HuggingFaceFW/fineweb-edu", ...)
    for unit in plan_units(source, unit_bytes=16 << 20):             # in document order, made as they are asked for
        for batch in read_unit(source, unit):                        # in any process: source and unit are picklable
            batch.texts, batch.rows                                  # pa.Array of strings, row numbers in the unit

The documents of all units, in order, are the documents of the source: they do not depend on unit_bytes. A unit of
plain jsonl or txt is a byte range, of parquet some row groups; gzip and zstd cannot be entered in the middle, so a
compressed file is one unit however large, as is a huge row group: use batches as they come.

To resume, record for the next token its Position(file, row, token, offset): row is the unit's first row in the file
plus `batch.rows[i]`, offset is `batch.offsets[i]` where batches have offsets. A plan made with `resume=position` begins
with the unit that holds it; pass `skip_rows=position.row - unit.first_row` when reading that one, and drop the first
`position.token` tokens of its first document. Nothing before is read again, except within a row group or compressed file.

Hub files are read by range requests inside the process that calls read_unit, and never stored. Everything a user can
do something about is raised as SourceError.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from pretrain.source import Batch, File, Patience, Position, Source, SourceError, Unit

__all__ = ["Batch", "File", "Patience", "Position", "Source", "SourceError", "Unit",
           "hub_source", "local_source", "plan_units", "read_unit"]

KINDS = {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".txt": "txt"}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}


def kind_of(path: str) -> tuple[str, str | None] | None:
    """("jsonl", "gzip") for x.jsonl.gz; None for a file that cannot be read."""
    stem, ending = os.path.splitext(path.lower())
    compression = COMPRESSIONS.get(ending)
    if compression:
        ending = os.path.splitext(stem)[1]
    kind = KINDS.get(ending)
    if kind is None or (kind == "parquet" and compression):
        return None
    return kind, compression


def local_source(paths: Sequence[str | os.PathLike], *, text_column: str = "text") -> Source:
    """Files, folders (searched recursively) and globs, in the order given, each file once."""
    found, seen = [], set()
    for given in paths:
        for path in _expand(os.fspath(given)):
            real = os.path.normcase(os.path.realpath(path))
            if real not in seen:
                seen.add(real)
                kind, compression = kind_of(path.name)
                found.append(File(path.as_posix(), path.stat().st_size, kind, compression))
    description = {
        "kind": "local", "text_column": text_column,
        "files": [{"path": f.path, "size": f.size, "edges_sha256": _edges_sha256(f.path)} for f in found],
    }
    return Source(_local_name(paths), tuple(found), text_column, description)


def _expand(given: str) -> list[Path]:
    path = Path(given)
    if path.is_file():
        if kind_of(path.name) is None:
            raise SourceError(f"{given}: not a .parquet, .jsonl or .txt file (jsonl and txt also as .gz or .zst)")
        return [path]
    if path.is_dir():
        files = [p for p in path.rglob("*") if p.is_file() and kind_of(p.name)
                 and not any(part.startswith((".", "_")) for part in p.relative_to(path).parts)]
        if not files:
            raise SourceError(f"{given}: no .parquet, .jsonl or .txt file in this folder")
        return sorted(files, key=lambda p: p.relative_to(path).as_posix())
    files = [Path(p) for p in glob.glob(given, recursive=True)]
    files = sorted((p for p in files if p.is_file() and kind_of(p.name)), key=lambda p: p.as_posix())
    if not files:
        raise SourceError(f"{given}: no such file or folder, and as a pattern it matches nothing that can be read")
    return files


def _edges_sha256(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        digest.update(f.read(1 << 16))
        f.seek(max(f.tell(), os.fstat(f.fileno()).st_size - (1 << 16)))
        digest.update(f.read())
    return digest.hexdigest()


def _local_name(paths) -> str:
    given = Path(os.fspath(paths[0]))
    stem = given.resolve().name if given.is_dir() else given.name.split(".")[0]
    return re.sub(r"[^\w.-]+", "-", stem).strip("-.") or "documents"


def hub_source(dataset: str, *, name: str | None = None, split: str = "train", revision: str = "main",
               text_column: str = "text", patience: Patience | None = None) -> Source:
    """The files of a dataset on the Hub, at the commit that `revision` names now."""
    from pretrain import hub

    patience = patience or Patience()
    found = hub.resolve(dataset, name=name, split=split, revision=revision, patience=patience)
    files = []
    for f in found.files:
        if kind_of(f.path) is None:
            raise SourceError(f"dataset {dataset}: {f.path} is neither parquet nor JSON lines nor text")
        files.append(File(f.path, f.size, *kind_of(f.path), url=f.url))
    description = {
        "kind": "hub", "dataset": dataset, "config": found.config, "split": split, "commit": found.commit,
        "text_column": text_column,
        "files": [{"path": f.path, "size": f.size, "sha256": f.sha256} for f in found.files],
    }
    parts = [dataset.split("/")[-1], *([found.config] if found.config != "default" else [])]
    return Source("-".join(parts), tuple(files), text_column, description, patience)


# ---- units


def plan_units(source: Source, *, unit_bytes: int, resume: Position | None = None) -> Iterator[Unit]:
    """Units of about `unit_bytes` stored bytes of text, in document order, from `resume` on."""
    at = resume or Position(0, 0)
    for index in range(at.file, len(source.files)):
        file = source.files[index]
        here = at if resume and index == at.file else Position(index, 0)
        if file.kind == "parquet":
            yield from _parquet_units(source, index, unit_bytes, here.row)
        elif not file.splittable:
            yield Unit(index, 0, file.size, 0, file.size)
        else:
            first_row, start = here.row, here.offset or 0
            while start < file.size:
                stop = min(file.size, start + unit_bytes)
                yield Unit(index, start, stop, first_row, stop - start)
                start, first_row = stop, None


def _parquet_units(source: Source, index: int, unit_bytes: int, row: int) -> Iterator[Unit]:
    from pretrain.formats import chunk_range

    metadata = _footer(source.files[index], source.text_column, source.patience)
    start, first_row, size, rows = 0, 0, 0, 0
    for group in range(metadata.num_row_groups):
        a, b = chunk_range(metadata, group, source.text_column)
        n = metadata.row_group(group).num_rows
        if first_row + rows + n <= row:  # before the position
            start, first_row = group + 1, first_row + rows + n
            continue
        size, rows = size + b - a, rows + n
        if size >= unit_bytes or group + 1 == metadata.num_row_groups:
            yield Unit(index, start, group + 1, first_row, size)
            start, first_row, size, rows = group + 1, first_row + rows, 0, 0


# ---- reading


def open_file(file: File, patience: Patience):
    """The file's stored bytes, for reading and seeking."""
    if file.url:
        from pretrain.hub import RemoteFile

        return RemoteFile(file.url, file.size, patience)
    try:
        size = os.stat(file.path).st_size
        if size != file.size:
            raise SourceError(f"{file.path}: has {size} bytes now and had {file.size} when this run began")
        return open(file.path, "rb", buffering=0)  # noqa: SIM115
    except OSError as e:
        raise SourceError(f"{file.path}: {e.strerror or e}") from None


@functools.lru_cache(maxsize=4)
def _footer(file: File, column: str, patience: Patience):
    from pretrain.formats import open_parquet

    with open_file(file, patience) as f:
        return open_parquet(f, file.path, column).metadata


def read_unit(source: Source, unit: Unit, *, skip_rows: int = 0, on_bad_document: str = "stop") -> Iterator[Batch]:
    """The unit's documents in order; the first `skip_rows` rows are left out."""
    import pyarrow as pa

    from pretrain import formats

    file = source.files[unit.file]

    def on_bad(row: int, offset: int | None, what: str) -> None:
        if on_bad_document == "stop":
            raise SourceError(f"{file.path}: row {(unit.first_row or 0) + row} (byte {offset}): {what}; "
                              "--on_bad_document skip leaves such documents out")

    with open_file(file, source.patience) as f:
        if file.kind == "parquet":
            metadata = _footer(file, source.text_column, source.patience)
            parquet = formats.open_parquet(f, file.path, source.text_column, metadata)
            yield from formats.read_parquet(f, parquet, file.path, unit, source.text_column, skip_rows, on_bad)
            return
        stream = pa.CompressedInputStream(pa.PythonFile(f, "r"), file.compression) if file.compression else f
        if file.kind == "jsonl":
            yield from formats.read_jsonl(stream, unit, source.text_column, skip_rows, on_bad, file.splittable)
        else:
            yield from formats.read_txt(stream, unit, skip_rows, on_bad, file.splittable)
