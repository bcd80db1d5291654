"""What fineweb.py does once its flags are understood: plan, build, say what came of it; verify.

    status = run(Request(source=("input.txt",), settings=Settings()))

fineweb.py itself parses flags and returns the status.
"""

import contextlib
import errno
import shlex
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from pretrain.errors import UserError, first_line
from pretrain.text.documents import Source, hub_source, local_source
from pretrain.tokens.build import (
    Settings,
    Work,
    build_shards,
    refuse_changes,
    refuse_differences,
)
from pretrain.tokens.destination import Destination, StoreDestination, opened
from pretrain.tokens.engines import MAX_THREADS, cores, load_engine
from pretrain.tokens.estimate import Estimate, estimate
from pretrain.tokens.folder import leftovers
from pretrain.tokens.interruption import Stopped
from pretrain.tokens.owntext import without_files_below
from pretrain.tokens.progress import ConsoleProgress, in_bytes, plural, rounded
from pretrain.tokens.shards import DEFAULT_DATA_DIR, Manifest, Shard, ShardError
from pretrain.tokens.tokenizer import Tokenizer
from pretrain.tokens.verify import verify_folder

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Request:
    """What is asked of the program."""

    settings: Settings
    source: tuple[str, ...] = ()  # local files, folders, patterns; none: the settings' dataset
    out_dir: str | Path | None = None  # a folder, or the address of one in a store
    shard_name: str | None = None
    num_proc: int | None = None
    engine: str = "local"
    ray_address: str | None = None
    tokenizer_backend: str = "auto"
    check_every: int = 1000
    on_bad_document: str = "stop"
    dry_run: bool = False
    verify: bool = False

    def name(self, source: Source | None) -> str:
        """How the shards are called, known without asking the Hub."""
        if self.shard_name or source:
            return self.shard_name or source.name  # type: ignore[union-attr]
        dataset = str(self.settings.dataset).split("/")[-1]
        return "-".join([dataset, *filter(None, [self.settings.name])])


def run(request: Request) -> int:
    """Build or verify: the exit status. Raises UserError, and Stopped with what there is now."""
    folder, source, shown = None, None, None
    try:
        with opened(request.out_dir, request.dry_run or request.verify) as destination:
            folder = destination.folder or (Path(request.out_dir) if request.out_dir else None)
            shown = destination.address
            if request.source and not (folder and request.verify):
                source = local_source(
                    request.source,
                    text_column=request.settings.text_column,
                    on_bad_document=request.on_bad_document,
                )
            folder = folder or Path("data") / request.name(source)
            if request.verify:
                return verify(folder, destination)
            if source:
                source = without_files_below(folder, source, request.source)
            return build(request, folder, source, destination)
    except Stopped as stopped:
        stopped.note = kept(folder, shown)
        raise
    except OSError as error:
        once = " once there is room" if error.errno in FULL else ""
        raise UserError(f"{first_line(error)}; {kept(folder, shown)}{once}") from None


def kept(folder: Path | None, shown: str | None = None) -> str:
    """What a rerun will find. `shown`: where it lies, if that is not the folder."""
    with contextlib.suppress(ShardError):
        if folder and (manifest := Manifest.load(folder)) and manifest.shards:
            number = f"{len(manifest.shards)} finished {plural('shard', len(manifest.shards))}"
            tokens = f"{manifest.tokens:,} tokens"
            return f"{number} with {tokens} stay in {shown or folder}, the same command continues"
    return "no shard was finished yet, the same command starts again"


# ---- build


def build(request: Request, folder: Path, source: Source | None, destination: Destination) -> int:
    """Write the shards that are missing. Returns the exit status."""
    shown = destination.shown(folder)
    manifest = Manifest.load(folder)
    name, settings = request.name(source), request.settings
    damaged = False
    if manifest and manifest.shards:
        refuse_differences(folder, manifest, name, settings)
        if source:
            refuse_changes(folder, manifest, source)
        damaged = print_damaged(shown, destination.missing(folder, manifest))
        if manifest.complete and not damaged:  # seen without asking the Hub
            print(f"{shown}: finished before, nothing is left to do")
            print_result(shown, manifest)
            return 0
    source = source or open_dataset(settings, manifest)
    work = make_work(request, destination)
    expected = estimate(source, work.count_tokens, on_bad_document=request.on_bad_document)
    print_plan(folder, source, settings, expected, manifest, destination=destination)
    if request.dry_run:
        return 0
    work.progress = ConsoleProgress(expected, settings.max_tokens)
    make = load_engine(request.engine)
    with contextlib.closing(work.progress):
        manifest = make(request, source, folder, work, name=name, tokens=expected.tokens)
    print_result(shown, manifest)
    return 0


def build_here(
    request: Request, source: Source, folder: Path, work: Work, *, name: str, tokens: int
) -> Manifest:
    """On this machine."""
    return build_shards(source, folder, request.settings, work, name=name, expected_tokens=tokens)


def open_dataset(settings: Settings, manifest: Manifest | None) -> Source:
    """The settings' dataset on the Hub; what was begun stays with its commit. Raises
    SourceError."""
    begun = manifest.source.get("commit") if manifest and manifest.shards else None
    return hub_source(
        str(settings.dataset),
        name=settings.name,
        split=settings.split or "train",
        revision=begun or settings.revision or "main",
        text_column=settings.text_column,
    )


def make_work(request: Request, destination: Destination) -> Work:
    """How the build is done here. Raises TokenizerUnavailable."""
    # gigatoken starts threads of its own where one process has cores left beside ours
    parallel = request.num_proc in (None, 1) and cores() > MAX_THREADS
    tokenizer = Tokenizer(request.tokenizer_backend, request.check_every, parallel)
    num_proc = request.num_proc or (1 if tokenizer.backend == "gigatoken" else min(8, cores()))
    skips = request.on_bad_document
    return Work(tokenizer, num_proc, on_bad_document=skips, destination=destination)


def print_damaged(shown: str, shards: list[Shard]) -> bool:
    """Name the listed shards that are missing or cut short; returns whether there are any."""
    names = [shard.file for shard in shards]
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        made = "missing or of another size: made again from the documents"
        print(f"{shown}: {', '.join(names[:5])}{more} {made}")
    return bool(names)


def print_plan(
    folder: Path,
    source: Source,
    settings: Settings,
    expected: Estimate,
    manifest: Manifest | None,
    *,
    destination: Destination,
) -> None:
    """Say what will be done. Raises UserError where the disk has no room for it."""
    print_documents(source, expected)
    all_tokens = min(expected.tokens, settings.max_tokens or expected.tokens)
    exact = all_tokens == settings.max_tokens
    number = f"{all_tokens:,}" if exact else f"about {rounded(all_tokens)}"
    free = free_bytes(folder, manifest)
    disk = f"{in_bytes(2 * all_tokens)} in {folder} ({in_bytes(free)} free)"
    if destination.address:
        at_once = f"{in_bytes(4 * settings.shard_size)} at a time in {folder}"
        disk = f"{in_bytes(2 * all_tokens)} in {destination.address}, {at_once}"
    print(f"shards      {number} tokens, {settings.shard_size:,} in a shard, {disk}")
    there = manifest.tokens if manifest else 0
    if manifest and there:
        ready = f"{len(manifest.shards)} are there, {there:,} tokens"
        print(f"            {ready}: going on behind them")
    elif settings.default_val and settings.validation_share(expected.tokens):
        few = "a tenth of the tokens, as all are fewer than two shards"
        print(f"validation  {few} (--val_tokens N: so many)")
    needed = 2 * max(0, all_tokens - there)
    if destination.address:
        needed = min(needed, 4 * settings.shard_size)
    if needed > free:
        about = "" if exact else "about "
        room = f"needs {about}{in_bytes(needed)} more on its disk, where {in_bytes(free)} are free"
        raise UserError(f"{folder}: {room}; give --max_tokens, or another disk with --out_dir")


def print_documents(source: Source, expected: Estimate) -> None:
    """Where the documents come from, and how much there is."""
    place = source.description
    if place["kind"] == "hub":
        what = f"{place['dataset']}, {place['config']}, {place['split']}"
        print(f"dataset     {what}, commit {place['commit']}")
    rows = ""
    if expected.rows is not None:
        rows = f"{'' if expected.rows_exact else 'about '}{expected.rows:,} rows, "
    stored = in_bytes(sum(file.size for file in source.files))
    files = f"{len(source.files):,} {plural('file', len(source.files))}"
    read = in_bytes(expected.text_bytes)
    print(f"documents   {files}, {rows}{stored}, of which {read} are to be read")
    for note in source.notes:
        print(f"note: {note}")


def free_bytes(folder: Path, manifest: Manifest | None) -> int:
    """Room for shards on the folder's disk, with what a killed build left there."""
    parents = (folder.absolute(), *folder.absolute().parents)
    free = shutil.disk_usage(next(path for path in parents if path.exists())).free
    if manifest:
        free += sum(path.stat().st_size for path in leftovers(folder, manifest))
    return free


def print_result(folder: str, manifest: Manifest) -> None:
    """What the folder holds now, and what to do with it."""
    train = [shard for shard in manifest.shards if shard.split == "train"]
    trained = sum(shard.tokens for shard in train)
    shards = f"{trained:,} for training in {len(train)} {plural('shard', len(train))}"
    documents = f"{manifest.documents:,} {plural('document', manifest.documents)}"
    validation = f"{manifest.tokens - trained:,} for validation"
    print(f"{folder}: {manifest.tokens:,} tokens of {documents}: {validation}, {shards}")
    for reason in sorted({reason for shard in manifest.shards for reason in shard.skipped}):
        number = sum(shard.skipped.get(reason, 0) for shard in manifest.shards)
        noun = reason if reason.endswith("file") else f"{reason} document"
        print(f"left out: {number:,} {plural(noun, number)}")
    print_token_count(manifest)
    if train:
        default = Path(folder) == Path(DEFAULT_DATA_DIR)
        data_dir = "" if default else f" --data_dir {shlex.quote(folder)}"
        print(f"next: python train_gpt2.py{data_dir}")
    else:
        more = "give a smaller --val_tokens, or more documents, elsewhere"
        print(f"nothing is left to train on: {more}")


def print_token_count(manifest: Manifest) -> None:
    """Compare with what the source's token_count column (FineWeb has one) says of the same
    documents."""
    counts = [shard.token_count for shard in manifest.shards if shard.token_count]
    source, written = (sum(each[key] for each in counts) for key in ("source", "written"))
    if source:
        counted = f"{source:,} says the source, {written:,} were written"
        print(f"token_count: {counted}: {written - source:+,} ({(written - source) / source:+.4%})")


# ---- verify


def verify(folder: Path, destination: Destination) -> int:
    """Check a folder, and print what was found. Returns the exit status."""
    t0, shown = time.perf_counter(), destination.shown(folder)
    store = destination if isinstance(destination, StoreDestination) else None
    found = verify_folder(folder, store)
    for line in [*found.problems, *(f"note: {note}" for note in found.notes)]:
        print(line.replace(str(folder), shown))
    done = f"{found.shards} {plural('shard', found.shards)}, {found.tokens:,} tokens read"
    compared = f", {found.compared} documents encoded again" if found.compared else ""
    problems = f"{len(found.problems) or 'no'} {plural('problem', len(found.problems))}"
    print(f"{shown}: {done}{compared} in {time.perf_counter() - t0:.1f} s: {problems}")
    return 1 if found.problems else 0
