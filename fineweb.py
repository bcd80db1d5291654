#!/usr/bin/env python3
"""Stage 1: documents in, GPT-2 tokens out, as shards that train_gpt2.py and others read.

    $ python fineweb.py                          # FineWeb-Edu sample-10BT: 10 billion tokens, 20 GB
    $ python fineweb.py --source input.txt       # your own: .txt, .jsonl, .parquet, folders of them

Whatever stops it, the same command continues. `--help` tells the rest.
"""

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pretrain import __version__
from pretrain.errors import lasting_output, program
from pretrain.flags import AMOUNT, COUNT, REAL, number, parse
from pretrain.text.source import DRIVERS
from pretrain.tokens.engines import ENGINES
from pretrain.tokens.interruption import stopped_by_signals
from pretrain.tokens.manifest import ENDINGS

if TYPE_CHECKING:
    from pretrain.tokens.command import Request

PROG = "fineweb.py"
DATASET, NAME = "HuggingFaceFW/fineweb-edu", "sample-10BT"
NAMED_DATASETS = (DATASET, "HuggingFaceFW/fineweb")  # nobody wants all of these by accident
ON_THE_HUB = ("dataset", "name", "split", "revision")  # flags that belong to datasets on the Hub

DESCRIPTION = """\
Turn documents into GPT-2 tokens to train on: FineWeb-Edu, another dataset on the Hugging Face Hub,
or your own files. Each document becomes token 50256 (end of text) and its own tokens; all of them,
one after the other, are cut into shards of --shard_size tokens: NumPy files of uint16. The first,
NAME_val_000000.npy, is for validation; NAME_train_000001.npy and so on are for training."""

EPILOG = f"""\
examples:
  python {PROG}                                      FineWeb-Edu, 10 billion tokens
  python {PROG} --max_tokens 500_000_000             the first half billion of them
  python {PROG} --dataset HuggingFaceFW/fineweb      FineWeb, as many
  python {PROG} --source input.txt                   a text, a tenth of it for validation
  python {PROG} --source corpus/ 'more/*.jsonl.gz' --text_column content
  python {PROG} --source corpus/ --dry_run           what would be done, and nothing else
  python {PROG} --verify --out_dir data/input        are the shards still what was written?

what is written: the shards and manifest.json, which records where the documents came from and, for
  each shard, its tokens, documents, SHA-256 (as sha256sum prints it) and position. The same
  documents and settings give the same bytes, with any number of processes and after any
  interruption.
when it stops: run the same command again. Finished shards stay, the unfinished one is made anew,
  what came before is not read again. Other settings or other documents in the same folder are
  refused. In a finished folder the command makes shards again that are missing, or ends at once.
what it takes: 2 bytes of disk per token, for the default 20 GB, and 28 GB of network, which are not
  stored. A core tokenizes tens of millions of tokens per second; reading from the Hub takes what
  the connection needs. Memory stays below 2 GB, however much is read, unless a single document is
  very large: one of more than 50 MB takes up to 30 times its size.
next: python train_gpt2.py --data_dir FOLDER
"""
PROCESSES = number(int, minimum=1, maximum=1024)


# ---- arguments


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        PROG,
        description=DESCRIPTION,
        epilog=EPILOG,
        allow_abbrev=False,
        exit_on_error=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"{PROG} {__version__}")
    add_document_flags(parser.add_argument_group("documents").add_argument)
    add_shard_flags(parser.add_argument_group("shards").add_argument)
    add_work_flags(parser.add_argument_group("work (changes nothing in the shards)").add_argument)
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags, with what follows from them. All problems end the program at once."""
    parser = make_parser()
    args, _, problems = parse(parser, sys.argv[1:] if argv is None else argv)
    if problems := problems + find_problems(args):
        parser.error("; ".join(problems))
    if args.format == "npy":  # the default, which manifests do not write down
        args.format = None
    if not args.source:
        args.dataset = args.dataset or DATASET
        args.name = args.name or (NAME if args.dataset in NAMED_DATASETS else None)
        args.split, args.revision = args.split or "train", args.revision or "main"
    return args


def add_document_flags(add: Callable[..., Any]) -> None:
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
        help="files, folders, patterns instead of a dataset, on this machine or at s3://, gs://, "
        "az://, hf://datasets/, https://: .parquet; .jsonl; .txt, cut in documents at lines "
        "<|endoftext|>; the last two also as .gz and .zst; PATH#COLUMN where the text is in "
        "another column or key than --text_column",
    )
    add("--text_column", default="text", help="column or key with the text (default: %(default)s)")
    add(
        "--max_tokens",
        type=COUNT,
        metavar="N",
        help="stop after exactly so many tokens (default: all)",
    )
    add(
        "--on_bad_document",
        choices=("stop", "skip"),
        default="stop",
        help="on broken JSON, invalid UTF-8, a truncated parquet file and the like: stop and say "
        "where, or leave it out and count it (default: %(default)s)",
    )


def add_shard_flags(add: Callable[..., Any]) -> None:
    add(
        "--out_dir",
        metavar="PATH",
        help="folder to write, on this machine or in a store, such as s3://bucket/folder; shards "
        "are then made in data/.stores and sent one by one (default: data/SHARD_NAME)",
    )
    add(
        "--shard_name",
        help="how file names begin (default: dataset and configuration, or name of the source)",
    )
    add(
        "--format",
        choices=ENDINGS,
        help="of the shards: NumPy files, or .bin as llm.c and modded-nanogpt read them; "
        "train_gpt2.py takes either (default: npy)",
    )
    add(
        "--shard_size",
        type=COUNT,
        default=10**8,
        metavar="N",
        help="tokens in a shard (default: 100_000_000)",
    )
    add(
        "--val_tokens",
        type=COUNT,
        metavar="N",
        help="tokens in the validation shard (default: --shard_size, or a tenth of all where all "
        "are fewer than two shards)",
    )
    add(
        "--val_fraction",
        type=REAL,
        metavar="F",
        help="share of all tokens in the validation shard, such as 0.1; for --source only: it is "
        "counted first, and read twice if it has more than some 200 million tokens",
    )


def add_work_flags(add: Callable[..., Any]) -> None:
    add(
        "--num_proc",
        type=PROCESSES,
        metavar="N",
        help="processes that tokenize, at most 1,024; 1 is this one, from which gigatoken uses all "
        "cores (default: 1; with tiktoken one per core, at most 8)",
    )
    add(
        "--tokenizer_backend",
        choices=("auto", "gigatoken", "tiktoken"),
        default="auto",
        help="gigatoken is fast, tiktoken the reference, auto is gigatoken where installed "
        "(default: auto)",
    )
    add(
        "--check_every",
        type=AMOUNT,
        default=1000,
        metavar="N",
        help="compare one document in N with tiktoken, stop where gigatoken differs "
        "(default: %(default)s; 0: none)",
    )
    add(
        "--engine",
        choices=tuple(ENGINES),
        default="local",
        help="where text becomes tokens: on this machine, or on a Ray cluster, whose machines must "
        "all see the source and --out_dir; the shards are the same (default: %(default)s)",
    )
    add(
        "--ray_address",
        metavar="ADDRESS",
        help="for --engine ray: auto, or HOST:PORT of a cluster that `ray start` made (default: "
        "one is started on this machine, of --num_proc cores)",
    )
    add("--dry_run", action="store_true", help="say what would be done, and do none of it")
    add(
        "--verify",
        action="store_true",
        help="check the shards in --out_dir: hashes, headers, counts, ids, and samples against the "
        "documents where these are at hand; exit code 1 if something is damaged",
    )


def find_problems(args: argparse.Namespace) -> list[str]:
    """All that is wrong with the arguments."""
    hub_flags = [f"--{flag}" for flag in ON_THE_HUB if getattr(args, flag) is not None]
    problems = []
    if args.source and hub_flags:
        problems.append(
            f"{', '.join(hub_flags)}: for a dataset as --dataset has it; --source has its files "
            "named: give either"
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
    if (scheme := re.match(r"(\w+)://", args.out_dir or "")) and scheme[1] not in DRIVERS:
        problems.append(
            f"--out_dir {args.out_dir}: shards are written to a folder, or to s3://, gs:// or az://"
        )
    if args.ray_address and args.engine != "ray":
        problems.append("--ray_address: needs --engine ray")
    if args.shard_name is not None and not is_file_name(args.shard_name):
        problems.append(f"--shard_name {args.shard_name!r}: cannot begin a file name")
    return problems


def is_file_name(name: str) -> bool:
    return bool(name.strip(". ")) and not any(char in '/\\:*?"<>|' or char < " " for char in name)


def make_request(args: argparse.Namespace) -> "Request":
    """The flags as the package takes them."""
    from pretrain.tokens.build import Settings
    from pretrain.tokens.command import Request

    values = vars(args) | {"source": tuple(args.source or ())}
    settings = Settings(**{name: values.pop(name) for name in Settings.__dataclass_fields__})
    return Request(settings, **values)


def main(argv: Sequence[str] | None = None) -> int:
    with program(PROG, less_memory="a smaller --num_proc") as outcome:
        args = parse_args(argv)
        with lasting_output(), stopped_by_signals(PROG, outcome):
            from pretrain.tokens.command import run

            outcome.status = run(make_request(args))
    return outcome.status


if __name__ == "__main__":
    code = main()
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)  # at once: no thread that waits for the network may keep the process
