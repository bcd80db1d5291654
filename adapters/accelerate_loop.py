"""train_gpt2.py's loop in the idiom of Accelerate.

    $ python -m adapters.accelerate_loop --data_dir data/input --max_iters 2000 --warmup_iters 100
    $ torchrun --nproc_per_node=8 -m adapters.accelerate_loop ...

    step     10/2000 | loss 9.7312 | lr 3.0e-06 | norm 1.91

In --out_dir: step-N, the full state, at each evaluation (the newest two are kept), metrics.jsonl
for `python -m pretrain.report`, and export, the trained model for transformers and `hellaswag.py
--model`. The same command again continues the run, on any number of processes that divides the
batch.
"""

import argparse
import math
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adapters.arguments import answer_at_once

if __name__ == "__main__":  # before the frameworks are loaded
    answer_at_once("accelerate_loop", __doc__, "out-accelerate")

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from adapters import common, huggingface, states
from pretrain import files
from pretrain.distributed import pick_dtype
from pretrain.errors import first_line
from pretrain.report.runlog import RunLog
from pretrain.train.optim import make_optimizer

common.require_for(__name__, "accelerate", "transformers", "safetensors")
from accelerate import Accelerator, DataLoaderConfiguration  # noqa: E402  (it is there)

MIXED_PRECISION = {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}
KEPT_STATES = 2
# What accelerate writes, in the order in which it does, and what save_state adds in the end.
NEEDED = ("model*.safetensors", "optimizer.bin", "random_states_*.pkl", "custom_checkpoint_0.pkl")


def train(args: argparse.Namespace, given: set[str]) -> None:
    """The run that the flags describe."""
    out_dir, accelerator = Path(args.out_dir), make_accelerator(args)
    model, block_size = common.build_model(args, given)
    model.gradient_checkpointing = args.gradient_checkpointing
    optimizer = make_optimizer(
        model.to(accelerator.device),
        learning_rate=args.learning_rate,
        weight_decay=args.weight_decay,
        betas=(args.beta1, args.beta2),
    )
    # Not through prepare(): it would be stepped once per process, and the schedule be over that
    # much sooner.
    scheduler = LambdaLR(optimizer, common.schedule(args))
    described = common.describe_run(args, model, block_size, accelerator.num_processes)
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(scheduler)
    step = resume(accelerator, out_dir, described)

    batches, val_batches = load_data(args, accelerator, model, block_size, step)
    log = RunLog(out_dir, enabled=accelerator.is_main_process)
    log.write("start", step=step, flags=vars(args), processes=accelerator.num_processes)
    tokens_per_step = described["sequences_per_update"] * block_size

    model.train()
    losses = torch.zeros((), device=accelerator.device)
    for batch in batches:
        with accelerator.accumulate(model):
            _, loss = model(batch["input_ids"], batch["labels"])  # a scalar, mean over (B, T)
            accelerator.backward(loss)  # divides by the number of micro-batches
            losses += loss.detach() / args.gradient_accumulation_steps
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(model.parameters(), args.grad_clip or math.inf)
            optimizer.step()
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue
        learning_rate = scheduler.get_last_lr()[0]
        scheduler.step()
        step += 1
        if step % args.log_interval == 0 or step == args.max_iters:
            loss = accelerator.reduce(losses, "mean").item()
            values = {"loss": loss, "learning_rate": learning_rate, "grad_norm": norm}
            common.log_metrics(log, step, step * tokens_per_step, values)
            accelerator.print(
                f"step {step:6}/{args.max_iters} | loss {loss:.4f} | lr {learning_rate:.1e}"
                f" | norm {norm:.2f}"
            )
        losses.zero_()
        evaluated = args.eval_interval and step % args.eval_interval == 0
        if evaluated and val_batches:
            val_loss = evaluate(accelerator, model, val_batches)
            common.log_metrics(log, step, step * tokens_per_step, {"val_loss": val_loss})
            accelerator.print(f"step {step:6}/{args.max_iters} | val loss {val_loss:.4f}")
        if evaluated or step == args.max_iters:
            save_state(accelerator, out_dir, step, described)
    finish(accelerator, model, log, out_dir, step)


def make_accelerator(args: argparse.Namespace) -> Accelerator:
    device = common.device(args)
    return Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=MIXED_PRECISION[pick_dtype(args.dtype, device)],
        cpu=device.type == "cpu",
        # Evaluation adds up what each process has: nothing needs to be repeated to make their
        # shares equal.
        dataloader_config=DataLoaderConfiguration(even_batches=False),
    )


def load_data(
    args: argparse.Namespace, accelerator: Accelerator, model: nn.Module, block_size: int, step: int
) -> tuple[DataLoader, DataLoader | None]:
    """Training batches from update `step` on, and those of an evaluation (None without one)."""
    windows = common.shard_windows(
        args.data_dir,
        "train",
        block_size=block_size,
        seed=args.seed,
        shuffle=args.shuffle,
        vocab_size=accelerator.unwrap_model(model).config.vocab_size,
    )
    # Batch k of these positions goes to process k mod num_processes. To resume is to begin further
    # on.
    global_batch = args.batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    positions = range(step * global_batch, args.max_iters * global_batch)
    batches = accelerator.prepare(
        DataLoader(windows, batch_size=args.batch_size, sampler=positions)
    )
    if not args.eval_interval:
        return batches, None
    length = args.eval_iters * args.batch_size
    val = common.shard_windows(args.data_dir, "val", block_size=block_size, length=length)
    return batches, accelerator.prepare(DataLoader(val, batch_size=args.batch_size))


def finish(
    accelerator: Accelerator, model: nn.Module, log: RunLog, out_dir: Path, step: int
) -> None:
    """The end of a run: its model for transformers, and the last line of its log."""
    if accelerator.is_main_process:
        # Without accelerate's wrapper, which computes in the precision of training.
        plain = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        huggingface.export(plain, out_dir / "export", overwrite=True)
    log.write("stop", step=step, reason="finished")
    accelerator.print(f"finished: {out_dir / 'export'}")
    accelerator.end_training()


@torch.no_grad()
def evaluate(accelerator: Accelerator, model: nn.Module, batches: DataLoader) -> float:
    """Mean loss over all tokens of all processes, in nats. Sums are gathered, not means: the last
    batch may be smaller, and a process may have had none."""
    plain = accelerator.unwrap_model(model)
    plain.eval()
    totals = torch.zeros(2, dtype=torch.float64)
    for batch in batches:
        with accelerator.autocast():
            loss_sum, _, count = plain.score(batch["input_ids"], batch["labels"])
        totals += torch.tensor([loss_sum.item(), count.item()], dtype=torch.float64)
    plain.train()
    loss_sum, count = accelerator.gather(totals.to(accelerator.device)[None]).sum(dim=0).tolist()
    return loss_sum / count


def saved_states(out_dir: Path) -> list[Path]:
    """The step-N folders, highest N first."""
    found = [path for path in out_dir.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def newest_state(out_dir: Path) -> Path | None:
    """The step-N folder of the highest N that is whole; None when there is none. Raises
    StateError."""
    return states.newest_in(out_dir, saved_states(out_dir), NEEDED)


def resume(accelerator: Accelerator, out_dir: Path, described: dict[str, Any]) -> int:
    """Continue the newest state of out_dir, if there is one; the updates that were made so far."""
    state = newest_state(out_dir)
    if state is None:
        return 0
    states.refuse_other_run(state, states.saved_run(state), described)
    try:
        accelerator.load_state(str(state))
    except (RuntimeError, ValueError, KeyError) as error:
        raise states.StateError(
            f"{state}: not the state of a run with these flags ({first_line(error)})"
        ) from None
    # It counts micro-batches, and restores their number: of the run before, whose updates may have
    # been split into more or fewer. A state is saved after an update, so none is under way.
    accelerator.step = 0
    accelerator.print(f"continues {state}")
    return int(state.name.removeprefix("step-"))


def save_state(
    accelerator: Accelerator, out_dir: Path, step: int, described: dict[str, Any]
) -> None:
    """Model, optimizer, scheduler, scaler and generators, under its name only when it is
    complete."""
    temporary = out_dir / "saving"
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)  # of a save that was killed
    accelerator.wait_for_everyone()
    accelerator.save_state(str(temporary))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        files.write_json(temporary / states.RUN, described)
        files.sync_tree(temporary)
        files.publish(temporary, out_dir / f"step-{step}")
        for state in saved_states(out_dir)[KEPT_STATES:]:
            shutil.rmtree(state)
    accelerator.wait_for_everyone()


def main(argv: Sequence[str] | None = None) -> int:
    return common.main(
        "accelerate_loop", argv, train, description=__doc__, out_dir="out-accelerate"
    )


if __name__ == "__main__":
    sys.exit(main())
