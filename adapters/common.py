"""What the three trainers share: train_gpt2.py's flags and weights, shards and raw text as torch
Datasets.

    args, given = parse(__doc__, argv, "out-trainer")
    train = shard_windows(args.data_dir, "train", block_size=1024, seed=1337)
    train[0]    # {"input_ids": int64 (1024,), "labels": the same one token later}

Labels are shifted already: labels[t] is the token after input_ids[t], as train_gpt2.py has it, so
that all block_size of them are used. The order is train_gpt2.py's too: item p of a training set is
the window at position p of the run, counted through all epochs. A trainer that reads it from front
to back in batches sees what train_gpt2.py sees.
"""

import argparse
import contextlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from adapters import AdapterError, FrameworkMissing, arguments, require
from adapters.arguments import SIZES, is_speaker
from adapters.raw_text import ChunkWindows, load_text, split_chunks, text_chunks
from adapters.states import plain_values_only
from model import GPT, CheckpointError, GPTConfig, load_checkpoint
from pretrain import distributed, files
from pretrain.errors import UserError, first_line, program, say
from pretrain.models import architecture_of
from pretrain.rendezvous import Watch, has_agent
from pretrain.report.runlog import RunLog
from pretrain.tokens.shards import ShardError, find_shards
from pretrain.tokens.tokenizer import TokenizerUnavailable
from pretrain.train.checkpoint import CheckpointError as TrainCheckpointError
from pretrain.train.keytokens import KeyTokenError
from pretrain.train.loader import ShardLoader, TokenWindows
from pretrain.train.optim import learning_rate

__all__ = ["AdapterError", "ChunkWindows", "load_text", "split_chunks", "text_chunks"]

# What other rooms raise for their users to mend.
ERRORS = (CheckpointError, TrainCheckpointError, ShardError, TokenizerUnavailable, KeyTokenError)


@contextlib.contextmanager
def net(name: str) -> Iterator[Any]:
    """pretrain.errors.program for a program that runs a framework: its errors of the disk become a
    line too, and nothing that it loads is executed. Yields the outcome."""
    less = "a smaller --batch_size"
    with program(name, is_speaker, less_memory=less) as outcome, plain_values_only():
        try:
            yield outcome
        except ERRORS as error:
            raise AdapterError(str(error)) from None
        except Exception as error:
            if isinstance(error, UserError | OSError) or not (line := disk_problem(error)):
                raise
            raise AdapterError(line) from None


def disk_problem(error: BaseException) -> str | None:
    """The line of an OSError that a library has wrapped in an exception of its own; None when the
    error is of another kind. torch's writer chains it, safetensors has its text."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return first_line(cause)
        cause = cause.__cause__ or cause.__context__
    line = first_line(error)
    return line if "os error" in line or "PytorchStreamWriter failed" in line else None


def is_first_process() -> bool:
    """Whether this is rank 0, told before any framework has made its process group: torchrun sets
    both variables, Lightning's own launcher the second one for the processes that it starts."""
    environment = distributed.environment
    return environment("RANK", 0) == 0 and environment("LOCAL_RANK", 0) == 0


@contextlib.contextmanager
def run_folder(out_dir: str | Path) -> Iterator[Path]:
    """A run's folder, made if need be, that no other run may write to meanwhile. train_gpt2.py
    takes the same lock. Raises pretrain.files.Locked, OSError."""
    out_dir = Path(out_dir)
    if not is_first_process():
        yield out_dir
        return
    out_dir.mkdir(parents=True, exist_ok=True)
    problem = f"{out_dir}: another run is writing here; wait for it or use another --out_dir"
    with files.lock(out_dir / ".lock", problem):
        yield out_dir


def main(
    name: str,
    argv: Sequence[str] | None,
    train: Callable[[argparse.Namespace, set[str]], None],
    *,
    description: str | None,
    out_dir: str,
    add_flags: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> int:
    """A trainer's main: flags, the net, the folder's lock, the run. Returns the exit status."""
    with net(name) as outcome:
        watch_torchrun()
        args, given = parse(description or "", argv, out_dir, add_flags)
        with run_folder(args.out_dir):
            train(args, given)
    return outcome.status


def watch_torchrun() -> None:
    """Have this process end when the torchrun that started it is killed, as train_gpt2.py's does:
    frameworks do not look, and its ranks would train on, unseen and with the folder's lock. Raises
    RankError when torchrun has gone already."""
    if has_agent() and distributed.environment("WORLD_SIZE", 1) > 1:
        Watch(distributed.environment("RANK", 0))


def require_for(name: str, *modules: str) -> None:
    """require() for a module called `name`: where that is the command that was run, a line instead
    of a traceback."""
    try:
        require(*modules)
    except FrameworkMissing as error:
        if name != "__main__":
            raise
        sys.exit(f"error: {error}")


def parse(
    description: str,
    argv: Sequence[str] | None,
    out_dir: str,
    add_flags: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> tuple[argparse.Namespace, set[str]]:
    """arguments.parse, and what only torch knows of the machine."""
    args, given = arguments.parse(description, argv, out_dir, add_flags)
    if args.dtype == "float16" and device(args).type == "cpu":
        message = "on a CPU this trainer would use another in silence; take bfloat16"
        say(Path(sys.argv[0]).name, f"--dtype float16: {message}")
        raise SystemExit(2)
    return args, given


def device(args: argparse.Namespace) -> torch.device:
    return distributed.pick_device(
        "cpu" if args.cpu else "auto", distributed.environment("LOCAL_RANK", 0)
    )


def build_model(args: argparse.Namespace, given: set[str]) -> tuple[GPT, int]:
    """The model with which train_gpt2.py would begin with these flags, and the length of the
    windows to train it on. Raises model.CheckpointError, AdapterError."""
    torch.manual_seed(args.seed)
    if args.init_from == "scratch":
        return GPT(GPTConfig(**{name: getattr(args, name) for name in SIZES})), args.block_size
    if Path(args.init_from).is_file():
        model = load_checkpoint(args.init_from)[0]
    else:
        model = GPT.from_pretrained(args.init_from)
    if (name := architecture_of(model)) != "gpt2":
        raise AdapterError(
            f"{args.init_from}: a model of the {name} architecture; this trainer has GPT-2's alone,"
            " train_gpt2.py --init_from takes it"
        )
    block_size = args.block_size if "block_size" in given else model.config.block_size
    asked = given & {"n_layer", "n_head", "n_embd", "bias"}
    wrong = [
        f"--{name}" for name in sorted(asked) if getattr(args, name) != getattr(model.config, name)
    ]
    wrong += ["--block_size"] * (block_size > model.config.block_size)
    if wrong:
        raise AdapterError(f"{args.init_from} has {model.config}: leave out {', '.join(wrong)}")
    again = GPT(replace(model.config, dropout=args.dropout))
    again.load_state_dict(model.state_dict())
    return again, block_size


def schedule(args: argparse.Namespace) -> Callable[[int], float]:
    """Share of --learning_rate at each update, for LambdaLR: train_gpt2.py's warmup and cosine."""
    rate = partial(
        learning_rate,
        max_lr=args.learning_rate,
        min_lr=args.min_lr,
        warmup_iters=args.warmup_iters,
        lr_decay_iters=args.lr_decay_iters,
    )
    return lambda step: rate(step) / args.learning_rate if args.learning_rate else 0.0


def log_metrics(log: RunLog, step: int, tokens: int, values: dict[str, float | None]) -> None:
    """Write those of `values` that are not None as an event of metrics.jsonl: eval if val_loss is
    among them, else train."""
    numbers = {name: float(value) for name, value in values.items() if value is not None}
    if "val_loss" in numbers:
        numbers["perplexity"] = math.exp(min(numbers["val_loss"], 700))
    log.write("eval" if "val_loss" in numbers else "train", step=step, tokens=tokens, **numbers)


def describe_run(
    args: argparse.Namespace, model: Any, block_size: int, processes: int
) -> dict[str, Any]:
    """What a run that continues must have in common with the one that it continues: the model, the
    sequences of an update, and their order. How an update's batch is split into micro-batches and
    processes is free."""
    config = asdict(model.config) if isinstance(model, GPT) else {}
    return {
        **{name: config[name] for name in ("n_layer", "n_head", "n_embd", "bias") if config},
        "block_size": block_size,
        "sequences_per_update": args.batch_size * args.gradient_accumulation_steps * processes,
        "seed": args.seed,
        "shuffle": args.shuffle,
    }


class Windows(Dataset):
    """`length` windows in training order; item p is {"input_ids", "labels"}, int64 (block_size,)
    each.

    windows.read(numbers) gives the tokens of windows, (n, block_size + 1); order(positions) says
    which window comes at which position. Positions past `length` are fine: they belong to later
    epochs.
    """

    def __init__(self, windows, order: Callable[[np.ndarray], np.ndarray], length: int):
        self.windows, self.order, self.length = windows, order, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, position: int) -> dict[str, torch.Tensor]:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: Sequence[int]) -> list[dict[str, torch.Tensor]]:
        """What a DataLoader asks for: a whole batch at once."""
        numbers = self.order(np.asarray(positions, dtype=np.int64))
        tokens = torch.from_numpy(self.windows.read(numbers).astype(np.int64))
        return [{"input_ids": row[:-1], "labels": row[1:]} for row in tokens]


def shard_windows(
    data_dir: str | Path,
    split: str,
    *,
    block_size: int,
    seed: int = 0,
    shuffle: bool = True,
    length: int | None = None,
    vocab_size: int = 2**16,
) -> Windows:
    """The windows of a folder's shards. split "train": in ShardLoader's order, `length` of them
    (default: an epoch). split "val": the first `length`, all if there are fewer. Raises
    ShardError."""
    paths = find_shards(data_dir, split)
    if split == "val":
        windows = TokenWindows(paths, block_size=block_size, vocab_size=vocab_size)
        return Windows(
            windows, lambda positions: positions, min(length or len(windows), len(windows))
        )
    loader = ShardLoader(
        paths,
        batch_size=1,
        block_size=block_size,
        seed=seed,
        shuffle=shuffle,
        vocab_size=vocab_size,
    )
    return Windows(loader.windows, loader.order, length or loader.windows_per_epoch)
