"""Stage 2: train GPT-2 on the shards that fineweb.py made.

    $ torchrun --nproc_per_node=8 train_gpt2.py --config configs/gpt2-124m.yaml    # on 8 GPUs
    $ python train_gpt2.py --data my.txt --n_layer 4 --n_head 4 --n_embd 256 --block_size 256
    --epochs 20

    step   2000/600000 | loss  6.1234 | lr 6.00e-04 | norm   0.91 | 1,234,567 tok/s |    265.4 ms |
    ...

Stop it whenever you like: the same command continues, as if nothing had happened. In --out_dir it
keeps
    iter-{step}-loss-{validation loss}.pt   at each evaluation, the last --keep_checkpoints
    best_val_loss.pt, final_model.pt        further names of those (hard links)
    resume.pt                               between evaluations, and when told to stop (SIGTERM,
    Ctrl-C) config.json, metrics.jsonl              what was run, and what came of it: see
    pretrain/report/runlog.py
    data/                                   the shards of --data
Exit status: 0 finished, 1 stopped by an error, 2 the flags are wrong, 128 + n stopped by signal n.
"""

import argparse
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hellaswag import Example, HellaSwagError, ensure_data, load_examples
from hellaswag import evaluate as score_endings
from model import GPT, GPTConfig, load_checkpoint
from model import CheckpointError as ModelError
from pretrain import distributed
from pretrain.distributed import Ranks, seed_dropout
from pretrain.eval import validation
from pretrain.eval.sampling import TrainingSamples
from pretrain.flags import parse_with_config
from pretrain.report.console import Console
from pretrain.report.runlog import (
    RunLog,
    Stopwatch,
    eval_line,
    provenance,
    scores_block,
    start_block,
)
from pretrain.report.trackers import TrackerError, open_trackers
from pretrain.text.source import SourceError
from pretrain.tokens.build import BuildRefused
from pretrain.tokens.owntext import prepare, unigram_entropy
from pretrain.tokens.shards import ShardError, data_fingerprint, find_shards
from pretrain.tokens.tokenizer import TokenizerUnavailable, TokenMismatch
from pretrain.train import checkpoint as checkpoints
from pretrain.train.checkpoint import CheckpointError
from pretrain.train.keytokens import key_token_weights, load_key_tokens
from pretrain.train.loader import ShardLoader, TokenWindows, verify_data
from pretrain.train.optim import learning_rate, make_optimizer
from pretrain.train.settings import RIVALS, build_parser, check, set_length
from pretrain.train.stopping import FiniteGuard, NotFinite, StopSignal

__all__ = ["load_checkpoint", "main"]
SIZES = ("n_layer", "n_head", "n_embd", "bias")
USER_ERRORS = (
    BuildRefused,
    CheckpointError,
    ModelError,
    NotFinite,
    ShardError,
    SourceError,
    TokenizerUnavailable,
    TokenMismatch,
    TrackerError,
)


@dataclass
class Progress:
    """What a checkpoint holds besides the states of model, optimizer and scaler."""

    step: int = 0  # updates made
    last_eval_step: int = -1
    loss: float = math.nan  # of training, as last logged or evaluated
    val_loss: float = math.nan
    best_val_loss: float = math.inf
    evals_since_best: int = 0
    learning_rate: float = 0.0


def main(argv: Sequence[str] | None = None) -> int:
    args, given, problems = parse_with_config(
        build_parser(), sys.argv[1:] if argv is None else argv, RIVALS
    )
    problems = problems or check(args, given, distributed.environment("WORLD_SIZE", 1))
    if problems:
        for problem in problems if distributed.environment("LOCAL_RANK", 0) == 0 else ():
            print(f"train_gpt2.py: error: {problem}", file=sys.stderr)
        return 2
    try:
        ranks = Ranks.start(args.device)
        with StopSignal(ranks) as stop, ExitStack() as held:
            status = train(args, given, ranks, stop, held)
        ranks.stop()
        return status
    except USER_ERRORS as error:
        if distributed.environment("RANK", 0) == 0 or not getattr(error, "on_all_ranks", False):
            print(f"train_gpt2.py: error: {error}", file=sys.stderr)
        return 1
    except torch.OutOfMemoryError as error:
        first_line = str(error).split(". ")[0]
        print(
            f"train_gpt2.py: error: {first_line}; try a smaller --batch_size with more"
            " --gradient_accumulation_steps, or --gradient_checkpointing",
            file=sys.stderr,
        )
        return 1


def build_model(saved: dict | None, init_from: str, sizes: GPTConfig, asked: set[str]) -> GPT:
    """The model that continues `saved`, or that begins as init_from says. `sizes` are those of the
    flags; `asked` names the ones that weights from elsewhere must agree with."""
    if saved:
        config, state = GPTConfig(**saved["model_config"]), saved["model"]
    elif init_from == "scratch":
        return GPT(sizes)
    else:
        is_file = os.path.isfile(init_from)
        loaded = load_checkpoint(init_from)[0] if is_file else GPT.from_pretrained(init_from)
        config, state = loaded.config, loaded.state_dict()
        wrong = [
            f"--{name} {getattr(sizes, name)}"
            for name in sorted(asked & set(SIZES))
            if getattr(sizes, name) != getattr(config, name)
        ]
        if "block_size" in asked and sizes.block_size > config.block_size:
            wrong.append(f"--block_size {sizes.block_size}")
        if wrong:
            raise ModelError(f"{init_from} has {config}: leave out {', '.join(wrong)}")
    model = GPT(replace(config, dropout=sizes.dropout))
    model.load_state_dict(state)
    return model


def open_data(
    args: argparse.Namespace, ranks: Ranks, block_size: int, vocab_size: int
) -> tuple[ShardLoader, dict[str, tuple[TokenWindows, np.ndarray]]]:
    """The batches to train on, and by name the windows that evaluations look at, with their
    numbers."""
    ranks.together(verify_data, args.data_dir, args.verify_data, ranks.rank, ranks.world_size)
    micro_tokens = args.batch_size * block_size * ranks.world_size
    loader = ShardLoader(
        find_shards(args.data_dir, "train"),
        batch_size=args.batch_size,
        block_size=block_size,
        accumulation_steps=args.total_batch_tokens // micro_tokens
        or args.gradient_accumulation_steps,
        rank=ranks.rank,
        world_size=ranks.world_size,
        seed=args.seed,
        shuffle=args.shuffle,
        stride=args.stride or None,
        vocab_size=vocab_size,
        pin_memory=ranks.device.type == "cuda",
    )
    evaluated = {}
    if args.eval_interval or args.eval_only:
        val = TokenWindows(
            find_shards(args.data_dir, "val"), block_size=block_size, vocab_size=vocab_size
        )
        num_windows = args.eval_iters * args.batch_size
        evaluated["val"] = (val, validation.first(val, num_windows))
        evaluated["train"] = (loader.windows, validation.spread(loader.windows, num_windows))
    return loader, evaluated


class HellaSwag:
    """HellaSwag at evaluations, from the moment its data is at hand: a download goes on beside the
    training, and whatever goes wrong is one warning."""

    def __init__(
        self, ranks: Ranks, file: str | None, limit: int | None, wait_seconds: float | None
    ):
        """file: the data; None: the published file, downloaded if need be. wait_seconds: for it, at
        most."""
        self.ranks, self.limit = ranks, limit
        self._path: str | None = None
        self._problem: str | None = None
        self._examples: list[Example] | None = None
        if ranks.is_first:
            thread = threading.Thread(target=self._find, args=(file,), daemon=True)
            thread.start()
            thread.join(wait_seconds)

    def _find(self, file: str | None) -> None:
        logging.getLogger("pretrain.text.remote").setLevel(
            logging.ERROR
        )  # its retries are not for this console
        try:
            self._path = str(file or ensure_data())
        except Exception as error:
            self._problem = str(error)

    def score(self, model: GPT, dtype: torch.dtype, interrupted: Callable[[], bool]) -> dict | None:
        """The summary of a Result, on every rank; None when there is none (yet)."""
        path, self._problem = self.ranks.broadcast((self._path, self._problem))
        if self._problem is None and path:
            try:
                self._examples = self._examples or self.ranks.together(
                    load_examples, path, self.limit
                )
                result = score_endings(
                    model,
                    self._examples,
                    dtype=dtype,
                    interrupted=interrupted,
                    rank=self.ranks.rank,
                    world_size=self.ranks.world_size,
                    group=self.ranks.control,
                )
                return result and result.summary()
            except (HellaSwagError, TokenizerUnavailable) as error:
                self._problem = str(error)
        if self._problem and self.ranks.is_first:
            print(f"warning: HellaSwag is left out: {self._problem}", file=sys.stderr)
        self._path, self._problem = None, None  # said once
        return None


def train(
    args: argparse.Namespace, given: set[str], ranks: Ranks, stop: StopSignal, held: ExitStack
) -> int:
    """The run that the flags describe. Returns the exit status."""
    device, out_dir = ranks.device, Path(args.out_dir)
    say = print if ranks.is_first else lambda *text, **how: None

    # Where to begin.
    if args.eval_only and "init_from" in given:
        path = None
    elif args.eval_only:
        path = ranks.on_first(checkpoints.find_to_evaluate, out_dir, args.resume)
    else:
        ranks.on_first(lambda: held.enter_context(checkpoints.lock(out_dir)) and None)
        path = ranks.on_first(checkpoints.find, out_dir, args.resume)
    saved = checkpoints.load(path, verify=False) if path else None  # the first rank has verified it
    progress = Progress(
        **{f.name: saved[f.name] for f in fields(Progress) if saved and f.name in saved}
    )
    if not (out_dir / checkpoints.BEST).exists():
        progress.best_val_loss, progress.evals_since_best = math.inf, 0

    # The model.
    torch.manual_seed(args.seed)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32
    sizes = GPTConfig(**{name: getattr(args, name) for name in (*SIZES, "block_size", "dropout")})
    from_flags = given if args.eval_only or args.init_from != "scratch" else {*SIZES, "block_size"}
    model = ranks.together(build_model, saved, args.init_from, sizes, from_flags).to(device)
    model.gradient_checkpointing = args.gradient_checkpointing
    config = model.config
    block_size = args.block_size if "block_size" in from_flags else config.block_size

    # The data.
    if args.data:
        is_builder = distributed.environment("LOCAL_RANK", 0) == 0
        args.data_dir = str(prepare(args.data, out_dir / "data", builder=is_builder))
    loader, evaluated = open_data(args, ranks, block_size, config.vocab_size)
    accumulation, tokens_per_step = loader.shape[0], loader.global_batch * block_size
    if problem := set_length(args, given, loader.steps_per_epoch):
        say(f"train_gpt2.py: error: {problem}", file=sys.stderr)
        return 2
    fingerprint = data_fingerprint(args.data_dir)
    run = {name: getattr(sizes if name in from_flags else config, name) for name in SIZES} | {
        "block_size": block_size,
        "stride": loader.windows.stride,
        "tokens per update": tokens_per_step,
        "data": fingerprint[:16],
        "seed": args.seed,
        "shuffle": args.shuffle,
    }

    # How it is computed.
    dtype = distributed.pick_dtype(args.dtype, device)
    autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
    hellaswag = None
    if evaluated and args.hellaswag:
        limit = args.hellaswag_limit if "hellaswag_limit" in given or device.type == "cuda" else 200
        hellaswag = HellaSwag(
            ranks, args.hellaswag_data, limit, wait_seconds=None if args.eval_only else 2.0
        )

    def measure() -> tuple[dict, dict | None]:
        """Loss and accuracy by set of windows, and HellaSwag's summary where there is one. Uses
        `model`, which is neither compiled nor wrapped: the same weights, and any shape."""
        scores = validation.evaluate(
            model,
            evaluated,
            batch_size=args.batch_size,
            ranks=ranks,
            autocast=autocast,
            interrupted=stop.is_set,
        )
        return scores, hellaswag and hellaswag.score(model, dtype, interrupted=stop.is_set)

    if args.eval_only:
        say(f"{path or args.init_from}\n{scores_block(*measure())}")
        return 0
    betas = (args.beta1, args.beta2)
    optimizer = make_optimizer(
        model, learning_rate=args.learning_rate, weight_decay=args.weight_decay, betas=betas
    )
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    guard = FiniteGuard(ranks, scaler)
    if saved:
        checkpoints.refuse_other_run(path, saved["run"], run)
        checkpoints.restore_optimizer(optimizer, saved["optimizer"])
        scaler.load_state_dict(saved["scaler"])
        saved = None  # unmaps the file

    def is_over() -> bool:
        return (
            progress.step >= args.max_iters or 0 < args.early_stopping <= progress.evals_since_best
        )

    if is_over() and checkpoints.is_finished(out_dir, progress.step):
        is_early = progress.step < args.max_iters
        limit = "early_stopping" if is_early else "epochs" if args.epochs else "max_iters"
        say(f"{out_dir}: finished at step {progress.step:,}; with a higher --{limit} it goes on")
        return 0
    compiled = device.type == "cuda" if args.compile is None else args.compile
    if compiled and (problem := distributed.compiler_problem(device)):
        say(f"warning: --compile left out: {problem}", file=sys.stderr)
        compiled = False
    forward = torch.compile(model) if compiled else model
    if ranks.world_size > 1:
        forward = DistributedDataParallel(forward, gradient_as_bucket_view=True)

    # What is about to happen, on the console and for later.
    rate = partial(
        learning_rate,
        max_lr=args.learning_rate,
        min_lr=args.min_lr,
        warmup_iters=args.warmup_iters,
        lr_decay_iters=args.lr_decay_iters,
    )
    name = distributed.device_name(device)
    peak_flops = distributed.peak_flops(name, dtype)
    setup = {
        "flags": vars(args),
        "model_config": asdict(config),
        "parameters": model.num_parameters(),
        "run": run,
        "data_fingerprint": fingerprint,
        "device": name,
        "dtype": str(dtype).removeprefix("torch."),
        "compiled": compiled,
        "processes": ranks.world_size,
        "micro_steps": accumulation,
        "tokens_per_step": tokens_per_step,
        "steps_per_epoch": loader.steps_per_epoch,
        "max_tokens": args.max_iters * tokens_per_step,
        "last_learning_rate": rate(args.max_iters - 1),
        "train_shards": len(loader.windows.paths),
        "train_tokens": loader.windows.num_tokens,
        "evaluated_windows": {split: len(numbers) for split, (_, numbers) in evaluated.items()},
        "unigram_entropy": unigram_entropy(loader.windows.paths),
        "peak_flops": peak_flops,
        **provenance(),
    }
    log = RunLog(out_dir, enabled=ranks.is_first)

    def note_failure(kind: type | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception):
            reason = "not finite" if isinstance(error, NotFinite) else kind.__name__
            log.write("stop", step=progress.step, reason=f"{reason}: {error}")

    held.push(note_failure)
    if ranks.is_first:
        checkpoints.write_json(out_dir / "config.json", setup)
        log.write("start", step=progress.step, resumed_from=path, **setup)
        print(
            start_block(
                setup, f"continues {path}, step {progress.step:,}" if path else "begins anew"
            )
        )
        for tracker in open_trackers(args.tensorboard, args.wandb, log.path, progress.step, setup):
            log.follow(held.enter_context(closing(tracker)))
    console = Console(args.max_iters, progress.step, enabled=ranks.is_first)
    say = held.enter_context(closing(console)).say
    key_tokens = load_key_tokens(args.key_tokens).to(device) if args.key_tokens else None
    samples = TrainingSamples(args.sample_prompt, args.sample_tokens, args.seed)

    def sample() -> None:
        with autocast:
            text = samples.write(model)
        if text is not None:
            console.sample(
                log.write("sample", step=progress.step, prompt=samples.prompt, text=text)
            )

    def save(*names: str) -> bool:
        """Write this point of the run under these names in out_dir. A full disk stops nothing: it
        is said, and the checkpoints that are there stay."""
        state = asdict(progress) | {
            "format": checkpoints.FORMAT,
            "tokens": progress.step * tokens_per_step,
            "config": vars(args),
            "run": run,
            "data_fingerprint": fingerprint,
            "rng": {"seed": args.seed},
            "model_config": asdict(config),
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
        }
        try:
            checkpoints.save(out_dir / names[0], state)
            for name in names[1:]:
                checkpoints.link(out_dir / names[0], out_dir / name)
        except CheckpointError as error:
            print(f"warning: {error}", file=sys.stderr)
            return False
        return True

    signal_number, watch, lap_step, saved_at = 0, Stopwatch(), progress.step, time.monotonic()
    batches = held.enter_context(closing(loader.prefetch(progress.step, device=device)))
    while True:
        is_last = is_over()
        due = is_last or (args.eval_interval and progress.step % args.eval_interval == 0)
        if evaluated and due and progress.step != progress.last_eval_step:
            distributed.synchronize(device)
            watch.pause()
            scores, endings = measure()
            if signal_number := stop.agreed_now():
                break  # evaluated anew when the run goes on
            is_best = scores["val"]["loss"] < progress.best_val_loss
            progress.last_eval_step = progress.step
            progress.loss, progress.val_loss = scores["train"]["loss"], scores["val"]["loss"]
            progress.best_val_loss = min(progress.best_val_loss, progress.val_loss)
            progress.evals_since_best = 0 if is_best else progress.evals_since_best + 1
            is_last = is_over()
            record = log.write(
                "eval",
                step=progress.step,
                tokens=progress.step * tokens_per_step,
                train_loss=progress.loss,
                val_loss=progress.val_loss,
                best_val_loss=progress.best_val_loss,
                perplexity=math.exp(progress.val_loss),
                accuracy=scores["val"]["accuracy"],
                **({"hellaswag": endings} if endings else {}),
            )
            say(eval_line(record, args.max_iters))
            if ranks.is_first and progress.step > 0:
                names = [checkpoints.iter_name(progress.step, progress.val_loss)]
                if save(*names, *[checkpoints.BEST] * is_best, *[checkpoints.FINAL] * is_last):
                    checkpoints.prune(out_dir, args.keep_checkpoints)
                saved_at = time.monotonic()
                every = args.sample_interval * args.eval_interval
                if every and (is_last or progress.step % every == 0):
                    sample()
            watch.resume()
        if is_last:
            break

        # One update
        # ----------------------------------------------------------------------------------------
        x, y = next(batches)  # (accumulation, batch_size, block_size)
        progress.learning_rate = rate(progress.step)
        for group in optimizer.param_groups:
            group["lr"] = progress.learning_rate * group["lr_scale"]
        loss = torch.zeros((), device=device)
        for micro_step in range(accumulation):
            if signal_number := stop.agreed():
                break
            seed_dropout(args.seed, progress.step, micro_step * ranks.world_size + ranks.rank)
            if (
                ranks.world_size > 1
            ):  # gradients are exchanged in the last backward; DDP asks in forward
                forward.require_backward_grad_sync = micro_step == accumulation - 1
            weights = None  # of the sequences in the loss; None: all alike
            if key_tokens is not None:
                weights = key_token_weights(x[micro_step], key_tokens, args.key_token_alpha)
            with autocast:
                _, micro_loss = forward(x[micro_step], y[micro_step], weights)
            micro_loss = micro_loss * guard.loss_weight(micro_loss, accumulation)
            scaler.scale(micro_loss).backward()
            loss += micro_loss.detach()
        if signal_number:
            break  # nothing of this step is in the weights yet: it is made anew when the run goes on
        scaler.unscale_(optimizer)
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip or math.inf)
        guard.check(progress.step, loss, grad_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        stop.at_once = False
        # ---------------------------------------------------------------------------------------------------

        if progress.step % args.log_interval == 0 or progress.step == args.max_iters:
            progress.loss = ranks.sum(loss.item())[0] / ranks.world_size  # waits for the device
            seconds, steps = watch.lap(), progress.step - lap_step
            lap_step = progress.step
            speed = steps * tokens_per_step / seconds  # tokens per second
            flops = speed * model.flops_per_token(block_size) / ranks.world_size
            record = log.write(
                "train",
                step=progress.step,
                tokens=progress.step * tokens_per_step,
                loss=progress.loss,
                epoch=progress.step / loader.steps_per_epoch,
                learning_rate=progress.learning_rate,
                grad_norm=grad_norm.item(),
                tokens_per_second=speed,
                milliseconds_per_step=1000 * seconds / steps,
                mfu=flops / peak_flops if peak_flops else None,
                memory_bytes=distributed.peak_memory(device),
            )
            console.train(record)
        by_step = args.checkpoint_interval and progress.step % args.checkpoint_interval == 0
        by_time = (
            args.checkpoint_minutes and time.monotonic() - saved_at > 60 * args.checkpoint_minutes
        )
        if ranks.is_first and (by_step or by_time):
            watch.pause()
            save(checkpoints.RESUME)
            watch.resume()
            saved_at = time.monotonic()

    if signal_number:
        say(f"signal {signal_number} at step {progress.step:,}: saving; the same command continues")
        is_saved = not ranks.is_first or save(checkpoints.RESUME)
        log.write("stop", step=progress.step, reason=f"signal {signal_number}")
        return 128 + signal_number if is_saved else 1
    if (
        ranks.is_first
        and not checkpoints.is_finished(out_dir, progress.step)
        and not save(checkpoints.FINAL)
    ):
        return 1
    if progress.step < args.max_iters:
        say(
            f"stopped early: the validation loss was lowest {progress.evals_since_best} evaluations ago"
        )
    log.write("stop", step=progress.step, reason="finished")
    best = f"; the lowest validation loss was {progress.best_val_loss:.4f}" if evaluated else ""
    say(f"finished: {out_dir / checkpoints.FINAL}{best}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
