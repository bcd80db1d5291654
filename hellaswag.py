"""Stage 3: how often a model picks the right one of four endings, HellaSwag, as published numbers
have it.

    $ python hellaswag.py --checkpoint checkpoints/best_val_loss.pt
    $ python hellaswag.py --model gpt2 --style lm-eval --output results.json
    $ torchrun --nproc_per_node=8 hellaswag.py --model gpt2-xl

    HellaSwag, 10,042 examples of val, completion style
    acc       0.2859 +- 0.0045   lowest loss
    acc_norm  0.2955 +- 0.0046   lowest loss per token

The same evaluate() scores inside training.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain import files
from pretrain.errors import UserError, program
from pretrain.eval.arguments import add_device_flags, add_model_flags, new_parser, parse_or_exit
from pretrain.eval.hellaswag import (
    DEFAULT_FOLDER,
    SPLITS,
    STYLES,
    DataUnavailable,
    Example,
    HellaSwagError,
    ensure_data,
    load_examples,
    load_with_hash,
)
from pretrain.flags import COUNT, named_files, number
from pretrain.report.known import KNOWN, title

if TYPE_CHECKING:
    from pretrain.eval.scoring import Result
    from pretrain.eval.scoring import score_examples as evaluate

__all__ = [
    "DataUnavailable",
    "Example",
    "HellaSwagError",
    "Result",
    "ensure_data",
    "evaluate",
    "load_examples",
    "main",
]


def __getattr__(name: str) -> Any:
    """`evaluate` and `Result` are those of pretrain.eval.scoring, loaded with torch when asked
    for."""
    if name not in ("evaluate", "Result"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pretrain.eval import scoring

    return scoring.Result if name == "Result" else scoring.score_examples


POSITIONS = number(int, minimum=1, maximum=2**18)


def build_parser() -> argparse.ArgumentParser:
    scores = "\n".join(
        f"  {style:12}"
        + ", ".join(f"{name} {acc:.4f} / {norm:.4f}" for name, (acc, norm) in models.items())
        for style, models in KNOWN["hellaswag"].published.items()
    )
    parser = new_parser(
        "hellaswag.py",
        "hellaswag.py [--checkpoint PATH | --model NAME] [options]",
        "Score a model on HellaSwag: four endings of a text, one of them right. Chance is 0.25.",
        f"published acc / acc_norm on the 10,042 examples of val, to compare with:\n{scores}\n",
    )
    add_model_flags(parser)
    # fmt: off
    add = parser.add_argument_group("the examples").add_argument
    add("--data", type=Path, metavar="FILE",
        help="a .jsonl or .jsonl.gz file in HellaSwag's format (default: the published file, "
             f"downloaded once into {DEFAULT_FOLDER}, or where the environment variable "
             "HELLASWAG_DIR says)")
    add("--task", metavar="NAME=FILE",
        help="another file in HellaSwag's format instead, a context and four endings a line, under "
             "its own name in what is printed and written")
    add("--split", choices=SPLITS, default="val",
        help="which published file (default: val; train has 39,905 examples; test has no labels "
             "to score)")
    add("--limit", type=COUNT, metavar="N",
        help="score N examples, a random choice that is always the same; the standard error is "
             "then 1 %% (2,000 examples) or 3 %% (200) (default: all)")
    group = parser.add_argument_group("scoring")
    add = group.add_argument
    add("--style", choices=STYLES, default="completion",
        help="completion: the context as it is, acc_norm by loss per token, as people compare "
             "GPT-2 reproductions; lm-eval: the activity in front, acc_norm by loss per "
             "character, as EleutherAI's harness and most papers have it (default: completion)")
    add("--batch_tokens", type=POSITIONS, metavar="N",
        help="positions in a batch, which bounds the memory; at most 262,144 (default: 1024 on "
             "cpu, 16384 on cuda)")
    add_device_flags(group, "computation")
    add = parser.add_argument_group("results").add_argument
    add("--output", type=Path, metavar="FILE.json",
        help="write accuracies, standard errors, model, data hash, settings, versions and seconds")
    add("--per_example", type=Path, metavar="FILE.jsonl",
        help="write a line for each example: the four losses, picks, label")
    add("--show", type=COUNT, metavar="N", default=0,
        help="print the first N examples with their losses")
    # fmt: on
    return parser


def run(args: argparse.Namespace) -> None:
    """Load, score, print and write."""
    try:
        check_outputs(args.output, args.per_example)
        name, args.data = task_of(args.task, args.data)
        # What is here comes first, so that its mistakes are not said after minutes of a download.
        found = load_with_hash(args.data, args.limit) if args.data else None

        from pretrain.eval.loading import open_model, user_errors

        model, about = open_model(args.checkpoint, args.model, any_tokenizer=args.any_tokenizer)
        data = args.data or download(args.split)
        examples, sha256 = found or load_with_hash(data, args.limit)
    except UserError as error:
        error.on_all_ranks = True  # of this machine: one of them says so
        raise

    from pretrain.distributed import Ranks, pick_dtype
    from pretrain.eval import results
    from pretrain.eval.choices import BATCH_TOKENS
    from pretrain.eval.scoring import score_examples
    from pretrain.eval.tasks import refuse_other_files

    with user_errors():
        ranks = Ranks.start(args.device)
        dtype = pick_dtype(args.dtype, ranks.device)
    refuse_other_files(data, sha256, ranks)
    batch_tokens = args.batch_tokens or BATCH_TOKENS[ranks.device.type]
    result = score_examples(
        model.to(ranks.device),
        examples,
        style=args.style,
        batch_tokens=batch_tokens,
        device=ranks.device,
        dtype=dtype,
        rank=ranks.rank,
        world_size=ranks.world_size,
        group=ranks.control,
        progress=title(name),
    )
    if ranks.is_first and result is not None:
        settings = {
            "device": str(ranks.device),
            "dtype": str(dtype).removeprefix("torch."),
            "batch_tokens": batch_tokens,
            "world_size": ranks.world_size,
            "limit": args.limit,
        }
        described = {"model": about, "data": results.describe(data), "settings": settings}
        write_results(args, examples, result, {"task": name, **described})
        for i in range(min(args.show, result.n)):
            print(results.example_lines(examples[i], result, i))
        print(results.report_lines(result, **described, task=name))
    ranks.stop()


def write_results(
    args: argparse.Namespace, examples: list[Example], result: "Result", described: dict[str, Any]
) -> None:
    """--output and --per_example, before anything is printed: a reader of stdout that goes away
    must not cost them."""
    from pretrain.eval import results
    from pretrain.report.runlog import provenance

    if args.output:
        record = {**described, **result.summary(), **provenance()}
        files.write_json(args.output, record)
    if args.per_example:
        lines = results.json_lines(results.per_example(examples, result))
        files.write_text(args.per_example, lines)


def task_of(task: str | None, data: Path | None) -> tuple[str, Path | None]:
    """(name, file) of what is scored; no file: the published one. Raises UserError."""
    if not task:
        return "hellaswag", data
    if data:
        raise UserError("--task and --data: give one of them")
    ((name, file),) = named_files([task]).items()
    return name, Path(str(file))


def check_outputs(*paths: Path | None) -> None:
    """Before an hour of scoring, not after it: whether the results have a place. Raises
    HellaSwagError."""
    for file in paths:
        if file and (file.is_dir() or not file.parent.is_dir()):
            raise HellaSwagError(f"{file}: is a folder, or is in none that exists")


def download(split: str) -> Path:
    """The published file of a split. Raises DataUnavailable."""
    try:
        return ensure_data(split, progress=is_speaker())
    except DataUnavailable as error:
        raise DataUnavailable(f"{error}; a copy from elsewhere can be named with --data") from None


def is_speaker() -> bool:
    """Whether this process says what all processes of this machine would say."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_or_exit(build_parser(), argv, speaks=is_speaker())
    with program("hellaswag.py", is_speaker, less_memory="a smaller --batch_tokens") as outcome:
        run(args)
    return outcome.status


if __name__ == "__main__":
    sys.exit(main())
