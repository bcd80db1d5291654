"""Checkpoints of a run: saved whole or not at all, loaded without trust, found by what they hold.

    save(out_dir / "resume.pt", {"format": 1, "step": 2000, "model": ..., ...})
    found = newest(out_dir)             # (path, checkpoint) of the highest step that is undamaged,
    or None

Names in an out_dir: iter-{step}-loss-{validation loss}.pt at each evaluation, best_val_loss.pt (a
hard link to the best of them), resume.pt (between evaluations, and at a signal), final_model.pt. No
name is trusted for what it says: the newest checkpoint is the one whose content has the highest
step.
"""

import json
import os
import pickle
import re
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any, TextIO

import torch

FORMAT = 1
BEST, RESUME, FINAL = "best_val_loss.pt", "resume.pt", "final_model.pt"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be saved, read or continued; the message is for the user."""


def iter_name(step: int, val_loss: float) -> str:
    return f"iter-{step}-loss-{val_loss:.4f}.pt"


def model_file(path: Path) -> Path:
    """The file to read when somebody names this path: in the folder of a run its best checkpoint.
    Raises CheckpointError when nothing is there."""
    if path.is_dir():
        found = next((path / name for name in (BEST, FINAL) if (path / name).is_file()), None)
        if found is None:
            raise CheckpointError(f"{path}: neither {BEST} nor {FINAL} in this folder")
        return found
    if not path.exists():
        raise CheckpointError(
            f"{path}: no such file; train a model with train_gpt2.py, name another file with --checkpoint, or"
            " take a published model with --model gpt2"
        )
    return path


def save(path: str | Path, checkpoint: dict[str, Any]) -> None:
    """Write a dict of tensors and plain values; when this returns it is on the disk under its name.

    Raises CheckpointError when the disk is full or the like; whatever was under the name before is
    still there.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        _rename(temporary, path)
    except (
        OSError,
        RuntimeError,
    ) as error:  # torch's writer turns the file's OSError into a RuntimeError
        temporary.unlink(missing_ok=True)
        cause = error if isinstance(error, OSError) else error.__context__ or error
        raise CheckpointError(
            f"{path}: not saved ({_first_line(cause)}); earlier checkpoints are untouched"
        ) from None


def link(existing: str | Path, name: str | Path) -> None:
    """A second name for a saved checkpoint, which takes no room; a copy where the file system has
    no hard links. Raises CheckpointError like save."""
    name = Path(name)
    temporary = name.with_name(f".{name.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        try:
            os.link(existing, temporary)
        except OSError:
            shutil.copyfile(existing, temporary)
        _rename(temporary, name)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"{name}: not saved ({_first_line(error)})") from None


def load(path: str | Path, *, verify: bool = True) -> dict[str, Any]:
    """The checkpoint with its tensors on the CPU, mapped from the file (writing to them does not
    change it).

    Nothing in the file is executed. verify: read all of it and compare the checksum that torch.save
    stored with each tensor, at 1 to 2 GB/s; torch.load alone does not notice a flipped bit. Raises
    CheckpointError for a file that is missing, damaged, hostile or not a checkpoint of this
    program.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"{path}: no such file")
    if not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"{path}: damaged or cut short (it does not end as torch.save ends a file)"
        )
    try:
        if verify:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged:
                raise CheckpointError(f"{path}: damaged: {damaged} fails its checksum")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: damaged, or it holds more than tensors and plain values, which is refused because"
            f" loading it could run code ({_first_line(error)})"
        ) from None
    # What zipfile and torch raise on damaged files, down to struct.error and NotImplementedError,
    # has no common base.
    except Exception as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: damaged or cut short ({_first_line(error)})") from None
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("step"), int):
        raise CheckpointError(f"{path}: not a checkpoint of train_gpt2.py (it has no step)")
    if checkpoint.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: format {checkpoint.get('format')}; this version reads {FORMAT}"
        )
    return checkpoint


def newest(
    out_dir: str | Path, *, messages: TextIO | None = None
) -> tuple[Path, dict[str, Any]] | None:
    """The undamaged checkpoint of the highest step in a folder; None when there are none at all.
    Weights without the state of an optimizer, such as imported ones, are no run's checkpoint and
    are passed over.

    A damaged one is passed over with a warning (to stderr by default). Raises CheckpointError when
    all are damaged: starting over in silence would cost the run.
    """
    steps, failures = _steps(out_dir)
    for path in sorted(steps, key=lambda path: (steps[path], path.name), reverse=True):
        try:
            checkpoint = load(path)
        except CheckpointError as error:
            failures[path] = str(error)
            continue
        for failure in failures.values():
            print(f"warning: {failure}; passed over", file=messages or sys.stderr)
        return path, checkpoint
    if failures:
        raise CheckpointError("no checkpoint can be read:\n  " + "\n  ".join(failures.values()))
    return None


def find(out_dir: str | Path, resume: str) -> Path | None:
    """The checkpoint from which a run in out_dir begins; None to begin anew. What its rerun must
    not meet again moves aside.

    resume: "auto", "never" or a path. Once torchrun has restarted what fell
    (TORCHELASTIC_RESTART_COUNT) all of them mean auto: begin where the run was, not where its
    command did. Raises CheckpointError like load and newest.
    """
    out_dir = Path(out_dir)
    for leftover in out_dir.glob(".*.tmp"):  # of a save that was killed
        leftover.unlink()
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0:
        resume = "auto"
    if resume == "never":
        path, step = None, -1
    elif resume == "auto":
        path, checkpoint = newest(out_dir) or (None, {"step": -1})
        step = checkpoint["step"]
    else:
        path, checkpoint = Path(resume), load(resume)
        if "optimizer" not in checkpoint:
            raise CheckpointError(
                f"{path}: weights alone, no run to continue; give them with --init_from"
            )
        step = checkpoint["step"]
    aside = later_than(out_dir, step)
    if resume == "never":
        aside += [
            file for name in ("config.json", "metrics.jsonl") if (file := out_dir / name).exists()
        ]
    if aside:
        folder = set_aside(out_dir, aside)
        print(f"moved to {folder}: {', '.join(file.name for file in aside)}")
    return path


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
    of a higher step, and those that cannot be read."""
    steps, failures = _steps(out_dir)
    return sorted([path for path in steps if steps[path] > step] + list(failures))


def prune(out_dir: str | Path, keep: int) -> None:
    """After an iter-*.pt was saved: delete all but the newest `keep` of them, and resume.pt, which
    is older now."""
    steps = {}
    for path in Path(out_dir).glob("iter-*-loss-*.pt"):
        if match := re.match(r"iter-(\d+)-loss-", path.name):
            steps[path] = int(match[1])
    (Path(out_dir) / RESUME).unlink(missing_ok=True)
    for path in sorted(steps, key=lambda path: (steps[path], path.stat().st_mtime), reverse=True)[
        keep:
    ]:
        path.unlink()


def _steps(out_dir: str | Path) -> tuple[dict[Path, int], dict[Path, str]]:
    """The step that each *.pt of a run in a folder holds, and why others cannot be opened. Reads no
    tensors."""
    steps, failures = {}, {}
    for path in sorted(Path(out_dir).glob("*.pt")):
        try:
            checkpoint = load(path, verify=False)
            if "optimizer" in checkpoint:
                steps[path] = checkpoint["step"]
        except CheckpointError as error:
            failures[path] = str(error)
    return steps, failures


def set_aside(out_dir: str | Path, files: list[Path]) -> Path:
    """Move files into a new folder earlier-N of out_dir."""
    number = 1
    while (folder := Path(out_dir) / f"earlier-{number}").exists():
        number += 1
    folder.mkdir()
    for file in files:
        os.replace(file, folder / file.name)
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
            f"{path} belongs to another run:{''.join(different)}\nGive the flags of that run (with more or"
            " fewer processes --total_batch_tokens keeps the batch), or another --out_dir, or --resume never"
        )


def write_json(path: str | Path, content: dict[str, Any]) -> None:
    """Replace a JSON file atomically."""
    temporary = Path(path).with_name(f".{Path(path).name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    _rename(temporary, Path(path))


def lock(out_dir: str | Path) -> TextIO:
    """Hold out_dir for this process until it ends; two runs in one folder would prune each other's
    checkpoints. Raises CheckpointError when another process holds it. Without effect where the file
    system has no locks."""
    Path(out_dir).mkdir(parents=True, exist_ok=True)
    file = open(Path(out_dir) / ".lock", "w")  # noqa: SIM115 (open as long as it is locked)
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise CheckpointError(
            f"{out_dir}: another run is writing here; wait for it or use another --out_dir"
        ) from None
    except (ImportError, OSError):
        pass
    return file


def _rename(temporary: Path, path: Path) -> None:
    os.replace(temporary, path)
    if hasattr(os, "O_DIRECTORY"):  # the new name itself is on the disk only when its folder is
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]
