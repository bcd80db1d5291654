"""What train_gpt2.py can be told: every flag, its default, and what of it contradicts the rest or the
machine.

    args, given, problems = parse(build_parser(), ["--batch_size", "16"])
    problems = problems or check(args, given, world_size=8)
"""

import argparse
import os

from pretrain import distributed
from pretrain.flags import number
from pretrain.shards import DEFAULT_DATA_DIR, ShardError, find_shards

COUNT, AMOUNT = number(int, minimum=1), number(int, minimum=0)
REAL, SHARE = number(float, minimum=0), number(float, minimum=0, below=1)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train_gpt2.py",
        usage="[torchrun --nproc_per_node=N] train_gpt2.py [--data_dir DIR] [--out_dir DIR] [flags]",
        description="Train GPT-2 on token shards. The same command again continues where it stopped.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    switch = argparse.BooleanOptionalAction
    # fmt: off
    add = parser.add_argument_group("model").add_argument
    add("--n_layer", type=COUNT, default=12, help="blocks (%(default)s; gpt2-medium 24, large 36, xl 48)")
    add("--n_head", type=COUNT, default=12, help="attention heads (%(default)s; 16, 20, 25)")
    add("--n_embd", type=COUNT, default=768, help="width (%(default)s; 1024, 1280, 1600)")
    add("--block_size", type=COUNT, default=1024, help="tokens of context (%(default)s)")
    add("--dropout", type=SHARE, default=0.0,
        help="0 for pretraining, 0.1 or more for small data (%(default)s)")
    add("--bias", action=switch, default=True, help="biases, as GPT-2 has them (on)")
    add("--init_from", default="scratch", metavar="WHAT",
        help="weights to begin with: scratch, gpt2, gpt2-medium, gpt2-large, gpt2-xl, a checkpoint of this "
             "program, or a folder in Hugging Face's format; sizes come with the weights (scratch)")
    add = parser.add_argument_group("data").add_argument
    add("--data_dir", default=DEFAULT_DATA_DIR, metavar="DIR", help=f"shards ({DEFAULT_DATA_DIR})")
    add("--shuffle", action=switch, default=True, help="a new order every epoch; else file order (on)")
    add("--verify_data", action=switch, default=None,
        help="hash all shards before starting. Headers and sizes are always checked, and ids as they are "
             "read (on for up to 2 GB)")
    add = parser.add_argument_group("batch").add_argument
    add("--batch_size", type=COUNT, default=8,
        help="sequences per process and micro-step; the first thing to lower when memory runs out "
             "(%(default)s)")
    add("--gradient_accumulation_steps", type=COUNT, default=5, metavar="N",
        help="micro-steps per update, per process (%(default)s)")
    add("--total_batch_tokens", type=AMOUNT, default=0, metavar="N",
        help="tokens per update over all processes, for instance 524288; the micro-steps follow from it "
             "(%(default)s: the batch follows from the two flags above)")
    add = parser.add_argument_group("optimizer").add_argument
    add("--max_iters", type=COUNT, default=600000, metavar="N",
        help="updates in all; raise it to go on with a finished run (%(default)s)")
    add("--learning_rate", type=REAL, default=6e-4, metavar="LR", help="highest learning rate (%(default)s)")
    add("--min_lr", type=REAL, default=6e-5, metavar="LR",
        help="learning rate at the end of the cosine and after; a tenth is usual (%(default)s)")
    add("--warmup_iters", type=AMOUNT, default=2000, metavar="N",
        help="updates of linear warmup (%(default)s)")
    add("--lr_decay_iters", type=AMOUNT, default=600000, metavar="N",
        help="update at which the cosine ends, usually --max_iters (%(default)s)")
    add("--weight_decay", type=REAL, default=0.1, help="AdamW's, on matrices only (%(default)s)")
    add("--beta1", type=SHARE, default=0.9, help="AdamW's (%(default)s)")
    add("--beta2", type=SHARE, default=0.95, help="AdamW's (%(default)s)")
    add("--grad_clip", type=REAL, default=1.0, help="largest gradient norm (%(default)s; 0: any)")
    add = parser.add_argument_group("evaluation").add_argument
    add("--eval_interval", type=AMOUNT, default=2000, metavar="N",
        help="updates between evaluations; the start and the end are evaluated too (%(default)s; 0: never)")
    add("--eval_iters", type=COUNT, default=200, metavar="N",
        help="batches of --batch_size sequences in an evaluation, shared out among the processes: the first "
             "of the val shards, and as many spread over the train shards (%(default)s)")
    add("--eval_only", action=switch, default=False,
        help="evaluate the newest checkpoint in --out_dir, or that of --resume or --init_from; print, write "
             "nothing, and exit")
    add("--hellaswag", action=switch, default=True,
        help="score HellaSwag at evaluations where its data can be had (on)")
    add("--hellaswag_data", metavar="FILE", help="hellaswag_val.jsonl, also .gz (else downloaded once)")
    add("--hellaswag_limit", type=AMOUNT, metavar="N",
        help="score N examples, always the same choice (all on cuda, 200 elsewhere; 0: all)")
    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", help="cuda, cuda:N, mps or cpu (the first of these there is)")
    add("--dtype", choices=["auto", "bfloat16", "float16", "float32"], default="auto",
        help="of the computation; weights are float32, float16 scales its gradients (bfloat16 where the "
             "device computes in it, else float16 on cuda, else float32)")
    add("--compile", action=switch, default=None,
        help="torch.compile: a minute at the start, then faster steps; on a CPU it needs a C++ compiler "
             "(on for cuda)")
    add("--gradient_checkpointing", action=switch, default=False,
        help="recompute activations: much less memory, a third more time (off)")
    add = parser.add_argument_group("run").add_argument
    add("--out_dir", default="checkpoints", metavar="DIR", help="for checkpoints and logs (checkpoints)")
    add("--resume", default="auto", metavar="auto|never|PATH",
        help="auto: continue the newest good checkpoint in --out_dir, if any. never: start anew, an earlier "
             "run's files are moved aside. A path: continue that one, later ones are moved aside (auto)")
    add("--keep_checkpoints", type=COUNT, default=3, metavar="N", help="iter-*.pt to keep (%(default)s)")
    add("--checkpoint_interval", type=AMOUNT, default=0, metavar="N",
        help="updates between saves of resume.pt (%(default)s: by time only)")
    add("--checkpoint_minutes", type=REAL, default=15, metavar="M",
        help="minutes between saves of resume.pt (%(default)s; 0: never)")
    add("--log_interval", type=COUNT, default=10, metavar="N", help="updates between log lines (%(default)s)")
    add("--seed", type=AMOUNT, default=1337, help="of weights, data order and dropout (1337)")
    # fmt: on
    return parser


def check(args: argparse.Namespace, given: set[str], world_size: int) -> list[str]:
    """What is wrong with the flags together, and with the world they meet: one line each."""
    problems = []
    if args.init_from == "scratch" and args.n_embd % args.n_head:
        problems.append(f"--n_embd {args.n_embd}: not a multiple of --n_head {args.n_head}")
    if args.min_lr > args.learning_rate:
        problems.append(f"--min_lr {args.min_lr}: above --learning_rate {args.learning_rate}")
    if args.warmup_iters > args.lr_decay_iters:
        problems.append(f"--warmup_iters {args.warmup_iters}: after --lr_decay_iters {args.lr_decay_iters}")
    smallest = args.batch_size * args.block_size * world_size  # tokens in a micro-step of all processes
    if args.total_batch_tokens % smallest:
        problems.append(
            f"--total_batch_tokens {args.total_batch_tokens}: not a multiple of {smallest} (--batch_size"
            f" {args.batch_size} x --block_size {args.block_size} x {world_size} processes)"
        )
    if args.total_batch_tokens and "gradient_accumulation_steps" in given:
        problems.append("--total_batch_tokens and --gradient_accumulation_steps: give one of them")
    try:
        distributed.pick_device(args.device, distributed.environment("LOCAL_RANK", 0))
    except ValueError as error:
        problems.append(f"--device {error}")
    try:
        for split in ("train", "val") if args.eval_interval or args.eval_only else ("train",):
            find_shards(args.data_dir, split)
    except ShardError as error:
        problems.append(f"--data_dir {error}")
    if args.resume not in ("auto", "never") and not os.path.isfile(args.resume):
        problems.append(f"--resume {args.resume}: no such file (and neither auto nor never)")
    if args.hellaswag_data and not os.path.isfile(args.hellaswag_data):
        problems.append(f"--hellaswag_data {args.hellaswag_data}: no such file")
    return problems
