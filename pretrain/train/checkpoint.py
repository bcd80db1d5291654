"""Checkpoints of a run: saved whole or not at all, loaded without trust, found by what they hold.

    save(out_dir / "resume.pt", {"format": 1, "step": 2000, "model": ..., ...})
    found = newest(out_dir)     # (path, checkpoint) of the highest step that is undamaged, or None

Names in an out_dir: iter-{step}-loss-{validation loss}.pt at each evaluation, best_val_loss.pt (a
hard link to the best of them), resume.pt (between evaluations, and at a signal), final_model.pt. No
name is trusted for what it says: the newest checkpoint is the one whose content has the highest
step.
"""

import contextlib
import errno
import os
import re
import shutil
import stat
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import torch

from pretrain import files, weights
from pretrain.errors import CheckpointError, reason
from pretrain.rendezvous import environment
from pretrain.train.schema import problem_in
from pretrain.weights import BEST, FINAL

FORMAT = 1
RESUME = "resume.pt"
# What only a run's checkpoints are called.
OWN = re.compile(r"(iter-.*|resume|best_val_loss|final_model)\.pt")
# What a save that was killed leaves behind. Anything else with a dot and .tmp is somebody's own.
LEFTOVER = re.compile(r"\.(.+\.pt|config\.json)\.tmp")
CANNOT_BE_READ = (
    "{path}: cannot be read: {reason}. Nothing was changed; make it readable, or move it away to go"
    " on without it"
)
# Flags that decide what a run trains, and on what.
SHAPING = (
    *("n_layer", "n_head", "n_embd", "bias", "value_embeddings", "block_size", "dropout"),
    "init_from",
    *("data", "data_dir", "stride", "shuffle", "seed"),
    *("batch_size", "gradient_accumulation_steps", "total_batch_tokens"),
)


class DamagedCheckpoint(CheckpointError):
    """The system hands the file out, and what it holds is no good: others may take its place."""


class Unreadable(CheckpointError):
    """The system does not hand the file out. It may be as good as ever, so nothing takes its
    place."""


def iter_name(step: int, val_loss: float) -> str:
    return f"iter-{step}-loss-{val_loss:.4f}.pt"


def model_file(path: Path) -> Path:
    """The file to read when somebody names this path: in the folder of a run its best checkpoint.
    Raises CheckpointError when nothing is there."""
    if not path.exists():
        raise CheckpointError(
            f"{path}: no such file; train a model with train_gpt2.py, name another file with"
            " --checkpoint, or take a published model with --model gpt2"
        )
    try:
        return weights.model_file(path)
    except weights.Damaged:
        raise CheckpointError(f"{path}: neither {BEST} nor {FINAL} in this folder") from None


def save(path: str | Path, checkpoint: dict[str, Any]) -> None:
    """Write a dict of tensors and plain values; when this returns it is on the disk under its name.

    Raises CheckpointError when the disk is full or the like; whatever was under the name before is
    still there.
    """
    try:
        with files.atomic_write(path) as file:
            torch.save(checkpoint, file)
    except (OSError, RuntimeError) as error:
        # torch's writer turns the file's OSError into a RuntimeError.
        cause = error if isinstance(error, OSError) else error.__context__ or error
        kept = any(Path(path).absolute().parent.glob("*.pt"))
        state = "earlier checkpoints are untouched" if kept else "so far nothing of the run is"
        raise CheckpointError(f"{path}: not saved ({reason(cause)}); {state}") from None


def refuse_here(out_dir: Path, rank: int) -> None:
    """rank: 0, or that of a process on another machine than rank 0's, whose disk holds no run. Here
    may be one, if torchrun has put the machines in another order than last time: not to be begun
    anew. Raises CheckpointError."""
    if rank and (found := sorted(out_dir.glob("*.pt"))):
        raise CheckpointError(
            f"{found[0]}: on the disk of rank {rank}'s machine, while rank 0 reads and writes the"
            " run: start that machine first, or copy the folder to rank 0's"
        )


def end_not_saved(out_dir: Path) -> CheckpointError:
    """What a run ends with that could not save its end, on every rank; why not was said before."""
    error = CheckpointError(
        f"{out_dir}: the end of this run is not saved, and updates are lost; make room, and the"
        " same command makes them anew"
    )
    error.on_all_ranks = True
    return error


def link(existing: str | Path, name: str | Path) -> None:
    """A second name for a saved checkpoint, which takes no room; a copy where the file system has
    no hard links. Raises CheckpointError like save."""
    existing, name = Path(existing), Path(name)
    temporary = files.temporary_name(name)
    try:
        temporary.unlink(missing_ok=True)
        try:
            os.link(existing, temporary)
        except OSError:
            with open(existing, "rb") as source, files.atomic_write(name) as copy:
                shutil.copyfileobj(source, copy, 1 << 20)
            return
        files.publish(temporary, name)
        # Renaming a file to another name of itself leaves both: POSIX has it so.
        temporary.unlink(missing_ok=True)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise CheckpointError(f"{name}: not saved ({reason(error)})") from None


def load(path: str | Path, *, verify: bool = True) -> dict[str, Any]:
    """The checkpoint with its tensors on the CPU, mapped from the file (writing to them does not
    change it).

    Nothing in the file is executed. verify: read all of it and compare the checksum that torch.save
    stored with each tensor, at 1 to 2 GB/s; torch.load alone does not notice a flipped bit. Raises
    DamagedCheckpoint for what is cut short, hostile or not a checkpoint of this program, Unreadable
    for what the system does not hand out, both CheckpointError.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise CheckpointError(f"{path}: not a file")
        checkpoint = weights.read(path, verify=verify)
    except weights.Damaged as error:
        raise DamagedCheckpoint(f"{path}: {error}") from None
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except OSError as error:
        raise Unreadable(CANNOT_BE_READ.format(path=path, reason=reason(error))) from None
    if problem := problem_in(checkpoint, FORMAT):
        raise DamagedCheckpoint(f"{path}: {problem}")
    return checkpoint


def newest(
    out_dir: str | Path, *, messages: TextIO | None = None
) -> tuple[Path, dict[str, Any]] | None:
    """The undamaged checkpoint of the highest step in a folder; None when there are none at all.
    Weights without the state of an optimizer, such as imported ones, are no run's checkpoint and
    are passed over.

    A damaged one is passed over with a warning (to stderr by default). Raises CheckpointError when
    all are damaged, since starting over in silence would cost the run, and Unreadable for any that
    the system does not hand out: it might be the newest.
    """
    found, failures = contents(out_dir)
    by_step = sorted(found, key=lambda path: (found[path]["step"], path.name), reverse=True)
    for path in by_step:
        try:
            checkpoint = load(path)
        except DamagedCheckpoint as error:
            failures[path] = str(error)
            continue
        for failure in failures.values():
            print(f"warning: {failure}; passed over", file=messages or sys.stderr)
        return path, checkpoint
    if failures:
        raise CheckpointError("no checkpoint can be read:\n  " + "\n  ".join(failures.values()))
    return None


def find(out_dir: str | Path, resume: str, flags: Mapping[str, Any] | None = None) -> Path | None:
    """The checkpoint from which a run in out_dir begins; None to begin anew. What its rerun must
    not meet again moves aside.

    resume: "auto", "never" or a path. Once torchrun has restarted what fell
    (TORCHELASTIC_RESTART_COUNT) all of them mean auto: begin where the run was, not where its
    command did. flags: those of this run; with others than these a checkpoint of step 0, which
    holds no update, is no reason to refuse them. Raises CheckpointError like load and newest.
    """
    out_dir = Path(out_dir)
    for leftover in out_dir.iterdir():
        if LEFTOVER.fullmatch(leftover.name) and leftover.is_file():
            leftover.unlink()
    if environment("TORCHELASTIC_RESTART_COUNT", 0) > 0:
        resume = "auto"
    path, step = None, -1
    if resume == "auto":
        path, checkpoint = newest(out_dir) or (None, {"step": -1})
        step = checkpoint["step"]
        if step == 0 and flags and _is_other(checkpoint, flags):
            path, step = None, -1
    elif resume != "never":
        path, checkpoint = Path(resume), load(resume)
        if "optimizer" not in checkpoint:
            raise CheckpointError(
                f"{path}: weights alone, no run to continue; give them with --init_from"
            )
        step = checkpoint["step"]
    aside = later_than(out_dir, step)
    if resume == "never":
        names = ("config.json", "metrics.jsonl")
        aside += [file for name in names if (file := out_dir / name).exists()]
    if aside:
        folder = set_aside(out_dir, aside)
        print(f"moved to {folder}: {', '.join(file.name for file in aside)}")
    return path


def _is_other(checkpoint: dict[str, Any], flags: Mapping[str, Any]) -> bool:
    """Whether another run than that of these flags saved a checkpoint."""
    saved = checkpoint.get("config", {}) | {"processes": checkpoint.get("processes")}
    names = [name for name in (*SHAPING, "processes") if saved.get(name) is not None]
    return any(name in flags and saved[name] != flags[name] for name in names)


def find_to_evaluate(out_dir: str | Path, resume: str) -> Path:
    """The newest good checkpoint of out_dir, or the one at `resume` when that is a path; nothing is
    moved."""
    if resume not in ("auto", "never"):
        load(resume)
        return Path(resume)
    found = newest(out_dir)
    if not found:
        raise CheckpointError(
            f"{out_dir}: no checkpoint to evaluate; name one with --resume or --init_from"
        )
    return found[0]


def is_finished(out_dir: str | Path, step: int) -> bool:
    """Whether final_model.pt is there and of this step."""
    path = Path(out_dir) / FINAL
    return path.exists() and load(path, verify=False)["step"] == step


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load the moments; learning rate, betas and weight decay stay those that the optimizer was
    made with."""
    settings = [
        {k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups
    ]
    optimizer.load_state_dict(state)
    for group, setting in zip(optimizer.param_groups, settings, strict=True):
        group.update(setting)


def later_than(out_dir: str | Path, step: int) -> list[Path]:
    """The checkpoints of a folder that a run which goes on from `step` must not meet again: those
    of a higher step, and those that are damaged."""
    found, failures = contents(out_dir)
    return sorted([path for path in found if found[path]["step"] > step] + list(failures))


def prune(out_dir: str | Path, keep: int) -> None:
    """After an iter-*.pt was saved: delete all but the newest `keep` of them, and resume.pt, which
    is older now."""
    steps = {}
    for path in Path(out_dir).glob("iter-*-loss-*.pt"):
        if match := re.match(r"iter-(\d+)-loss-", path.name):
            steps[path] = int(match[1])
    (Path(out_dir) / RESUME).unlink(missing_ok=True)
    by_age = sorted(steps, key=lambda path: (steps[path], path.stat().st_mtime), reverse=True)
    for path in by_age[keep:]:
        path.unlink()


def contents(out_dir: str | Path) -> tuple[dict[Path, dict[str, Any]], dict[Path, str]]:
    """What each *.pt of a run in a folder holds besides its tensors, and why others cannot be used.
    Raises Unreadable where the system does not say."""
    found, failures = {}, {}
    try:
        entries = sorted(path for path in Path(out_dir).iterdir() if path.suffix == ".pt")
    except FileNotFoundError:
        return {}, {}
    except OSError as error:
        raise Unreadable(f"{out_dir}: cannot be read: {reason(error)}") from None
    for path in entries:
        with contextlib.suppress(OSError):  # load says what it is
            if not stat.S_ISREG(os.stat(path).st_mode):
                if OWN.fullmatch(path.name):
                    what = os.strerror(errno.EISDIR) if path.is_dir() else "Not a regular file"
                    raise Unreadable(CANNOT_BE_READ.format(path=path, reason=what))
                continue  # a folder, say, that somebody keeps here
        try:
            checkpoint = load(path, verify=False)
        except DamagedCheckpoint as error:
            failures[path] = str(error)
            continue
        if "optimizer" in checkpoint:
            left_out = ("model", "optimizer", "scaler")
            found[path] = {k: v for k, v in checkpoint.items() if k not in left_out}
    return found, failures


def set_aside(out_dir: str | Path, paths: list[Path]) -> Path:
    """Move files into a new folder earlier-N of out_dir."""
    number = 1
    while (folder := Path(out_dir) / f"earlier-{number}").exists():
        number += 1
    folder.mkdir()
    for path in paths:
        os.replace(path, folder / path.name)
    return folder


def refuse_other_run(path: str | Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise CheckpointError with every key in which the run of the checkpoint at `path` differs
    from the one asked for."""
    different = [
        f"\n  {key}: {saved.get(key)} in the checkpoint, {wanted.get(key)} now"
        for key in {**saved, **wanted}
        if saved.get(key) != wanted.get(key)
    ]
    if different:
        raise CheckpointError(
            f"{path} belongs to another run:{''.join(different)}\nGive the flags of that run (with"
            " more or fewer processes --total_batch_tokens keeps the batch), or another --out_dir,"
            " or --resume never"
        )


def lock(out_dir: str | Path) -> contextlib.ExitStack:
    """Hold out_dir, which is made where it is missing, for this process; two runs in one folder
    would prune each other's checkpoints. Raises CheckpointError for a folder that cannot be made or
    written, files.Locked when another process holds it."""
    busy = f"{out_dir}: another run is writing here; wait for it or use another --out_dir"
    stack = contextlib.ExitStack()
    try:
        Path(out_dir).mkdir(parents=True, exist_ok=True)
        stack.enter_context(files.lock(Path(out_dir) / ".lock", busy))
    except (OSError, ValueError) as error:  # the latter for a name that no system takes
        raise CheckpointError(
            f"--out_dir {out_dir}: cannot be used: {reason(error)}; choose another"
        ) from None
    return stack
