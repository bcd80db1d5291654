"""Tokens of units on the disk, published: what lies between tokenizing and packing.

    record = tokenize_to_scratch(UnitJob(source, unit, tokenizer, "stop", scratch))
    batch = read_scratch(scratch, record)       # the unit as one TokenBatch, its tokens mapped

    unit-000003-8192.tokens     the tokens, as uint16
    unit-000003-8192.npz        where its documents lie, and which rows were left out
    unit-000003-8192.json       published last: counts and hashes; without it no unit is there

A unit may be made twice, by a retry or a rerun: it has the same bytes under the same name.
"""

import hashlib
import json
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
    sha256: str  # of its tokens file, then of its index

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
    """Tokenize a unit and publish it; at once where it is published already. Raises SourceError."""
    if record := published(job.scratch, job.unit):
        return record
    key = unit_key(job.unit)
    counts, rows, offsets, token_counts, text_bytes, next_row = [], [], [], [], 0, 0
    skipped: dict[str, list[np.ndarray]] = {}
    with files.atomic_write(job.scratch / f"{key}.tokens") as file:
        batches = tokenize_unit((job.unit, 0), job.source, job.tokenizer, job.on_bad_document)
        for batch in batches:
            file.write(np.ascontiguousarray(batch.tokens, TOKEN).data)
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
    with files.atomic_write(job.scratch / f"{key}.npz") as file:
        np.savez(file, allow_pickle=False, **index)
    record = UnitRecord(
        job.unit,
        tokens=int(index["counts"].sum()),
        documents=len(index["counts"]),
        rows=next_row,
        text_bytes=text_bytes,
        sha256=_unit_sha256(job.scratch, key),
    )
    files.write_json(job.scratch / f"{key}.json", asdict(record))
    return record


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)


def _unit_sha256(scratch: Path, key: str) -> str:
    # Where shards are small, many of them are packed from one unit by the same process.
    parts = (files.sha256_once(scratch / f"{key}{ending}") for ending in (".tokens", ".npz"))
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def published(scratch: Path, unit: Unit) -> UnitRecord | None:
    """The record of a unit, where one is published."""
    try:
        record = json.loads((scratch / f"{unit_key(unit)}.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    found = UnitRecord(**{**record, "unit": Unit(**record["unit"])})
    same = replace(found.unit, first_row=None) == replace(unit, first_row=None)
    return found if same else None


def read_scratch(scratch: Path, record: UnitRecord) -> TokenBatch:
    """A unit as one batch, its tokens mapped. Raises ScratchError for files that have changed."""
    key = record.key
    try:
        if _unit_sha256(scratch, key) != record.sha256:
            raise ScratchError(f"{scratch / key}: damaged; remove {scratch} and run it again")
        with np.load(scratch / f"{key}.npz", allow_pickle=False) as index:
            arrays = dict(index)
    except FileNotFoundError as error:
        raise ScratchError(f"{error.filename}: was removed; run the same command again") from None
    tokens = np.zeros(0, TOKEN)
    if record.tokens:  # an empty file cannot be mapped
        tokens = np.memmap(scratch / f"{key}.tokens", TOKEN, "r")
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
