"""The flags of train_gpt2.py: each declared once, with its unit, its default and its help."""

import argparse
from typing import Any

from pretrain.flags import AMOUNT, COUNT, REAL, SEED, SHARE, Gather, number
from pretrain.tokens.shards import DEFAULT_DATA_DIR
from pretrain.train.mixture import is_mixture

SAMPLED = number(int, minimum=1, maximum=100_000)
MODELS = ("gpt2", "modern")  # pretrain.models.ARCHITECTURES, named without loading torch
COMPILE_MODES = ("default", "max-autotune")  # pretrain.train.speed.MODES
ATTENTION = ("auto", "flash", "cudnn", "flash3", "flash4", "efficient", "math")
OPTIMIZERS, SCHEDULES = ("adamw", "muon"), ("cosine", "trapezoid")  # those of pretrain.train.optim
PARALLEL = ("ddp", "fsdp")

# A flag on the command line puts these of a --config file out of force.
OVERRIDES = {
    "data": {"data_dir"},
    "data_dir": {"data"},
    "max_iters": {"epochs"},
    "epochs": {"max_iters", "lr_decay_iters"},
    "total_batch_tokens": {"gradient_accumulation_steps"},
    "gradient_accumulation_steps": {"total_batch_tokens"},
}


class _Folders(argparse.Action):
    """One folder as a string, a mixture as a list."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, values if is_mixture(values) else values[0])


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train_gpt2.py",
        usage="[torchrun --nproc_per_node=N] train_gpt2.py [--data_dir DIR] [--out_dir DIR] "
        "[flags]",
        description="Train GPT-2 on token shards. The same command again continues where it "
        "stopped.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    switch = argparse.BooleanOptionalAction
    # fmt: off
    parser.add_argument("--config", metavar="FILE",
        help="a YAML file of flags, such as those in configs/: lines like batch_size: 16; flags of "
             "the command line win")
    add = parser.add_argument_group("model").add_argument
    add("--model", choices=MODELS, default="gpt2",
        help="architecture: gpt2 as published, or modern, which under --optimizer muon reaches its "
             "loss with a fraction of the tokens: see pretrain/models/modern.py (%(default)s)")
    add("--n_layer", type=COUNT, default=12,
        help="blocks (%(default)s; gpt2-medium 24, large 36, xl 48)")
    add("--n_head", type=COUNT, default=12,
        help="attention heads (%(default)s; 16, 20, 25; with --model modern --n_embd / 128)")
    add("--n_embd", type=COUNT, default=768, help="width (%(default)s; 1024, 1280, 1600)")
    add("--block_size", type=COUNT, default=1024, help="tokens of context (%(default)s)")
    add("--dropout", type=SHARE, default=0.0,
        help="0 for pretraining, 0.1 or more for small data (%(default)s)")
    add("--bias", action=switch, default=True, help="biases, as GPT-2 has them (on)")
    add("--value_embeddings", action=switch, default=False,
        help="of --model modern: in every second block each token adds a learnt vector of its own "
             "to its value. A lower loss at the same speed, for a table of the vocabulary's size "
             "in each of these blocks (off)")
    add("--init_from", default="scratch", metavar="WHAT",
        help="weights to begin with: scratch, gpt2, gpt2-medium, gpt2-large, gpt2-xl, a checkpoint "
             "of this program, or a folder in Hugging Face's format; sizes come with the weights "
             "(scratch)")
    add = parser.add_argument_group("data").add_argument
    add("--data_dir", action=_Folders, nargs="+", default=DEFAULT_DATA_DIR, metavar="DIR",
        help=f"shards ({DEFAULT_DATA_DIR}), .npy or .bin; or a mixture, NAME=FOLDER:WEIGHT for "
             "each source, such as web=data/fineweb:0.7 books=data/books:0.3. Weights are "
             "relative; books=data/books:0.3@10000:0.6 changes one at step 10,000. After "
             "every update each source has had its share to within one sequence, shuffled through "
             "its own epochs; validation losses are reported for each source and, as val, weighted "
             "by the shares of that step")
    add("--data_cache", default="data/.cache", metavar="DIR",
        help="where shards of a --data_dir in a store (s3://bucket/folder, gs://, az://) lie while "
             "they are needed, for all processes of this machine (%(default)s)")
    add("--data_cache_gb", type=COUNT, default=100, metavar="GB",
        help="size of all that --data_cache holds, in 10**9 bytes (%(default)s)")
    add("--data", nargs="+", metavar="PATH",
        help="one's own text instead: files, folders or patterns as for fineweb.py --source, with "
             "PATH#COLUMN where the text is not in the column or key text. Their "
             "shards go to OUT_DIR/data: the first tenth of the tokens for validation, the rest "
             "for training. A folder of shards is taken as it is")
    add("--stride", type=AMOUNT, default=0, metavar="N",
        help="tokens between the starts of training windows: half of --block_size gives a small "
             "text twice as many windows, that overlap; validation windows never do (%(default)s: "
             "--block_size)")
    add("--shuffle", action=switch, default=True,
        help="a new order every epoch; else file order (on)")
    add("--verify_data", action=switch, default=None,
        help="hash all shards before starting. Headers and sizes are always checked, and ids as "
             "they are read (on for up to 2 GB)")
    add = parser.add_argument_group("batch").add_argument
    add("--batch_size", type=COUNT, default=8,
        help="sequences per process and micro-step; the first thing to lower when memory runs out "
             "(%(default)s)")
    add("--gradient_accumulation_steps", type=COUNT, default=5, metavar="N",
        help="micro-steps per update, per process (%(default)s)")
    add("--total_batch_tokens", type=AMOUNT, default=0, metavar="N",
        help="tokens per update over all processes, for instance 524288; the micro-steps follow "
             "from it (%(default)s: the batch follows from the two flags above)")
    add = parser.add_argument_group("optimizer").add_argument
    add("--optimizer", choices=OPTIMIZERS, default="adamw",
        help="muon: Muon for the matrices of the blocks, AdamW for the rest, at rates proportional "
             "to --learning_rate; unless given, that is then 0.025, --weight_decay 0.05, --beta1 "
             "0.8, and --min_lr, --warmup_iters and --grad_clip are 0 (%(default)s)")
    add("--schedule", choices=SCHEDULES, default="cosine",
        help="of the learning rate after the warmup: cosine, or trapezoid: constant, then a "
             "straight line to --min_lr at --max_iters, or at --lr_decay_iters (%(default)s)")
    add("--decay_share", type=SHARE, default=0.7, metavar="S",
        help="share of the trapezoid that falls, counted from its end (%(default)s)")
    add("--max_iters", type=COUNT, default=600000, metavar="N",
        help="updates in all; raise it to go on with a finished run (%(default)s)")
    add("--epochs", type=REAL, default=0, metavar="N",
        help="instead of --max_iters: until every training window was used N times (0.5: half of "
             "them; of a mixture, as many as its sources hold together). The cosine ends there "
             "too, and the warmup takes a tenth of it at most, unless their flags are "
             "given (%(default)s: by --max_iters)")
    add("--learning_rate", type=REAL, default=6e-4, metavar="LR",
        help="highest learning rate (%(default)s)")
    add("--min_lr", type=REAL, default=6e-5, metavar="LR",
        help="learning rate at the end of the cosine and after; a tenth is usual (%(default)s)")
    add("--warmup_iters", type=AMOUNT, default=2000, metavar="N",
        help="updates of linear warmup (%(default)s)")
    add("--lr_decay_iters", type=AMOUNT, default=600000, metavar="N",
        help="update at which the decay ends, usually --max_iters (%(default)s)")
    add("--weight_decay", type=REAL, default=0.1, help="AdamW's, on matrices only (%(default)s)")
    add("--beta1", type=SHARE, default=0.9, help="AdamW's (%(default)s)")
    add("--beta2", type=SHARE, default=0.95, help="AdamW's (%(default)s)")
    add("--grad_clip", type=REAL, default=1.0, help="largest gradient norm (%(default)s; 0: any)")
    add = parser.add_argument_group("evaluation").add_argument
    add("--eval_interval", type=AMOUNT, default=2000, metavar="N",
        help="updates between evaluations; the start and the end are evaluated too (%(default)s; "
             "0: never)")
    add("--eval_iters", type=COUNT, default=200, metavar="N",
        help="batches of --batch_size sequences in an evaluation, shared out among the processes: "
             "the first of the val shards, and as many spread over the train shards (%(default)s)")
    add("--val_tokens", type=AMOUNT, default=0, metavar="N",
        help="score exactly the first N tokens of val, of each source in a mixture, in whole "
             "windows, whatever --eval_iters says: 10485760 is what llm.c and modded-nanogpt do on "
             "FineWeb (%(default)s: by --eval_iters)")
    add("--early_stopping", type=AMOUNT, default=0, metavar="PATIENCE",
        help="end the run after so many evaluations in a row without a new lowest validation loss; "
             "best_val_loss.pt has that (%(default)s: never)")
    add("--eval_only", action=switch, default=False,
        help="evaluate the newest checkpoint in --out_dir, or that of --resume or --init_from; "
             "print, write nothing, and exit")
    add("--hellaswag", action=switch, default=True,
        help="score HellaSwag at evaluations where its data can be had (on)")
    add("--hellaswag_data", metavar="FILE",
        help="hellaswag_val.jsonl, also .gz (else downloaded once)")
    add("--hellaswag_limit", type=AMOUNT, metavar="N",
        help="score N examples of HellaSwag and of each --task, always the same choice (all on "
             "cuda, 200 elsewhere; 0: all)")
    add("--task", nargs="+", action=Gather, metavar="NAME=FILE",
        help="also score these .jsonl or .jsonl.gz files in HellaSwag's format, a context and four "
             "endings a line, under names of your own (none)")
    add("--sample_interval", type=AMOUNT, default=1, metavar="N",
        help="evaluations from one sample of the model's text to the next, at temperature 0.8 from "
             "the 50 likeliest tokens (%(default)s: at each but that of step 0; 0: never)")
    add("--sample_prompt", default="Hello, I'm a language model,", metavar="TEXT",
        help='what it continues; "" begins a document (%(default)r)')
    add("--sample_tokens", type=SAMPLED, default=40, metavar="N",
        help="tokens it adds, at most 100,000, since training waits for them (%(default)s)")
    add = parser.add_argument_group("weights of sequences").add_argument
    add("--key_tokens", metavar="FILE",
        help="train on the mean over sequences of A x (1 + number of key tokens in it) x (mean "
             "loss of it), which is then the training loss that is logged; evaluations weigh "
             "nothing. FILE has the text of one GPT-2 token a line, where ' river' and 'river' are "
             "two (off)")
    add("--key_token_alpha", type=REAL, default=1.0, metavar="A", help="A above (%(default)s)")
    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", help="cuda, cuda:N, mps or cpu (the first of these there is)")
    add("--dtype", choices=["auto", "bfloat16", "float16", "float32"], default="auto",
        help="of the computation; weights are float32, float16 scales its gradients (bfloat16 "
             "where the device computes in it, else float16 on cuda, else float32)")
    add("--compile", action=switch, default=None,
        help="torch.compile: a minute at the start, then faster steps; on a CPU it needs a C++ "
             "compiler and Python's headers; left out with a warning where they are missing (on "
             "for cuda)")
    add("--compile_mode", choices=COMPILE_MODES, default="default",
        help="max-autotune: try several kernels for each product and keep the fastest, minutes at "
             "the start (%(default)s)")
    add("--compile_eval", action=switch, default=False,
        help="with --compile, compile the validation loss too: another minute at the first "
             "evaluation; tasks and samples stay as they are (off)")
    add("--parallel", choices=PARALLEL, default="ddp",
        help="several processes: ddp, a whole model on each, or fsdp, of weights, gradients and "
             "moments a part on each, for what does not fit one GPU (%(default)s)")
    add("--reshard_after_forward", action=switch, default=True,
        help="fsdp gathers a block's weights twice, for forward and for backward; else they stay "
             "whole in between: more memory, less traffic (on)")
    add("--gradient_checkpointing", action=switch, default=False,
        help="recompute activations: much less memory, a third more time (off)")
    add("--attention", choices=ATTENTION, default="auto",
        help="kernels that are tried first: flash is torch's FlashAttention 2, cudnn NVIDIA's, "
             "flash3 and flash4 need a package (flash_attn_interface, flash_attn.cute) and a GPU "
             "of its generation; math is exact and slow (auto: torch's choice)")
    add("--bfloat16_residual", action=switch, default=False,
        help="keep the sum that runs through the blocks in bfloat16 too: less memory traffic, "
             "less exact (off: float32)")
    add("--head_rows", type=AMOUNT, default=0, metavar="N",
        help="tokens whose logits exist at a time; 16384 or 32768 on a large GPU: the head's "
             "gradient is then also added up in float32 products (%(default)s: 8192 on a GPU, 512 "
             "on a CPU, products in --dtype)")
    add("--bucket_cap_mb", type=COUNT, default=25, metavar="MB",
        help="megabytes of gradients that ranks exchange at once; 50 to 100 where the network is "
             "fast (%(default)s, as torch has it)")
    add("--profile", type=AMOUNT, default=0, metavar="STEPS",
        help="write a trace of so many updates, after the first four, to OUT_DIR/trace.json.gz for "
             "ui.perfetto.dev; they are slower meanwhile (%(default)s: none)")
    add("--price_per_hour", type=REAL, default=0, metavar="DOLLARS",
        help="what an hour of all the GPUs costs: the log, the console and the report then say "
             "what the run has cost (%(default)s: not known)")
    add = parser.add_argument_group("run").add_argument
    add("--out_dir", default="checkpoints", metavar="DIR",
        help="for checkpoints and logs; {learning_rate} and other flags in braces become their "
             "values, so that each setting of a sweep has a folder of its own (checkpoints)")
    add("--resume", default="auto", metavar="auto|never|PATH",
        help="auto: continue the newest good checkpoint in --out_dir, if any. never: start anew, "
             "an earlier run's files are moved aside. A path: continue that one, later ones are "
             "moved aside (auto)")
    add("--keep_checkpoints", type=COUNT, default=3, metavar="N",
        help="iter-*.pt to keep (%(default)s)")
    add("--checkpoint_interval", type=AMOUNT, default=0, metavar="N",
        help="updates between saves of resume.pt (%(default)s: by time only)")
    add("--checkpoint_minutes", type=REAL, default=15, metavar="M",
        help="minutes between saves of resume.pt (%(default)s; 0: never)")
    add("--async_save", action=switch, default=True,
        help="write checkpoints behind training, from a copy in main memory as large as the file; "
             "else training waits for the disk (on)")
    add("--log_interval", type=COUNT, default=10, metavar="N",
        help="updates between log lines (%(default)s)")
    add("--tensorboard", action=switch, default=False,
        help="the metrics also as TensorBoard's files, in OUT_DIR/tensorboard (off)")
    add("--wandb", action=switch, default=False,
        help="the metrics also to Weights & Biases; WANDB_MODE=offline keeps them in OUT_DIR/wandb "
             "(off)")
    add("--trackio", action=switch, default=False,
        help="the metrics also to trackio, which keeps them on this machine: `trackio show` (off)")
    add("--seed", type=SEED, default=1337,
        help="of weights, data order, dropout and samples (1337)")
    # fmt: on
    return parser
