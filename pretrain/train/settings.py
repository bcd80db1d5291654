"""What train_gpt2.py can be told: every flag, its default, and what of it contradicts the rest or
the machine.

    settings, problems = resolve(["--batch_size", "16"], world_size=8)
    settings.batch_size             # 16; problems: one line each, none when the run may begin

No torch here, nor in what is imported at the top: --help and wrong flags answer at once.
"""

import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from pretrain.errors import UserError, say
from pretrain.flags import AMOUNT, COUNT, LARGEST, named_after_flags, parse_with_config, wrong_files
from pretrain.rendezvous import RankError, environment, is_first_rank
from pretrain.report import trackers
from pretrain.text.source import SourceError
from pretrain.tokens.shards import ShardError
from pretrain.tokens.tokenizer import TokenizerUnavailable
from pretrain.train.arguments import OVERRIDES, build_parser
from pretrain.train.folders import check_mixture, find_all
from pretrain.train.keytokens import KeyTokenError, read_key_tokens

__all__ = ["AMOUNT", "COUNT", "OVERRIDES", "TrainSettings", "build_parser", "resolve"]
# What holds with --optimizer muon where a flag is not given: the record's settings for 124M.
MUON = {
    "learning_rate": 0.025,
    "min_lr": 0.0,
    "warmup_iters": 0,
    "weight_decay": 0.05,
    "beta1": 0.8,
    "grad_clip": 0.0,
}
HEAD_DIM = 128  # of --model modern
VOCABULARY = 50257  # of GPT-2, for the size of a model that is not built yet


class SettingsError(UserError):
    """Flags that contradict what a run finds once its data is open."""


@dataclass(frozen=True)
class TrainSettings:
    """All that a run is told, made once from command line, --config and torchrun's environment.
    What a field means, its unit and its default: the flag of that name, in build_parser."""

    config: str | None
    # model
    model: str
    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    dropout: float
    bias: bool
    value_embeddings: bool
    init_from: str
    # data
    data_dir: str | list[str]  # a list: the sources of a mixture
    data_cache: str
    data_cache_gb: int
    data: list[str] | None
    stride: int
    shuffle: bool
    verify_data: bool | None
    # batch
    batch_size: int
    gradient_accumulation_steps: int
    total_batch_tokens: int
    # optimizer
    optimizer: str
    schedule: str
    decay_share: float
    max_iters: int
    epochs: float
    learning_rate: float
    min_lr: float
    warmup_iters: int
    lr_decay_iters: int
    weight_decay: float
    beta1: float
    beta2: float
    grad_clip: float
    # evaluation
    eval_interval: int
    eval_iters: int
    val_tokens: int
    early_stopping: int
    eval_only: bool
    hellaswag: bool
    hellaswag_data: str | None
    hellaswag_limit: int | None
    task: list[str] | None
    sample_interval: int
    sample_prompt: str
    sample_tokens: int
    # weights of sequences
    key_tokens: str | None
    key_token_alpha: float
    # machine
    device: str
    dtype: str
    compile: bool | None
    parallel: str
    reshard_after_forward: bool
    compile_mode: str
    compile_eval: bool
    gradient_checkpointing: bool
    attention: str
    bfloat16_residual: bool
    head_rows: int
    bucket_cap_mb: int
    profile: int
    price_per_hour: float
    # run
    out_dir: str
    resume: str
    keep_checkpoints: int
    checkpoint_interval: int
    checkpoint_minutes: float
    async_save: bool
    log_interval: int
    tensorboard: bool
    wandb: bool
    trackio: bool
    seed: int
    # not flags
    given: frozenset[str] = frozenset()  # names of the flags that somebody set
    world_size: int = 1  # processes

    @property
    def flags(self) -> dict[str, Any]:
        """Every flag with its value, for checkpoints and config.json."""
        names = [field.name for field in fields(self)]
        return {n: getattr(self, n) for n in names if n not in ("given", "world_size")}

    @property
    def asked_sizes(self) -> set[str]:
        """What of the flags a model must agree with, its architecture and its sizes: all of them
        for a new one, those that were given for weights from elsewhere."""
        sizes = {"model", "n_layer", "n_head", "n_embd", "bias", "value_embeddings", "block_size"}
        anew = self.init_from == "scratch" and not self.eval_only
        return sizes if anew else sizes & self.given

    @property
    def is_evaluated(self) -> bool:
        return bool(self.eval_interval or self.eval_only)

    def micro_steps(self, block_size: int) -> int:
        """Forward passes of each process per update."""
        micro_tokens = self.batch_size * block_size * self.world_size
        return self.total_batch_tokens // micro_tokens or self.gradient_accumulation_steps


def resolve(argv: Sequence[str], world_size: int) -> tuple[TrainSettings, list[str]]:
    """(settings, all problems, one line each): only without problems do the settings mean
    anything."""
    args, given, problems = parse_with_config(build_parser(), argv, OVERRIDES)
    values = vars(args) | _recipe(args, given)
    values["out_dir"] = named_after_flags(args.out_dir, values)
    settings = TrainSettings(**values, given=frozenset(given), world_size=world_size)
    return settings, problems or problems_of(settings)


def _recipe(args: Any, given: set[str]) -> dict[str, Any]:
    """Values of flags that were not given and that follow from --model, --optimizer, --schedule."""
    found: dict[str, Any] = dict(MUON) if args.optimizer == "muon" else {}
    if args.model == "modern":
        found["n_head"] = max(1, args.n_embd // HEAD_DIM)
    if args.schedule == "trapezoid" and "lr_decay_iters" not in given:
        found["lr_decay_iters"] = args.max_iters
        warmup = found.get("warmup_iters", args.warmup_iters)
        found["warmup_iters"] = min(warmup, args.max_iters // 10)  # as with --epochs
    return {name: value for name, value in found.items() if name not in given}


def from_command_line(argv: Sequence[str] | None) -> TrainSettings | None:
    """The settings of a command line (None: this program's); None where something is wrong, which
    the first process of each machine has said by then."""
    settings, problems = resolve(sys.argv[1:] if argv is None else argv, _number("WORLD_SIZE", 1))
    for problem in problems if _number("LOCAL_RANK", 0) == 0 else ():
        say("train_gpt2.py", problem)
    return None if problems else settings


def _number(name: str, default: int) -> int:
    """What torchrun set; what else stands there is refused where the ranks meet."""
    try:
        return environment(name, default)
    except RankError:
        return default


def with_length(settings: TrainSettings, steps_per_epoch: float) -> TrainSettings:
    """The same settings with --epochs, where given, turned into the updates that it is, and what
    follows from it. Raises SettingsError for what contradicts it."""
    if not settings.epochs:
        return settings
    updates = math.ceil(settings.epochs * steps_per_epoch)
    if updates > LARGEST:
        raise SettingsError(
            f"--epochs {settings.epochs:g}: {updates:.1e} updates are more than can be counted"
        )
    given = settings.given
    decay = settings.lr_decay_iters if "lr_decay_iters" in given else updates
    shortened = min(settings.warmup_iters, updates // 10)
    warmup = settings.warmup_iters if "warmup_iters" in given else shortened
    if warmup > decay:
        raise SettingsError(
            f"--warmup_iters {warmup}: after --lr_decay_iters {decay} ({settings.epochs:g} epochs"
            f" are {updates:,} updates)"
        )
    return replace(settings, max_iters=updates, lr_decay_iters=decay, warmup_iters=warmup)


def check(flags: Any, given: set[str], world_size: int) -> list[str]:
    """problems_of for flags that come as an object with these names."""
    names = {field.name for field in fields(TrainSettings)}
    values = {name: value for name, value in vars(flags).items() if name in names}
    return problems_of(TrainSettings(**values, given=frozenset(given), world_size=world_size))


def problems_of(settings: TrainSettings) -> list[str]:
    """What is wrong with the flags together, and with the world they meet: one line each."""
    problems = _check_numbers(settings) + _check_memory(settings) + _check_exclusive(settings)
    if problem := _device_problem(settings.device):
        problems.append(f"--device {problem}")
    problems += _check_data(settings) + _check_key_tokens(settings)
    for package in trackers.PACKAGES:
        if getattr(settings, package) and (problem := trackers.missing(package)):
            problems.append(f"--{package} {problem}")
    is_named = settings.resume not in ("auto", "never")
    # Rank 0 reads it for all; other machines need not have it.
    if is_named and is_first_rank() and not os.path.isfile(settings.resume):
        problems.append(f"--resume {settings.resume}: no such file (and neither auto nor never)")
    if settings.hellaswag_data and not os.path.isfile(settings.hellaswag_data):
        problems.append(f"--hellaswag_data {settings.hellaswag_data}: no such file")
    return problems + wrong_files("--task", settings.task or (), taken=("hellaswag",))


def _check_numbers(settings: TrainSettings) -> list[str]:
    problems = []
    if settings.init_from == "scratch" and settings.n_embd % settings.n_head:
        problems.append(f"--n_embd {settings.n_embd}: not a multiple of --n_head {settings.n_head}")
    elif settings.model == "modern" and settings.n_embd // settings.n_head % 4:
        problems.append(
            f"--n_embd {settings.n_embd}, --n_head {settings.n_head}: heads of"
            f" {settings.n_embd // settings.n_head}; --model modern needs a multiple of 4"
        )
    if settings.value_embeddings and settings.model != "modern" and settings.init_from == "scratch":
        problems.append("--value_embeddings: only --model modern has them")
    if settings.min_lr > settings.learning_rate:
        problems.append(
            f"--min_lr {settings.min_lr}: above --learning_rate {settings.learning_rate}"
        )
    if settings.warmup_iters > settings.lr_decay_iters and not settings.epochs:
        problems.append(
            f"--warmup_iters {settings.warmup_iters}: after --lr_decay_iters"
            f" {settings.lr_decay_iters}"
        )
    # Tokens in a micro-step of all processes.
    smallest = settings.batch_size * settings.block_size * settings.world_size
    if settings.total_batch_tokens % smallest:
        problems.append(
            f"--total_batch_tokens {settings.total_batch_tokens}: not a multiple of {smallest}"
            f" (--batch_size {settings.batch_size} x --block_size {settings.block_size} x"
            f" {settings.world_size} processes)"
        )
    return problems


def _check_exclusive(settings: TrainSettings) -> list[str]:
    given, problems = settings.given, []
    if settings.total_batch_tokens and "gradient_accumulation_steps" in given:
        problems.append("--total_batch_tokens and --gradient_accumulation_steps: give one of them")
    if settings.epochs and "max_iters" in given:
        problems.append("--epochs and --max_iters: give one of them")
    if settings.data and "data_dir" in given:
        problems.append("--data and --data_dir: give one of them")
    if settings.early_stopping and not settings.eval_interval:
        problems.append("--early_stopping: needs evaluations, but --eval_interval is 0")
    if settings.val_tokens and not settings.is_evaluated:
        problems.append("--val_tokens: needs evaluations, but --eval_interval is 0")
    return problems


def _check_memory(settings: TrainSettings) -> list[str]:
    """Sizes that no run on this machine could hold, found before any memory is asked for: a lower
    bound, so that nothing is refused that might work."""
    have = main_memory()
    if have is None or settings.init_from != "scratch" or settings.eval_only:
        return []
    width, problems = settings.n_embd, []
    # A block: attention 4 x width^2, MLP 8 x width^2. In float32: weight, gradient, two moments.
    parameters = 12 * settings.n_layer * width**2 + width * (VOCABULARY + settings.block_size)
    if 16 * parameters > have:
        problems.append(
            f"--n_layer {settings.n_layer}, --n_embd {width}, --block_size {settings.block_size}:"
            f" {parameters:.3g} parameters take {16 * parameters / 1e9:,.0f} GB to train, and this"
            f" machine has {have / 1e9:,.0f} GB; choose smaller ones"
        )
        return problems
    # The rows of a micro-step once, in half precision, and the ids of all its micro-steps.
    rows = settings.batch_size * settings.block_size
    if rows * (2 * width + 16 * settings.micro_steps(settings.block_size)) > have:
        problems.append(
            f"--batch_size {settings.batch_size}, --block_size {settings.block_size},"
            f" --gradient_accumulation_steps {settings.micro_steps(settings.block_size)}: an update"
            f" does not fit into the {have / 1e9:,.0f} GB of this machine; choose smaller ones"
        )
    return problems


def main_memory() -> int | None:
    """Bytes of main memory in this machine; None where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _device_problem(name: str) -> str | None:
    if name in ("auto", "cpu"):
        return None  # there always: no need to load torch, which takes seconds
    from pretrain import distributed

    try:
        distributed.pick_device(name, distributed.environment("LOCAL_RANK", 0))
    except (ValueError, UserError) as error:
        return str(error)
    return None


def _check_data(settings: TrainSettings) -> list[str]:
    data = settings.data
    try:
        if data:
            # Here, since building shards loads pyarrow.
            from pretrain.tokens.owntext import is_shard_folder, open_text

            if len(data) > 1 or not is_shard_folder(data[0]):
                open_text(data, Path(settings.out_dir))
                return []
        elif isinstance(settings.data_dir, list):
            return check_mixture(settings.data_dir, settings.is_evaluated)
        find_all(str(data[0] if data else settings.data_dir), settings.is_evaluated)
    except (SourceError, ShardError) as error:
        return [f"--{'data' if data else 'data_dir'} {error}"]
    return []


def _check_key_tokens(settings: TrainSettings) -> list[str]:
    if not settings.key_tokens:
        alone = "key_token_alpha" in settings.given
        return ["--key_token_alpha: needs --key_tokens"] if alone else []
    try:
        read_key_tokens(settings.key_tokens)
    except (KeyTokenError, TokenizerUnavailable) as error:
        return [f"--key_tokens {error}"]
    return []
