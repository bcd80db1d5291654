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
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.eval.hellaswag import (
    DEFAULT_FOLDER,
    PUBLISHED_FILES,
    SPLITS,
    STYLES,
    DataUnavailable,
    Example,
    HellaSwagError,
    data_sha256,
    ensure_data,
    load_examples,
)
from pretrain.report.known import KNOWN, published

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

DEFAULT_CHECKPOINT = Path("checkpoints/best_val_loss.pt")


def __getattr__(name: str) -> Any:
    """`evaluate` and `Result` are pretrain.eval.scoring's, loaded with torch when first asked for."""
    from pretrain.eval import scoring

    if name in ("evaluate", "Result"):
        return {"evaluate": scoring.score_examples, "Result": scoring.Result}[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# ---- command line


def build_parser() -> argparse.ArgumentParser:
    scores = "\n".join(
        f"  {style:12}"
        + ", ".join(f"{name} {acc:.4f} / {norm:.4f}" for name, (acc, norm) in models.items())
        for style, models in KNOWN["hellaswag"].published.items()
    )
    parser = argparse.ArgumentParser(
        prog="hellaswag.py",
        usage="hellaswag.py [--checkpoint PATH | --model NAME] [options]",
        description="Score a model on HellaSwag: four endings of a text, one of them right. Chance is 0.25.",
        epilog=f"published acc / acc_norm on the 10,042 examples of val, to compare with:\n{scores}\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # fmt: off
    add = parser.add_argument_group("the model").add_mutually_exclusive_group().add_argument
    add("--checkpoint", type=Path, metavar="PATH",
        help=f"a .pt file of train_gpt2.py, or the folder of a run (default: {DEFAULT_CHECKPOINT})")
    add("--model", metavar="NAME",
        help="gpt2, gpt2-medium, gpt2-large, gpt2-xl, another GPT-2 on the Hugging Face hub, or a folder in "
             "its format")
    add = parser.add_argument_group("the examples").add_argument
    add("--data", type=Path, metavar="FILE",
        help="a .jsonl or .jsonl.gz file in HellaSwag's format (default: the published file, downloaded once "
             f"into {DEFAULT_FOLDER}, or where the environment variable HELLASWAG_DIR says)")
    add("--split", choices=SPLITS, default="val",
        help="which published file (default: val; train has 39,905 examples; test has no labels to score)")
    add("--limit", type=_positive, metavar="N",
        help="score N examples, a random choice that is always the same; the standard error is then 1 %% "
             "(2,000 examples) or 3 %% (200) (default: all)")
    add = parser.add_argument_group("scoring").add_argument
    add("--style", choices=STYLES, default="completion",
        help="completion: the context as it is, acc_norm by loss per token, as people compare GPT-2 "
             "reproductions; lm-eval: the activity in front, acc_norm by loss per character, as EleutherAI's "
             "harness and most papers have it (default: completion)")
    add("--batch_tokens", type=_positive, metavar="N",
        help="positions in a batch, which bounds the memory (default: 1024 on cpu, 16384 on cuda)")
    add("--device", default="auto", help="cuda, cuda:1, mps or cpu (default: the first of these there is)")
    add("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto",
        help="of the computation (default: bfloat16 where the device computes in it, else float16 on a GPU, "
             "else float32)")
    add = parser.add_argument_group("results").add_argument
    add("--output", type=Path, metavar="FILE.json",
        help="write accuracies, standard errors, model, data hash, settings, versions and seconds")
    add("--per_example", type=Path, metavar="FILE.jsonl",
        help="write a line for each example: the four losses, picks, label")
    add("--show", type=_positive, metavar="N", default=0, help="print the first N examples with their losses")
    # fmt: on
    return parser


def _positive(text: str) -> int:
    with contextlib.suppress(ValueError):
        if int(text) > 0:
            return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        files = [file for file in (args.output, args.per_example) if file]
        for file in files:
            if file.is_dir() or not file.parent.is_dir():
                raise HellaSwagError(f"{file}: is a folder, or is in none that exists")
        try:
            data = args.data or ensure_data(args.split, progress=first)
        except DataUnavailable as error:
            raise DataUnavailable(
                f"{error}; a copy from elsewhere can be named with --data"
            ) from None
        examples = load_examples(data, args.limit)
        model, about = _load_model(args)
    except _user_errors() as error:
        if first:  # up to here all ranks of a machine fail alike: one of them says so
            print(f"hellaswag.py: error: {_one_line(error)}", file=sys.stderr)
        return 1
    try:
        return _run(args, model, about, data, examples)
    except _user_errors() as error:
        print(f"hellaswag.py: error: {_one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _user_errors() -> tuple[type[Exception], ...]:
    import torch

    from model import CheckpointError
    from pretrain.tokens.tokenizer import TokenizerUnavailable
    from pretrain.train import checkpoint as checkpoints

    ours = HellaSwagError, CheckpointError, checkpoints.CheckpointError, TokenizerUnavailable
    return *ours, torch.OutOfMemoryError, ValueError, OSError


def _one_line(error: Exception) -> str:
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return (
        f"{line} Try a smaller --batch_tokens." if "OutOfMemory" in type(error).__name__ else line
    )


def _load_model(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """The model on the CPU, and what to call it in results."""
    from model import GPT, load_checkpoint
    from pretrain.train import checkpoint as checkpoints

    if args.model:
        model, about = GPT.from_pretrained(args.model), {"name": args.model}
    else:
        path = checkpoints.model_file(args.checkpoint or DEFAULT_CHECKPOINT)
        model, checkpoint = load_checkpoint(path)
        about = {"name": str(path), "step": checkpoint.get("step")}
    return model, about | {"parameters": model.num_parameters()}


def _run(
    args: argparse.Namespace, model: Any, about: dict, data: Path, examples: Sequence[Example]
) -> int:
    from pretrain.distributed import Ranks, pick_dtype
    from pretrain.eval.choices import BATCH_TOKENS
    from pretrain.eval.scoring import score_examples
    from pretrain.report.runlog import provenance

    ranks = Ranks.start(args.device)
    dtype = pick_dtype(args.dtype, ranks.device)
    batch_tokens = args.batch_tokens or BATCH_TOKENS[ranks.device.type]
    model.to(ranks.device)
    result = score_examples(
        model,
        examples,
        style=args.style,
        batch_tokens=batch_tokens,
        device=ranks.device,
        dtype=dtype,
        rank=ranks.rank,
        world_size=ranks.world_size,
        group=ranks.control,
        progress=True,
    )
    if ranks.is_first:
        for i in range(min(args.show, result.n)):
            print(_shown(examples[i], result, i))
        settings = {
            "device": str(ranks.device),
            "dtype": str(dtype).removeprefix("torch."),
            "batch_tokens": batch_tokens,
            "world_size": ranks.world_size,
            "limit": args.limit,
        }
        about = {"model": about, "data": _describe(data), "settings": settings}
        if args.output:
            record = {"task": "hellaswag", **result.summary(), **about, **provenance()}
            _replace(args.output, json.dumps(record, indent=2) + "\n")
        if args.per_example:
            _replace(args.per_example, _lines(examples, result))
        print(_report(result, **about))
    ranks.stop()
    return 0


def _describe(data: Path) -> dict[str, Any]:
    sha256 = data_sha256(data)
    split = next((split for split, (_, known) in PUBLISHED_FILES.items() if known == sha256), None)
    return {"file": str(data), "sha256": sha256, "published_split": split}


def _report(result: "Result", model: dict, data: dict, settings: dict) -> str:
    known = published("hellaswag", result.style).items()
    others = ", ".join(f"{name} {acc:.4f} / {norm:.4f}" for name, (acc, norm) in known)
    unit = "token" if result.style == "completion" else "character"
    lines = [
        f"HellaSwag, {result.n:,} examples of {data['published_split'] or data['file']},"
        f" {result.style} style",
        f"model     {model['name']}, {model['parameters'] / 1e6:.1f}M parameters, {settings['dtype']} on"
        f" {settings['device']}",
        f"acc       {result.acc:.4f} +- {result.acc_stderr:.4f}   lowest loss",
        f"acc_norm  {result.acc_norm:.4f} +- {result.acc_norm_stderr:.4f}   lowest loss per {unit}",
        f"published, acc / acc_norm of all val: {others}",
        f"{result.seconds:.1f} s, {result.n / result.seconds:.1f} examples/s",
    ]
    if result.truncated:
        lines.insert(
            1, f"note      {result.truncated} endings had their context cut to fit into the model"
        )
    return "\n".join(lines)


def _shown(example: Example, result: "Result", i: int) -> str:
    """An example with the losses of its endings: * marks the right one, > the pick by acc_norm."""
    lines = [f"\n[{example.ind}] {example.activity_label}: {example.ctx}"]
    for k, ending in enumerate(example.endings):
        marks = ("*" if k == example.label else " ") + (">" if k == result.picks_norm[i] else " ")
        lines.append(
            f"  {marks} {result.losses[i, k]:8.3f} {result.losses_norm[i, k]:7.4f}  {ending}"
        )
    return "\n".join(lines)


def _lines(examples: Sequence[Example], result: "Result") -> str:
    records = (
        {
            "ind": example.ind,
            "label": example.label,
            "losses": losses,
            "losses_norm": norm,
            "pick": pick,
            "pick_norm": pick_norm,
        }
        for example, losses, norm, pick, pick_norm in zip(
            examples,
            result.losses.tolist(),
            result.losses_norm.tolist(),
            result.picks.tolist(),
            result.picks_norm.tolist(),
            strict=True,
        )
    )
    return "".join(json.dumps(record) + "\n" for record in records)


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


if __name__ == "__main__":
    sys.exit(main())
