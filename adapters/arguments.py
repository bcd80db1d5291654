"""The flags of the three trainers, read before their frameworks are loaded: those take seconds, and
--help and wrong flags are answered at once.

    if __name__ == "__main__":
        answer_at_once("hf_trainer", __doc__, "out-trainer", hf_trainer_flags)
    import torch
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from pretrain import flags
from pretrain.errors import program, say
from pretrain.rendezvous import environment, is_first_rank
from pretrain.train import settings

SIZES = ("n_layer", "n_head", "n_embd", "bias", "block_size", "dropout")
FLAGS = (
    *(
        *SIZES,
        "init_from",
        "data_dir",
        "shuffle",
        "batch_size",
        "gradient_accumulation_steps",
        "max_iters",
    ),
    *("learning_rate", "min_lr", "warmup_iters", "weight_decay", "beta1", "beta2", "grad_clip"),
    *("dtype", "gradient_checkpointing", "log_interval", "seed"),
)
SCHEDULERS = ("train_gpt2", "cosine", "linear", "inverse_sqrt", "constant_with_warmup")


def is_speaker() -> bool:
    """common.is_first_process, also where those variables are no numbers: that is what is said
    then."""
    return os.environ.get("LOCAL_RANK", "").strip() in ("", "0") and is_first_rank()


def answer_at_once(
    name: str,
    description: str | None,
    out_dir: str,
    add_flags: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> None:
    """End the process where the command line asks for help or is wrong, else return."""
    with program(name, is_speaker) as outcome:
        parse(description or "", None, out_dir, add_flags)
    if outcome.status:
        sys.exit(outcome.status)


def parse(
    description: str,
    argv: Sequence[str] | None,
    out_dir: str,
    add_flags: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> tuple[argparse.Namespace, set[str]]:
    """(flags, names of those given): train_gpt2.py's that are in FLAGS, those below, those of
    add_flags.

    out_dir: default of --out_dir. With problems, prints one line for each and exits with status 2.
    """
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,
    )
    ours = settings.build_parser()
    for action in ours._actions:
        if action.dest in FLAGS:
            parser._add_action(action)
    # fmt: off
    add = parser.add_argument
    add("--lr_decay_iters", type=flags.COUNT, metavar="N",
        help="where the cosine ends (--max_iters)")
    add("--eval_interval", type=flags.AMOUNT, default=2000, metavar="N",
        help="updates between evaluations, each with a checkpoint (2000; 0: one at the end alone)")
    add("--eval_iters", type=flags.COUNT, default=200, metavar="N",
        help="batches of --batch_size sequences in an evaluation, shared out among processes (200)")
    add("--out_dir", default=out_dir, metavar="DIR", help=f"for checkpoints and logs ({out_dir})")
    add("--cpu", action="store_true", help="stay on the CPU even where there is a GPU")
    # fmt: on
    add_flags(parser)
    args, given, problems = flags.parse(parser, sys.argv[1:] if argv is None else argv)
    args.lr_decay_iters = args.lr_decay_iters or args.max_iters
    everything = argparse.Namespace(**{**vars(ours.parse_args([])), **vars(args)})
    found = settings.check(everything, given, environment("WORLD_SIZE", 1))
    if getattr(args, "text", None):
        found = [problem for problem in found if not problem.startswith("--data_dir")]
        found += ["--text and --data_dir: give one of them"] * ("data_dir" in given)
    if isinstance(args.data_dir, list):
        found.append("--data_dir: train_gpt2.py trains on a mixture; this trainer takes one folder")
    for problem in problems or found:
        say(parser.prog, problem)
    if problems or found:
        raise SystemExit(2)
    return args, given


def hf_trainer_flags(parser: argparse.ArgumentParser) -> None:
    """What adapters/hf_trainer.py has besides."""
    # fmt: off
    add = parser.add_argument
    add("--text", nargs="+", metavar="FILE",
        help=".txt, .jsonl or .parquet files instead of shards; their last tenth is for evaluation")
    add("--text_column", default="text", help="of .jsonl and .parquet files (text)")
    add("--lr_scheduler", choices=SCHEDULERS, default=SCHEDULERS[0],
        help="that of train_gpt2.py, or transformers' of this name, which rises from 0 over "
             "--warmup_iters and ends at --max_iters (train_gpt2)")
    add("--key_tokens", metavar="FILE",
        help="a GPT-2 token a line; sequences with more of them weigh more, see"
             " pretrain/train/keytokens.py (off)")
    add("--key_token_alpha", type=flags.REAL, default=1.0, metavar="A",
        help="factor of these weights (1.0)")
    add("--push_to_hub", metavar="user/name",
        help="upload the trained model; needs `hf auth login`")
    # fmt: on


def lightning_flags(parser: argparse.ArgumentParser) -> None:
    """What adapters/lightning_module.py has besides."""
    # fmt: off
    add = parser.add_argument
    add("--text", nargs="+", metavar="FILE",
        help=".txt, .jsonl or .parquet files instead of shards; their last tenth is for evaluation")
    add("--text_column", default="text", help="of .jsonl and .parquet files (text)")
    add("--model", metavar="NAME",
        help="continue any AutoModelForCausalLM with GPT-2's tokens, by name or folder, instead"
             " of our GPT")
    # fmt: on
