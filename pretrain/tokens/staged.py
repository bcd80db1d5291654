"""Shards in steps that any machine may take: plan, tokenize units, pack shards, each published.

    manifest = build_staged(source, folder, settings, work, RayEngine("auto"))

The steps meet in files alone, never in what an engine says it has done:

    .staged/plan.json               what is built, frozen: another plan here is refused
    .staged/unit-...                tokens of units, each published once: see scratch.py
    NAME_train_000001.npy           a shard, packed from the units that overlap it
    manifest.json                   which shards there are

A unit or a shard may be made twice, by a retry or by a rerun: it has the same bytes and the same
name, so that at-least-once execution gives exactly-once output. The bytes of shards and manifest
are those of `build_shards` on one machine.

A shard is packed as soon as the units up to its end are there, while others are still tokenized;
units that are packed are removed, and so much is tokenized ahead as scratch_bytes() says. All
machines must see the same folder.
"""

import hashlib
import itertools
import json
import shutil
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pretrain import files
from pretrain.text.documents import Position, Source, SourceError, Unit, plan_units
from pretrain.tokens.build import (
    SMALL_SHARE,
    Settings,
    Work,
    new_manifest,
    no_documents,
    rebuild_damaged,
    share_of,
)
from pretrain.tokens.engines import Engine
from pretrain.tokens.folder import BuildRefused, prepare_folder
from pretrain.tokens.formats import TOKEN
from pretrain.tokens.scratch import (
    UnitJob,
    UnitRecord,
    read_scratch,
    remove_scratch,
    tokenize_to_scratch,
    unit_key,
)
from pretrain.tokens.shard_jobs import ShardJob, pack_shard
from pretrain.tokens.shards import MANIFEST, Manifest, Shard, ShardError

SCRATCH = ".staged"
PLAN = "plan.json"
VERSION = 2  # of what lies in the scratch
# Stored bytes of text in a unit: seconds of work, so that a retry costs little.
UNIT_BYTES = 64 << 20
# Tokens ahead of the shards: of so many shards, at least so many units for each worker.
AHEAD_SHARDS, AHEAD_UNITS = 8, 3
PUBLISHING_SHARE = 0.1  # of the time, at most: a manifest of 100,000 shards takes a second to write

Job = UnitJob | ShardJob


def scratch_bytes(settings: Settings, workers: int) -> int:
    """About how many bytes of tokens lie in the scratch at most, in a build that counts nothing
    first."""
    size = TOKEN.itemsize * settings.shard_size
    return max(AHEAD_SHARDS * size, AHEAD_UNITS * workers * UNIT_BYTES)


def do(job: Job) -> Any:
    """What any worker does with a job: the UnitRecord of a unit, or a shard and the position behind
    it."""
    return tokenize_to_scratch(job) if isinstance(job, UnitJob) else pack_shard(job)


def build_staged(
    source: Source,
    folder: Path,
    settings: Settings,
    work: Work,
    engine: Engine,
    *,
    name: str | None = None,
    expected_tokens: int,
) -> Manifest:
    """Like build_shards, with units and shards made by an engine's workers. The same call after any
    interruption goes on with the units and shards that are published.

    Raises like build_shards, and BuildRefused where the scratch holds another plan.
    """
    with prepare_folder(source, folder, settings, name or source.name) as manifest:
        if manifest:
            rebuild_damaged(source, folder, manifest, work)
        if not (manifest and manifest.complete):
            share = None
            freeze_plan(source, folder, settings, work)
            if manifest is None or not manifest.shards:
                manifest = new_manifest(source, name or source.name, settings)
                share = settings.validation_share(expected_tokens)
                manifest.val_tokens = settings.val_tokens or settings.shard_size
            work.progress.begin("tokenizing", manifest)
            build = StagedBuild(
                source, folder, settings, work, engine, manifest=manifest, share=share
            )
            build.run()
            if manifest.tokens == 0:
                raise SourceError(no_documents(source))
        shutil.rmtree(folder / SCRATCH, ignore_errors=True)
    return manifest


def freeze_plan(source: Source, folder: Path, settings: Settings, work: Work) -> None:
    """Write down what is built; refuse to go on with the scratch of something else."""
    plan = {
        "version": VERSION,
        "source": source.description,
        "settings": settings.given(),
        "unit_bytes": UNIT_BYTES,
        "on_bad_document": work.on_bad_document,
    }
    text = json.dumps(plan, sort_keys=True)
    plan["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    path = folder / SCRATCH / PLAN
    path.parent.mkdir(exist_ok=True)
    if not path.exists():
        files.write_json(path, plan)
    elif json.loads(path.read_text(encoding="utf-8")).get("sha256") != plan["sha256"]:
        raise BuildRefused(
            f"{path}: another plan is under way here; give the settings it was begun with, "
            f"or remove {path.parent}"
        )


class StagedBuild:
    """The units from the manifest's position on, and the shards that they make.

    A unit is handed out, then its record comes, in any order. Once all before it are there it is
    numbered, and the shards that end in it can be packed. Once they are published it is dropped.
    """

    def __init__(
        self,
        source: Source,
        folder: Path,
        settings: Settings,
        work: Work,
        engine: Engine,
        *,
        manifest: Manifest,
        share: float | None,
    ):
        """manifest: what there is; it is extended. share: of all tokens, for the first shard, which
        is then packed when they are counted."""
        self.source, self.folder, self.settings = source, folder, settings
        self.work, self.engine, self.manifest, self.share = work, engine, manifest, share
        self.scratch = folder / SCRATCH
        self.limit = scratch_bytes(settings, engine.workers)
        self.resume = Position.from_json(manifest.next) if manifest.next else None
        self.planned = _units_from(source, self.resume)
        self.next_unit = next(self.planned, None)
        self.handed_out: deque[Unit] = deque()  # and not numbered, in order
        self.records: dict[str, UnitRecord] = {}  # of those, as they come
        self.units: list[UnitRecord] = []  # numbered and not dropped, in order
        self.ends: list[int] = []  # the number of the token behind each of them
        self.start = 0  # number of their first token
        self.held = 0  # tokens that came, and are not dropped
        self.under_way = 0  # stored bytes of text in units whose records have not come
        self.seen_tokens, self.seen_bytes = 0, 0  # of all that came: tokens, stored bytes of text
        self.next_token = manifest.tokens  # the first that is in no shard's job
        self.packing: deque[ShardJob] = deque()  # and not in the manifest, in order
        self.last_shard: int | None = None  # its index, once its job is made
        self.packed: dict[int, tuple[Shard, dict]] = {}  # results of those, as they come
        self.unpublished: list[Shard] = []  # in the manifest here, and not yet on the disk
        self.publish_at = 0.0

    def run(self) -> None:
        """Make all shards that the manifest lacks."""
        for job, result in self.engine.map(do, self._jobs()):
            if isinstance(job, UnitJob):
                self._number(result)
            else:
                self.packed[job.index] = result
            self._publish()

    def _jobs(self) -> Iterator[Job | None]:
        """What to do next, packing first, which frees scratch."""
        while True:
            if job := self._next_shard():
                yield job
            elif unit_job := self._next_unit():
                yield unit_job
            elif self.handed_out or self.packing:
                yield None
            else:
                return

    # ---- units

    def _next_unit(self) -> UnitJob | None:
        """The next one to tokenize, if there is one and room for it."""
        unit, work = self.next_unit, self.work
        is_idle = not (self.handed_out or self.packing)
        # Before all tokens are counted nothing can be packed to make room.
        has_room = self.share is not None or is_idle or self._bytes_ahead() < self.limit
        if unit is None or self._has_enough() or not has_room:
            return None
        self.next_unit = next(self.planned, None)
        self.handed_out.append(unit)
        self.under_way += unit.num_bytes
        source = with_one_file(self.source, unit.file)
        return UnitJob(source, unit, work.tokenizer, work.on_bad_document, self.scratch)

    def _bytes_ahead(self) -> float:
        """Bytes of the tokens in scratch, and about those of the units that are on their way."""
        ratio = self.seen_tokens / self.seen_bytes if self.seen_bytes else 0
        return TOKEN.itemsize * (self.held + self.under_way * ratio)

    def _number(self, record: UnitRecord) -> None:
        """Note a unit that is published, and number those before which none is missing."""
        self.records[record.key] = record
        self.held += record.tokens
        self.under_way -= record.unit.num_bytes
        self.seen_tokens += record.tokens
        self.seen_bytes += record.unit.num_bytes
        self.work.progress.unit(record.unit, record.tokens, record.text_bytes)
        while self.handed_out and unit_key(self.handed_out[0]) in self.records:
            unit = self.handed_out.popleft()
            record, row = self.records.pop(unit_key(unit)), unit.first_row
            if row is None and self.units:  # of text files: known once those before are counted
                before = self.units[-1]
                if before.unit.file == unit.file and before.unit.first_row is not None:
                    row = before.unit.first_row + before.rows
            record = replace(record, unit=replace(unit, first_row=row))
            if self.resume is not None:
                record = self._find_place(record, self.resume)
                self.resume = None
            self.units.append(record)
            self.ends.append((self.ends[-1] if self.ends else self.start) + record.tokens)

    def _find_place(self, record: UnitRecord, resume: Position) -> UnitRecord:
        """Number the tokens of the first unit from the position at which the manifest ends; returns
        it with the number of its first row."""
        batch = read_scratch(self.scratch, record, (0, 0))
        first_row, wanted = record.unit.first_row, resume.row
        if first_row is None:  # a text file's: the position has the row's byte, and so its row
            offsets = np.zeros(0) if batch.offsets is None else batch.offsets
            place = int(np.searchsorted(offsets, resume.offset or 0))
            first_row = wanted - int(batch.rows[place]) if place < len(offsets) else 0
        place = int(np.searchsorted(batch.rows, wanted - first_row))
        fits = place < len(batch.rows) and batch.rows[place] == wanted - first_row
        if not fits or not 0 < resume.token <= batch.counts[place]:
            raise ShardError(
                f"{self.folder / MANIFEST}: its next position does not fit: no document has "
                f"row {resume.row}, token {resume.token} of file {resume.file}; restore it, or "
                "remove the folder and build it again"
            )
        self.start = self.manifest.tokens - int(batch.counts[:place].sum()) - resume.token
        return replace(record, unit=replace(record.unit, first_row=first_row))

    # ---- shards

    def _total(self) -> int:
        """All tokens up to the end of the numbered units, at most max_tokens."""
        total = self.ends[-1] if self.ends else self.start
        return min(total, self.settings.max_tokens or total)

    def _has_enough(self) -> bool:
        return self.settings.max_tokens is not None and self._total() >= self.settings.max_tokens

    def _next_shard(self) -> ShardJob | None:
        """The next one to pack, if its tokens are at hand; of the last one fewer may be."""
        total = self._total()
        is_last = self._has_enough() or (self.next_unit is None and not self.handed_out)
        start, manifest = self.next_token, self.manifest
        if start >= total or not (is_last or self.share is None):
            return None
        if self.share is not None:
            manifest.val_tokens, self.share = share_of(total, self.share), None
        index = len(manifest.shards) + len(self.packing)
        size = manifest.val_tokens if index == 0 else self.settings.shard_size
        if index == 0 and is_last and total <= size and self.settings.default_val:
            # The estimate was too high, and nothing would be left to train on.
            size = manifest.val_tokens = share_of(total, SMALL_SHARE)
        stop = min(start + size, total)
        # Whether a full shard is the last one shows when there is a token behind it.
        if not is_last and stop == total:
            return None
        if index == 0:
            self.work.destination.publish(self.folder, manifest)
        # From the unit that holds the token before it to that of its last one.
        begin = 0 if start == 0 else bisect_left(self.ends, start)
        end = bisect_left(self.ends, stop) + 1
        if is_last and stop == total:
            self.last_shard = index
        ends_all = index == self.last_shard and not self._has_enough()
        if ends_all:  # rows left out behind it are its own
            end = len(self.ends)
        numbers = [self.ends[at - 1] if at else self.start for at in range(begin, end)]
        units = tuple(zip(numbers, self.units[begin:end], strict=True))
        name, ending = manifest.name, manifest.ending
        place = (index, start, stop)
        job = ShardJob(self.folder, self.scratch, name, ending, *place, units, is_last=ends_all)
        self.packing.append(job)
        self.next_token = stop
        return job

    def _publish(self) -> None:
        """Have the shards before which none is missing in the manifest, now and then on the disk
        too, and drop the units that are in them."""
        manifest = self.manifest
        while self.packing and self.packing[0].index in self.packed:
            index = self.packing.popleft().index
            shard, manifest.next = self.packed.pop(index)
            manifest.shards.append(shard)
            manifest.complete = index == self.last_shard
            self.unpublished.append(shard)
        began = time.monotonic()
        is_due = began >= self.publish_at or self._bytes_ahead() >= self.limit
        if not (self.unpublished and (is_due or manifest.complete)):
            return
        self.work.destination.publish(self.folder, manifest)
        now = time.monotonic()
        self.publish_at = now + (now - began) / PUBLISHING_SHARE
        for shard in self.unpublished:
            self.work.progress.shard(shard)
        self.unpublished = []
        while self.units and self.ends[0] < manifest.tokens:
            record, self.start = self.units.pop(0), self.ends.pop(0)
            self.held -= record.tokens
            remove_scratch(self.scratch, record)


def with_one_file(source: Source, index: int) -> Source:
    """For a worker that reads this file alone: thousands of others, pickled with every unit of
    FineWeb, would be terabytes."""
    one: Any = {index: source.files[index]}
    return replace(source, files=one, description={})


def file_units(source: Source, index: int) -> Iterator[Unit]:
    """All units of one file."""
    start = Position(index, 0)
    units = plan_units(source, unit_bytes=UNIT_BYTES, resume=start)
    return itertools.takewhile(lambda unit: unit.file == index, units)


def _units_from(source: Source, position: Position | None) -> Iterator[Unit]:
    """All units, or those from a position on. Each file's are planned on their own, so that they
    are the same in every run."""
    first_file = position.file if position else 0
    for index in range(first_file, len(source.files)):
        units = file_units(source, index)
        yield from _from_position(units, position if index == first_file else None)


def _from_position(units: Iterator[Unit], position: Position | None) -> Iterator[Unit]:
    """A file's units from the one that holds the row of a position."""
    waiting: Unit | None = None
    for unit in units:
        if waiting is not None and not (position and _begins_by(unit, position)):
            yield waiting
            position = None
        waiting = unit
    if waiting is not None:
        yield waiting


def _begins_by(unit: Unit, position: Position) -> bool:
    """Whether a position's row is not before the unit's first."""
    if position.offset is not None:
        return unit.start <= position.offset
    return unit.first_row is not None and unit.first_row <= position.row
