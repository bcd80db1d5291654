#!/usr/bin/env python3
"""Stage 1: documents in, GPT-2 tokens out, as shards that train_gpt2.py and others read.

    $ python fineweb.py                          # FineWeb-Edu sample-10BT: 10 billion tokens, 20 GB
    $ python fineweb.py --source input.txt       # your own text: .txt, .jsonl, .parquet, folders of
    them

Whatever stops it, the same command continues. `--help` tells the rest.
"""

import argparse
import contextlib
import errno
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

PROG = "fineweb.py"
DATASET, NAME = "HuggingFaceFW/fineweb-edu", "sample-10BT"
NAMED_DATASETS = (
    DATASET,
    "HuggingFaceFW/fineweb",
)  # all of these is more than anyone wants by accident
ON_THE_HUB = ("dataset", "name", "split", "revision")  # flags that belong to datasets on the Hub

DESCRIPTION = """\
Turn documents into GPT-2 tokens to train on: FineWeb-Edu, another dataset on the Hugging Face Hub, or your
own files. Each document becomes token 50256 (end of text) and its own tokens; all of them, one after the
other, are cut into shards of --shard_size tokens: NumPy files of uint16. The first, NAME_val_000000.npy, is
for validation; NAME_train_000001.npy, NAME_train_000002.npy and so on are for training."""

EPILOG = f"""\
examples:
  python {PROG}                                      FineWeb-Edu, 10 billion tokens
  python {PROG} --max_tokens 500_000_000             the first half billion of them
  python {PROG} --dataset HuggingFaceFW/fineweb      FineWeb, as many
  python {PROG} --source input.txt                   a text, a tenth of it for validation
  python {PROG} --source corpus/ 'more/*.jsonl.gz' --text_column content
  python {PROG} --source corpus/ --dry_run           what would be done, and nothing else
  python {PROG} --verify --out_dir data/input        are the shards still what was written?

what is written: the shards and manifest.json, which records where the documents came from and, for each
  shard, its tokens, documents, SHA-256 (as sha256sum prints it) and position. The same documents and
  settings give the same bytes, with any number of processes and after any interruption.
when it stops: run the same command again. Finished shards stay, the unfinished one is made anew, what came
  before is not read again. Other settings or other documents in the same folder are refused. In a finished
  folder the command ends at once.
what it takes: 2 bytes of disk per token, for the default 20 GB, and 28 GB of network, which are not stored.
  A core tokenizes tens of millions of tokens per second; reading from the Hub takes what the connection
  needs. Memory stays below 2 GB, however much is read.
next: python train_gpt2.py --data_dir FOLDER
"""


# ---- arguments


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        PROG,
        description=DESCRIPTION,
        epilog=EPILOG,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_document_flags(parser.add_argument_group("documents").add_argument)
    add_shard_flags(parser.add_argument_group("shards").add_argument)
    add_work_flags(parser.add_argument_group("work (changes nothing in the shards)").add_argument)
    args = parser.parse_args(argv)
    if problems := find_problems(args):
        parser.error("; ".join(problems))
    if not args.source:
        args.dataset = args.dataset or DATASET
        args.name = args.name or (NAME if args.dataset in NAMED_DATASETS else None)
        args.split, args.revision = args.split or "train", args.revision or "main"
    return args


def add_document_flags(add) -> None:
    add("--dataset", metavar="OWNER/NAME", help=f"dataset on the Hub (default: {DATASET})")
    add(
        "--name",
        help=f"its configuration (default: {NAME} for FineWeb and FineWeb-Edu, else the dataset's)",
    )
    add("--split", help="its split (default: train)")
    add(
        "--revision",
        help="its branch, tag or commit (default: main); reruns stay with the commit of the first",
    )
    add(
        "--source",
        nargs="+",
        metavar="PATH",
        help="local files, folders, patterns instead of a dataset: .parquet; .jsonl; .txt, cut in documents "
        "at lines <|endoftext|>; the last two also as .gz and .zst",
    )
    add("--text_column", default="text", help="column or key with the text (default: %(default)s)")
    add(
        "--max_tokens",
        type=count,
        metavar="N",
        help="stop after exactly so many tokens (default: all)",
    )
    add(
        "--on_bad_document",
        choices=("stop", "skip"),
        default="stop",
        help="on broken JSON, invalid UTF-8, a truncated parquet file and the like: stop and say where, or "
        "leave it out and count it (default: %(default)s)",
    )


def add_shard_flags(add) -> None:
    add("--out_dir", type=Path, help="folder to write (default: data/SHARD_NAME)")
    add(
        "--shard_name",
        help="how file names begin (default: dataset and configuration, or name of the source)",
    )
    add(
        "--shard_size",
        type=count,
        default=10**8,
        metavar="N",
        help="tokens in a shard (default: 100_000_000)",
    )
    add(
        "--val_tokens",
        type=count,
        metavar="N",
        help="tokens in the validation shard (default: --shard_size, or a tenth of all where all are fewer "
        "than two shards)",
    )
    add(
        "--val_fraction",
        type=float,
        metavar="F",
        help="share of all tokens in the validation shard, such as 0.1; for --source only: it is counted "
        "first, and read twice if it has more than some 200 million tokens",
    )


def add_work_flags(add) -> None:
    add(
        "--num_proc",
        type=count,
        metavar="N",
        help="processes that tokenize; 1 is this one, from which gigatoken uses all cores (default: 1; with "
        "tiktoken one per core, at most 8)",
    )
    add(
        "--tokenizer_backend",
        choices=("auto", "gigatoken", "tiktoken"),
        default="auto",
        help="gigatoken is fast, tiktoken the reference, auto is gigatoken where installed (default: auto)",
    )
    add(
        "--check_every",
        type=int,
        default=1000,
        metavar="N",
        help="compare one document in N with tiktoken, stop where gigatoken differs (default: %(default)s; "
        "0: none)",
    )
    add("--dry_run", action="store_true", help="say what would be done, and do none of it")
    add(
        "--verify",
        action="store_true",
        help="check the shards in --out_dir: hashes, headers, counts, ids, and samples against the documents "
        "where these are at hand; exit code 1 if something is damaged",
    )


def count(text: str) -> int:
    """A positive whole number: 100000000, 100_000_000 or 1e8."""
    with contextlib.suppress(ValueError, OverflowError):
        value = float(text) if "e" in text.lower() else int(text)
        if value == int(value) >= 1:
            return int(value)
    raise argparse.ArgumentTypeError(
        f"{text!r} is not a whole number of at least 1, such as 1_000_000 or 1e6"
    )


def find_problems(args: argparse.Namespace) -> list[str]:
    """All that is wrong with the arguments."""
    hub_flags = [f"--{flag}" for flag in ON_THE_HUB if getattr(args, flag) is not None]
    problems = []
    if args.source and hub_flags:
        problems.append(
            f"{', '.join(hub_flags)}: for datasets on the Hub, --source is for local files: give either"
        )
    if args.val_fraction is not None and not 0 < args.val_fraction < 1:
        problems.append(f"--val_fraction {args.val_fraction}: expected a share between 0 and 1")
    if args.val_fraction is not None and args.val_tokens is not None:
        problems.append(
            "--val_tokens and --val_fraction both size the validation shard: give one of them"
        )
    if args.val_fraction is not None and not args.source and not args.verify:
        problems.append(
            "--val_fraction needs all tokens counted first: for --source only; give --val_tokens"
        )
    if args.max_tokens and (args.val_tokens or 1) >= args.max_tokens:
        problems.append("--max_tokens leaves nothing to train on behind the validation shard")
    if args.check_every < 0:
        problems.append(
            f"--check_every {args.check_every}: expected a number of documents, or 0 for none"
        )
    if args.shard_name is not None and not is_file_name(args.shard_name):
        problems.append(f"--shard_name {args.shard_name!r}: cannot begin a file name")
    return problems


def is_file_name(name: str) -> bool:
    return bool(name.strip(". ")) and not any(char in '/\\:*?"<>|' or char < " " for char in name)


def hub_name(args: argparse.Namespace) -> str:
    """How shards of the dataset are called, known without asking the Hub."""
    return "-".join([args.dataset.split("/")[-1], *([args.name] if args.name else [])])


# ---- build


def build(args: argparse.Namespace) -> int:
    from pretrain.text.documents import hub_source, local_source
    from pretrain.tokens.build import (
        Settings,
        Work,
        build_shards,
        refuse_changes,
        refuse_differences,
    )
    from pretrain.tokens.estimate import estimate
    from pretrain.tokens.pipeline import MAX_THREADS, cores
    from pretrain.tokens.progress import ConsoleProgress
    from pretrain.tokens.shards import Manifest
    from pretrain.tokens.tokenizer import Tokenizer

    settings = Settings(**{flag: getattr(args, flag) for flag in Settings.__dataclass_fields__})
    options = {"text_column": args.text_column, "on_bad_document": args.on_bad_document}
    source = local_source(args.source, **options) if args.source else None
    name = args.shard_name or (source.name if source else hub_name(args))
    folder = args.out_dir = args.out_dir or Path("data") / name
    manifest, revision = Manifest.load(folder), args.revision
    if manifest and manifest.shards:
        refuse_differences(folder, manifest, name, settings)
        if source:
            refuse_changes(folder, manifest, source)
        if manifest.complete:  # seen without asking the Hub
            print(f"{folder}: finished before, nothing is left to do")
            print_result(folder, manifest)
            return 0
        revision = manifest.source.get("commit")  # what was begun stays with its commit
    if source is None:
        hub = {
            "name": args.name,
            "split": args.split,
            "revision": revision,
            "text_column": args.text_column,
        }
        source = hub_source(args.dataset, **hub)
    parallel = args.num_proc in (None, 1) and cores() > MAX_THREADS  # else there are enough of ours
    tokenizer = Tokenizer(args.tokenizer_backend, args.check_every, parallel)
    num_proc = args.num_proc or (1 if tokenizer.backend == "gigatoken" else min(8, cores()))
    work = Work(tokenizer, num_proc, on_bad_document=args.on_bad_document)
    expected = estimate(source, work.count_tokens, on_bad_document=args.on_bad_document)
    problem = print_plan(folder, source, settings, expected, manifest)
    if problem or args.dry_run:
        return fail(problem) if problem else 0
    work.progress = ConsoleProgress(expected, settings.max_tokens)
    with contextlib.closing(work.progress):
        manifest = build_shards(
            source, folder, settings, work, name=name, expected_tokens=expected.tokens
        )
    print_result(folder, manifest)
    return 0


def print_plan(folder: Path, source, settings, expected, manifest) -> str | None:
    """Say what will be done. Returns what stands in the way of it."""
    from pretrain.tokens.build import leftovers
    from pretrain.tokens.progress import in_bytes, rounded

    place = source.description
    if place["kind"] == "hub":
        print(
            f"dataset     {place['dataset']}, {place['config']}, {place['split']}, commit {place['commit']}"
        )
    rows = (
        f"{'' if expected.rows_exact else 'about '}{expected.rows:,} rows, "
        if expected.rows is not None
        else ""
    )
    stored = in_bytes(sum(file.size for file in source.files))
    files = f"{len(source.files):,} {plural('file', len(source.files))}"
    print(
        f"documents   {files}, {rows}{stored}, of which {in_bytes(expected.text_bytes)} are to be read"
    )
    tokens = min(expected.tokens, settings.max_tokens or expected.tokens)
    about = "" if tokens == settings.max_tokens else "about "
    number = f"{tokens:,}" if tokens == settings.max_tokens else f"about {rounded(tokens)}"
    existing = next(
        path for path in (folder.absolute(), *folder.absolute().parents) if path.exists()
    )
    free = shutil.disk_usage(existing).free
    if manifest:
        free += sum(path.stat().st_size for path in leftovers(folder, manifest))  # will be removed
    disk = f"{in_bytes(2 * tokens)} in {folder} ({in_bytes(free)} free)"
    print(f"shards      {number} tokens, {settings.shard_size:,} in a shard, {disk}")
    there = manifest.tokens if manifest else 0
    if there:
        print(
            f"            {len(manifest.shards)} are there, {there:,} tokens: going on behind them"
        )
    elif settings.default_val and settings.validation_share(expected.tokens):
        print(
            "validation  a tenth of the tokens, as all are fewer than two shards (--val_tokens N: so many)"
        )
    needed = 2 * max(0, tokens - there)
    if needed > free:
        room = f"needs {about}{in_bytes(needed)} more on its disk, where {in_bytes(free)} are free"
        return f"{folder}: {room}; give --max_tokens, or another disk with --out_dir"
    return None


def print_result(folder: Path, manifest) -> None:
    from pretrain.tokens.shards import DEFAULT_DATA_DIR

    train = [shard for shard in manifest.shards if shard.split == "train"]
    trained = sum(shard.tokens for shard in train)
    shards = f"{trained:,} for training in {len(train)} {plural('shard', len(train))}"
    tokens = f"{manifest.tokens:,} tokens of {manifest.documents:,} {plural('document', manifest.documents)}"
    print(f"{folder}: {tokens}: {manifest.tokens - trained:,} for validation, {shards}")
    for reason in sorted({reason for shard in manifest.shards for reason in shard.skipped}):
        number = sum(shard.skipped.get(reason, 0) for shard in manifest.shards)
        noun = reason if reason.endswith("file") else f"{reason} document"
        print(f"left out: {number:,} {plural(noun, number)}")
    print_token_count(manifest)
    data_dir = "" if folder == Path(DEFAULT_DATA_DIR) else f" --data_dir {folder}"
    if train:
        print(f"next: python train_gpt2.py{data_dir}")
    else:
        print(
            "nothing is left to train on: give a smaller --val_tokens, or more documents, elsewhere"
        )


def print_token_count(manifest) -> None:
    """Compare with what the source's token_count column (FineWeb has one) says of the same
    documents."""
    counts = [shard.token_count for shard in manifest.shards if shard.token_count]
    source, written = (sum(each[key] for each in counts) for key in ("source", "written"))
    if source:
        counted = f"{source:,} says the source, {written:,} were written"
        print(f"token_count: {counted}: {written - source:+,} ({(written - source) / source:+.4%})")


def plural(noun: str, number: int) -> str:
    return noun if number == 1 else noun + "s"


# ---- verify


def verify(args: argparse.Namespace) -> int:
    from pretrain.text.documents import local_source
    from pretrain.tokens.verify import verify_folder

    if args.out_dir is None:
        name = args.shard_name or (
            local_source(args.source).name if args.source else hub_name(args)
        )
        args.out_dir = Path("data") / name
    t0 = time.perf_counter()
    found = verify_folder(args.out_dir)
    for line in [*found.problems, *(f"note: {note}" for note in found.notes)]:
        print(line)
    done = f"{found.shards} {plural('shard', found.shards)}, {found.tokens:,} tokens read"
    compared = f", {found.compared} documents encoded again" if found.compared else ""
    problems = f"{len(found.problems) or 'no'} {plural('problem', len(found.problems))}"
    print(f"{args.out_dir}: {done}{compared} in {time.perf_counter() - t0:.1f} s: {problems}")
    return 1 if found.problems else 0


# ---- the frame


class Stopped(BaseException):
    """SIGINT or SIGTERM."""

    def __init__(self, number: int):
        self.number = number


@contextlib.contextmanager
def stopped_by_signals():
    """SIGINT and SIGTERM raise Stopped in the main thread, the second one ends the process at
    once."""

    def stop(number, frame):
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, lambda number, frame: os._exit(128 + number))
        raise Stopped(number)

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread hears signals
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def kept(args: argparse.Namespace) -> str:
    """What a rerun will find."""
    from pretrain.tokens.shards import Manifest, ShardError

    with contextlib.suppress(ShardError):
        if args.out_dir and (manifest := Manifest.load(args.out_dir)) and manifest.shards:
            number = f"{len(manifest.shards)} finished {plural('shard', len(manifest.shards))}"
            tokens = f"{manifest.tokens:,} tokens"
            return f"{number} with {tokens} stay in {args.out_dir}, the same command continues"
    return "no shard was finished yet, the same command starts again"


def fail(message: str) -> int:
    print(f"{PROG}: error: {message}", file=sys.stderr)
    return 1


def run(args: argparse.Namespace) -> int:
    from pretrain.text.documents import SourceError
    from pretrain.tokens.build import BuildRefused
    from pretrain.tokens.shards import ShardError
    from pretrain.tokens.tokenizer import TokenizerUnavailable

    try:
        return verify(args) if args.verify else build(args)
    except (BuildRefused, SourceError, ShardError, TokenizerUnavailable) as error:
        return fail(str(error))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            place = f"{error.filename}: " if error.filename else ""
            return fail(f"{place}{error.strerror}; {kept(args)} once there is room")
        return fail(f"{error}; {kept(args)}")


def main(argv=None) -> int:
    args = parse_args(argv)
    try:
        with stopped_by_signals():
            return run(args)
    except Stopped as stop:
        print(
            f"{PROG}: stopped by {signal.Signals(stop.number).name}; {kept(args)}", file=sys.stderr
        )
        return 128 + stop.number


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # at once: no thread that waits for the network may hold up the end
