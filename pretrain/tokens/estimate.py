"""How much a source holds, found out without reading it all: what is printed before a long run
begins."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

from pretrain.text.documents import LEAVE_OUT_FILES, footer, open_file, plan_units, read_open_file
from pretrain.text.source import File, Source, UnreadableFile

if TYPE_CHECKING:
    import pyarrow as pa

SAMPLE_FILES = 64  # parquet files whose footers are read, if they are on this machine
SAMPLE_BYTES = 1 << 20  # stored bytes that are tokenized of each kind of file


@dataclasses.dataclass(frozen=True)
class Estimate:
    rows: int | None  # None where there are text files: their rows are counted nowhere
    rows_exact: bool  # False: from some files' footers, scaled by file size
    text_bytes: int  # stored bytes to be read: the text columns of parquet files, other files whole
    # from the tokens in the first SAMPLE_BYTES of each kind of file, scaled by text_bytes
    tokens: int


def estimate(
    source: Source, count_tokens: "Callable[[pa.Array], int]", *, on_bad_document: str = "stop"
) -> Estimate:
    """Reads the footers of up to SAMPLE_FILES parquet files (of one, on the Hub) and tokenizes a
    sample.

    `count_tokens` gets an array of texts. Bad documents are passed over here: the run will report
    them. Raises SourceError for a parquet file that cannot be read, with on_bad_document="skip" if
    none of the sample can.
    """
    by_kind: dict[tuple, list[File]] = {}
    for file in source.files:
        by_kind.setdefault((file.kind, file.compression), []).append(file)
    rows, exact, text_bytes, tokens = 0, True, 0, 0.0
    for (kind, _), files in by_kind.items():
        stored = sum(file.size for file in files)
        if kind == "parquet":
            rows, stored, exact = _from_footers(source, files, on_bad_document)
        text_bytes += stored
        part = dataclasses.replace(source, files=tuple(files))
        tokens += stored * _tokens_per_byte(part, count_tokens)
    only_parquet = all(kind == "parquet" for kind, _ in by_kind)
    return Estimate(rows if only_parquet else None, exact, text_bytes, round(tokens))


def _from_footers(source: Source, files: list[File], on_bad_document: str) -> tuple[int, int, bool]:
    """(rows, stored bytes of the text column, whether they are exact) of parquet files."""
    sample = files[:1] if files[0].url else files[:: -(-len(files) // SAMPLE_FILES)]
    rows = stored = unreadable = 0
    for file in sample:
        try:
            known = footer(file, source.column_of(file), source.patience)
        except UnreadableFile as error:
            unreadable += 1
            if on_bad_document == "stop":
                raise UnreadableFile(f"{error} {LEAVE_OUT_FILES}") from None
            if unreadable == len(sample):
                raise
            continue
        groups = range(known.metadata.num_row_groups)
        rows += known.metadata.num_rows
        stored += sum(stop - start for start, stop in (known.ranges(group)[0] for group in groups))
    scale = sum(file.size for file in files) / sum(file.size for file in sample)
    return round(rows * scale), round(stored * scale), len(sample) == len(files)


def _tokens_per_byte(source: Source, count_tokens: "Callable[[pa.Array], int]") -> float:
    """Tokens per stored byte of text at the beginning of the source."""
    tokens = stored_bytes = 0
    for unit in plan_units(source, unit_bytes=SAMPLE_BYTES):
        if unit.num_bytes == 0:  # of a file that cannot be read
            continue
        file, seen = source.files[unit.file], unit.num_bytes
        with open_file(file, source.patience) as stored:
            for batch in read_open_file(source, unit, stored, skip_rows=0, report=lambda *_: None):
                tokens += count_tokens(batch.texts)
                if file.compression:  # one batch took what has been read of the file so far
                    seen = stored.tell()
                    break
                if file.kind == "parquet":  # of a large row group, too
                    known = footer(file, source.column_of(file), source.patience)
                    rows = sum(map(known.num_rows, range(unit.start, unit.stop)))
                    seen = round(unit.num_bytes * batch.num_rows / rows)
                    break
        stored_bytes += seen
        if stored_bytes >= SAMPLE_BYTES // 2:
            break
    return tokens / max(1, stored_bytes)
