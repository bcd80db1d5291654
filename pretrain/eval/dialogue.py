"""Prompts from files and from people, and texts on the screen as they grow.

    for prompt in read_prompts(Path("beginnings.txt")): ...
    converse(write, "checkpoints/best_val_loss.pt, step 2000")  # calls write([prompt])

Several texts are separated by a line <|endoftext|>, as in the files that fineweb.py reads. Loads no
torch.
"""

import contextlib
import itertools
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from pretrain.errors import UserError

LINE = "<|endoftext|>"  # between texts


class PromptError(UserError):
    """A file of prompts that holds none, or no text."""


def read_prompts(file: Path) -> list[str]:
    """The prompts in a text file, - for standard input. Raises PromptError where there is none,
    OSError."""
    data = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
    try:
        text = data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise PromptError(f"{file}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    prompts = [part.removesuffix("\n") for part in re.split(r"(?m)^<\|endoftext\|>(?:\n|\Z)", text)]
    if not any(prompts):
        raise PromptError(f'{file}: no prompt in it (--prompt "" begins a document)')
    return [prompt for prompt in prompts if prompt]


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
