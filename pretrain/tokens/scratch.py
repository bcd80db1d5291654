"""Tokens of units on the disk, published: what lies between tokenizing and packing.

    record = tokenize_to_scratch(UnitJob(source, unit, tokenizer, "stop", scratch))
    batch = read_scratch(scratch, record, (0, 5000))    # one TokenBatch; of its tokens so many are
                                                        # looked at, and none is loaded

    unit-000003-8192.tokens     the tokens, as uint16
    unit-000003-8192.npz        where its documents lie, and which rows were left out
    unit-000003-8192.json       published last: counts and checksums; without it no unit is there

A unit may be made twice, by a retry or a rerun: it has the same bytes under the same name. Nobody
waits for the disk: its checksums tell what a power cut has damaged.
"""

import contextlib
import io
import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from pretrain import files
from pretrain.errors import UserError
from pretrain.text.documents import Source, Unit
from pretrain.tokens.formats import TOKEN
from pretrain.tokens.pipeline import TokenBatch, tokenize_unit
from pretrain.tokens.tokenizer import Tokenizer

# Bytes of tokens under one checksum: who packs a shard looks at what is in it, not at whole units.
# CRC-32 notices damage, three times as fast as the SHA-256 that the shards have.
CHECKED_BYTES = 1 << 20


class ScratchError(UserError):
    """A unit's files are not what was published."""


@dataclass(frozen=True)
class UnitRecord:
    """What is published of a unit: enough to say which shards it overlaps."""

    unit: Unit
    tokens: int
    documents: int
    rows: int  # consumed, with those that were left out
    text_bytes: int
    checksums: tuple[int, ...]  # CRC-32 of the index, then of each CHECKED_BYTES of tokens

    @property
    def key(self) -> str:
        return unit_key(self.unit)


def unit_key(unit: Unit) -> str:
    return f"unit-{unit.file:06d}-{unit.start}"


@dataclass(frozen=True)
class UnitJob:
    """A unit to tokenize into a scratch folder."""

    source: Source
    unit: Unit
    tokenizer: Tokenizer
    on_bad_document: str
    scratch: Path


def tokenize_to_scratch(job: UnitJob) -> UnitRecord:
    """Tokenize a unit and publish it; at once where it is published already, and whole. Raises
    SourceError."""
    if record := published(job.scratch, job.unit):
        with contextlib.suppress(ScratchError):
            read_scratch(job.scratch, record, (0, record.tokens))
            return record
    key = unit_key(job.unit)
    counts, rows, offsets, token_counts, text_bytes, next_row = [], [], [], [], 0, 0
    skipped: dict[str, list[np.ndarray]] = {}
    checksums = _Checksums()
    with files.atomic_write(job.scratch / f"{key}.tokens", durable=False) as file:
        batches = tokenize_unit((job.unit, 0), job.source, job.tokenizer, job.on_bad_document)
        for batch in batches:
            tokens = np.ascontiguousarray(batch.tokens, TOKEN).view(np.uint8).data
            file.write(tokens)
            checksums.add(tokens)
            counts.append(batch.counts)
            rows.append(batch.rows)
            offsets.append(batch.offsets)
            token_counts.append(batch.token_counts)
            for reason, left_out in batch.skipped.items():
                skipped.setdefault(reason, []).append(left_out)
            text_bytes, next_row = text_bytes + batch.text_bytes, batch.next_row
    index = {"counts": _joined(counts), "rows": _joined(rows)}
    for name, parts in (("offsets", offsets), ("token_counts", token_counts)):
        there = [part for part in parts if part is not None]
        if there and len(there) == len(parts):
            index[name] = _joined(there)
    index |= {f"skipped {reason}": _joined(parts) for reason, parts in skipped.items()}
    stored = io.BytesIO()
    np.savez(stored, allow_pickle=False, **index)
    with files.atomic_write(job.scratch / f"{key}.npz", durable=False) as file:
        file.write(stored.getbuffer())
    record = UnitRecord(
        job.unit,
        tokens=int(index["counts"].sum()),
        documents=len(index["counts"]),
        rows=next_row,
        text_bytes=text_bytes,
        checksums=(zlib.crc32(stored.getbuffer()), *checksums.values()),
    )
    files.write_json(job.scratch / f"{key}.json", asdict(record), durable=False)
    return record


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)


class _Checksums:
    """CRC-32 of each CHECKED_BYTES of what is added."""

    def __init__(self) -> None:
        self.whole: list[int] = []
        self.current, self.size = 0, 0  # of the bytes since the last whole one

    def add(self, data: memoryview) -> None:
        while len(data):
            part = data[: CHECKED_BYTES - self.size]
            self.current, self.size = zlib.crc32(part, self.current), self.size + len(part)
            if self.size == CHECKED_BYTES:
                self.whole.append(self.current)
                self.current, self.size = 0, 0
            data = data[len(part) :]

    def values(self) -> list[int]:
        return self.whole + ([self.current] if self.size else [])


def published(scratch: Path, unit: Unit) -> UnitRecord | None:
    """The record of a unit, where one is published."""
    try:
        record = json.loads((scratch / f"{unit_key(unit)}.json").read_text(encoding="utf-8"))
        typed = {"unit": Unit(**record["unit"]), "checksums": tuple(record["checksums"])}
        found = UnitRecord(**record | typed)
    except (FileNotFoundError, ValueError, LookupError, TypeError):  # none, or not whole
        return None
    same = replace(found.unit, first_row=None) == replace(unit, first_row=None)
    return found if same else None


def read_scratch(scratch: Path, record: UnitRecord, wanted: tuple[int, int]) -> TokenBatch:
    """A unit as one batch, its tokens mapped. wanted: the first of the tokens that are needed and
    the one behind the last, which are compared with their checksums. Raises ScratchError for what
    has changed."""
    key, (of_index, *of_tokens) = record.key, record.checksums
    damaged = ScratchError(f"{scratch / key}: damaged; remove {scratch} and run it again")
    tokens = np.zeros(0, TOKEN)
    try:
        stored = (scratch / f"{key}.npz").read_bytes()
        if record.tokens:  # an empty file cannot be mapped
            tokens = np.memmap(scratch / f"{key}.tokens", TOKEN, "r")
    except FileNotFoundError as error:
        raise ScratchError(f"{error.filename}: was removed; run the same command again") from None
    except ValueError:  # emptied
        raise damaged from None
    begin, end = (TOKEN.itemsize * token for token in wanted)
    content = tokens.view(np.uint8).data
    blocks = range(begin // CHECKED_BYTES, -(-end // CHECKED_BYTES))
    parts = (content[at * CHECKED_BYTES :][:CHECKED_BYTES] for at in blocks)
    if (
        len(tokens) != record.tokens
        or zlib.crc32(stored) != of_index
        or any(zlib.crc32(part) != of_tokens[at] for at, part in zip(blocks, parts, strict=True))
    ):
        raise damaged
    with np.load(io.BytesIO(stored), allow_pickle=False) as index:
        arrays = dict(index)
    prefix = "skipped "
    return TokenBatch(
        record.unit,
        tokens,
        arrays["counts"],
        arrays["rows"],
        arrays.get("offsets"),
        record.rows,
        {name.removeprefix(prefix): arrays[name] for name in arrays if name.startswith(prefix)},
        arrays.get("token_counts"),
        record.text_bytes,
    )


def remove_scratch(scratch: Path, record: UnitRecord) -> None:
    """Remove a unit: first what says that it is there."""
    for ending in (".json", ".npz", ".tokens"):
        (scratch / f"{record.key}{ending}").unlink(missing_ok=True)
