"""Stage 2: train GPT-2 on the shards that fineweb.py made.

    $ torchrun --nproc_per_node=8 train_gpt2.py --config configs/gpt2-124m.yaml    # on 8 GPUs
    $ python train_gpt2.py --data my.txt --n_layer 4 --n_head 4 --n_embd 256 --epochs 20

    step   2000/600000 | loss  6.1234 | lr 6.00e-04 | norm   0.91 | 1,234,567 tok/s |    265.4 ms

Stop it whenever you like: the same command continues, as if nothing had happened. In --out_dir it
keeps

    iter-{step}-loss-{validation loss}.pt   at each evaluation, the last --keep_checkpoints
    best_val_loss.pt, final_model.pt        further names of those (hard links)
    resume.pt                               between evaluations, and when told to stop
    config.json, metrics.jsonl              what was run, and what came of it
    data/                                   the shards of --data

The update is in train(), inline. When to evaluate, log and save is pretrain/train/run.py; what a
checkpoint holds is pretrain/train/state.py.
Exit status: 0 finished, 1 stopped by an error, 2 the flags are wrong, 128 + n stopped by signal n.
"""

import sys

from pretrain.errors import program, say
from pretrain.rendezvous import is_first_rank
from pretrain.train.settings import SettingsError, TrainSettings, from_command_line, with_length

# Torch takes seconds to load: --help and wrong flags are answered before it is.
if __name__ == "__main__" and from_command_line(None) is None:
    sys.exit(2)

import math
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model import GPT, load_checkpoint
from pretrain import distributed, models
from pretrain.distributed import Ranks, seed_dropout
from pretrain.eval import validation
from pretrain.eval.sampling import TrainingSamples
from pretrain.eval.tasks import tasks_of
from pretrain.eval.validation import Windows, evaluated_windows
from pretrain.report.console import silent
from pretrain.report.runlog import Measured, scores_block
from pretrain.train import checkpoint as checkpoints
from pretrain.train import memory, parallel
from pretrain.train.assembly import identity_of, initial_model, precision
from pretrain.train.data import TrainingData
from pretrain.train.describe import describe
from pretrain.train.folders import local_folders
from pretrain.train.keytokens import key_token_weights, load_key_tokens
from pretrain.train.loader import BatchLoader
from pretrain.train.optim import SCHEDULES, make_optimizer
from pretrain.train.run import Run
from pretrain.train.speed import Profile, choose_compiler
from pretrain.train.state import TrainState
from pretrain.train.stopping import FiniteGuard

__all__ = ["checkpoints", "load_checkpoint", "main"]
LESS_MEMORY = (
    "a smaller --batch_size with more --gradient_accumulation_steps, or --gradient_checkpointing"
)


def main(argv: Sequence[str] | None = None) -> int:
    settings = from_command_line(argv)
    if settings is None:
        return 2
    with program("train_gpt2.py", is_first_rank, less_memory=LESS_MEMORY) as outcome:
        ranks = Ranks.start(settings.device)
        try:
            outcome.status = train(settings, ranks)
        except SettingsError as error:  # found once the data is open, on every rank
            outcome.status = 2
            if ranks.is_first:
                say("train_gpt2.py", str(error))
        ranks.stop()
    return outcome.status


def train(settings: TrainSettings, ranks: Ranks) -> int:
    """The run that the settings describe. Returns the exit status."""
    with Run(settings, ranks) as run:
        model, block_size = initial_model(run)
        loader, windows = open_data(run, block_size, model.config.vocab_size)
        if settings.eval_only:
            return evaluate_alone(run, model, windows)
        state = TrainState(model, optimizer_for(run, model), scaler_for(run))
        forward = begin(run, state, loader, windows)
        if forward is None:
            return 0  # it was finished before
        settings, optimizer, scaler = run.settings, state.optimizer, state.scaler
        rate, weigh, autocast = schedule(settings), weigher(run), precision(run)[1]
        guard = FiniteGuard(ranks, scaler)
        batches = run.enter(closing(loader.prefetch(state.step, device=ranks.device)))
        profile = run.enter(Profile(settings.profile * ranks.is_first, run.out_dir, run.say))

        # Before the first update too: where fine-tuning only makes it worse, step 0 is the best.
        run.evaluate_if_due()
        while not run.is_over():
            # One update
            # ----------------------------------------------------------------------------------
            x, y = next(batches)  # int64 (micro_steps, batch_size, block_size)
            state.learning_rate = rate(state.step)
            for group in optimizer.param_groups:  # Muon's learn at rates of their own
                group["lr"] = state.learning_rate * group["lr_scale"]
            # Summed on the device: to read it in each micro-step would be to wait for the GPU.
            loss = torch.zeros((), device=ranks.device)
            for micro_step in range(len(x)):
                # Asked here, as a preempted job may have less time left than an update takes.
                if run.is_told_to_stop():
                    break
                # Dropout by step and micro-batch: a resumed run has no generator states to restore.
                seed_dropout(settings.seed, state.step, micro_step * ranks.world_size + ranks.rank)
                # DDP exchanges gradients in the last backward alone, and asks in forward; fsdp in
                # each, as no rank could hold them whole.
                if ranks.world_size > 1:
                    forward.require_backward_grad_sync = micro_step == len(x) - 1
                with autocast:
                    _, micro_loss = forward(x[micro_step], y[micro_step], weigh(x[micro_step]))
                # nan for a loss that is not finite: so its gradients tell all ranks of it.
                micro_loss = micro_loss * guard.loss_weight(micro_loss, len(x))
                scaler.scale(micro_loss).backward()
                loss += micro_loss.detach()
            if run.signal:
                break  # nothing of this step is in the weights: it is made anew by the next run
            # Only float16 is scaled; elsewhere the scaler's four calls are the plain step.
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip or math.inf)
            grad_norm = parallel.whole(norm)
            # While the weights are still good: after a step with a nan they would all be nan.
            guard.check(state.step, loss, grad_norm)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            # ----------------------------------------------------------------------------------
            run.advance(loss, grad_norm)
            profile.step()
            run.evaluate_if_due()
        return run.finish()


def open_data(run: Run, block_size: int, vocab_size: int) -> tuple[BatchLoader, Windows]:
    """The batches to train on, and by name the windows that evaluations look at, with their
    numbers. The run's settings learn what follows from the data: where it lies, and how many
    updates --epochs are."""
    settings, ranks = run.settings, run.ranks
    if settings.data:
        # Here, as it loads pyarrow, which a run on shards does without.
        from pretrain.tokens.owntext import prepare

        folder = ranks.on_every_disk(prepare, settings.data, run.out_dir / "data")
        settings = replace(settings, data_dir=str(folder))
    cache = Path(settings.data_cache), settings.data_cache_gb * 10**9
    folders = ranks.on_all(local_folders, settings.data_dir, *cache, block_size)
    settings = replace(settings, data_dir=folders)
    # Each node may have a disk of its own: its processes share out what lies there.
    here = ranks.node_ranks
    place, count = here.index(ranks.rank), len(here)
    data = TrainingData(settings.data_dir)
    ranks.on_all(data.verify, settings.verify_data, place, count)
    ranks.on_all(data.refuse_different, ranks.gather(ranks.on_all(data.fingerprints)))
    loader = data.loader(
        batch_size=settings.batch_size,
        block_size=block_size,
        accumulation_steps=settings.micro_steps(block_size),
        rank=ranks.rank,
        world_size=ranks.world_size,
        seed=settings.seed,
        shuffle=settings.shuffle,
        stride=settings.stride or None,
        vocab_size=vocab_size,
        pin_memory=ranks.device.type == "cuda",
    )
    # Only now is it known how many updates an epoch is.
    run.settings, run.loader = with_length(settings, loader.steps_per_epoch), loader
    if not settings.is_evaluated:
        return loader, {}
    if left := settings.val_tokens % block_size:
        run.warn(
            f"--val_tokens {settings.val_tokens:,}: scored are {settings.val_tokens - left:,}, the"
            f" whole windows of {block_size} in them"
        )
    return loader, evaluated_windows(settings, data, loader, vocab_size)


def evaluation(
    run: Run, model: GPT, sets: Windows, compiler: Callable[[Any], Any] | None = None
) -> Callable[[], Measured]:
    """A function that measures the model as it is then. It uses `model`, which is neither compiled
    nor wrapped: the same weights, and any shape; --compile_eval compiles the loss alone."""
    settings, ranks = run.settings, run.ranks
    dtype, autocast = precision(run)
    is_compiled = settings.compile_eval and not parallel.is_sharded(settings)
    score = compiler(model.score) if compiler and is_compiled else None
    tasks = tasks_of(settings, ranks.device) if sets else []

    @parallel.gathered(model)
    def measure() -> Measured:
        is_set, progress = run.stop.is_set, run.console.progress if run.console else silent
        scores = validation.evaluate(
            model,
            sets,
            batch_size=settings.batch_size,
            ranks=ranks,
            autocast=autocast,
            interrupted=is_set,
            progress=progress,
            score=score,
        )
        scores = validation.weighted(scores, run.shares())
        summaries = {
            task.name: task.score(
                model, dtype=dtype, ranks=ranks, interrupted=is_set, progress=progress
            )
            for task in tasks
        }
        return scores, {name: summary for name, summary in summaries.items() if summary}

    return measure


def evaluate_alone(run: Run, model: GPT, windows: Windows) -> int:
    scores, tasks = evaluation(run, model, windows)()
    run.say(f"{run.path or run.settings.init_from}\n{scores_block(scores, tasks)}")
    return 0


def sampler(run: Run, model: GPT) -> Callable[[], dict[str, Any] | None]:
    """A function that lets the model continue --sample_prompt: the values of a "sample" record."""
    settings, autocast = run.settings, precision(run)[1]
    samples = TrainingSamples(settings.sample_prompt, settings.sample_tokens, settings.seed)

    def told_to_stop() -> bool:
        """On any rank, where each token is a call of all of them."""
        is_set = run.stop.is_set()
        return bool(run.ranks.sum(is_set)[0]) if parallel.is_sharded(settings) else is_set

    @parallel.gathered(model)
    def sample() -> dict[str, Any] | None:
        with autocast:
            text = samples.write(model, told_to_stop)
        return None if text is None else {"prompt": samples.prompt, "text": text}

    return sample


def optimizer_for(run: Run, model: GPT) -> Any:
    settings = run.settings
    return make_optimizer(
        model,
        name=settings.optimizer,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        betas=(settings.beta1, settings.beta2),
    )


def scaler_for(run: Run) -> torch.amp.GradScaler:
    """float16 holds small gradients only when the loss is scaled; elsewhere this does nothing."""
    return torch.amp.GradScaler(run.ranks.device.type, enabled=precision(run)[0] == torch.float16)


def schedule(settings: TrainSettings) -> Callable[[int], float]:
    """The learning rate of the update that follows step."""
    rate = partial(
        SCHEDULES[settings.schedule],
        max_lr=settings.learning_rate,
        min_lr=settings.min_lr,
        warmup_iters=settings.warmup_iters,
        lr_decay_iters=settings.lr_decay_iters,
    )
    is_trapezoid = settings.schedule == "trapezoid"
    return partial(rate, decay_share=settings.decay_share) if is_trapezoid else rate


def weigher(run: Run) -> Callable[[Tensor], Tensor | None]:
    """From inputs int64 (B, T) to the weights (B,) of sequences in the loss; None: all alike."""
    settings = run.settings
    if not settings.key_tokens:
        return lambda inputs: None
    key_tokens = load_key_tokens(settings.key_tokens).to(run.ranks.device)
    return lambda inputs: key_token_weights(inputs, key_tokens, settings.key_token_alpha)


def begin(run: Run, state: TrainState, loader: BatchLoader, windows: Windows) -> Any:
    """Bring the state to where the run goes on, and say what is about to happen. Returns the model
    as updates call it; None where nothing is left to do."""
    settings, model = run.settings, state.model
    identity = identity_of(settings, model, loader)
    run.restore(settings, state, identity, models.architecture_of(model))
    if run.was_finished():
        return None
    # Only now is the model wrapped: checkpoints have GPT-2's names, not those of a wrapper.
    compiler = choose_compiler(settings, run.ranks.device, run.warn)
    forward = parallel.wrapped(model, settings, run.ranks, compiler)
    setup = describe(
        settings, model, loader, identity=identity, ranks=run.ranks, dtype=precision(run)[0]
    )
    setup |= {
        "compiled": compiler is not None,
        "memory": memory.estimate(settings, state, loader.block_size, precision(run)[0]),
        "last_learning_rate": schedule(settings)(settings.max_iters - 1),
        "evaluated_windows": {name: len(numbers) for name, (_, numbers) in windows.items()},
    }
    measure = evaluation(run, model, windows, compiler) if windows else None
    run.start(setup, measure, sampler(run, model))
    return forward


if __name__ == "__main__":
    distributed.leave(main())
