"""Flags that hellaswag.py and sample.py share. Loads no torch, so that --help answers at once."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import pretrain
from pretrain.flags import parse

DEFAULT_CHECKPOINT = Path("checkpoints/best_val_loss.pt")
# What people type who come from other programs: it is named in the answer.
SYNONYMS = {
    "ckpt": "checkpoint",
    "checkpoint_path": "checkpoint",
    "ckpt_path": "checkpoint",
    "resume": "checkpoint",
    "run": "checkpoint",
    "out_dir": "checkpoint",
    "init_from": "model",
    "model_name": "model",
    "model_type": "model",
    "pretrained": "model",
    "hf_model": "model",
    "precision": "dtype",
    "fp16": "dtype",
    "bf16": "dtype",
    "cuda": "device",
    "gpu": "device",
    "batch": "batch_size",
    "bs": "batch_size",
    "n": "num_samples",
    "samples": "num_samples",
    "start": "prompt",
    "text": "prompt",
    "length": "max_new_tokens",
    "max_tokens": "max_new_tokens",
    "max_length": "max_new_tokens",
    "num_tokens": "max_new_tokens",
    "temp": "temperature",
    "t": "temperature",
    "topk": "top_k",
    "topp": "top_p",
    "num_examples": "limit",
    "max_examples": "limit",
    "out": "output",
    "csv_file": "csv",
    "markdown": "md",
    "file": "data",
    "data_file": "data",
}


def new_parser(
    name: str, usage: str, description: str, epilog: str = ""
) -> argparse.ArgumentParser:
    """A parser as pretrain.flags.parse wants it, with --version."""
    parser = argparse.ArgumentParser(
        prog=name,
        usage=usage,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"{name} {pretrain.__version__}")
    return parser


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """--checkpoint, --model and --any_tokenizer: the arguments of loading.open_model."""
    group = parser.add_argument_group("the model")
    add = group.add_mutually_exclusive_group().add_argument
    add(
        "--checkpoint",
        type=Path,
        metavar="PATH",
        help=f"a .pt file of train_gpt2.py, or the folder of a run (default: {DEFAULT_CHECKPOINT})",
    )
    add(
        "--model",
        metavar="NAME",
        help="gpt2, gpt2-medium, gpt2-large, gpt2-xl, another GPT-2 on the Hugging Face hub, or a "
        "folder in its format",
    )
    group.add_argument(
        "--any_tokenizer",
        action="store_true",
        help="also a model whose own tokenizer is not GPT-2's, for which texts are then the wrong "
        "tokens (default: it is refused)",
    )


def add_device_flags(group: argparse._ArgumentGroup, of: str) -> None:
    """--device and --dtype; `of`: what the number format is that of."""
    group.add_argument(
        "--device",
        default="auto",
        help="cuda, cuda:1, mps or cpu (default: the first of these there is)",
    )
    group.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help=f"of the {of} (default: bfloat16 where the device computes in it, else float16 on a "
        "GPU, else float32)",
    )


def parse_or_exit(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, *, speaks: bool = True
) -> argparse.Namespace:
    """The flags; where some are wrong all of them are said, and the program ends with status 2."""
    args, _, problems = parse(parser, sys.argv[1:] if argv is None else argv)
    if problems:
        for problem in problems if speaks else ():
            print(f"{parser.prog}: error: {_with_synonym(parser, problem)}", file=sys.stderr)
        raise SystemExit(2)
    return args


def _with_synonym(parser: argparse.ArgumentParser, problem: str) -> str:
    """The problem, with a better guess at what was meant than the nearest spelling."""
    flag, _, what = problem.partition(": ")
    meant = SYNONYMS.get(flag.split("=")[0].lstrip("-").replace("-", "_").lower())
    known = parser._option_string_actions
    if what.startswith("unknown") and f"--{meant}" in known:
        return f"{flag}: unknown (did you mean --{meant}?)"
    return problem
