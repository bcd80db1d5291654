"""Build a folder of shards from a source: go on from what is there, refuse what does not fit.

    source, work = local_source(["input.txt"]), Work(Tokenizer())
    manifest = build_shards(source, Path("data/input"), Settings(), work)

The same call after any interruption continues; on a finished folder it returns at once. The steps
are functions of their own, so that another engine can take them one by one: `prepare_folder`, the
plan (`plan_units`), `tokenize_unit`, `Packer`, `rebuild_shard`, and `verify_folder`.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from pretrain.text import arrow
from pretrain.text.documents import Position, Source, SourceError, Unit, plan_units
from pretrain.tokens.destination import Destination
from pretrain.tokens.estimate import estimate
from pretrain.tokens.folder import (
    BuildRefused,
    prepare_folder,
    refuse_changes,
    refuse_differences,
)
from pretrain.tokens.packing import Packer
from pretrain.tokens.pipeline import UNIT_BYTES, TokenBatch, tokenize_units
from pretrain.tokens.shards import MANIFEST, Manifest, Shard, ShardError, ShardWriter
from pretrain.tokens.tokenizer import (
    END_OF_TEXT,
    TOKENIZER_NAME,
    VOCABULARY_SHA256,
    Tokenizer,
    TokenMismatch,
)

__all__ = [
    "BuildRefused",
    "Callbacks",
    "Settings",
    "Work",
    "build_shards",
    "prepare_folder",
    "refuse_changes",
    "refuse_differences",
]

SMALL_SHARE = 0.1  # of a source with fewer than two shards goes to validation
KEPT_BYTES = 400_000_000  # of tokens that are counted first: where there are no more, read once
SAMPLE_BYTES = 1 << 18  # of text are tokenized to estimate how many tokens a batch has


@dataclass(frozen=True)
class Settings:
    """What decides the shards' bytes beside the documents; kept in the manifest.

    In tokens: `shard_size`; `val_tokens`, the size of shard 0; `max_tokens`, in all shards
    together. `val_fraction` is shard 0's share of all tokens. With neither of the two, shard 0 has
    shard_size tokens, or a tenth of all where these are fewer than two shards.
    """

    shard_size: int = 100_000_000
    val_tokens: int | None = None
    val_fraction: float | None = None
    max_tokens: int | None = None
    text_column: str = "text"
    format: str | None = None  # of the shards: None is "npy", and "bin" llm.c's
    dataset: str | None = None  # this and what follows: for sources on the Hub
    name: str | None = None
    split: str | None = None
    revision: str | None = None

    @property
    def default_val(self) -> bool:
        return self.val_tokens is None and self.val_fraction is None

    def validation_share(self, expected_tokens: int) -> float | None:
        """Shard 0's share of all tokens where a share decides its size, else None."""
        if not self.default_val:
            return self.val_fraction
        expected = min(expected_tokens, self.max_tokens or expected_tokens)
        return SMALL_SHARE if expected < 2 * self.shard_size else None

    def given(self) -> dict:
        """For the manifest."""
        return {key: value for key, value in asdict(self).items() if value is not None}


class Callbacks:
    """Callbacks of a build; the default ignores them."""

    def begin(self, what: str, manifest: Manifest) -> None:
        """A pass over documents begins: "counting" or "writing" where the manifest ends,
        "repairing" at a shard that is made again."""

    def batch(self, batch: TokenBatch) -> None:
        """The next batch of this pass is there."""

    def unit(self, unit: Unit, tokens: int, text_bytes: int) -> None:
        """A unit is tokenized and published; units come in any order."""

    def shard(self, shard: Shard) -> None:
        """A shard is finished and durable."""


@dataclass
class Work:
    """How a build is done: nothing here changes the shards."""

    tokenizer: Tokenizer
    num_proc: int = 1
    unit_bytes: int = UNIT_BYTES
    on_bad_document: str = "stop"
    progress: Callbacks = field(default_factory=Callbacks)
    destination: Destination = field(default_factory=Destination)

    def count_tokens(self, texts) -> int:
        """About how many tokens an Arrow array of documents has, from the first of them."""
        ends = np.cumsum(arrow.lengths(texts))
        sample = texts[: 1 + int(np.searchsorted(ends, SAMPLE_BYTES))]
        try:
            tokens = len(self.tokenizer.encode_documents(sample)[0])
        except TokenMismatch:  # tokenize_unit will stop there and say where
            tokens = sample.nbytes // 4
        return round(tokens * ends[-1] / ends[len(sample) - 1]) if len(sample) else 0

    def batches(
        self, what: str, source: Source, manifest: Manifest, start: Position | None = None
    ) -> Iterator[TokenBatch]:
        """The source's tokens from a position's document on, all of this one, to the last. Without
        `start` it is where the manifest ends."""
        self.progress.begin(what, manifest)
        if start is None and manifest.next:
            start = Position.from_json(manifest.next)
        units = plan_units(source, unit_bytes=self.unit_bytes, resume=start)
        first = next(units, None)
        if first is None:
            return
        skip_rows = start.row - (first.first_row or 0) if start and start.file == first.file else 0
        for batch in tokenize_units(
            source,
            itertools.chain([first], units),
            self.tokenizer,
            num_proc=self.num_proc,
            skip_rows=skip_rows,
            on_bad_document=self.on_bad_document,
        ):
            self.progress.batch(batch)
            yield batch


def build_shards(
    source: Source,
    folder: Path,
    settings: Settings,
    work: Work,
    *,
    name: str | None = None,
    expected_tokens: int | None = None,
) -> Manifest:
    """Write the source's shards into `folder`, or those still missing, and return the manifest.

    `name` begins the shards' file names (default: the source's). `expected_tokens` tells whether
    the source has fewer than two shards (default: an estimate). Shards that the manifest lists and
    that are not there are made again first, to the same bytes. Raises BuildRefused when the folder
    holds something else, files.Locked when another process writes it, SourceError when the source
    cannot be read, ShardError for a damaged manifest, OSError when the disk is full. Finished
    shards stay in any case, and the same call continues.
    """
    name = name or source.name
    with prepare_folder(source, folder, settings, name) as manifest:
        total, batches = None, None
        if manifest and manifest.shards:
            rebuild_damaged(source, folder, manifest, work)
        else:
            if expected_tokens is None:
                expected = estimate(source, work.count_tokens, on_bad_document=work.on_bad_document)
                expected_tokens = expected.tokens
            manifest, total, batches = _begin(source, name, settings, work, expected_tokens)
            # before any shard: what a crash leaves over is known to be ours
            work.destination.publish(folder, manifest)
        if not manifest.complete:
            _pack(source, folder, settings, work, manifest=manifest, total=total, batches=batches)
    return manifest


def rebuild_damaged(source: Source, folder: Path, manifest: Manifest, work: Work) -> None:
    """Make the listed shards again that are missing or of another size. Raises like
    rebuild_shard."""
    for shard in work.destination.missing(folder, manifest):
        rebuild_shard(source, folder, manifest, shard, work)
        work.destination.publish(folder, manifest)


def rebuild_shard(
    source: Source, folder: Path, manifest: Manifest, shard: Shard, work: Work
) -> None:
    """Make one listed shard again, from its recorded position. Raises ShardError where the
    documents do not give its recorded bytes, and leaves the folder as it was."""
    if not shard.first:
        raise ShardError(
            f"{folder / shard.file}: missing, and {MANIFEST} does not say where it begins; "
            "restore it, or remove the folder and build it again"
        )
    start = Position.from_json(shard.first)
    skip, batches = start.token, work.batches("repairing", source, manifest, start)
    writer = ShardWriter(folder / shard.file, shard.tokens)
    try:
        for batch in batches:
            tokens = batch.tokens[skip : skip + shard.tokens - writer.tokens]
            skip = max(0, skip - len(batch.tokens))
            writer.write(tokens)
            if writer.tokens == shard.tokens:
                break
        writer.close(shard.sha256)
    finally:
        writer.abort()


def new_manifest(source: Source, name: str, settings: Settings) -> Manifest:
    """The manifest of a folder that has no shards yet."""
    tokenizer = {
        "name": TOKENIZER_NAME,
        "vocabulary_sha256": VOCABULARY_SHA256,
        "end_of_text": END_OF_TEXT,
    }
    return Manifest(name, source.description, settings.given(), tokenizer, val_tokens=0)


def no_documents(source: Source) -> str:
    """What is said of a source that holds nothing."""
    files = source.files[0].path if len(source.files) == 1 else f"all {len(source.files)} files"
    return f"no document in {files}: whatever is there is empty or was left out"


def _begin(
    source: Source, name: str, settings: Settings, work: Work, expected_tokens: int
) -> tuple[Manifest, int | None, list[TokenBatch] | None]:
    """The manifest of a new folder; where tokens must be counted, their number, and they if not too
    many."""
    manifest = new_manifest(source, name, settings)
    share = settings.validation_share(expected_tokens)
    if not share:
        manifest.val_tokens = settings.val_tokens or settings.shard_size
        return manifest, None, None
    kept: list[TokenBatch] | None = []
    total, kept_bytes = 0, 0
    for batch in work.batches("counting", source, manifest):
        total += len(batch.tokens)
        kept_bytes += batch.tokens.nbytes + 3 * batch.counts.nbytes  # so are rows and offsets
        if kept_bytes > KEPT_BYTES:
            kept = None
        elif kept is not None:
            kept.append(batch)
        if settings.max_tokens and total >= settings.max_tokens:
            total = settings.max_tokens
            break
    manifest.val_tokens = share_of(total, share)
    return manifest, total, kept


def share_of(total: int, share: float) -> int:
    """Tokens for validation."""
    return max(1, int(share * total))


def _pack(
    source: Source,
    folder: Path,
    settings: Settings,
    work: Work,
    *,
    manifest: Manifest,
    total: int | None = None,
    batches: Iterable[TokenBatch] | None = None,
) -> None:
    """Write what the manifest lacks. `total`, `batches`: the source's tokens, where they are
    known."""
    if batches is None:
        batches = work.batches("writing", source, manifest)
    packer = Packer(
        folder,
        manifest,
        shard_size=settings.shard_size,
        max_tokens=settings.max_tokens,
        total_tokens=total,
        on_shard=work.progress.shard,
        publish=work.destination.publish,
    )
    try:
        for batch in batches:
            packer.add(batch)
            if packer.done:
                return
        if packer.tokens == 0:
            raise SourceError(no_documents(source))
        if packer.only_validation and settings.default_val and not packer.resuming:
            # the estimate was too high: nothing to train on
            manifest.val_tokens = share_of(packer.tokens, SMALL_SHARE)
            manifest.shards, manifest.next = [], None
            packer.abort()
            work.destination.publish(folder, manifest)
            _pack(source, folder, settings, work, manifest=manifest)
        else:
            packer.finish()
    finally:
        packer.abort()
