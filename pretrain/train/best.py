"""Which checkpoint is the best so far, and for how long none was better.

    record = record.after(step=2000, val_loss=3.29)     # saved in the checkpoint of that evaluation
    record, problem = reconcile(out_dir, path, checkpoint)      # when a run goes on

A checkpoint is saved with the record that holds once it is there, so each of them knows the
evaluations up to its own. best_val_loss.pt is only a name for the one that the record points at: a
kill between the save and the link, or somebody who deletes it, leaves it to be linked anew.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pretrain.train import checkpoint as checkpoints
from pretrain.train.checkpoint import BEST, iter_name


@dataclass(frozen=True)
class Record:
    """The lowest validation loss of a run and how long ago it was, step 0 included."""

    best_val_loss: float = math.inf
    best_step: int = -1  # -1: no evaluation yet, or saved by a version that did not note it
    evals_since_best: int = 0

    @classmethod
    def of(cls, checkpoint: Mapping[str, Any]) -> "Record":
        names = ("best_val_loss", "best_step", "evals_since_best")
        return cls(**{name: checkpoint[name] for name in names if name in checkpoint})

    def after(self, step: int, val_loss: float) -> "Record":
        """The record once this evaluation is saved."""
        if val_loss < self.best_val_loss:
            return Record(val_loss, step, 0)
        return replace(self, evals_since_best=self.evals_since_best + 1)

    def is_held_by(self, checkpoint: Mapping[str, Any]) -> bool:
        """Whether the weights of a checkpoint are those with the lowest loss."""
        return (
            _is_evaluated(checkpoint)
            and checkpoint["val_loss"] == self.best_val_loss
            and self.best_step in (-1, checkpoint["step"])
        )


def _is_evaluated(checkpoint: Mapping[str, Any]) -> bool:
    """Whether its val_loss is that of its own weights, not of an evaluation some updates before."""
    return (
        checkpoint.get("last_eval_step") == checkpoint["step"]
        and checkpoint.get("val_loss", math.nan) < math.inf
    )


def reconcile(
    out_dir: Path, path: Path, checkpoint: Mapping[str, Any]
) -> tuple[Record, str | None]:
    """The record of a run that goes on from `checkpoint`, read from `path`, with best_val_loss.pt
    in out_dir being what it says.

    Where no file holds the best weights any more, the best of those that are there take their
    place, and the second result says so; the evaluations since stay counted, since early stopping
    goes by them. Raises CheckpointError where the link cannot be made.
    """
    record = Record.of(checkpoint)
    if record.best_val_loss == math.inf:
        return record, None
    here = _candidates(out_dir, checkpoint)
    holders = [file for file, values in here.items() if record.is_held_by(values)]
    if out_dir / BEST in holders:
        return record, None
    if not holders and path.parent.resolve() != out_dir.resolve():  # --resume with a path elsewhere
        there = _candidates(path.parent, checkpoint)
        holders = [file for file, values in there.items() if record.is_held_by(values)]
        if record.is_held_by(checkpoint):
            holders.append(path)
    problem = None
    if not holders:
        lost = f"the best model (validation loss {record.best_val_loss:.4f}) is in no file here"
        if not here:
            return replace(record, best_val_loss=math.inf, best_step=-1), f"{lost} any more"
        holders = [min(here, key=lambda file: here[file]["val_loss"])]
        best = here[holders[0]]
        record = replace(record, best_val_loss=best["val_loss"], best_step=best["step"])
        problem = f"{lost} any more; {BEST} is that of step {best['step']:,} now"
    checkpoints.link(holders[0], out_dir / BEST)
    return record, problem


def link_best(out_dir: Path, record: Record) -> None:
    """best_val_loss.pt as the record says, once the iter-* that it points at is saved. Where that
    could not be linked before, it is now. Raises CheckpointError, OSError."""
    path, link = out_dir / iter_name(record.best_step, record.best_val_loss), out_dir / BEST
    if not path.exists():  # it was pruned, and the link is all that there is of it
        return
    if not link.exists() or link.stat().st_mtime_ns < path.stat().st_mtime_ns:
        checkpoints.link(path, link)


def _candidates(folder: Path, checkpoint: Mapping[str, Any]) -> dict[Path, dict[str, Any]]:
    """The checkpoints in a folder with the weights of an evaluation of the same run, not after this
    one."""
    found, _ = checkpoints.contents(folder)
    return {
        file: values
        for file, values in found.items()
        if values["step"] <= checkpoint["step"]
        and values.get("run") == checkpoint.get("run")
        and _is_evaluated(values)
    }
