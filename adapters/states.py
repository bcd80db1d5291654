"""Saved states of other frameworks: the newest that is whole, and nothing in it executed.

    state = newest([out_dir / "step-4", out_dir / "step-2"], needed=["optimizer.bin"])

Frameworks save with pickle, and some load with it: a pickle runs what its author likes. Here every
file that a framework is going to load is read first as tensors and plain values, with its
checksums; and while `plain_values_only()` lasts torch.load cannot do otherwise, whatever a
framework asks of it.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from pretrain import weights
from pretrain.errors import UserError, first_line, say
from pretrain.train.checkpoint import set_aside

PICKLES = (".pt", ".pth", ".bin", ".pkl", ".ckpt")
# Trainer writes its arguments as objects, and nothing reads them.
NEVER_LOADED = {"training_args.bin"}
RUN = "run.json"  # in a state: what a run that goes on from it must have in common with this one
# What the state of NumPy's generator is made of; these build arrays and run nothing.
_core: Any = getattr(np, "_core", None) or np.core  # its name since NumPy 2, and before
ARRAYS = [np.ndarray, np.dtype, np.dtypes.UInt32DType, _core.multiarray._reconstruct]
FORCE, FORBID = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
T = TypeVar("T")


class StateError(UserError):
    """A saved state that cannot be read or continued; one line."""


@contextlib.contextmanager
def plain_values_only() -> Iterator[None]:
    """torch.load takes tensors and plain values alone, for every caller in this process and in
    those that it starts, even for one that asks for weights_only=False."""
    before = {name: os.environ.pop(name, None) for name in (FORCE, FORBID)}
    os.environ[FORCE] = "1"
    try:
        with torch.serialization.safe_globals(ARRAYS):
            yield
    finally:
        del os.environ[FORCE]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def newest(states: Sequence[Path], needed: Sequence[str] = ()) -> Path | None:
    """The first of these states, given newest first, that is whole; None when there are none.

    Damaged ones are passed over with a warning. needed: see check. Raises StateError when all are
    damaged, as to begin anew in silence would cost the run, and OSError for one that cannot be
    read, which says nothing about what is in it.
    """
    failures = []
    for state in states:
        try:
            check(state, needed)
        except StateError as error:
            failures.append(str(error))
            continue
        for failure in failures:
            say("adapters", f"{failure}; passed over", "warning")
        return state
    if failures:
        more = " (nor can the older ones be read)" if len(failures) > 1 else ""
        raise StateError(
            f"{failures[0]}{more}; move it away to begin anew, or take another --out_dir"
        )
    return None


def newest_in(out_dir: Path, states: Sequence[Path], needed: Sequence[str] = ()) -> Path | None:
    """newest(), the same on all ranks; the first rank moves those passed over to earlier-N, where a
    save of the same step does not meet them."""

    def choose() -> Path | None:
        found = newest(states, needed)
        passed = states[: states.index(found)] if found else []
        if passed:
            folder = set_aside(out_dir, list(passed))
            say("adapters", f"moved to {folder}: {', '.join(p.name for p in passed)}", "warning")
        return found

    return decided_once(choose)


def decided_once(decide: Callable[[], T]) -> T:
    """What the first rank decides, on every rank."""
    if not (dist.is_available() and dist.is_initialized()):
        return decide()
    box: list[Any] = [decide() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box)
    return box[0]


def check(state: Path, needed: Sequence[str] = ()) -> None:
    """Raise StateError for a folder or file that was not saved to its end, is damaged, or holds
    more than tensors and plain values.

    needed: patterns of names, at least one file for each. Raises OSError for what cannot be read.
    """
    for pattern in needed:
        if not any(state.glob(pattern)):
            raise StateError(f"{state}: there is no {pattern} in it, so its save was cut short")
    for file in sorted(state.iterdir()) if state.is_dir() else [state]:
        if file.is_file() and file.name not in NEVER_LOADED:
            with open(file, "rb"):
                pass  # what the system refuses is no damage
            _check_file(file)


def _check_file(file: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        if file.suffix in PICKLES:
            weights.read(file, allowed=ARRAYS)
        elif file.suffix == ".safetensors":
            with safe_open(file, framework="pt"):
                pass
        elif file.suffix == ".json":
            json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, SafetensorError, UserError) as error:
        line = first_line(error)
        place = "" if str(file) in line else f"{file}: "
        damage = "" if isinstance(error, UserError) or "damaged" in line else "damaged: "
        raise StateError(f"{place}{damage}{line}") from None


def refuse_other_run(state: Path, saved: Any, wanted: Mapping[str, Any]) -> None:
    """Raise StateError with every key in which the run of a state differs from the one asked for.
    States of earlier versions do not say what run they are of, and pass."""
    if not isinstance(saved, dict):
        return
    different = [
        f"{key} {saved[key]} there, {wanted[key]} now"
        for key in wanted
        if key in saved and saved[key] != wanted[key]
    ]
    if different:
        raise StateError(
            f"{state} is of another run: {'; '.join(different)}; give the flags of that run, or"
            " another --out_dir"
        )


def saved_run(state: Path) -> Any:
    """What the folder of a state says about its run; None for one of an earlier version."""
    file = state / RUN
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
