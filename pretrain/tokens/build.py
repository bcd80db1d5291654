"""Build a folder of shards from a source: go on from what is there, refuse what does not fit.

    manifest = build_shards(local_source(["input.txt"]), Path("data/input"), Settings(),
    Work(Tokenizer()))

The same call after any interruption continues; on a finished folder it returns at once.
"""

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from pretrain.text import arrow
from pretrain.text.documents import Position, Source, SourceError, changed_files, plan_units
from pretrain.tokens.estimate import estimate
from pretrain.tokens.packing import Packer
from pretrain.tokens.pipeline import UNIT_BYTES, TokenBatch, tokenize_units
from pretrain.tokens.shards import MANIFEST, NAME_PATTERN, Manifest, Shard
from pretrain.tokens.tokenizer import (
    END_OF_TEXT,
    TOKENIZER_NAME,
    VOCABULARY_SHA256,
    Tokenizer,
    TokenMismatch,
)

SMALL_SHARE = 0.1  # of a source with fewer than two shards goes to validation
KEPT_BYTES = (
    400_000_000  # of tokens of a source that is counted first: if it has no more, it is read once
)
SAMPLE_BYTES = 1 << 18  # of text are tokenized to estimate how many tokens a batch has
LOCK = ".lock"


class BuildRefused(ValueError):
    """The folder and what is asked do not fit together; the message is one line that says why."""


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


class Progress:
    """Hears how a build goes on; this one keeps it to itself."""

    def begin(self, what: str, manifest: Manifest) -> None:
        """A pass over the documents begins where the manifest ends: "counting" or "writing"."""

    def batch(self, batch: TokenBatch) -> None:
        """The next batch of this pass is there."""

    def shard(self, shard: Shard) -> None:
        """A shard is finished and durable."""


@dataclass
class Work:
    """How a build is done: nothing here changes the shards."""

    tokenizer: Tokenizer
    num_proc: int = 1
    unit_bytes: int = UNIT_BYTES
    on_bad_document: str = "stop"
    progress: Progress = field(default_factory=Progress)

    def count_tokens(self, texts) -> int:
        """About how many tokens an Arrow array of documents has, from the first of them."""
        ends = np.cumsum(arrow.lengths(texts))
        sample = texts[: 1 + int(np.searchsorted(ends, SAMPLE_BYTES))]
        try:
            tokens = len(self.tokenizer.encode_documents(sample)[0])
        except TokenMismatch:  # tokenize_unit will stop there and say where
            tokens = sample.nbytes // 4
        return round(tokens * ends[-1] / ends[len(sample) - 1]) if len(sample) else 0

    def batches(self, what: str, source: Source, manifest: Manifest) -> Iterator[TokenBatch]:
        """The source's tokens from the document at which the manifest ends, all of this one, to the
        last."""
        self.progress.begin(what, manifest)
        start = Position.from_json(manifest.next) if manifest.next else None
        units = plan_units(source, unit_bytes=self.unit_bytes, resume=start)
        first = next(units, None)
        if first is None:
            return
        skip_rows = start.row - first.first_row if start and start.file == first.file else 0
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
    the source has fewer than two shards (default: an estimate). Raises BuildRefused when the folder
    holds something else or another process writes it, SourceError when the source cannot be read,
    ShardError for a damaged manifest, OSError when the disk is full. Finished shards stay in any
    case, and the same call continues.
    """
    name = name or source.name
    folder.mkdir(parents=True, exist_ok=True)
    with _folder_lock(folder):
        manifest, total, batches = Manifest.load(folder), None, None
        if manifest:
            for path in leftovers(folder, manifest):
                path.unlink()
        else:
            _refuse_foreign_shards(folder)
        if manifest and manifest.shards:
            refuse_differences(folder, manifest, name, settings)
            refuse_changes(folder, manifest, source)
        else:
            if expected_tokens is None:
                expected = estimate(source, work.count_tokens, on_bad_document=work.on_bad_document)
                expected_tokens = expected.tokens
            manifest, total, batches = _begin(source, name, settings, work, expected_tokens)
            manifest.save(
                folder
            )  # before any shard: what a crash leaves over is then known to be ours
        if not manifest.complete:
            _pack(source, folder, settings, work, manifest=manifest, total=total, batches=batches)
    return manifest


def _begin(
    source: Source, name: str, settings: Settings, work: Work, expected_tokens: int
) -> tuple[Manifest, int | None, list[TokenBatch] | None]:
    """The manifest of a new folder; where tokens must be counted, their number, and they if not too
    many."""
    tokenizer = {
        "name": TOKENIZER_NAME,
        "vocabulary_sha256": VOCABULARY_SHA256,
        "end_of_text": END_OF_TEXT,
    }
    manifest = Manifest(name, source.description, settings.given(), tokenizer, val_tokens=0)
    share = settings.validation_share(expected_tokens)
    if not share:
        manifest.val_tokens = settings.val_tokens or settings.shard_size
        return manifest, None, None
    total, held, kept = 0, 0, []
    for batch in work.batches("counting", source, manifest):
        total += len(batch.tokens)
        held += batch.tokens.nbytes + 3 * batch.counts.nbytes  # as many are rows and offsets
        if held > KEPT_BYTES:
            kept = None
        elif kept is not None:
            kept.append(batch)
        if settings.max_tokens and total >= settings.max_tokens:
            total = settings.max_tokens
            break
    manifest.val_tokens = _share_of(total, share)
    return manifest, total, kept


def _share_of(total: int, share: float) -> int:
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
    )
    try:
        for batch in batches:
            packer.add(batch)
            if packer.done:
                return
        if packer.tokens == 0:
            files = (
                source.files[0].path if len(source.files) == 1 else f"all {len(source.files)} files"
            )
            raise SourceError(f"no document in {files}: whatever is there is empty or was left out")
        if (
            packer.only_validation and settings.default_val
        ):  # the estimate was too high: nothing to train on
            manifest.val_tokens = _share_of(packer.tokens, SMALL_SHARE)
            manifest.shards, manifest.next = [], None
            packer.abort()
            manifest.save(folder)
            _pack(source, folder, settings, work, manifest=manifest)
        else:
            packer.finish()
    finally:
        packer.abort()


# ---- what is in the folder already


@contextlib.contextmanager
def _folder_lock(folder: Path) -> Iterator[None]:
    """One writer at a time; the system releases the lock when its holder dies."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise BuildRefused(
            f"{folder}: another process is writing here; wait for it, or choose another folder with --out_dir"
        ) from None
    try:
        yield
    finally:
        lock.release()


def refuse_differences(folder: Path, manifest: Manifest, name: str, settings: Settings) -> None:
    """BuildRefused, naming each, if the folder was made with other settings."""
    there = {"shard_name": manifest.name, **manifest.settings}
    here = {"shard_name": name, **settings.given()}
    differences = [
        f"--{key} was {there.get(key, 'not given')}, now {here.get(key, 'not given')}"
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key)
    ]
    if differences:
        raise BuildRefused(
            f"{folder}: holds shards made with other settings: {'; '.join(differences)}. Use "
            "the same, choose another folder with --out_dir, or remove this one"
        )


def refuse_changes(folder: Path, manifest: Manifest, source: Source) -> None:
    """BuildRefused, naming them, if the source's files are not those that the folder was made from.

    Where local files lie may change; what is in them, and their order, may not.
    """
    there, here = dict(manifest.source), dict(source.description)
    files_there = there.pop("files")
    here.pop("files")
    changes = [
        f"{key} was {there.get(key)}, now {here.get(key)}"
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key)
    ]
    if not changes:
        changes = changed_files(files_there, source)
    if changes:
        more = f" and {len(changes) - 5} more" if len(changes) > 5 else ""
        raise BuildRefused(
            f"{folder}: holds shards of other documents: {'; '.join(changes[:5])}{more}. Give "
            "the same, choose another folder with --out_dir, or remove this one"
        )


def _refuse_foreign_shards(folder: Path) -> None:
    shards = sorted(path.name for path in folder.glob("*.npy") if NAME_PATTERN.fullmatch(path.name))
    if shards:
        others = " and others" if len(shards) > 1 else ""
        raise BuildRefused(
            f"{folder}: holds {shards[0]}{others} but no {MANIFEST}: not made here, so not to be "
            "continued; choose another folder with --out_dir"
        )


def leftovers(folder: Path, manifest: Manifest) -> list[Path]:
    """Files of a build that was killed: unfinished shards, and one that never came into the
    manifest."""
    listed, found = {shard.file for shard in manifest.shards}, []
    for path in folder.iterdir():
        parts = NAME_PATTERN.fullmatch(path.name.removesuffix(".tmp"))
        if parts and parts["name"] == manifest.name and path.name not in listed:
            found.append(path)
    return found
