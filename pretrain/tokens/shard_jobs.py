"""One shard, packed from the units that overlap it, by any worker and in any order.

    shard, behind = pack_shard(job)      # what the manifest says of it, and where the next begins

A shard depends on its units alone, so that one made twice has the same bytes.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pretrain.text.documents import Position
from pretrain.tokens.packing import Packer, position_behind
from pretrain.tokens.pipeline import TokenBatch
from pretrain.tokens.scratch import UnitRecord, read_scratch
from pretrain.tokens.shards import Manifest, Shard


@dataclass(frozen=True)
class ShardJob:
    """A shard to pack: tokens [start, stop) of the source, out of `units`."""

    folder: Path
    scratch: Path
    name: str
    ending: str
    index: int
    start: int
    stop: int
    units: tuple[tuple[int, UnitRecord], ...]  # (number of its first token, unit), in order
    is_last: bool  # nothing comes after: rows left out behind it are its own

    @property
    def size(self) -> int:
        return self.stop - self.start


class _OneShardManifest(Manifest):
    """What Packer needs to know of the shards before; it is never written."""

    def save(self, folder: Path) -> None:
        pass


class _OneShardPacker(Packer):
    """Begins where it is told: the shard before may not be there yet."""

    def _check_position(self, batch: TokenBatch, first_row: int) -> None:
        pass


def pack_shard(job: ShardJob) -> tuple[Shard, dict]:
    """Write one shard; returns what the manifest says of it, and the position behind it."""
    batches = []
    for number, record in job.units:
        wanted = max(0, job.start - number), min(record.tokens, job.stop - number)
        batches.append(read_scratch(job.scratch, record, wanted))
    position = None
    if job.start > 0:  # the first unit holds the token before the shard, which tells the position
        batches[0], position = _begin_at(batches[0], job.start - job.units[0][0])
    val = "val" if job.index == 0 else "train"
    before = [Shard("", val, job.start, 0, "", {})] + [Shard("", val, 0, 0, "", {})] * job.index
    manifest = _OneShardManifest(
        job.name,
        {},
        {"format": job.ending},
        {},
        val_tokens=job.size,
        shards=before[: job.index],
        next=position.to_json() if position else None,
    )
    packer = _OneShardPacker(
        job.folder,
        manifest,
        shard_size=job.size,
        max_tokens=None if job.is_last else job.stop,
        total_tokens=job.stop,
    )
    try:
        for batch in batches:
            packer.add(batch)
        if job.is_last:
            packer.finish()
    finally:
        packer.abort()
    return manifest.shards[job.index], manifest.next or {}


def _begin_at(batch: TokenBatch, token: int) -> tuple[TokenBatch, Position]:
    """The batch from the document on that holds its token `token` - 1, and the position behind that
    token. Rows left out up to there are counted with the shard that has this token."""
    ends = np.cumsum(batch.counts)
    first, position = position_behind(batch, ends, token, batch.unit.first_row or 0)
    row = batch.rows[first]
    from_there = replace(
        batch,
        tokens=batch.tokens[ends[first] - batch.counts[first] :],
        counts=batch.counts[first:],
        rows=batch.rows[first:],
        offsets=None if batch.offsets is None else batch.offsets[first:],
        token_counts=None if batch.token_counts is None else batch.token_counts[first:],
        skipped={reason: rows[rows > row] for reason, rows in batch.skipped.items()},
    )
    return from_there, position
