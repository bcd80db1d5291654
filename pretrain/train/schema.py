"""What a checkpoint must look like: the one place that checks what others may have written.

    problem_in({"format": 1, "step": -3}, format=1)     # "its step is -3, not a whole number ..."

A checkpoint that passes has the names and kinds of values that the rest of the program relies on.
"""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from pretrain.flags import LARGEST

Check = tuple[Callable[[Any], bool], str]


def _is_whole(value: Any, minimum: int = 0) -> bool:
    return type(value) is int and minimum <= value <= LARGEST


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_names(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(name, str) for name in value)


def _is_settings(value: Any) -> bool:
    """A dict that can be compared with another: what tensors in it are equal to has no answer."""
    return _is_names(value) and all(map(_is_plain, value.values()))


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, [*value, *value.values()]))
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _is_sizes(value: Any) -> bool:
    return _is_names(value) and all(
        _is_number(v) or isinstance(v, bool | str) for v in value.values()
    )


def _is_weights(value: Any) -> bool:
    return _is_names(value) and all(isinstance(weight, Tensor) for weight in value.values())


COUNT: Check = (_is_whole, "a whole number from 0 on")
NUMBER: Check = (_is_number, "a number")
NAMES: Check = (_is_names, "a dict with names")
SETTINGS: Check = (_is_settings, "a dict of plain values with names")
KEYS: dict[str, Check] = {
    "step": COUNT,
    "tokens": COUNT,
    "processes": COUNT,
    "evals_since_best": COUNT,
    "last_eval_step": (lambda value: _is_whole(value, -1), "a whole number from -1 on"),
    "best_step": (lambda value: _is_whole(value, -1), "a whole number from -1 on"),
    "loss": NUMBER,
    "val_loss": NUMBER,
    "best_val_loss": NUMBER,
    "learning_rate": NUMBER,
    "model": (_is_weights, "a dict of tensors with names"),
    "model_config": (_is_sizes, "a dict of sizes"),
    "model_source": SETTINGS,
    "config": SETTINGS,
    "run": SETTINGS,
    "scaler": NAMES,
    "architecture": (lambda value: isinstance(value, str), "a name"),
}
CONTINUED = ("model", "model_config", "optimizer", "scaler", "run")  # without which no run goes on


def problem_in(checkpoint: Any, format: int) -> str | None:
    """What is wrong with the form of something that was read as a checkpoint; None when nothing
    is."""
    if not isinstance(checkpoint, dict) or type(checkpoint.get("step")) is not int:
        return "not a checkpoint of train_gpt2.py (it has no step)"
    found = checkpoint.get("format")
    if type(found) is not int or found != format:  # a tensor's comparison has no answer
        shown = f"{found!r:.40}" if found is None or _is_number(found) else "of something else"
        return f"format {shown}; this version reads {format}"
    for key, (is_right, noun) in KEYS.items():
        if key in checkpoint and not is_right(checkpoint[key]):
            found = f"{checkpoint[key]!r:.40}" if _is_number(checkpoint[key]) else "something else"
            return f"not a checkpoint of train_gpt2.py (its {key} is {found}, not {noun})"
    return None


def problem_in_continued(checkpoint: dict[str, Any]) -> str | None:
    """What keeps a run from going on from a checkpoint in which problem_in finds nothing."""
    if missing := [key for key in CONTINUED if key not in checkpoint]:
        return f"no run can go on from it: it lacks {', '.join(missing)}"
    optimizer = checkpoint["optimizer"]
    if not isinstance(optimizer, dict) or not isinstance(optimizer.get("state", {}), dict):
        return "no run can go on from it: its optimizer is not the state of one"
    best, since = checkpoint.get("best_val_loss", math.inf), checkpoint.get("evals_since_best", 0)
    if math.isnan(best) or since > checkpoint["step"] + 1:
        return f"no run can go on from it: best_val_loss {best}, evals_since_best {since}"
    return None
