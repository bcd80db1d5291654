"""Let a model write: from a checkpoint of train_gpt2.py, or from GPT-2 as published.

    $ python sample.py --prompt "The mill stood"
    The mill stood at the end of the lane, and nobody had ground corn in it since ...
    $ python sample.py                       # asks for one beginning after another
    $ python sample.py --prompt "" --num_samples 100 > texts.txt    # documents, as fineweb.py reads
    them

Several texts are separated by a line <|endoftext|>, as in the files that fineweb.py reads.
"""

import argparse
import contextlib
import itertools
import math
import os
import random
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

LINE = "<|endoftext|>"  # between texts
DEFAULT_CHECKPOINT = Path("checkpoints/best_val_loss.pt")
EPILOG = """examples:
  python sample.py --prompt "Once upon a time" --num_samples 3
  python sample.py --model gpt2 --prompt "Once upon a time" --temperature 0   # the likeliest tokens
  python sample.py --checkpoint runs/small/final_model.pt --prompt_file beginnings.txt > texts.txt
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sample.py",
        usage="sample.py [--checkpoint PATH | --model NAME] [--prompt TEXT | --prompt_file FILE] [options]",
        description="Let a model continue a text. Without a prompt it asks for one after another.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # fmt: off
    add = parser.add_argument_group("the model").add_mutually_exclusive_group().add_argument
    add("--checkpoint", type=Path, metavar="PATH",
        help=f"a .pt file of train_gpt2.py, or the folder of a run (default: {DEFAULT_CHECKPOINT})")
    add("--model", metavar="NAME",
        help="gpt2, gpt2-medium, gpt2-large, gpt2-xl, another GPT-2 on the Hugging Face hub, or a folder in "
             "its format")
    add = parser.add_argument_group("the beginning").add_mutually_exclusive_group().add_argument
    add("--prompt", metavar="TEXT",
        help='text to continue; "" begins a document, and <|endoftext|> in it is that token')
    add("--prompt_file", type=Path, metavar="FILE",
        help="file with one prompt, or several separated by lines <|endoftext|>; a final line break is not "
             "part of a prompt; - is standard input")
    add = parser.add_argument_group("sampling").add_argument
    add("--num_samples", type=POSITIVE, default=1, metavar="N", help="texts per prompt (default: 1)")
    add("--max_new_tokens", type=POSITIVE, default=200, metavar="N",
        help="a text ends after this many tokens, or when the model ends it (default: 200); from the model's "
             "block_size on it sees the last three to four quarters of that")
    add("--temperature", type=_number(float, lambda t: 0 <= t < math.inf, "a number from 0 on"), default=0.8,
        metavar="T", help="below 1 likelier tokens, above 1 less likely ones, 0 always the likeliest "
                          "(default: 0.8)")
    add("--top_k", type=_number(int, lambda k: k >= 0, "a whole number from 0 on"), default=50, metavar="K",
        help="draw from the K likeliest tokens; 0: from all (default: 50)")
    add("--top_p", type=_number(float, lambda p: 0 < p <= 1, "above 0 and at most 1"), default=1.0,
        metavar="P", help="draw from the fewest tokens that together have probability P (default: 1, all)")
    add("--seed", type=int, metavar="N",
        help="the same seed and options give the same texts (default: new ones each time)")
    add = parser.add_argument_group("running").add_argument
    add("--stream", action=argparse.BooleanOptionalAction, default=None,
        help="print a text while it is written (default: where the output is a terminal)")
    add("--batch_size", type=POSITIVE, default=8, metavar="N",
        help="texts written side by side; more are faster and take more memory (default: 8)")
    add("--device", default="auto", help="cuda, mps, cpu, or cuda:1 ... (default: the best one here)")
    add("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto",
        help="of the weights (default: bfloat16 where the device computes in it, else float16 on a GPU, else "
             "float32)")
    # fmt: on
    return parser


def _number(kind: type, accept: Callable[[float], bool], meaning: str) -> Callable[[str], float]:
    """A type for argparse: numbers of a kind that `accept` takes."""

    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            if accept(kind(text)):
                return kind(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not {meaning}")

    return parse


POSITIVE = _number(int, lambda n: n > 0, "a whole number from 1 on")


def read_prompts(file: Path) -> list[str]:
    """The prompts in a text file, - for standard input. Raises ValueError where there is none,
    OSError."""
    data = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
    try:
        text = data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 at byte {error.start}") from None
    prompts = [part.removesuffix("\n") for part in re.split(r"(?m)^<\|endoftext\|>(?:\n|\Z)", text)]
    if not any(prompts):
        raise ValueError(f'{file}: no prompt in it (--prompt "" begins a document)')
    return [prompt for prompt in prompts if prompt]


def load_model(checkpoint: Path | None, name: str | None, device: str, dtype: str):
    """The model on its device, and a line that says what it is. Raises CheckpointError,
    ValueError."""
    from model import GPT, load_checkpoint
    from pretrain.distributed import pick_device, pick_dtype
    from pretrain.tokens.tokenizer import VOCAB_SIZE
    from pretrain.train import checkpoint as checkpoints

    place = pick_device(device)
    number_format = pick_dtype(dtype, place)
    if name is not None:
        model, source = GPT.from_pretrained(name), name
    else:
        path = checkpoints.model_file(checkpoint or DEFAULT_CHECKPOINT)
        model, saved = load_checkpoint(path)
        source = f"{path}, step {saved['step']}" if "step" in saved else str(path)
    if model.config.vocab_size < VOCAB_SIZE:
        size = model.config.vocab_size
        raise ValueError(
            f"{source}: a vocabulary of {size} tokens, but GPT-2's tokenizer has {VOCAB_SIZE}"
        )
    about = (
        f"{source}: {model.num_parameters() / 1e6:.1f}M parameters in {number_format} on {place}"
    )
    return model.to(place, number_format), about.replace("torch.", "")


def print_texts(
    prompts: Sequence[str], steps: Iterable[Sequence[str | None]], stream: bool
) -> None:
    """Print prompts with their continuations, which grow side by side, one after the other. With
    `stream` the first that is not complete is shown as it grows, and what has come of the next one
    when it is its turn."""
    waiting, current = list(prompts), 0

    def show(row: int) -> None:
        print(waiting[row], end="", flush=True)
        waiting[row] = ""

    if stream:
        show(0)
    for pieces in steps:
        waiting = [text + (piece or "") for text, piece in zip(waiting, pieces, strict=True)]
        if stream:
            show(current)
            while pieces[current] is None and current + 1 < len(prompts):
                print("", LINE, sep="\n")
                current += 1
                show(current)
    print(f"\n{LINE}\n".join(waiting[current:]), flush=True)


def converse(write: Callable[[list[str]], None], about: str) -> None:
    """Ask for a prompt and continue it, until an empty line, the end of input, or Ctrl-C; while a
    text is being written Ctrl-C ends that text only. From a pipe each line is a prompt."""
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (input() then edits lines and remembers them)
        print(
            f"{about}\nType a beginning. Ctrl-C stops a text; an empty line ends.", file=sys.stderr
        )
    for number in itertools.count():
        try:
            prompt = input("\n> " if terminal else "")
        except (EOFError, KeyboardInterrupt):
            prompt = ""
            if terminal:
                print()
        if not prompt:
            return
        try:
            if number and not terminal:
                print(LINE)
            write([prompt])
        except KeyboardInterrupt:
            print()


def run(args: argparse.Namespace) -> None:
    prompts = None
    if args.prompt is not None:
        # Bytes of the command line that are no UTF-8 arrive as lone surrogates, which cannot be
        # printed.
        prompts = [args.prompt.encode("utf-8", "surrogateescape").decode("utf-8", "replace")]
    elif args.prompt_file is not None:
        prompts = read_prompts(args.prompt_file)

    from pretrain.eval.sampling import stream_texts
    from pretrain.tokens.tokenizer import load_encoding

    encoding = load_encoding()
    model, about = load_model(args.checkpoint, args.model, args.device, args.dtype)
    stream = sys.stdout.isatty() if args.stream is None else args.stream
    seeds = random.Random(args.seed)
    sampling = {
        "temperature": args.temperature,
        "top_k": args.top_k or None,
        "top_p": args.top_p,
        "slide": max(1, model.config.block_size // 4),
    }

    def write(prompts: list[str]) -> None:
        texts = [prompt for prompt in prompts for _ in range(args.num_samples)]
        for first in range(0, len(texts), args.batch_size):
            if first:
                print(LINE)
            batch = texts[first : first + args.batch_size]
            sampling["seed"] = seeds.getrandbits(63)
            steps = stream_texts(model, encoding, batch, args.max_new_tokens, **sampling)
            print_texts(batch, steps, stream)

    if prompts is None:
        converse(write, about)
    else:
        write(prompts)


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    for file in (sys.stdin, sys.stdout):
        with contextlib.suppress(AttributeError):
            file.reconfigure(errors="replace")
    try:
        run(args)
    except BrokenPipeError:  # `| head` has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
    except KeyboardInterrupt:
        print()
        return 130
    except (OSError, ValueError, RuntimeError) as error:
        print(f"sample.py: {_first_line(error)}", file=sys.stderr)
        return 1
    return 0


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


if __name__ == "__main__":
    sys.exit(main())
