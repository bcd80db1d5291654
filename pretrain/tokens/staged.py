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

Files are worked off in waves: what a wave's units hold is packed and removed before the next one,
so that scratch holds the tokens of about two waves. All machines must see the same folder.
"""

import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

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
from pretrain.tokens.folder import BuildRefused, prepare_folder
from pretrain.tokens.scratch import (
    UnitJob,
    UnitRecord,
    read_scratch,
    tokenize_to_scratch,
    unit_key,
)
from pretrain.tokens.shard_jobs import ShardJob, pack_shard
from pretrain.tokens.shards import MANIFEST, Manifest, ShardError

SCRATCH = ".staged"
PLAN = "plan.json"
UNIT_BYTES = (
    64 << 20
)  # stored bytes of text in a unit: seconds of work, so that a retry costs little
WAVE_SHARDS = 16  # of tokens in a wave, at least a unit for each worker

Result = tuple[Any, Any]


class Engine(Protocol):
    """Where units run, and nothing else."""

    workers: int

    def map(self, function: Callable[[Any], Any], tasks: Iterable[Any]) -> Iterator[Result]:
        """(task, function(task)) for every task, in the order in which they end. A worker that dies
        is replaced and its task is run again; an exception of the function is raised here."""


class DirectEngine:
    """One task after the other, in this process."""

    workers = 1

    def map(self, function: Callable[[Any], Any], tasks: Iterable[Any]) -> Iterator[Result]:
        """See Engine."""
        for task in tasks:
            yield task, function(task)


def scratch_bytes(settings: Settings, workers: int) -> int:
    """About how many bytes of units lie in the scratch at most, in a build that counts nothing
    first: the tokens of two waves, and where their documents lie."""
    return 3 * wave_bytes(settings, workers)


def wave_bytes(settings: Settings, workers: int) -> int:
    """Stored bytes of text in a wave; its tokens take about half as many."""
    return max(WAVE_SHARDS * 2 * settings.shard_size, workers * UNIT_BYTES)


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
        build = StagedBuild(source, folder, settings, work, engine)
        if manifest:
            rebuild_damaged(source, folder, manifest, work)
        if not (manifest and manifest.complete):
            manifest = build.run(manifest, name or source.name, expected_tokens)
        shutil.rmtree(build.scratch, ignore_errors=True)
    return manifest


class StagedBuild:
    """One build: the units that are tokenized and not yet packed, and the tokens before them."""

    def __init__(
        self, source: Source, folder: Path, settings: Settings, work: Work, engine: Engine
    ):
        self.source, self.folder, self.settings = source, folder, settings
        self.work, self.engine = work, engine
        self.scratch = folder / SCRATCH
        self.units: list[UnitRecord] = []  # waiting to be packed, in order
        self.start = 0  # number of their first token

    def run(self, manifest: Manifest | None, name: str, expected_tokens: int) -> Manifest:
        """Make what the manifest lacks, or all of it."""
        self._freeze_plan()
        share = None
        if manifest is None or not manifest.shards:
            manifest = new_manifest(self.source, name, self.settings)
            share = self.settings.validation_share(expected_tokens)
            manifest.val_tokens = self.settings.val_tokens or self.settings.shard_size
        self.work.progress.begin("tokenizing", manifest)
        resume = Position.from_json(manifest.next) if manifest.next else None
        waves = self._waves(resume)
        for last, wave in _with_last(waves):
            self._tokenize(wave)
            if resume is not None:
                self._find_place(manifest, resume)
                resume = None
            if share and not last and not self._has_enough():
                continue  # the size of shard 0 follows from the number of all tokens
            if share:
                manifest.val_tokens, share = share_of(self._total(), share), None
            if not manifest.shards:
                self.work.destination.publish(self.folder, manifest)
            self._pack(manifest, last)
            if manifest.complete:
                break
        if manifest.tokens == 0:
            raise SourceError(no_documents(self.source))
        if len(manifest.shards) == 1 and self.settings.default_val:
            return self._again_with_a_share(manifest)
        return manifest

    def _again_with_a_share(self, manifest: Manifest) -> Manifest:
        """The estimate was too high, and nothing is left to train on: a tenth for validation."""
        if manifest.val_tokens == share_of(manifest.tokens, SMALL_SHARE):
            return manifest
        manifest.val_tokens = share_of(manifest.tokens, SMALL_SHARE)
        manifest.shards, manifest.next, manifest.complete = [], None, False
        self.work.destination.publish(self.folder, manifest)
        self.units, self.start = [], 0
        for last, wave in _with_last(self._waves(None)):
            self._tokenize(wave)
            self._pack(manifest, last)
        return manifest

    def _freeze_plan(self) -> None:
        """Write down what is built; refuse to go on with the scratch of something else."""
        plan = {
            "source": self.source.description,
            "settings": self.settings.given(),
            "unit_bytes": UNIT_BYTES,
            "on_bad_document": self.work.on_bad_document,
        }
        text = json.dumps(plan, sort_keys=True)
        plan["sha256"] = hashlib.sha256(text.encode()).hexdigest()
        self.scratch.mkdir(exist_ok=True)
        path = self.scratch / PLAN
        if path.exists():
            if json.loads(path.read_text(encoding="utf-8")).get("sha256") != plan["sha256"]:
                raise BuildRefused(
                    f"{path}: another plan is under way here; give the settings it was begun with, "
                    f"or remove {self.scratch}"
                )
            return
        files.write_json(path, plan)

    def _waves(self, resume: Position | None) -> Iterator[list[Unit]]:
        """The units from a position on, as many at a time as make a wave. Each file's units are
        planned on their own, so that they are the same in every run."""
        size = wave_bytes(self.settings, self.engine.workers)
        wave: list[Unit] = []
        wave_size = 0  # in stored bytes
        first_file = resume.file if resume else 0
        for index in range(first_file, len(self.source.files)):
            units = file_units(self.source, index)
            for unit in _from_position(units, resume if index == first_file else None):
                wave.append(unit)
                wave_size += unit.num_bytes
                # Stored bytes stand for tokens' bytes: compressed text has fewer, plain text more.
                if wave_size >= size:
                    yield wave
                    wave, wave_size = [], 0
        yield wave

    def _tokenize(self, wave: list[Unit]) -> None:
        """Have the wave's units published, and note them in the source's order."""
        jobs = [
            UnitJob(
                with_one_file(self.source, unit.file),
                unit,
                self.work.tokenizer,
                self.work.on_bad_document,
                self.scratch,
            )
            for unit in wave
        ]
        records: dict[str, UnitRecord] = {}
        for _, record in self.engine.map(tokenize_to_scratch, jobs):
            records[record.key] = record
            self.work.progress.unit(record.unit, record.tokens, record.text_bytes)
        for unit in wave:
            record, row = records[unit_key(unit)], unit.first_row
            if row is None and self.units:  # of text files: known once those before are counted
                before = self.units[-1]
                if before.unit.file == unit.file and before.unit.first_row is not None:
                    row = before.unit.first_row + before.rows
            self.units.append(replace(record, unit=replace(unit, first_row=row)))

    def _find_place(self, manifest: Manifest, resume: Position) -> None:
        """Number the tokens of the units from the position at which the manifest ends."""
        batch = read_scratch(self.scratch, self.units[0])
        first_row, wanted = self.units[0].unit.first_row, resume.row
        if first_row is None:  # a text file's: the position has the row's byte, and so its row
            offsets = np.zeros(0) if batch.offsets is None else batch.offsets
            place = int(np.searchsorted(offsets, resume.offset or 0))
            first_row = wanted - int(batch.rows[place]) if place < len(offsets) else 0
            self._set_rows(self.units[0].unit.file, first_row)
        place = int(np.searchsorted(batch.rows, wanted - first_row))
        fits = place < len(batch.rows) and batch.rows[place] == wanted - first_row
        if not fits or not 0 < resume.token <= batch.counts[place]:
            raise ShardError(
                f"{self.folder / MANIFEST}: its next position does not fit: no document has row "
                f"{resume.row}, token {resume.token} of file {resume.file}; restore it, or remove "
                "the folder and build it again"
            )
        self.start = manifest.tokens - int(batch.counts[:place].sum()) - resume.token

    def _set_rows(self, file: int, first_row: int) -> None:
        """Number the rows of a file's units, which begin with this row."""
        known, self.units = self.units, []
        for record in known:
            if record.unit.file == file:
                record = replace(record, unit=replace(record.unit, first_row=first_row))
                first_row += record.rows
            self.units.append(record)

    def _total(self) -> int:
        """All tokens up to the end of the units at hand, at most max_tokens."""
        total = self.start + sum(record.tokens for record in self.units)
        return min(total, self.settings.max_tokens or total)

    def _has_enough(self) -> bool:
        return self.settings.max_tokens is not None and self._total() >= self.settings.max_tokens

    def _pack(self, manifest: Manifest, is_last: bool) -> None:
        """Pack every shard whose tokens are at hand, with is_last also one that is not full."""
        total = self._total()
        ends = list(
            itertools.accumulate((record.tokens for record in self.units), initial=self.start)
        )
        numbers, ends = ends[:-1], ends[1:]  # of each unit's first token, and behind its last
        is_last = is_last or self._has_enough()
        jobs: list[ShardJob] = []
        start = manifest.tokens
        while start < total:
            index = len(manifest.shards) + len(jobs)
            size = manifest.val_tokens if index == 0 else self.settings.shard_size
            stop = min(start + size, total)
            # Whether a full shard is the last one shows when there is a token behind it.
            if not is_last and stop + 1 > total:
                break
            ends_all = is_last and stop == total and not self._has_enough()
            jobs.append(
                self._shard_job(manifest, index, (start, stop), numbers, ends, ends_all=ends_all)
            )
            start = stop
        made = dict(self.engine.map(pack_shard, jobs))
        for job in jobs:
            shard, behind = made[job]
            manifest.shards.append(shard)
            manifest.next = behind
            manifest.complete = is_last and job.stop == total
        if jobs:
            # Once a wave: a manifest of 100,000 shards takes a second to write, and each of them
            # would ask for it anew.
            self.work.destination.publish(self.folder, manifest)
        for job in jobs:
            self.work.progress.shard(made[job][0])
        self._drop_packed(manifest.tokens)

    def _shard_job(
        self,
        manifest: Manifest,
        index: int,
        place: tuple[int, int],
        numbers: list[int],
        ends: list[int],
        *,
        ends_all: bool,
    ) -> ShardJob:
        """The job of tokens place[0] to place[1], with the units from the one that holds the token
        before them to that of the last one. ends_all: nothing comes after."""
        start, stop = place
        begin = 0 if start == 0 else int(np.searchsorted(ends, start))
        end = len(ends) if ends_all else int(np.searchsorted(ends, stop)) + 1
        units = tuple(zip(numbers[begin:end], self.units[begin:end], strict=True))
        return ShardJob(
            self.folder,
            self.scratch,
            manifest.name,
            manifest.ending,
            index,
            start,
            stop,
            units,
            ends_all,
        )

    def _drop_packed(self, packed: int) -> None:
        """Remove the units before the one that holds the last token in a shard."""
        while self.units and self.start + self.units[0].tokens < packed:
            record = self.units.pop(0)
            self.start += record.tokens
            for ending in (".json", ".npz", ".tokens"):  # first what says that it is there
                (self.scratch / f"{record.key}{ending}").unlink(missing_ok=True)


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


def _with_last(items: Iterable[Any]) -> Iterator[tuple[bool, Any]]:
    """(whether it is the last one, item)."""
    items = iter(items)
    item = next(items)
    for following in items:
        yield False, item
        item = following
    yield True, item
