"""Let a model write: from a checkpoint of train_gpt2.py, or from GPT-2 as published.

    $ python sample.py --prompt "The mill stood"
    The mill stood at the end of the lane, and nobody had ground corn in it since ...
    $ python sample.py                       # asks for one beginning after another
    $ python sample.py --prompt "" --num_samples 100 > texts.txt      # documents for fineweb.py

Several texts are separated by a line <|endoftext|>, as in the files that fineweb.py reads.
"""

import argparse
import contextlib
import itertools
import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path

from pretrain.errors import program
from pretrain.eval.arguments import add_device_flags, add_model_flags, new_parser, parse_or_exit
from pretrain.eval.dialogue import LINE, converse, print_texts, read_prompts
from pretrain.flags import AMOUNT, COUNT, REAL, SEED, number

__all__ = ["converse", "main", "print_texts", "read_prompts"]
EPILOG = """examples:
  python sample.py --prompt "Once upon a time" --num_samples 3
  python sample.py --model gpt2 --prompt "Once upon a time" --temperature 0   # the likeliest tokens
  python sample.py --checkpoint runs/small/final_model.pt --prompt_file beginnings.txt > texts.txt
"""
SIDE_BY_SIDE = number(int, minimum=1, maximum=10_000)
SHARE_ABOVE_0 = number(float, minimum=5e-324, maximum=1)


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser(
        "sample.py",
        "sample.py [--checkpoint PATH | --model NAME] [--prompt TEXT | --prompt_file FILE]"
        " [options]",
        "Let a model continue a text. Without a prompt it asks for one after another.",
        EPILOG,
    )
    add_model_flags(parser)
    # fmt: off
    add = parser.add_argument_group("the beginning").add_mutually_exclusive_group().add_argument
    add("--prompt", metavar="TEXT",
        help='text to continue; "" begins a document, and <|endoftext|> in it is that token')
    add("--prompt_file", type=Path, metavar="FILE",
        help="file with one prompt, or several separated by lines <|endoftext|>; a final line "
             "break is not part of a prompt; - is standard input")
    add = parser.add_argument_group("sampling").add_argument
    add("--num_samples", type=COUNT, default=1, metavar="N", help="texts per prompt (default: 1)")
    add("--max_new_tokens", type=COUNT, default=200, metavar="N",
        help="a text ends after this many tokens, or when the model ends it (default: 200); from "
             "the model's block_size on it sees the last three to four quarters of that")
    add("--temperature", type=REAL, default=0.8, metavar="T",
        help="below 1 likelier tokens, above 1 less likely ones, 0 always the likeliest "
             "(default: 0.8)")
    add("--top_k", type=AMOUNT, default=50, metavar="K",
        help="draw from the K likeliest tokens; 0: from all (default: 50)")
    add("--top_p", type=SHARE_ABOVE_0, default=1.0, metavar="P",
        help="draw from the fewest tokens that together have probability P (default: 1, all)")
    add("--seed", type=SEED, metavar="N",
        help="the same seed and options give the same texts (default: new ones each time)")
    group = parser.add_argument_group("running")
    add = group.add_argument
    add("--stream", action=argparse.BooleanOptionalAction, default=None,
        help="print a text while it is written (default: where the output is a terminal)")
    add("--batch_size", type=SIDE_BY_SIDE, default=8, metavar="N",
        help="texts written side by side, at most 10,000; more are faster and take more memory "
             "(default: 8)")
    # fmt: on
    add_device_flags(group, "weights")
    return parser


def run(args: argparse.Namespace) -> None:
    """Load the model and write, for the prompts that there are or that are asked for."""
    prompts = None
    if args.prompt is not None:
        # Bytes of the command line that are no UTF-8 arrive as lone surrogates, which cannot be
        # printed.
        prompts = [args.prompt.encode("utf-8", "surrogateescape").decode("utf-8", "replace")]
    elif args.prompt_file is not None:
        prompts = read_prompts(args.prompt_file)

    from pretrain.distributed import pick_device, pick_dtype
    from pretrain.eval.loading import open_model, user_errors
    from pretrain.eval.sampling import stream_texts
    from pretrain.tokens.tokenizer import load_encoding

    with user_errors():
        device = pick_device(args.device)
        dtype = pick_dtype(args.dtype, device)
        encoding = load_encoding()
    model, about = open_model(args.checkpoint, args.model, any_tokenizer=args.any_tokenizer)
    model.to(device, dtype)
    stream = sys.stdout.isatty() if args.stream is None else args.stream
    seeds = random.Random(args.seed)
    sampling = {
        "temperature": args.temperature,
        "top_k": args.top_k or None,
        "top_p": args.top_p,
        "slide": max(1, model.config.block_size // 4),
    }

    def write(prompts: list[str]) -> None:
        texts = (prompt for prompt in prompts for _ in range(args.num_samples))
        batches = iter(lambda: list(itertools.islice(texts, args.batch_size)), [])
        for done, batch in enumerate(batches):
            if done:
                print(LINE)
            sampling["seed"] = seeds.getrandbits(63)
            steps = stream_texts(model, encoding, batch, args.max_new_tokens, **sampling)
            print_texts(batch, steps, stream)

    if prompts is None:
        step = "" if about.get("step") is None else f", step {about['step']}"
        converse(
            write,
            f"{about['name']}{step}: {about['parameters'] / 1e6:.1f}M parameters in"
            f" {str(dtype).removeprefix('torch.')} on {device}",
        )
    else:
        write(prompts)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_or_exit(build_parser(), argv)
    with program("sample.py", less_memory="a smaller --batch_size") as outcome:
        if sys.stdin is None:  # closed by the shell
            sys.stdin = open(os.devnull)  # noqa: SIM115
        with contextlib.suppress(AttributeError, ValueError):
            sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
        try:
            run(args)
        except KeyboardInterrupt:
            print()  # the text that was being written ends its line
            raise
    return outcome.status


if __name__ == "__main__":
    sys.exit(main())
