"""Packing: tokens in document order become shards, and the manifest says after each where the next
begins."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from pretrain.text.documents import Position, Unit
from pretrain.tokens.pipeline import TokenBatch
from pretrain.tokens.shards import (
    MANIFEST,
    Manifest,
    Shard,
    ShardError,
    ShardWriter,
    open_shard,
    shard_name,
)


class Packer:
    """Cuts a stream of TokenBatch into the shards of a folder, from the manifest's position on.

    `shard_size` is the number of tokens in a shard, the manifest's `val_tokens` that of shard 0;
    packing stops after `max_tokens` (None: at the end of the documents). The shards depend on the
    tokens alone, never on how they come in batches. Each finished shard is durable and in the
    manifest before the next begins. `total_tokens`, where known, lets the last shard have the right
    header from the start.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        *,
        shard_size: int,
        max_tokens: int | None = None,
        total_tokens: int | None = None,
        on_shard: Callable[[Shard], None] | None = None,
        publish: Callable[[Path, Manifest], None] = lambda folder, manifest: manifest.save(folder),
    ):
        self.folder, self.manifest = folder, manifest
        self.shard_size, self.on_shard, self.publish = shard_size, on_shard, publish
        self.max_tokens, self.total_tokens = max_tokens, total_tokens
        self.position = Position.from_json(manifest.next) if manifest.next else Position(0, 0)
        self.resuming = manifest.next is not None  # until the document at the position has come
        self.writer: ShardWriter | None = None
        # Rows count from the beginning of the file.
        self.unit: Unit | None = None
        self.unit_row = self.next_row = 0
        self._reset_counts()

    @property
    def done(self) -> bool:
        """Whether max_tokens is reached: no further batch is wanted."""
        return self.manifest.tokens == self.max_tokens

    @property
    def tokens(self) -> int:
        """All tokens so far, with those of the unfinished shard."""
        return self.manifest.tokens + (self.writer.tokens if self.writer else 0)

    @property
    def only_validation(self) -> bool:
        """Whether shard 0 is all there is so far."""
        return self.tokens > 0 and len(self.manifest.shards) + (self.writer is not None) == 1

    def add(self, batch: TokenBatch) -> None:
        """Write a batch, finishing as many shards as it fills."""
        first_row = self._first_row(batch)
        ends = np.cumsum(batch.counts)
        at, rows_seen = 0, -1  # what of the batch is in shards: tokens, rows up to this one
        if self.resuming and len(ends):
            self._check_position(batch, first_row)
            at, self.resuming = self.position.token, False
        while at < len(batch.tokens) and not self.done:
            writer = self.writer or self._begin_shard()
            stop = min(len(batch.tokens), at + writer.expected - writer.tokens)
            writer.write(batch.tokens[at:stop])
            self.documents += _count_between(ends - batch.counts, at, stop)
            self._sum_token_count(batch, ends, at, stop)
            last, self.position = position_behind(batch, ends, stop, first_row)
            at = stop
            if writer.tokens == writer.expected:
                self._count_skipped(batch, rows_seen, batch.rows[last])
                rows_seen = batch.rows[last]
                self._end_shard()
        if not self.done:
            self._count_skipped(batch, rows_seen, batch.next_row)

    def finish(self) -> None:
        """Nothing comes after: finish the last shard, however short, and mark the manifest
        complete.

        There must have been a document. Raises ShardError if the one at which the manifest ends
        did not come.
        """
        if self.resuming:
            raise self._wrong_position("there are no documents from there on")
        if self.writer:
            self._end_shard(complete=True)
            return
        last = self.manifest.shards[-1]
        for reason, count in self.skipped.items():  # rows left out behind the last document
            more = {reason: last.skipped.get(reason, 0) + count}
            last.skipped = dict(sorted({**last.skipped, **more}.items()))
        self.manifest.complete = True
        self.publish(self.folder, self.manifest)

    def abort(self) -> None:
        """Drop the unfinished shard; the finished ones stay."""
        if self.writer:
            self.writer.abort()
            self.writer = None

    def _first_row(self, batch: TokenBatch) -> int:
        """The file's row number of the unit's first row: counted here where the plan could not know
        it."""
        if batch.unit != self.unit:
            same_file = self.unit is not None and self.unit.file == batch.unit.file
            counted = self.unit_row + self.next_row if same_file else 0
            self.unit, self.unit_row = batch.unit, counted
            if batch.unit.first_row is not None:
                self.unit_row = batch.unit.first_row
        self.next_row = batch.next_row
        return self.unit_row

    def _check_position(self, batch: TokenBatch, first_row: int) -> None:
        """ShardError unless the batch begins with the document at the manifest's position, and that
        document's tokens up to there are those with which the last shard ends."""
        here, offset = self.position, None if batch.offsets is None else int(batch.offsets[0])
        if (batch.unit.file, first_row + int(batch.rows[0]), offset) != (
            here.file,
            here.row,
            here.offset,
        ):
            raise self._wrong_position("no document begins there")
        if not 0 < here.token <= batch.counts[0]:
            raise self._wrong_position(f"the document there has {batch.counts[0]:,} tokens")
        last = open_shard(self.folder / self.manifest.shards[-1].file)
        before = batch.tokens[max(0, here.token - len(last)) : here.token]
        if not np.array_equal(last[len(last) - len(before) :], before):
            raise self._wrong_position(
                "the document there is not the one that the last shard ends in"
            )

    def _wrong_position(self, why: str) -> ShardError:
        here = self.position
        return ShardError(
            f"{self.folder / MANIFEST}: its next position, file {here.file}, row {here.row}, token "
            f"{here.token}, does not fit: {why}; restore it, or remove the folder and build it "
            "again"
        )

    def _begin_shard(self) -> ShardWriter:
        index = len(self.manifest.shards)
        size = self.manifest.val_tokens if index == 0 else self.shard_size
        for end in (self.max_tokens, self.total_tokens):
            size = size if end is None else min(size, end - self.manifest.tokens)
        split, ending = "val" if index == 0 else "train", self.manifest.ending
        name = shard_name(self.manifest.name, split, index, ending)
        self.first = self.position
        self.writer = ShardWriter(self.folder / name, size)
        return self.writer

    def _end_shard(self, complete: bool = False) -> None:
        writer, self.writer = self.writer, None
        assert writer
        try:
            digest = writer.close()
        except BaseException:
            writer.abort()
            raise
        split = "train" if self.manifest.shards else "val"
        shard = Shard(
            writer.path.name,
            split,
            writer.tokens,
            self.documents,
            digest,
            self.first.to_json(),
            dict(sorted(self.skipped.items())),
            self.token_count,
        )
        self.manifest.shards.append(shard)
        self.manifest.next = self.position.to_json()
        self.manifest.complete = complete or self.done
        self.publish(self.folder, self.manifest)
        self._reset_counts()
        if self.on_shard:
            self.on_shard(shard)

    def _reset_counts(self) -> None:
        """What the manifest will say about the shard that begins: see Shard."""
        self.documents = 0
        self.skipped: dict[str, int] = {}
        self.token_count: dict[str, int] | None = None

    def _count_skipped(self, batch: TokenBatch, after: int, until: int) -> None:
        for reason, rows in batch.skipped.items():
            if count := _count_between(rows, after + 1, until):
                self.skipped[reason] = self.skipped.get(reason, 0) + count

    def _sum_token_count(self, batch: TokenBatch, ends: np.ndarray, at: int, stop: int) -> None:
        if batch.token_counts is not None:
            ended = slice(*np.searchsorted(ends, [at + 1, stop + 1]))
            sums = self.token_count = self.token_count or {"source": 0, "written": 0}
            sums["source"] += int(batch.token_counts[ended].sum())
            # the column is without end-of-text
            sums["written"] += int((batch.counts[ended] - 1).sum())


def position_behind(
    batch: TokenBatch, ends: np.ndarray, stop: int, first_row: int
) -> tuple[int, Position]:
    """The document that holds the batch's token `stop` - 1, by its place in the batch, and the
    position behind that token. ends: int64 (documents,), where each document ends in the batch;
    first_row: the file's row number of the unit's first row."""
    last = int(np.searchsorted(ends, stop))
    offset = None if batch.offsets is None else int(batch.offsets[last])
    token = int(stop - ends[last] + batch.counts[last])
    return last, Position(batch.unit.file, first_row + int(batch.rows[last]), token, offset)


def _count_between(sorted_values: np.ndarray, start: int, stop: int) -> int:
    """How many of the values are in [start, stop)."""
    return int(np.diff(np.searchsorted(sorted_values, [start, stop]))[0])
